"""`pilotq dashboard`: serves the web page of a pilot (cli/dashboard), behind a password, as long as the pilot runs.

Pages are made in this process: the server's URL, with its password, is in no command line and in no environment.
Whoever may open them may cancel tasks and end the pilot.
"""

from __future__ import annotations

import signal
from importlib.util import find_spec
from typing import Any

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput
from pilotq.cli.options import dir_option
from pilotq.cli.serving import (
    BoundedHandler,
    PilotEndedError,
    PilotWatch,
    announce,
    bind_option,
    listen,
    password_of,
    password_option,
    port_option,
)

PORT = 9181  # rq-dashboard's own


@click.command("dashboard")
@port_option(PORT)
@bind_option
@password_option
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
    password, where = password_of(pilot, password_file)
    from pilotq.cli.dashboard.app import make_app

    app = make_app(pilot, url, password)
    server = _server(app, bind, port)
    server.service_actions = PilotWatch(pilot, connection)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    announce(bind, server.port, "/", where)
    try:
        server.serve_forever()  # returns on SIGINT and SIGTERM
    except PilotEndedError as ended:
        click.echo(f"pilotq: {ended}, and so does the dashboard", err=True)
    finally:
        server.server_close()


def _server(app: Any, bind: str, port: int | None) -> Any:
    """A server that listens; raises InvalidInput when it cannot."""
    import logging

    from werkzeug.serving import WSGIRequestHandler, make_server

    handler: Any = type("Handler", (BoundedHandler, WSGIRequestHandler), {})

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line for each request is noise
    # Listening is done here: werkzeug ends the process where it cannot.
    with listen("the dashboard", bind, port, PORT) as listening:
        return make_server(
            bind, listening.getsockname()[1], app, threaded=True, request_handler=handler, fd=listening.fileno()
        )
