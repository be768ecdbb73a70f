"""The one module that knows RQ's Python side.

A command task is a valid RQ job whose function is `run` below: RQ's tools can fetch and show it. A stock `rq worker`
that took one would fail it with a sentence instead of running half of it.
"""

from __future__ import annotations

from typing import NoReturn

# pickle of ("pilotq.broker.rq_jobs.run", None, (), {}): the `data` of every command task. RQ reads it uncompressed.
COMMAND_DATA = b"\x80\x02(X\x19\x00\x00\x00pilotq.broker.rq_jobs.runN)}t."


def run() -> NoReturn:
    raise RuntimeError("this is a command task of a pilotq pilot: only pilotq's workers can run it")
