"""QCG-PilotJob's file interface: the requests of a file are handled one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TextIO

from pilotq.broker.qcg.service.requests import Reply, Requests

ReplyWriter = Callable[[Any, Reply], None]


class PlayResult(NamedTuple):
    """``refused``: a sentence for each submit that was refused; ``omitted``: name of a job -> why."""

    refused: list[str]
    omitted: Mapping[str, str]


def reply_writer(file: TextIO | None) -> ReplyWriter:
    """A function that writes the replies to a file, one a line; it does nothing where there is none."""

    def write(_request: Any, reply: Reply) -> None:
        if file is not None:
            print(json.dumps(reply), file=file, flush=True)

    return write


def play(requests: Requests, bodies: Iterable[Any], write_reply: ReplyWriter | None = None) -> PlayResult:
    """Handle all requests of a file in their order, then omit jobs that wait for unknown ones.

    ``write_reply`` gets each request with its reply.
    """
    refused: list[str] = []
    for number, body in enumerate(bodies):
        reply = requests.handle(body)
        if write_reply is not None:
            write_reply(body, reply)
        if reply["code"] and isinstance(body, dict) and body.get("request") == "submit":
            refused.append(f"request {number + 1}: {reply['message']}")
    return PlayResult(refused, requests.omit_unmet())
