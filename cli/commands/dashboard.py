"""`pilotq dashboard`: serves the web page of a pilot (cli/dashboard), behind a password, as long as the pilot runs.

Pages are made in this process: the server's URL, with its password, is in no command line and in no environment.
Whoever may open them may cancel tasks and end the pilot.
"""

from __future__ import annotations

import getpass
import os
import signal
import socket
import time
from importlib.util import find_spec
from typing import Any

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput, NoPilot
from pilotq.broker.pilot.directory import ConnectionInfo, Pilot, write_private
from pilotq.cli.dashboard import USER
from pilotq.cli.options import dir_option, read_text

PORT = 9181  # rq-dashboard's own
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLL_S = 1.0  # how often to check whether the pilot still runs


@click.command("dashboard")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help=f"[default: {PORT}, or a free one]")
@click.option("--bind", default=LOOPBACK[0], show_default=True, metavar="ADDRESS", help="The address to listen on.")
@click.option("--password-file", metavar="FILE",
              help="Its file.  [default: dashboard-password in the pilot's directory, made if missing]")  # fmt: skip
@dir_option
def dashboard_command(port: int | None, bind: str, password_file: str | None, directory: str | None) -> None:
    """Show the pilot in a browser, live, until Ctrl-C or the pilot's end; RQ's pages are beside it.

    It prints the URL of the page, and an ssh command to open it from elsewhere.

    \b
    Example: pilotq dashboard --port 8000
    """
    if find_spec("flask") is None:
        raise InvalidInput("the dashboard needs flask, not installed here: `pip install 'pilotq[dashboard]'`")
    with Broker.connect(directory) as broker:
        assert broker.pilot is not None, "connect always finds a directory"
        pilot, url = broker.pilot, broker.url
        connection = pilot.connection()
    password, where = _password(pilot, password_file)
    from pilotq.cli.dashboard.app import make_app

    app = make_app(pilot, url, password)
    server = _server(app, bind, port)
    server.service_actions = _PilotWatch(pilot, connection)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    click.echo(f"http://{f'[{bind}]' if ':' in bind else bind}:{server.port}/")
    click.echo("\n".join(_advice(bind, server.port, where)), err=True)
    try:
        server.serve_forever()  # returns on SIGINT and SIGTERM
    except _PilotEndedError as ended:
        click.echo(f"pilotq: {ended}, and so does the dashboard", err=True)
    finally:
        server.server_close()


def _password(pilot: Pilot, path: str | None) -> tuple[str, str]:
    """The password, and where it is kept. A new one is shown once, and kept for the next time."""
    kept = path or pilot.path("dashboard-password")
    if path is None and not os.path.exists(kept):
        password = os.urandom(12).hex()
        write_private(kept, f"{password}\n".encode())
        return password, f"the password {password}, kept in {kept}"
    password = read_text(kept).strip()
    if not password:
        raise InvalidInput(f"{kept} is empty: write a password into it, or remove it")
    return password, f"the password in {kept}"


def _server(app: Any, bind: str, port: int | None) -> Any:
    """A server that listens; raises InvalidInput when it cannot."""
    import logging

    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request is noise
    for number in (PORT, 0) if port is None else (port,):
        try:
            # Listening is done here: werkzeug ends the process where it cannot.
            family = socket.AF_INET6 if ":" in bind else socket.AF_INET
            listening = socket.create_server((bind, number), family=family)
        except OSError as error:
            refused = error
            continue
        with listening:
            return make_server(bind, number, app, threaded=True, fd=listening.fileno())
    raise InvalidInput(
        f"the dashboard cannot listen on {bind}{f':{port}' if port else ''}: {os.strerror(refused.errno or 0)}; name "
        "another with --port or --bind"
    )


def _advice(bind: str, port: int, where: str) -> list[str]:
    try:
        who = f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container may run as a user without a name
        who = socket.gethostname()
    lines = [f"pilotq: log in as {USER}, with {where}"]
    if bind in LOOPBACK:
        host = f"[{bind}]" if ":" in bind else bind
        lines.append(f"pilotq: to open it on your own machine, run there first: ssh -N -L {port}:{host}:{port} {who}")
    else:
        lines.append(f"pilotq: other machines reach {bind}, and the password travels unencrypted")
    return [*lines, "pilotq: Ctrl-C ends it"]


class _PilotEndedError(Exception):
    pass


class _PilotWatch:
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
            raise _PilotEndedError("the pilot has ended") from None
        if found != self.connection:
            raise _PilotEndedError("the pilot was started again")
