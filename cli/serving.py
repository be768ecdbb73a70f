"""What commands share that serve something of a pilot over HTTP: password, socket, what they print, and their end."""

from __future__ import annotations

import getpass
import io
import os
import socket
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any, TypeVar

import click

from pilotq.broker.errors import InvalidInput, NoPilot
from pilotq.broker.pilot.directory import ConnectionInfo, Pilot, write_private
from pilotq.cli.options import read_text

F = TypeVar("F", bound=Callable[..., Any])
USER = "pilotq"  # the name to log in with
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLL_S = 1.0  # how often to check whether the pilot still runs
PIECE_S = 10.0  # within which a next piece of a request is to come, and a piece of an answer is to be taken
REQUEST_S = 30.0  # within which a request is to be there as a whole


def port_option(usual: int) -> Callable[[F], F]:
    """``--port``, by default ``usual``, or a free one."""
    return click.option("--port", type=click.IntRange(1, 65535), metavar="N", help=f"[default: {usual}, or a free one]")


bind_option = click.option(
    "--bind", default=LOOPBACK[0], show_default=True, metavar="ADDRESS", help="The address to listen on."
)
password_option = click.option(
    "--password-file",
    metavar="FILE",
    help="Take the password from FILE.  [default: dashboard-password in the pilot's directory, made if missing]",
)


def password_of(pilot: Pilot, path: str | None) -> tuple[str, str]:
    """The password, and where it is kept. A new one is kept for the next time, and shown once, on a terminal only: what
    is no terminal may be a log that others read. Raises InvalidInput for a file that holds none."""
    kept = path or pilot.path("dashboard-password")
    if path is None and not os.path.exists(kept):
        password = os.urandom(12).hex()
        write_private(kept, f"{password}\n".encode())
        shown = sys.stderr.isatty()
        return password, f"the password {password}, kept in {kept}" if shown else f"the password in {kept}"
    password = read_text(kept).strip()
    if not password:
        raise InvalidInput(f"{kept} is empty: write a password into it, or remove it")
    if not password.isprintable():  # nobody could type it, and a browser could not send it
        raise InvalidInput(f"{kept}: the password is to be one line of printable characters, in UTF-8")
    return password, f"the password in {kept}"


def listen(what: str, bind: str, port: int | None, usual: int) -> socket.socket:
    """A socket that listens on ``port``, else on the ``usual`` one or a free one; raises InvalidInput."""
    for number in (usual, 0) if port is None else (port,):
        try:
            return socket.create_server((bind, number), family=socket.AF_INET6 if ":" in bind else socket.AF_INET)
        except OSError as error:
            refused = error
    raise InvalidInput(
        f"{what} cannot listen on {bind}{f':{port}' if port else ''}: {os.strerror(refused.errno or 0)}; name "
        "another with --port or --bind"
    )


def announce(bind: str, port: int, path: str, where: str) -> None:
    """Print the URL, and to stderr how to log in and how to open it from elsewhere; ``where`` the password is."""
    try:
        who = f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container may run as a user without a name
        who = socket.gethostname()
    host = f"[{bind}]" if ":" in bind else bind
    click.echo(f"http://{host}:{port}{path}")
    lines = [f"pilotq: log in as {USER}, with {where}"]
    if bind in LOOPBACK:
        lines.append(f"pilotq: to open it on your own machine, run there first: ssh -N -L {port}:{host}:{port} {who}")
    else:
        lines.append(f"pilotq: other machines reach {bind}, and the password travels unencrypted")
    click.echo("\n".join([*lines, "pilotq: Ctrl-C ends it"]), err=True)


class BoundedHandler(BaseHTTPRequestHandler):
    """Handles one request of a connection, which has to be sent within REQUEST_S, and each piece of it within PIECE_S:
    each connection has a thread."""

    timeout = PIECE_S

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Sent(self.connection))


class _Sent(io.RawIOBase):
    """What a client sends; raises TimeoutError when it has taken too long."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + REQUEST_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request was not sent in time")
        self._connection.settimeout(min(left, PIECE_S))
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(PIECE_S)  # answers have it, too


class PilotEndedError(Exception):
    """The pilot that is served has ended."""


class PilotWatch:
    """Ends the server when the pilot that it shows has ended; called between requests."""

    def __init__(self, pilot: Pilot, connection: ConnectionInfo) -> None:
        self.pilot = pilot
        self.connection = connection
        self.next = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + POLL_S
        try:
            found = self.pilot.connection()
        except NoPilot:
            raise PilotEndedError("the pilot has ended") from None
        if found != self.connection:
            raise PilotEndedError("the pilot was started again")
