"""QCG-PilotJob's file interface: a JSON list of requests, handled one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.file_errors import malformed_json, utf8
from pilotq.broker.qcg.requests import Reply, Requests

Tell = Callable[[Any, Reply], None]


class Played(NamedTuple):
    """``refused``: a sentence for each submit that was refused; ``omitted``: name of a job -> why."""

    refused: list[str]
    omitted: Mapping[str, str]


def read_requests(path: str) -> list[Any]:
    """The requests of a file, not yet looked at; raises InvalidInput, and OSError as open does."""
    with open(path, "rb") as file:
        data = file.read()
    utf8(data, path)
    try:
        requests = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"))
    except msgspec.DecodeError:
        raise malformed_json(data, path) from None
    except RecursionError:
        raise InvalidInput(f"{path}: lists and tables are nested too deeply") from None
    if not isinstance(requests, list):
        raise InvalidInput(f"{path}: this is no list of requests: it must begin with [")
    return requests


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
