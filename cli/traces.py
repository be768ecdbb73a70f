"""Spans of OpenTelemetry from the entries of a journal: one for each execution, with its times as spans below.

Ids are made from the pilot's and the task's: what is exported twice are the same spans.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import NoPilot, ServerUnavailable
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store import keys
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.tasks.submit_context import SubmitContext

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

TRACEPARENT: Final = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
SUBMISSIONS_MAX = 10_000  # whose parents are remembered
# Span of an execution -> its parts: name, where it begins and where it ends.
PARTS = (("queued", "queued", "handed"), ("placed", "handed", "started"), ("launched", "started", "ended"))
# Attribute of the span of an execution -> field of the entry; docs/metrics.md names them.
ATTRIBUTES: Final[dict[str, str]] = {
    "pilotq.task.id": "id", "pilotq.task.name": "name", "pilotq.array": "array", "pilotq.index": "index",
    "pilotq.execution": "execution", "pilotq.final": "final", "pilotq.status": "status", "pilotq.reason": "reason",
    "pilotq.exit_code": "exit_code", "pilotq.signal": "signal", "pilotq.node": "node", "pilotq.cores": "cpus",
    "pilotq.cpu_seconds": "cpu", "pilotq.max_rss_bytes": "max_rss", "pilotq.submission": "submission",
}  # fmt: skip


class Parents:
    """The TRACEPARENT of submitters, from the environment that the server keeps with each submission."""

    def __init__(self, pilot: Pilot) -> None:
        self._known: dict[str, str] = {}
        try:
            self._broker: Broker | None = Broker.connect(pilot.directory)
        except (NoPilot, ServerUnavailable):  # it has ended: nobody knows them any more
            self._broker = None

    def of(self, submission: str) -> str:
        """That of a submission; empty where it has none, and where nobody knows any more."""
        if submission not in self._known:
            if len(self._known) >= SUBMISSIONS_MAX:
                self._known.clear()
            self._known[submission] = self._read(submission)
        return self._known[submission]

    def _read(self, submission: str) -> str:
        if self._broker is None:
            return ""
        try:
            shared = self._broker.link.call("HGET", keys.submission(submission), "shared")
            data = self._broker.link.call("GET", keys.shared(shared.decode())) if shared else None
            context = msgspec.msgpack.decode(data, type=SubmitContext) if data else None
        except (ServerUnavailable, msgspec.MsgspecError):  # it ends, or somebody has written there
            return ""
        return context.env.get(b"TRACEPARENT", b"").decode("ascii", "replace") if context else ""

    def close(self) -> None:
        if self._broker is not None:
            self._broker.close()


def spans_of(entry: JournalEntry, pilot: str, parent_of: Callable[[str], str]) -> Iterator[ReadableSpan]:
    """The spans of an entry; none of an array as a whole, of a task that nobody may trace, and of one without times.

    A task is in the trace of its submitter, if that had a TRACEPARENT, else in one of its own.
    """
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    found = TRACEPARENT.fullmatch(parent_of(entry.submission))
    begin = entry.queued if entry.execution <= 1 else entry.handed
    end = entry.ended
    if entry.elements or begin is None or end is None or (found and not int(found[3], 16) & 1):
        return
    trace = int(found[1], 16) if found else _number(16, pilot, entry.id)

    def context(span: int) -> SpanContext:
        return SpanContext(trace, span, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    whole = context(_number(8, pilot, entry.id, entry.execution))
    values = {name: getattr(entry, field) for name, field in ATTRIBUTES.items()}
    attributes = {name: value for name, value in values.items() if value not in ("", None)}
    failed = entry.status in ("failed", "stopped")
    yield ReadableSpan(
        entry.name or f"task {entry.id}", whole, parent=context(int(found[2], 16)) if found else None,
        resource=_resource(pilot), attributes=attributes, kind=SpanKind.CONSUMER,
        start_time=_ns(begin), end_time=_ns(end),
        events=[Event("ended", {"pilotq.status": entry.status, "pilotq.reason": entry.reason}, _ns(end))],
        status=Status(StatusCode.ERROR, entry.reason) if failed else Status(StatusCode.UNSET),
    )  # fmt: skip
    for name, first, last in PARTS:
        start, stop = getattr(entry, first), getattr(entry, last)
        if start is not None and stop is not None and (first != "queued" or entry.execution <= 1):
            yield ReadableSpan(
                name, context(_number(8, pilot, entry.id, entry.execution, name)), parent=whole,
                resource=_resource(pilot), kind=SpanKind.INTERNAL, start_time=_ns(start),
                end_time=max(_ns(stop), _ns(start)),
            )  # fmt: skip


@lru_cache(maxsize=4)
def _resource(pilot: str) -> Resource:
    from opentelemetry.sdk.resources import Resource

    from pilotq import __version__

    return Resource({"service.name": "pilotq", "service.version": __version__, "service.instance.id": pilot})


def _number(size: int, *words: object) -> int:
    """A number of so many bytes, other than 0, that these words always give."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:size], "big") or 1


def _ns(seconds: float) -> int:
    return round(seconds * 1e6) * 1000
