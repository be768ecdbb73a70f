"""Reads the ledgers: what the tasks of the selfcheck have written about themselves."""

from __future__ import annotations

import ast
import os

import msgspec


class Start(msgspec.Struct, kw_only=True):
    """The line an execution wrote when it began. ``begun`` is by the monotonic clock ``clock``, ``at`` unix time."""

    execution: int
    pid: int
    begun: float
    at: float
    descriptors: dict[int, str]
    mask: list[int]
    cwd: str
    umask: int
    limits: dict[int, tuple[int, int]]  # number -> soft, hard
    signals: tuple[int, int]  # bits: blocked, ignored
    by_shell: bool  # ``signals`` were seen by a program that ignores none by itself
    leads: bool  # its session and its process group are its own
    stdin: str
    env: dict[str, str]
    clock: str


class End(msgspec.Struct, kw_only=True):
    """The line it wrote when it was about to end."""

    execution: int
    pid: int
    ended: float
    at: float


class Ledger(msgspec.Struct):
    """All lines of one task, in the order of writing."""

    starts: list[Start] = []
    ends: list[End] = []


def read(directory: str) -> dict[str, Ledger]:
    """The ledgers of a directory by name. An incomplete line raises ValueError: each is written in one step."""
    found = {}
    for name in os.listdir(directory):
        ledger = found[name] = Ledger()
        with open(os.path.join(directory, name), encoding="ascii") as file:
            for line in file:
                fields = ast.literal_eval(line)
                if "begun" in fields:
                    ledger.starts.append(msgspec.convert(fields, Start))
                else:
                    ledger.ends.append(msgspec.convert(fields, End))
    return found
