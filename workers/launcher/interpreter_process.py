"""Starts one interpreter for its launcher, and keeps its socket and the calls it was given."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from pilotq.workers.launcher import message_socket
from pilotq.workers.launcher.capture import PoolFile
from pilotq.workers.launcher.chain import Chain, Running
from pilotq.workers.launcher.spawn import LaunchContext, Refusal, Spawner
from pilotq.workers.process_tree import CALL_MARK
from pilotq.workers.protocol import Call, Interrupt, Launch, Ready, Returned

_decode = msgspec.msgpack.Decoder(Returned | Ready).decode
_decode_call = msgspec.msgpack.Decoder(Call | Interrupt).decode


class LauncherOptions(NamedTuple):
    """What interpreters take over from their launcher."""

    directory: str
    node: str
    calls: int  # after so many an interpreter is replaced


class InterpreterProcess:
    """One interpreter and its calls.

    ``number`` (negative) is the key of its processes; raises Refusal when it cannot be started.
    """

    def __init__(
        self, number: int, call: Call, context: LaunchContext, spawner: Spawner, options: LauncherOptions
    ) -> None:
        self.number = number
        self.context_key = (call.base, call.slot)
        self.sock, self.peer = message_socket.pair()
        self.sock.setblocking(False)
        self.peer.set_inheritable(False)
        argv = [
            sys.executable, "-m", "pilotq.workers.launcher.interpreter",
            "--dir", options.directory, "--node", options.node,
        ]  # fmt: skip
        if call.rq_fields:
            argv += ["--rq", "now"]
        # Not started in the user's directory: there a folder called pilotq would be imported instead of us.
        launch = Launch(
            number, "interpreter", 0, call.base, call.slot, [os.fsencode(word) for word in argv],
            {CALL_MARK.encode(): context.path}, os.fsencode(options.directory),
        )  # fmt: skip
        try:
            spawned = spawner.spawn(launch, context, self.peer.fileno())
        except Refusal:
            self.close()
            raise
        assert spawned.stdout is not None and spawned.stderr is not None
        self.pid = spawned.pid
        self.env = spawned.env
        self.files: tuple[PoolFile, PoolFile] = (spawned.stdout, spawned.stderr)
        self.began = time.monotonic()
        self.ready = False
        self.calls: deque[tuple[Running, Call, LaunchContext | None]] = deque()  # that it has; the first one runs
        self.calls_done = 0
        self.cpu = 0.0  # seconds, of calls that have returned
        self.draining = False  # it gets no more calls: its call is interrupted, or has left processes
        self.last_return: tuple[Running, Returned] | None = None  # of a call that has left processes: it is ending
        self.job_stopped = False  # it was killed because somebody has stopped its job
        self.idle_since = 0.0
        self.chain: Chain | None = None  # the last one it had calls of

    def received(self) -> Iterator[Returned | Ready]:
        """The messages that have arrived from it."""
        while True:
            try:
                data = message_socket.receive(self.sock)
            except (BlockingIOError, ConnectionResetError):
                return
            if not data:
                return
            try:
                yield _decode(data)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                pass  # no message of ours: a function has written to the socket

    def take_unread(self) -> set[int]:
        """Keys of the calls that it has not begun: they are read from its own end of the socket, before it can."""
        keys = set()
        while True:
            try:
                data = message_socket.receive(self.peer, socket.MSG_DONTWAIT)
            except OSError:  # nothing is left to read, or the socket is closed
                break
            if not data:
                break
            message = _decode_call(data)
            if isinstance(message, Call):
                keys.add(message.key)
        return keys

    def close(self) -> None:
        self.sock.close()
        self.peer.close()
