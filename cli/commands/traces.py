"""`pilotq traces`: exports the executions in a pilot's journal as spans of OpenTelemetry."""

from __future__ import annotations

import time
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from pilotq.broker.errors import InvalidInput, NoPilot, PilotFailed
from pilotq.broker.pilot.directory import Pilot, find
from pilotq.broker.store.journal import Journal, JournalReader
from pilotq.cli.options import dir_option

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    from pilotq.cli.traces import Parents

PIECE = 500  # executions that are sent at a time
POLL_S, AGAIN_S = 1.0, 5.0  # how often the journal is looked at, and a collector that does not answer is tried again
GIVE_UP_S = 600.0  # how long such a one is waited for, with --follow
ANSWER_S = 10
ENDPOINT, DEFAULT = "OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318"


@click.command("traces")
@click.option("--endpoint", metavar="URL", help=f"The collector's.  [default: ${ENDPOINT}, else {DEFAULT}]")
@click.option("--follow", is_flag=True, help="Go on with what ends, until the pilot has ended.")
@dir_option
def traces_command(endpoint: str | None, follow: bool, directory: str | None) -> None:
    """Send the executions of the journal to an OpenTelemetry collector (OTLP over HTTP) as spans.

    Also those of a pilot that has ended. Needs `pip install 'pilotq[otel]'`. What a collector asks for,
    such as a token, it takes from OTEL_EXPORTER_OTLP_HEADERS and the like.

    \b
    Example: pilotq traces --follow --endpoint http://127.0.0.1:4318
    """
    if find_spec("opentelemetry.exporter.otlp.proto.http") is None if find_spec("opentelemetry") else True:
        raise InvalidInput(
            "traces need OpenTelemetry's SDK and exporter, not installed here: `pip install 'pilotq[otel]'`"
        )
    from pilotq.cli.traces import Parents

    pilot = find(directory)
    exporter = _exporter(endpoint)
    parents = Parents(pilot)
    reader = JournalReader(Journal(pilot.journal), None)
    number = 0
    try:
        while True:
            running = follow and _runs(pilot)  # before the last look, so that nothing that ends is missed
            number += _send_news(reader, pilot, parents, exporter, GIVE_UP_S if follow else 0.0)
            if not running:
                break
            time.sleep(POLL_S)
    finally:
        parents.close()
        exporter.shutdown()  # type: ignore[no-untyped-call]
        if number:
            click.echo(f"pilotq: the collector has {number:,} spans", err=True)


def _exporter(endpoint: str | None) -> OTLPSpanExporter:
    import logging

    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # what fails is said here, once
    if endpoint is None:
        return OTLPSpanExporter(timeout=ANSWER_S)
    try:
        where = urlsplit(endpoint)
        valid = where.scheme in ("http", "https") and where.hostname and not where.password
    except ValueError:
        valid = False
    if not valid:
        raise InvalidInput(
            f"--endpoint {endpoint}: give http://HOST:PORT or https://HOST, and what is secret in "
            "OTEL_EXPORTER_OTLP_HEADERS"
        )
    path = "" if where.path.strip("/") else "/v1/traces"
    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + path, timeout=ANSWER_S)


def _runs(pilot: Pilot) -> bool:
    try:
        pilot.connection()
    except NoPilot:
        return False
    return True


def _send_news(
    reader: JournalReader, pilot: Pilot, parents: Parents, exporter: OTLPSpanExporter, patience: float
) -> int:  # fmt: skip
    """Send what was written since the last time; returns the number of spans. Raises PilotFailed when the collector
    does not take them for ``patience`` seconds."""
    from opentelemetry.sdk.trace.export import SpanExportResult

    from pilotq.cli.traces import spans_of

    news, number = reader.read(), 0
    while piece := list(islice(news, PIECE)):
        spans = [span for entry in piece for span in spans_of(entry, pilot.id, parents.of)]
        deadline = time.monotonic() + patience
        while spans and exporter.export(spans) is not SpanExportResult.SUCCESS:
            if time.monotonic() > deadline:
                where = urlsplit(exporter._endpoint)  # without what may be secret
                host = where.netloc.rpartition("@")[2]
                raise PilotFailed(
                    f"no answer from {where.scheme}://{host}{where.path}, or it takes no spans: see whether the "
                    "collector runs, and --endpoint"
                )
            time.sleep(AGAIN_S)
        number += len(spans)
    return number
