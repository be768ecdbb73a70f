"""QCG-PilotJob's file interface: a JSON list of requests, handled one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TextIO

from pilotq.broker.qcg.service.requests import Reply, Requests

Tell = Callable[[Any, Reply], None]


class Played(NamedTuple):
    """``refused``: a sentence for each submit that was refused; ``omitted``: name of a job -> why."""

    refused: list[str]
    omitted: Mapping[str, str]


def teller(file: TextIO | None) -> Tell:
    """What writes the replies to a file, one a line; nothing where there is none."""

    def tell(_request: Any, reply: Reply) -> None:
        if file is not None:
            print(json.dumps(reply), file=file, flush=True)

    return tell


def play(requests: Requests, bodies: Iterable[Any], tell: Tell | None = None) -> Played:
    """Handle all requests of a file in their order, and settle: what they have brought runs, or waits for its turn.

    ``tell`` gets each request with its reply.
    """
    refused: list[str] = []
    for number, body in enumerate(bodies):
        reply = requests.handle(body)
        if tell is not None:
            tell(body, reply)
        if reply["code"] and isinstance(body, dict) and body.get("request") == "submit":
            refused.append(f"request {number + 1}: {reply['message']}")
    return Played(refused, requests.settle())
