"""A connection to the Redis server, on hiredis's parser.

Why not redis-py here: importing it costs 0.2 s, which every `pilotq enqueue` would pay, and it has no public file
descriptor to wait on beside pipes and timers (docs/design/0003-connection.md has the measurement). `Broker.redis` is a
redis-py client for everything else.

A connection is used in one of two ways. `call` sends one command and waits for its reply. `post` sends and returns; the
reply is read with `replies` when `fileno()` is readable. The two must not be mixed while replies are outstanding.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hiredis
import msgspec

from pilotq.broker.errors import InvalidInput, PilotFailed, ServerRefused, ServerUnavailable
from pilotq.broker.os_strings import printable

Argument = bytes | str | int | float | memoryview
# Errors of the server that mean "not now": nothing was changed and the same call may succeed later.
PASSING = ("LOADING", "BUSY", "MISCONF", "OOM", "READONLY", "MASTERDOWN", "TRYAGAIN")


class Address(msgspec.Struct, omit_defaults=True):
    """Where a server is and who we are there. ``path`` (unix socket) or ``host`` and ``port``."""

    path: str = ""
    host: str = ""
    port: int = 0
    user: str = ""
    password: str = ""
    db: int = 0

    def url(self, *, secret: bool = True) -> str:
        """The URL redis-py and RQ take; without ``secret`` the password is left out."""
        from urllib.parse import quote

        who = f"{quote(self.user)}:{quote(self.password)}@" if self.password and secret else ""
        if self.path:
            return f"unix://{who}{quote(self.path)}?db={self.db}"
        return f"redis://{who}{_bracketed(quote(self.host, safe=':'))}:{self.port}/{self.db}"

    def __str__(self) -> str:
        return self.path or f"{_bracketed(self.host)}:{self.port}"


class ScriptMissing(PilotFailed):
    """The server does not have the library of the script that was called: load it."""


class ReplyError(PilotFailed):
    """The server answered with an error that is no passing one; ``code`` is its first word."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.partition(" ")[0]


