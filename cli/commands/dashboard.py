"""`pilotq dashboard`: RQ's web page for a pilot, behind a password, as long as the pilot runs.

The page (rq-dashboard, of the extra `dashboard`) runs in this process: the server's URL, with its password, stands in
no command line and in no environment. Whoever may open the page may delete and requeue tasks.
"""

from __future__ import annotations

import getpass
import hmac
import os
import signal
import socket
import time
from importlib.util import find_spec
from typing import Any

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput, NoPilot
from pilotq.broker.pilot.directory import Connection, Pilot, write_private
from pilotq.cli.options import dir_option, read_text

USER = "pilotq"
PORT = 9181  # rq-dashboard's own
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANSWER_S = 10  # how long a page waits for the pilot's server
LOOK_S = 1.0  # how often is looked whether the pilot still runs


@click.command("dashboard")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help=f"[default: {PORT}, or a free one]")
@click.option("--bind", default=LOOPBACK[0], show_default=True, metavar="ADDRESS", help="The address to listen on.")
@click.option("--password-file", metavar="FILE",
              help="Its file.  [default: dashboard-password in the pilot's directory, made if need be]")  # fmt: skip
@dir_option
def dashboard_command(port: int | None, bind: str, password_file: str | None, directory: str | None) -> None:
    """Show the pilot in a browser, with rq-dashboard, until Ctrl-C or the pilot's end.

    It prints the page's URL, and the ssh command with which the page is seen from elsewhere.

    \b
    Example: pilotq dashboard --port 8000
    """
    missing = [name for name in ("rq_dashboard", "six") if find_spec(name) is None]
    if missing:
        raise InvalidInput(
            f"the dashboard needs {' and '.join(missing)}, not installed here: `pip install 'pilotq[dashboard]'`"
        )
    with Broker.connect(directory) as broker:
        assert broker.pilot is not None, "connect always finds a directory"
        pilot, url = broker.pilot, broker.url
        connection = pilot.connection()
    password, told = _password(pilot, password_file)
    app = _app(url, password)
    server = _server(app, bind, port)
    server.service_actions = _Watch(pilot, connection)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    click.echo(f"http://{f'[{bind}]' if ':' in bind else bind}:{server.port}/")
    click.echo("\n".join(_advice(bind, server.port, told)), err=True)
    try:
        server.serve_forever()  # returns on SIGINT and SIGTERM
    except _PilotEndedError as ended:
        click.echo(f"pilotq: {ended}: the dashboard ends, too", err=True)
    finally:
        server.server_close()


def _password(pilot: Pilot, path: str | None) -> tuple[str, str]:
    """The password, and what to tell of it. One that is made is shown once, and kept for the next time."""
    kept = path or pilot.path("dashboard-password")
    if path is None and not os.path.exists(kept):
        password = os.urandom(12).hex()
        write_private(kept, f"{password}\n".encode())
        return password, f"the password {password}, kept in {kept}"
    password = read_text(kept).strip()
    if not password:
        raise InvalidInput(f"{kept} is empty: write a password into it, or remove it")
    return password, f"the password in {kept}"


def _app(url: str, password: str) -> Any:
    """rq-dashboard as a WSGI application that lets nobody in without the password."""
    from flask import Response, request
    from rq_dashboard import web
    from rq_dashboard.cli import make_flask_app

    app = make_flask_app(None, None, None, "")
    app.config["DEPRECATED_OPTIONS"] = []
    app.config["RQ_DASHBOARD_REDIS_URL"] = f"{url}{'&' if '?' in url else '?'}socket_timeout={ANSWER_S}"
    web.setup_rq_connection(app)
    web.get_queue_registry_jobs_count = _page
    web.Job = _job_of(web.Job)

    def admit() -> Response | None:
        given = request.authorization
        if (
            given is None
            or given.username != USER
            or not hmac.compare_digest((given.password or "").encode(), password.encode())
        ):
            return Response("Log in.\n", 401, {"WWW-Authenticate": 'Basic realm="pilotq", charset="UTF-8"'})
        # A browser sends the password with whatever another site makes it ask for. rq-dashboard requeues on GET, too.
        changes = request.method == "POST" or request.path.startswith("/requeue/")
        if changes and request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return Response("Not from another site.\n", 403)
        return None

    app.before_request(admit)
    return app


def _job_of(base: Any) -> Any:
    """RQ's Job as rq-dashboard (0.9.0) expects it: it decodes the ids of dependencies, which RQ 3 gives as text, and so
    could not show a job that waits for others."""

    class Job(base):  # type: ignore[misc]
        @property
        def dependency_ids(self) -> list[bytes]:
            return [one if isinstance(one, bytes) else str(one).encode() for one in super().dependency_ids]

    return Job


def _page(queue_name: str, registry_name: str, offset: int, per_page: int, order: str, connection: Any) -> Any:
    """How many jobs a list has, and those of one page; stands in for rq-dashboard's own function.

    That one (0.9.0) takes the end of a page for its length: page 6,000 of 8 jobs each fetches 48,000 of them.
    """
    from rq_dashboard import web

    queue = web.Queue(queue_name, serializer=web.config.serializer, connection=connection)
    registry = None
    if registry_name != "queued":
        registry = getattr(web, f"{registry_name.capitalize()}JobRegistry")(queue_name, connection=connection)
    total = queue.count if registry is None else registry.get_job_count(cleanup=False)
    last = min(offset + per_page, total)
    # Both ends are counted from the front of the list, whichever end is shown first.
    first, end = (total - last, total - offset) if order == "dsc" else (offset, last)
    if end <= first:
        return total, []
    if registry is None:
        ids = queue.get_job_ids(first, end - first)
    else:
        ids = registry.get_job_ids(first, end - 1, cleanup=False)
    found = [queue.fetch_job(job_id) for job_id in (reversed(ids) if order == "dsc" else ids)]
    return total, [web.serialize_job(job) for job in found if job]


def _server(app: Any, bind: str, port: int | None) -> Any:
    """A server that listens; raises InvalidInput when it cannot."""
    import logging

    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request helps nobody
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


def _advice(bind: str, port: int, told: str) -> list[str]:
    try:
        who = f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container may run as a user without a name
        who = socket.gethostname()
    lines = [f"pilotq: log in as {USER}, with {told}"]
    if bind in LOOPBACK:
        lines.append(f"pilotq: from your own machine first: ssh -N -L {port}:{bind}:{port} {who}")
    else:
        lines.append(f"pilotq: {bind} is not this machine alone, and the password travels unencrypted")
    return [*lines, "pilotq: Ctrl-C ends it"]


class _PilotEndedError(Exception):
    pass


class _Watch:
    """Called between requests: ends the server when the pilot that it shows has ended."""

    def __init__(self, pilot: Pilot, connection: Connection) -> None:
        self.pilot = pilot
        self.connection = connection
        self.next = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + LOOK_S
        try:
            found = self.pilot.connection()
        except NoPilot:
            raise _PilotEndedError("the pilot has ended") from None
        if found != self.connection:
            raise _PilotEndedError("the pilot was started again")
