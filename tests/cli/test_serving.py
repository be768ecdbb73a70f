"""What `dashboard` and `metrics` have in common: how long a client may take to ask for something."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, cast

import pytest

from pilotq.cli import serving
from pilotq.cli.commands import dashboard, metrics
from pilotq.cli.metrics import PilotMetrics
from tests.support.waiting import wait_until

needs_flask = pytest.mark.skipif(find_spec("flask") is None, reason="flask is not installed")
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"


class Text:
    def text(self) -> bytes:
        return b"figures\n"


def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    """Answers with the length of what it was sent."""
    size = len(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
    start("200 OK", [("Content-Length", str(len(str(size))))])
    return [str(size).encode()]


def make(kind: str) -> Any:
    if kind == "dashboard":
        return dashboard._server(application, "127.0.0.1", None)
    return metrics._server(cast(PilotMetrics, Text()), "word", "127.0.0.1", None)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [pytest.param("dashboard", b"", marks=needs_flask), pytest.param("dashboard", HEAD, marks=needs_flask),
     ("metrics", b"")],
)  # fmt: skip
def test_a_request_sent_byte_by_byte_holds_a_thread_for_a_time_only(
    kind: str, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "REQUEST_S", 1.0)
    server = make(kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = threading.active_count()
    with socket.create_connection(server.server_address[:2]) as slow:
        slow.sendall(sent or b"GET /")
        slow.settimeout(0.05)
        begin, answer = time.monotonic(), None
        while answer is None and time.monotonic() - begin < 60:
            try:
                slow.sendall(b"x")
                answer = slow.recv(100)
            except TimeoutError:
                continue
            except ConnectionError:
                answer = b""
        assert answer is not None and b"200" not in answer, "each byte came in time, and the whole did not"
        assert time.monotonic() - begin >= 0.9
    wait_until(lambda: threading.active_count() <= before, what="the end of its thread")
    server.shutdown()
    server.server_close()
