"""Where launch agents of tasks on this node ask their worker for processes on other nodes; see agent.py."""

from __future__ import annotations

import os
import secrets
import socket

import msgspec

from pilotq.broker.processes import log
from pilotq.workers.multinode.agent import CREDENTIALS, SIZE

REQUEST_MAX = 8 << 20  # an environment is at most a quarter of the stack's limit
WAITING_MAX = 1024


class Ask(msgspec.Struct):
    """What an agent wants."""

    id: str
    execution: int
    node: str
    command: str  # for a shell
    cwd: str
    env: dict[str, str]


class Answer(msgspec.Struct):
    status: int
    stdout: str = ""
    stderr: str = ""


class Desk:
    """Listens from the first time that somebody wants to know its ``name``. Nothing here waits."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._name = ""
        self._connections: dict[int, tuple[socket.socket, bytearray]] = {}

    def name(self) -> str:
        """What agents are to find in PILOTQ_AGENT."""
        if self._listener is None:
            self._name = f"pilotq-{os.getpid()}-{secrets.token_hex(8)}"
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._listener.bind("\0" + self._name)
            self._listener.listen(WAITING_MAX)
        return self._name

    def filenos(self) -> list[int]:
        """To wait on for reading."""
        return ([self._listener.fileno()] if self._listener is not None else []) + list(self._connections)

    def serve(self, ready: set[int]) -> tuple[list[tuple[int, Ask]], list[int]]:
        """What was asked, and who has hung up, both by the number of the connection."""
        asks: list[tuple[int, Ask]] = []
        gone: list[int] = []
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept(self._listener)
        for number in ready & self._connections.keys():
            connection, data = self._connections[number]
            try:
                part = connection.recv(1 << 20)
            except BlockingIOError:
                continue
            except OSError:
                part = b""
            data += part
            if not part or len(data) > REQUEST_MAX:
                self._close(number)
                gone.append(number)
            elif (ask := self._decode(number, data)) is not None:
                asks.append((number, ask))
        return asks, gone

    def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                connection, _ = listener.accept()
                peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
                if CREDENTIALS.unpack(peer)[1] != os.getuid():
                    connection.close()  # any user may connect to an abstract socket: only ours is served
                    continue
                connection.setblocking(False)
                self._connections[connection.fileno()] = (connection, bytearray())
        except BlockingIOError:
            pass
        except OSError as error:
            log(f"a launch agent cannot be served: {error}")

    def _decode(self, number: int, data: bytearray) -> Ask | None:
        if len(data) < SIZE.size or len(data) < SIZE.size + SIZE.unpack_from(data)[0]:
            return None
        body = bytes(data[SIZE.size :])
        data.clear()
        try:
            return msgspec.json.decode(body, type=Ask)
        except msgspec.MsgspecError as error:
            self.answer(number, Answer(255, "", f"pilotq-agent: the worker does not understand it: {error}\n"))
            return None

    def answer(self, number: int, answer: Answer) -> None:
        """Say how it ended, and hang up. Who has gone is not told."""
        held = self._connections.get(number)
        if held is None:
            return
        body = msgspec.json.encode(answer)
        try:
            held[0].sendall(SIZE.pack(len(body)) + body)
        except OSError as error:
            log(f"a launch agent did not hear its answer: {error}")
        self._close(number)

    def _close(self, number: int) -> None:
        self._connections.pop(number)[0].close()

    def close(self) -> None:
        for number in list(self._connections):
            self._close(number)
        if self._listener is not None:
            self._listener.close()
