"""`pilotq dashboard`: RQ's web page for a pilot, behind a password, as long as the pilot runs.

The page (rq-dashboard, of the extra `dashboard`) runs in this process: the server's URL, with its password, is in no
command line and in no environment. Whoever may open the page may delete and requeue tasks.
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
from pilotq.broker.pilot.directory import ConnectionInfo, Pilot, write_private
from pilotq.cli.options import dir_option, read_text

USER = "pilotq"
PORT = 9181  # rq-dashboard's own
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANSWER_S = 10  # how long a page waits for the pilot's server
POLL_S = 1.0  # how often to check whether the pilot still runs


@click.command("dashboard")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help=f"[default: {PORT}, or a free one]")
@click.option("--bind", default=LOOPBACK[0], show_default=True, metavar="ADDRESS", help="The address to listen on.")
@click.option("--password-file", metavar="FILE",
              help="Its file.  [default: dashboard-password in the pilot's directory, made if missing]")  # fmt: skip
@dir_option
def dashboard_command(port: int | None, bind: str, password_file: str | None, directory: str | None) -> None:
    """Show the pilot in a browser, with rq-dashboard, until Ctrl-C or the pilot's end.

    It prints the URL of the page, and an ssh command to open it from elsewhere.

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
    password, where = _password(pilot, password_file)
    app = _app(url, password)
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


def _app(url: str, password: str) -> Any:
    """rq-dashboard as a WSGI application behind the password."""
    from flask import Response, request
    from rq_dashboard import web
    from rq_dashboard.cli import make_flask_app

    app = make_flask_app(None, None, None, "")
    app.config["DEPRECATED_OPTIONS"] = []
    app.config["RQ_DASHBOARD_REDIS_URL"] = f"{url}{'&' if '?' in url else '?'}socket_timeout={ANSWER_S}"
    web.setup_rq_connection(app)
    web.get_queue_registry_jobs_count = _jobs_of_page
    web.Job = _job_of(web.Job)

    def admit() -> Response | None:
        given = request.authorization
        if (
            given is None
            or given.username != USER
            or not hmac.compare_digest((given.password or "").encode(), password.encode())
        ):
            return Response("Log in.\n", 401, {"WWW-Authenticate": 'Basic realm="pilotq", charset="UTF-8"'})
        # A browser sends the password with whatever another site makes it ask for. What takes a POST changes something,
        # by GET, too: rq-dashboard requeues by either.
        changes = request.method == "POST" or (request.url_rule is not None and "POST" in request.url_rule.methods)
        if changes and not _same_origin(request.headers.get("Origin", ""), request.headers.get("Host", "")):
            return Response(
                "Only a page of this dashboard may change something: the request has no Origin header, or one that is "
                "not the Host that it asks.\n", 403
            )  # fmt: skip
        return None

    def protect(response: Response) -> Response:
        response.headers["X-Frame-Options"] = "DENY"  # in a frame of another site its buttons could be pressed unseen
        return response

    app.before_request(admit)
    app.after_request(protect)
    return app


def _same_origin(origin: str, host: str) -> bool:
    """Whether a request comes from a page of the host that it asks. A proxy in between may speak https to the browser,
    so that the scheme is not compared."""
    scheme, _, where = origin.partition("://")
    return scheme.lower() in ("http", "https") and bool(where) and where.lower() == host.lower()


def _job_of(base: Any) -> Any:
    """RQ's Job as rq-dashboard (0.9.0) expects it: it decodes the ids of dependencies, which RQ 3 gives as text, and so
    could not show a job that waits for others."""

    class Job(base):  # type: ignore[misc]
        @property
        def dependency_ids(self) -> list[bytes]:
            return [one if isinstance(one, bytes) else str(one).encode() for one in super().dependency_ids]

    return Job


def _jobs_of_page(queue_name: str, registry_name: str, offset: int, per_page: int, order: str, connection: Any) -> Any:
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
