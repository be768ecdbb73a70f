"""The start of one interpreter, and what its launcher keeps of it."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import NamedTuple

from pilotq.workers.launcher import message_socket
from pilotq.workers.launcher.capture import PoolFile
from pilotq.workers.launcher.chain import Line, Running
from pilotq.workers.launcher.spawn import Refusal, Spawner, Surroundings
from pilotq.workers.process_tree import CALL_MARK
from pilotq.workers.protocol import Call, Launch, Returned


class Options(NamedTuple):
    directory: str
    node: str
    calls: int  # after so many an interpreter is replaced


class Interpreter:
    """One interpreter process; ``number`` (negative) is the key of its family."""

    def __init__(self, number: int, call: Call, around: Surroundings, spawner: Spawner, options: Options) -> None:
        self.number = number
        self.kind = (call.base, call.place)
        self.sock, self.theirs = message_socket.pair()
        self.sock.setblocking(False)
        self.theirs.set_inheritable(False)
        argv = [
            sys.executable, "-m", "pilotq.workers.launcher.interpreter",
            "--dir", options.directory, "--node", options.node,
        ]  # fmt: skip
        if call.fields:
            argv += ["--rq", "now"]
        # Not started in the user's directory: there a folder called pilotq would be imported instead of us.
        launch = Launch(
            number, "interpreter", 0, call.base, call.place, [os.fsencode(word) for word in argv],
            {CALL_MARK: around.path}, options.directory,
        )  # fmt: skip
        try:
            spawned = spawner.spawn(launch, around, self.theirs.fileno())
        except Refusal:
            self.close()
            raise
        assert spawned.stdout is not None and spawned.stderr is not None
        self.pid = spawned.pid
        self.env = spawned.env
        self.files: tuple[PoolFile, PoolFile] = (spawned.stdout, spawned.stderr)
        self.began = time.monotonic()
        self.ready = False
        self.calls: deque[tuple[Running, Call, Surroundings | None]] = deque()  # that it has; the first one runs
        self.done = 0
        self.cpu = 0.0  # seconds, of calls that have returned
        self.alone = False  # it is to get no more than it has: its call is interrupted, or it leaves something
        self.last: tuple[Running, Returned] | None = None  # it has returned this, left something, and is ending
        self.stopped = False  # it was killed because somebody has stopped its job
        self.idle_since = 0.0
        self.line: Line | None = None  # the last one it had calls of

    def close(self) -> None:
        self.sock.close()
        self.theirs.close()
