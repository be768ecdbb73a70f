"""RQ's own pages, of rq-dashboard, as they are shown below /rq: with what its version 0.9.0 does wrong put right."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

PREFIX = "/rq"
ANSWER_S = 10  # how long a page waits for the pilot's server
BACK = b'<p style="text-align:right;margin:0 1em"><a href="/">pilotq: nodes, progress, failures</a></p>'
_UNESCAPED = re.compile(rb"<%=((?:(?!%>|\.html\(\)).)*)%>", re.DOTALL)  # what calls html() is escaped by that


def missing() -> list[str]:
    """The packages that RQ's pages need, and that are not installed."""
    return [name for name in ("rq_dashboard", "six") if find_spec(name) is None]


def make_rq_app(url: str) -> Any:
    """An application of these pages; ``url`` is that of the pilot's server, with its password."""
    from rq_dashboard import web
    from rq_dashboard.cli import make_flask_app

    app = make_flask_app(None, None, None, PREFIX)
    app.config["DEPRECATED_OPTIONS"] = []
    app.config["RQ_DASHBOARD_REDIS_URL"] = f"{url}{'&' if '?' in url else '?'}socket_timeout={ANSWER_S}"
    web.setup_rq_connection(app)
    web.get_queue_registry_jobs_count = _jobs_of_page
    web.Job = _job_of(web.Job)
    return app


def amend(response: Any) -> None:
    """Put a link to pilotq's page into one of RQ's, and make its templates escape what they show.

    Those of rq-dashboard (0.9.0) show a job's description, error and metadata as they are, and so run scripts in them.
    """
    if response.mimetype == "text/html" and not response.is_streamed:
        page = _UNESCAPED.sub(rb"<%-\1%>", response.get_data())
        response.set_data(page.replace(b"<body>", b"<body>" + BACK, 1))


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
