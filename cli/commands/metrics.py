"""`pilotq metrics`: serves the metrics of a pilot to Prometheus, behind a password, as long as the pilot runs.

The page of `pilotq dashboard` has the same at /metrics; this needs no browser's parts.
"""

from __future__ import annotations

import signal
from base64 import b64encode
from hmac import compare_digest
from http.server import ThreadingHTTPServer
from importlib.util import find_spec

import click

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput, PilotqError
from pilotq.cli.metrics import MEDIA_TYPE, PilotMetrics
from pilotq.cli.options import dir_option
from pilotq.cli.serving import (
    USER,
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

PORT = 9182


@click.command("metrics")
@port_option(PORT)
@bind_option
@password_option
@click.option("--once", is_flag=True, help="Print them, read to the end of the journal, and serve nothing.")
@dir_option
def metrics_command(
    port: int | None, bind: str, password_file: str | None, once: bool, directory: str | None
) -> None:  # fmt: skip
    """Serve the metrics of the pilot to Prometheus, until Ctrl-C or the pilot's end.

    It prints the URL. Needs prometheus-client: `pip install 'pilotq[metrics]'`.

    \b
    Example: pilotq metrics --port 9182
    Example: pilotq metrics --once
    """
    if find_spec("prometheus_client") is None:
        raise InvalidInput("metrics need prometheus-client, not installed here: `pip install 'pilotq[metrics]'`")
    with Broker.connect(directory) as broker:
        assert broker.pilot is not None, "connect always finds a directory"
        pilot, connection = broker.pilot, broker.pilot.connection()
    metrics = PilotMetrics(pilot)
    if once:
        try:
            metrics.read_all()
            click.echo(metrics.text(), nl=False)
        finally:
            metrics.close()
        return
    password, where = password_of(pilot, password_file)
    server = _server(metrics, password, bind, port)
    server.service_actions = PilotWatch(pilot, connection)  # type: ignore[method-assign]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    metrics.start()
    announce(bind, server.server_port, "/metrics", where)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    except PilotEndedError as ended:
        click.echo(f"pilotq: {ended}, and so do its metrics", err=True)
    finally:
        server.server_close()
        metrics.close()


def _server(metrics: PilotMetrics, password: str, bind: str, port: int | None) -> ThreadingHTTPServer:
    """A server that listens; raises InvalidInput when it cannot."""
    login = "Basic " + b64encode(f"{USER}:{password}".encode()).decode()

    class Handler(BoundedHandler):
        def do_GET(self) -> None:  # noqa: N802
            if not compare_digest(self.headers.get("Authorization", "").encode(), login.encode()):
                self._answer(401, b"Log in.\n", {"WWW-Authenticate": 'Basic realm="pilotq", charset="UTF-8"'})
            elif self.path.partition("?")[0] != "/metrics":
                self._answer(404, b"The metrics are at /metrics.\n", {})
            else:
                try:
                    text = metrics.text()
                except PilotqError as error:
                    self._refuse(str(error))
                except OSError as error:
                    self._refuse(f"the pilot's files cannot be read: {error}")
                else:
                    self._answer(200, text, {"Content-Type": MEDIA_TYPE})

        def _refuse(self, why: str) -> None:
            self._answer(503, f"{why}\n".encode("utf-8", "backslashreplace"), {})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in ({"Content-Type": "text/plain; charset=utf-8"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """One line for each request is noise."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Whoever asked has gone away."""

    listening = listen("metrics", bind, port, PORT)
    server = Server((bind, listening.getsockname()[1]), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    server.server_port = listening.getsockname()[1]
    return server
