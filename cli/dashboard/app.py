"""The dashboard as a WSGI application: who is let in, what may change something, and which page is where."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import flask

from pilotq.broker.errors import PilotqError
from pilotq.broker.pilot.directory import Pilot
from pilotq.cli.dashboard import rq_pages
from pilotq.cli.dashboard.api import Api
from pilotq.cli.dashboard.live import Live
from pilotq.cli.metrics import MEDIA_TYPE, PilotMetrics
from pilotq.cli.serving import USER

STATIC = os.path.join(os.path.dirname(os.path.abspath(__file__)), "static")
# Names and output of tasks are anybody's text: a browser is to run and load nothing but the three files of this page.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
BODY_MAX = 1 << 20  # bytes of a request
FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js", "/favicon.svg": "favicon.svg"}


def make_app(pilot: Pilot, url: str, password: str) -> Any:
    """The page of a pilot at /, and RQ's at /rq if they are installed, behind the password. ``url`` is that of the
    pilot's server, with its password. It begins to read the pilot."""
    lacking = rq_pages.missing()
    app = flask.Flask("pilotq", static_folder=None) if lacking else rq_pages.make_rq_app(url)
    if lacking:
        app.add_url_rule(f"{rq_pages.PREFIX}/", "rq", lambda: _without_rq(lacking))
    app.config["MAX_CONTENT_LENGTH"] = BODY_MAX
    for path, name in FILES.items():
        app.add_url_rule(path, name, _file, defaults={"name": name})
    live = Live(pilot.directory)
    Api(pilot, live).add_to(app)
    live.start()
    app.add_url_rule("/metrics", "metrics", _metrics(PilotMetrics(pilot)))

    def admit() -> Any:
        given = flask.request.authorization
        if (
            given is None
            or given.username != USER
            or not hmac.compare_digest((given.password or "").encode(), password.encode())
        ):
            return flask.Response("Log in.\n", 401, {"WWW-Authenticate": 'Basic realm="pilotq", charset="UTF-8"'})
        return _refuse_other_sites(flask.request)

    def protect(response: Any) -> Any:
        response.headers["X-Frame-Options"] = "DENY"  # in a frame of another site its buttons could be pressed unseen
        response.headers["X-Content-Type-Options"] = "nosniff"
        if flask.request.path.startswith(rq_pages.PREFIX):
            rq_pages.amend(response)
        else:
            response.headers["Content-Security-Policy"] = POLICY
            response.headers["Referrer-Policy"] = "no-referrer"
            response.headers["Cache-Control"] = "no-store"
        return response

    app.before_request(admit)
    app.after_request(protect)
    return app


def _refuse_other_sites(request: Any) -> Any:
    """A refusal of what another site makes a browser ask for: it sends the password with that, too.

    What takes a POST changes something, by GET, too: rq-dashboard requeues by either.
    """
    changes = request.method == "POST" or (request.url_rule is not None and "POST" in request.url_rule.methods)
    if changes and not _same_origin(request.headers.get("Origin", ""), request.headers.get("Host", "")):
        return flask.Response(
            "Only a page of this dashboard may change something: the request has no Origin header, or one that is not "
            "the Host that it asks.\n", 403
        )  # fmt: skip
    return None


def _same_origin(origin: str, host: str) -> bool:
    """Whether a request comes from a page of the host that it asks. A proxy in between may speak https to the browser,
    so that the scheme is not compared."""
    scheme, _, where = origin.partition("://")
    return scheme.lower() in ("http", "https") and bool(where) and where.lower() == host.lower()


def _file(name: str) -> Any:
    return flask.send_from_directory(STATIC, name, max_age=0)


def _metrics(metrics: PilotMetrics) -> Callable[[], Any]:
    """The view of what `pilotq metrics` serves, too; it reads the journal from its first call on."""

    def view() -> Any:
        if find_spec("prometheus_client") is None:
            lacking = "metrics need prometheus-client, not installed here: `pip install 'pilotq[metrics]'`\n"
            return flask.Response(lacking, 404, mimetype="text/plain")
        try:
            return flask.Response(metrics.text(), content_type=MEDIA_TYPE)
        except PilotqError as error:
            return flask.Response(f"{error}\n", 503, mimetype="text/plain")
        except OSError as error:
            return flask.Response(f"the pilot's files cannot be read: {error}\n", 503, mimetype="text/plain")

    return view


def _without_rq(lacking: list[str]) -> Any:
    text = f"RQ's pages need {' and '.join(lacking)}, not installed here: `pip install 'pilotq[dashboard]'`\n"
    return flask.Response(text, 404, mimetype="text/plain")
