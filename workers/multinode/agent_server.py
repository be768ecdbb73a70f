"""Serves the launch agents of this node's tasks, which ask for processes on other nodes; see agent.py."""

from __future__ import annotations

import os
import secrets
import socket

import msgspec

from pilotq.broker.log import log
from pilotq.broker.os_strings import UNREADABLE, from_json, to_json
from pilotq.workers.multinode.agent import CREDENTIALS, LENGTH

REQUEST_MAX = 8 << 20  # an environment is at most a quarter of the stack's limit
BACKLOG = 1024


class AgentRequest(msgspec.Struct):
    """The command that an agent is to have started, and where."""

    id: str
    execution: int
    node: str
    command: str  # for a shell
    cwd: str
    env: dict[str, str]


class AgentReply(msgspec.Struct):
    """How the command has ended, and the end of what it wrote (bytes that are not UTF-8 as surrogates)."""

    status: int
    stdout: str = ""
    stderr: str = ""


class AgentServer:
    """Serves launch agents over an abstract socket, from the first use of its `name`. It never waits."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._name = ""
        self._connections: dict[int, tuple[socket.socket, bytearray]] = {}

    def name(self) -> str:
        """The name of its socket, which agents find in PILOTQ_AGENT."""
        if self._listener is None:
            self._name = f"pilotq-{os.getpid()}-{secrets.token_hex(8)}"
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._listener.bind("\0" + self._name)
            self._listener.listen(BACKLOG)
        return self._name

    def filenos(self) -> list[int]:
        """Descriptors to wait on for reading."""
        return ([self._listener.fileno()] if self._listener is not None else []) + list(self._connections)

    def serve(self, ready: set[int]) -> tuple[list[tuple[int, AgentRequest]], list[int]]:
        """The requests that have come, and the connections that were closed, both by number of the connection."""
        requests: list[tuple[int, AgentRequest]] = []
        closed: list[int] = []
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept(self._listener)
        for number in ready & self._connections.keys():
            connection, data = self._connections[number]
            try:
                chunk = connection.recv(1 << 20)
            except BlockingIOError:
                continue
            except OSError:
                chunk = b""
            data += chunk
            if not chunk or len(data) > REQUEST_MAX:
                self._close(number)
                closed.append(number)
            elif (request := self._decode(number, data)) is not None:
                requests.append((number, request))
        return requests, closed

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
            log(f"a launch agent cannot be served: {error}", level="warning")

    def _decode(self, number: int, data: bytearray) -> AgentRequest | None:
        if len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack_from(data)[0]:
            return None
        body = bytes(data[LENGTH.size :])
        data.clear()
        try:
            return from_json(body, AgentRequest)
        except (*UNREADABLE, ValueError) as error:
            self.reply(number, AgentReply(255, "", f"pilotq-agent: the worker cannot read its request: {error}\n"))
            return None

    def reply(self, number: int, reply: AgentReply) -> None:
        """Send the reply and close the connection; nothing if it was closed meanwhile."""
        found = self._connections.get(number)
        if found is None:
            return
        body = to_json(reply)
        try:
            found[0].sendall(LENGTH.pack(len(body)) + body)
        except OSError as error:
            log(f"a launch agent did not get its reply: {error}", level="warning")
        self._close(number)

    def _close(self, number: int) -> None:
        self._connections.pop(number)[0].close()

    def close(self) -> None:
        for number in list(self._connections):
            self._close(number)
        if self._listener is not None:
            self._listener.close()