class Connection:
    """A connection that is opened on first use and after `close`. Not for several threads.

    A process that was forked opens one of its own: over a shared one each would get replies of the other.
    """

    def __init__(self, address: Address, *, timeout: float = 10.0) -> None:
        self.address = address
        self.timeout = timeout
        self._socket: socket.socket | None = None
        self._pid = 0  # of the process that has opened it
        self._reader = hiredis.Reader()
        self.outstanding = 0  # commands sent by `post` whose replies were not read yet

    def connect(self) -> None:
        """Open and authenticate; raises ServerUnavailable, or ServerRefused when the password is wrong."""
        if self._socket is not None:
            if self._pid == os.getpid():
                return
            self.close()  # this process's copy: the connection itself stays with the process that has opened it
        where = self.address
        try:
            if where.path:
                sock = _connect_unix(where.path, self.timeout)
            else:
                sock = socket.create_connection((where.host, where.port), timeout=self.timeout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as error:
            raise ServerUnavailable(f"the server at {where} does not answer: {error}") from None
        sock.setblocking(False)
        self._socket = sock
        self._pid = os.getpid()
        self._reader = hiredis.Reader()
        self.outstanding = 0
        try:
            if where.password:
                self.call("AUTH", *([where.user] if where.user else []), where.password)
            if where.db:
                self.call("SELECT", where.db)
        except ReplyError as error:
            self.close()
            raise ServerRefused(f"the server at {where} refuses us: {error}") from None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self.outstanding = 0

    @property
    def connected(self) -> bool:
        return self._socket is not None

    def fileno(self) -> int:
        if self._socket is None:
            raise ServerUnavailable(f"not connected to {self.address}")
        return self._socket.fileno()

    def call(self, *command: Argument, timeout: float | None = None) -> Any:
        """Send one command and return its reply; ``timeout`` (s) replaces its own for blocking commands."""
        self.connect()
        self._send(_packed(command))
        return _checked(self._read(self.timeout if timeout is None else timeout))

    def pipeline(
        self, commands: Sequence[tuple[Argument, ...]], meanwhile: Callable[[], object] | None = None
    ) -> list[Any]:
        """Send all, then return all replies; the first error is raised after every reply was read.

        While the server works ``meanwhile`` is called; what it raises is raised after every reply was read, too.
        """
        if meanwhile is None:
            return self.stream([commands])
        self.connect()
        self._send(b"".join([_packed(c) for c in commands]))
        try:
            meanwhile()
        finally:
            replies = [self._read(self.timeout) for _ in commands]
        return [_checked(r) for r in replies]

    def read_hashes(self, keys: Sequence[str], *fields: str) -> list[list[bytes | None]]:
        """These fields of many hashes; a key of another type reads as one that is missing."""
        try:
            return self.pipeline([("HMGET", key, *fields) for key in keys])
        except ReplyError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
        kinds = self.pipeline([("TYPE", key) for key in keys])
        hashes = [key for key, kind in zip(keys, kinds, strict=True) if kind == b"hash"]
        rows = dict(zip(hashes, self.pipeline([("HMGET", key, *fields) for key in hashes]), strict=True))
        return [rows.get(key, [None] * len(fields)) for key in keys]

    def stream(self, batches: Iterable[Sequence[tuple[Argument, ...]]]) -> list[Any]:
        """As `pipeline`, in batches: while the server works on one, the next is made. Only the last one's replies are
        returned."""
        self.connect()
        replies: list[Any] = []
        sent = 0
        for batch in batches:
            self._send(b"".join([_packed(c) for c in batch]))
            replies = [self._read(self.timeout) for _ in range(sent)]
            sent = len(batch)
            if any(isinstance(reply, hiredis.HiredisError) for reply in replies):
                # What is under way is read first: the connection must stay in step.
                replies += [self._read(self.timeout) for _ in range(sent)]
                sent = 0
                break
        replies += [self._read(self.timeout) for _ in range(sent)]
        return [_checked(r) for r in replies][-sent:]

    def post(self, *command: Argument) -> None:
        """Send one command; its reply comes with `replies`, in order."""
        self.connect()
        self._send(_packed(command))
        self.outstanding += 1

    def post_all(self, commands: Sequence[tuple[Argument, ...]]) -> None:
        """As `post`, for several commands in one piece."""
        self.connect()
        self._send(b"".join([_packed(c) for c in commands]))
        self.outstanding += len(commands)

    def replies(self) -> list[Any]:
        """Replies that have arrived, without waiting. Errors are returned as exceptions, not raised."""
        if self._socket is None:
            raise ServerUnavailable(f"not connected to {self.address}")
        try:
            data = self._socket.recv(1 << 18)
            if not data:
                raise ConnectionResetError("connection closed")
            self._reader.feed(data)
        except BlockingIOError:
            pass
        except OSError as error:
            self.close()
            raise ServerUnavailable(f"the server at {self.address} is gone: {error}") from None
        found: list[Any] = []
        while (reply := self._next()) is not False:
            self.outstanding -= 1
            found.append(_as_error(reply) if isinstance(reply, hiredis.HiredisError) else reply)
        return found

    def _send(self, data: bytes) -> None:
        assert self._socket is not None
        deadline = time.monotonic() + self.timeout
        rest = memoryview(data)
        try:
            while rest:
                try:
                    rest = rest[self._socket.send(rest) :]
                except BlockingIOError:
                    self._await(select.POLLOUT, deadline)
        except OSError as error:
            self.close()
            raise ServerUnavailable(f"the server at {self.address} is gone: {error}") from None

    def _read(self, timeout: float) -> Any:
        assert self._socket is not None
        deadline = time.monotonic() + timeout
        while (reply := self._next()) is False:
            try:
                self._await(select.POLLIN, deadline)
                data = self._socket.recv(1 << 18)
                if not data:
                    raise ConnectionResetError("connection closed")
            except OSError as error:
                # A reply may still come: the connection would be out of step, so it ends here.
                self.close()
                raise ServerUnavailable(f"the server at {self.address} does not answer: {error}") from None
            self._reader.feed(data)
        return reply

    def _next(self) -> Any:
        """The next reply that has arrived whole, or False."""
        try:
            return self._reader.gets()
        except hiredis.ProtocolError as error:
            self.close()
            raise ServerUnavailable(f"what answers at {self.address} is no server of Redis: {error}") from None

    def _await(self, event: int, deadline: float) -> None:
        """Wait until the socket is ready; raises TimeoutError (an OSError)."""
        poll = select.poll()
        poll.register(self.fileno(), event)
        if not poll.poll(max(deadline - time.monotonic(), 0.001) * 1000):
            raise TimeoutError(f"no answer in {self.timeout:g} s")


def _packed(command: tuple[Argument, ...]) -> bytes:
    try:
        packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # its stub knows tuples of one only
    except UnicodeEncodeError:  # an id that somebody has typed: there is none with such bytes
        packed = hiredis.pack_command(tuple(printable(a) if isinstance(a, str) else a for a in command))  # type: ignore[arg-type]
    return packed


def _connect_unix(path: str, timeout: float) -> socket.socket:
    """Connect to a unix socket, also where the path is longer than the 107 bytes a socket address holds."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    directory = -1
    try:
        if len(os.fsencode(path)) > 107:
            directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            path = f"/proc/self/fd/{directory}/{os.path.basename(path)}"
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    finally:
        if directory >= 0:
            os.close(directory)
    return sock


def _as_error(reply: Exception) -> Exception:
    text = str(reply)
    word = text.partition(" ")[0]
    if text == "ERR Function not found":
        return ScriptMissing(text)
    if word in PASSING:
        return ServerRefused(f"the server cannot take this now: {text}")
    return ReplyError(text)


def _checked(reply: Any) -> Any:
    if isinstance(reply, hiredis.HiredisError):
        raise _as_error(reply)
    return reply


def _bracketed(host: str) -> str:
    """A host before a colon and a port; an address of IPv6 has colons of its own."""
    return f"[{host}]" if ":" in host else host


def parse_url(url: str) -> Address:
    """``redis://[user:password@]host:port/db`` or ``unix://[user:password@]/path?db=0``."""
    from urllib.parse import parse_qs, unquote, urlsplit

    parts = urlsplit(url)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.scheme == "unix" and parts.path:
        db = int(parse_qs(parts.query).get("db", ["0"])[0])
        return Address(path=unquote(parts.path), user=user, password=password, db=db)
    if parts.scheme == "redis" and parts.hostname:
        return Address(
            host=unquote(parts.hostname),
            port=parts.port or 6379,
            user=user,
            password=password,
            db=int(parts.path.strip("/") or 0),
        )
    raise InvalidInput(f"{parts.scheme}://... is no server URL: use redis://host:port or unix:///path")
