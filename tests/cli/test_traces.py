"""`pilotq traces`: the spans that a collector gets, over OTLP, of a pilot that runs and of one that has ended."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from pilotq.broker.store.journal import JournalEntry
from pilotq.cli.traces import ATTRIBUTES, spans_of
from tests.support.command_line import Cli, command, environment, in_background, prompt
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

TRACE, SUBMITTER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes spans over OTLP, on loopback; ``refuse``: with how many requests it has no patience."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.headers: list[str] = []
        self.paths: set[str] = set()
        self.refuse = 0

    def take(self, path: str, token: str, body: bytes) -> int:
        self.paths.add(path)
        self.headers.append(token)
        if self.refuse:
            self.refuse -= 1
            return 400
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = (a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            assert service == "pilotq"
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return 200

    def executions(self) -> list[Span]:
        return [span for span in self.spans if "pilotq.task.id" in attributes(span)]

    def parts(self, span: Span) -> list[Span]:
        return sorted((s for s in self.spans if s.parent_span_id == span.span_id), key=lambda s: s.start_time_unix_nano)


@contextmanager
def collector() -> Iterator[tuple[Collector, str]]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = found.take(self.path, self.headers.get("Authorization", ""), body)
            self.send_response(status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield found, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def attributes(span: Span) -> dict[str, object]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value") or "string_value") for a in span.attributes}


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with in_background(tmp_path, "--nodes", "n1:1") as found:
        yield found


def test_spans_of_a_pilot_that_runs(cli: Cli, tmp_path: Path) -> None:
    with collector() as (found, url):
        process = subprocess.Popen(
            command("traces", "--follow"), cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=environment(OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20abc"),
        )  # fmt: skip
        mine = cli(
            "enqueue", "--name", "mine", "--", "sh", "-c", "test $TRACEPARENT", TRACEPARENT=f"00-{TRACE}-{SUBMITTER}-01"
        )
        hidden = cli("enqueue", "--name", "hidden", "--", "true", TRACEPARENT=f"00-{TRACE}-{SUBMITTER}-00")
        bad = cli("enqueue", "--name", "bad", "--retries", "1", "--", "sh", "-c", "exit 3")
        assert not mine.returncode + hidden.returncode + bad.returncode, mine.stderr + bad.stderr
        wait_until(lambda: len(found.executions()) == 3, what="the spans", seconds=60)
        assert process.poll() is None, "it goes on"
        cli("stop")
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0 and "the collector has 11 spans" in said, said
    (one,) = (span for span in found.executions() if span.name == "mine")
    assert one.trace_id.hex() == TRACE and one.parent_span_id.hex() == SUBMITTER
    facts = attributes(one)
    assert facts["pilotq.task.id"] == mine.stdout.strip() and facts["pilotq.status"] == "finished"
    assert facts["pilotq.cores"] == "n1[0]" and facts["pilotq.exit_code"] == 0
    assert one.status.code == Status.STATUS_CODE_UNSET and [event.name for event in one.events] == ["ended"]
    parts = found.parts(one)
    assert [part.name for part in parts] == ["queued", "placed", "launched"]
    ends = [one.start_time_unix_nano, *(part.end_time_unix_nano for part in parts)]
    assert ends == sorted(ends) and ends[-1] == one.end_time_unix_nano, "the parts follow each other and fill the whole"
    tries = [span for span in found.executions() if span.name == "bad"]
    assert {attributes(span)["pilotq.execution"] for span in tries} == {1, 2}
    (trace,) = {span.trace_id.hex() for span in tries}
    assert trace != TRACE and all(span.status.code == Status.STATUS_CODE_ERROR for span in tries)
    assert sorted(len(found.parts(span)) for span in tries) == [2, 3], "only the first has waited in the queue"
    assert found.paths == {"/v1/traces"} and set(found.headers) == {"Bearer abc"}


def test_spans_of_a_pilot_that_has_ended_are_the_same_each_time(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    (tmp_path / "tasks.txt").write_text("true\nfalse\n")
    assert cli("run", "--nodes", "n1:1", "tasks.txt").returncode == 1
    with collector() as (found, url):
        found.refuse = 1
        refused = cli("traces", "--endpoint", url)
        assert refused.returncode == 3 and "spans: see whether the collector" in refused.stderr
        assert "no answer from http://127.0.0.1:" in refused.stderr and "0 spans" not in refused.stderr
        assert "Traceback" not in refused.stderr and not found.spans
        for _ in range(2):
            done = cli("traces", "--endpoint", url)
            assert done.returncode == 0 and "the collector has 8 spans" in done.stderr, done
    assert len(found.spans) == 16 and len({span.span_id for span in found.spans}) == 8


def test_a_wrong_endpoint_is_refused(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    assert cli("run", "--nodes", "n1:1", "--", "true").returncode == 0
    for wrong in ("collector:4318", "http://user:word@host"):
        done = cli("traces", "--endpoint", wrong)
        assert done.returncode == 2 and "OTEL_EXPORTER_OTLP_HEADERS" in done.stderr, done


def test_what_has_no_times_has_no_spans() -> None:
    whole = JournalEntry(id="9", status="finished", queued=1.0, ended=2.0, elements={"finished": "0-2"})
    never = JournalEntry(id="8", status="canceled", queued=1.0, ended=2.0)
    assert not list(spans_of(whole, "p", lambda _: "")) and not list(spans_of(JournalEntry(id="7"), "p", lambda _: ""))
    assert [span.name for span in spans_of(never, "p", lambda _: "no traceparent")] == ["task 8"]


def test_every_attribute_is_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert not [name for name in ATTRIBUTES if f"`{name}`" not in text]
