"""What is known of a task, from Redis while it remembers, from the journal afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from pilotq.broker import keys
from pilotq.broker.journal import Journal
from pilotq.broker.link import Link
from pilotq.broker.records import Line, NodeInfo
from pilotq.broker.states import ENDED
from pilotq.broker.store import from_iso
from pilotq.broker.views import NodeView, TaskView

SLICE = 500
ELEMENT_WORDS = ("waiting", "finished", "failed", "canceled")  # by the two bits of an element
FIELDS = (
    "status", "description", "origin", "pq_name", "pq_reason", "pq_exit", "pq_exec", "pq_node", "pq_cpus",
    "pq_at", "started_at", "ended_at", "pq_retries", "pq_array", "pq_next", "pq_array_of", "pq_running",
)  # fmt: skip


def ranges(numbers: Iterable[int], step: int = 1) -> str:
    """Compact text of ascending numbers that are ``step`` apart: ``0-3,7``; with a step above 1: ``0-8:2``."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][1] + step:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    suffix = f":{step}" if step > 1 else ""
    return ",".join(str(a) if a == b else f"{a}-{b}{suffix}" for a, b in pieces)


def outcome_at(bits: bytes, position: int, following: int) -> str:
    """What became of the element at this position: one of ELEMENT_WORDS, or started."""
    byte = bits[position >> 2] if position >> 2 < len(bits) else 0
    outcome = (byte >> (6 - 2 * (position & 3))) & 3
    return "started" if outcome == 0 and position < following else ELEMENT_WORDS[outcome]


def element_ranges(bits: bytes, array: str, following: int) -> dict[str, str]:
    """Status -> compact ranges of indices. ``array`` is ``start:step:count``; from position ``following`` on none was handed out."""
    start, step, count = map(int, array.split(":"))
    found: dict[str, list[int]] = {}
    for position in range(count):
        found.setdefault(outcome_at(bits, position, following), []).append(start + step * position)
    return {word: ranges(indices, step) for word, indices in found.items()}


def _text(value: bytes | None) -> str:
    return value.decode("utf-8", "replace") if value else ""


def _number(text: str) -> float | None:
    return float(text) if text else None


def view_of(task_id: str, values: Sequence[bytes | None]) -> TaskView:
    """A view from the fields FIELDS of a task's hash."""
    f = dict(zip(FIELDS, map(_text, values), strict=True))
    status = f["status"]
    exit_text = f["pq_exit"]
    reason = f["pq_reason"]
    if status == "started" and not f["pq_array"]:
        reason = "running" if f["pq_running"] else "handed"
    # Until a launch is reported, started_at is the time the task was handed out; the journal knows both.
    launched = status in ENDED or f["pq_running"]
    view = TaskView(
        id=task_id,
        name=f["pq_name"],
        status=status,
        reason=reason,
        exit_code=int(exit_text) if exit_text else None,
        execution=int(f["pq_exec"] or 0),
        node=f["pq_node"].rpartition(":")[0] if status != "queued" else "",
        cores=f["pq_cpus"],
        times={
            "queued": _number(f["pq_at"]),
            "handed": None if launched else from_iso(f["started_at"]),
            "started": from_iso(f["started_at"]) if launched else None,
            "ended": from_iso(f["ended_at"]),
        },
        queue=f["origin"].partition(".")[0],
        command=f["description"],
        retries=int(f["pq_retries"] or 0),
        array=f["pq_array_of"],
        index=int(task_id.rpartition("_")[2]) if f["pq_array_of"] else None,
        ended=status in ENDED,
    )
    if f["pq_array"]:
        view.array_size = int(f["pq_array"].rpartition(":")[2])
    return view


def from_line(line: Line) -> TaskView:
    """A view of an ended task from its last line in the journal."""
    return TaskView(
        id=line.id,
        name=line.name,
        status=line.status,
        reason=line.reason,
        exit_code=line.exit_code,
        signal=line.signal,
        execution=line.execution,
        node=line.node,
        cores=line.cpus,
        times={"queued": line.queued, "handed": line.handed, "started": line.started, "ended": line.ended},
        message=line.message,
        max_rss=line.max_rss,
        cpu=line.cpu,
        array=line.array,
        index=line.index,
        elements=line.elements,
        stdout_tail=_tail(line.stdout),
        stderr_tail=_tail(line.stderr),
        ended=line.final,
    )


def _tail(data: str | bytes) -> str:
    return data if isinstance(data, str) else data.decode("utf-8", "replace")


def enrich(view: TaskView, line: Line) -> TaskView:
    """What only the journal knows of an ended task, added to what Redis says."""
    view.signal, view.message = line.signal, line.message
    view.max_rss, view.cpu = line.max_rss, line.cpu
    view.stdout_tail, view.stderr_tail = _tail(line.stdout), _tail(line.stderr)
    view.elements = view.elements or line.elements
    return view


class Listing:
    """Reads of one pilot; ``journal`` may be None where the pilot's directory is not at hand."""

    def __init__(self, link: Link, journal: Journal | None) -> None:
        self.link = link
        self.journal = journal

    def views(self, ids: Sequence[str]) -> list[TaskView | None]:
        """What Redis knows of these tasks, in one round trip for each 500; None where it knows nothing."""
        found: list[TaskView | None] = []
        for first in range(0, len(ids), SLICE):
            part = ids[first : first + SLICE]
            rows = self.link.pipeline([("HMGET", keys.job(i), *FIELDS) for i in part])
            found += [view_of(i, row) if row[0] is not None else None for i, row in zip(part, rows, strict=True)]
        return found

    def task(self, task_id: str) -> TaskView | None:
        """All that is known of one task."""
        view = self.views([task_id])[0]
        lines = self.journal.find(task_id) if self.journal is not None else []
        if view is None:
            if not lines:
                return self._element_without_record(task_id)
            return from_line(lines[0])
        if view.array_size:
            array, following, bits = self._array(task_id)
            view.elements = element_ranges(bits, array, following)
        if view.ended and lines:
            enrich(view, lines[0])
        return view

    def _array(self, task_id: str) -> tuple[str, int, bytes]:
        row, bits = self.link.pipeline(
            [("HMGET", keys.job(task_id), "pq_array", "pq_next"), ("GET", keys.bits(task_id))]
        )
        return _text(row[0]), int(row[1] or 0), bits or b""

    def _element_without_record(self, task_id: str) -> TaskView | None:
        """An element that was not handed out yet (it has no record), or whose line is still on its way."""
        array, _, index = task_id.rpartition("_")
        if not array or not index.isdigit():
            return None
        view = self.views([array])[0]
        if view is None or not view.array_size:
            return None
        span, following, bits = self._array(array)
        start, step, count = map(int, span.split(":"))
        position, rest = divmod(int(index) - start, step)
        if rest or not 0 <= position < count:
            return None
        word = outcome_at(bits, position, following)
        status = {"waiting": view.status if view.status == "deferred" else "queued"}.get(word, word)
        return TaskView(
            id=task_id, name=view.name, status=status, queue=view.queue, command=view.command, array=array,
            index=int(index), times={"queued": view.times["queued"]}, ended=status in ENDED,
        )  # fmt: skip

    def ids(self, status: str | None) -> Iterator[str]:
        """Ids of the records Redis has, by RQ's lists and registries; running first, then waiting, then ended."""
        classes = [name.decode() for name in self.link.call("HKEYS", keys.CLASSES)]
        queues = sorted({name.partition(".")[0] for name in classes})
        kinds = (("wip", "started"), ("deferred", "deferred"), ("failed", "failed"), ("canceled", "canceled"), ("finished", "finished"))
        for kind, word in kinds[:1]:
            if status in (None, word):
                for queue in queues:
                    for member in self.link.call("ZREVRANGE", keys.registry(kind, queue), 0, -1):
                        yield member.decode().rpartition(":")[0]
        if status in (None, "queued"):
            for name in classes:
                for member in self.link.call("LRANGE", keys.queue(name), 0, 9999):
                    yield member.decode()
        for kind, word in kinds[1:]:
            if status in (None, word) or (kind == "failed" and status == "stopped"):
                for queue in queues:
                    for member in self.link.call("ZREVRANGE", keys.registry(kind, queue), 0, 9999):
                        yield member.decode()

    def tasks(self, status: str | None, limit: int) -> Iterator[TaskView]:
        """Tasks Redis knows, then those only the journal remembers."""
        seen: set[str] = set()
        batch: list[str] = []

        def flush() -> Iterator[TaskView]:
            for view in self.views(batch):
                if view is not None and (status is None or view.status == status):
                    yield view

        for task_id in self.ids(status):
            if task_id in seen:
                continue
            seen.add(task_id)
            batch.append(task_id)
            if len(batch) >= min(SLICE, limit):
                for view in flush():
                    yield view
                    limit -= 1
                    if limit <= 0:
                        return
                batch = []
        for view in flush():
            yield view
            limit -= 1
            if limit <= 0:
                return
        yield from self._remembered(status, limit, seen)

    def _remembered(self, status: str | None, limit: int, seen: set[str]) -> Iterator[TaskView]:
        if self.journal is None:
            return
        for line in self.journal.last(limit + len(seen)):
            if line.final and line.id not in seen and (status is None or line.status == status):
                seen.add(line.id)
                yield from_line(line)
                limit -= 1
                if limit <= 0:
                    return

    def nodes(self) -> list[NodeView]:
        infos = [msgspec.json.decode(r, type=NodeInfo) for r in self.link.call("HVALS", keys.NODES)]
        infos.sort(key=lambda info: info.name)
        rows = self.link.pipeline([("HMGET", keys.worker(i.name), "last_heartbeat", "pq_used", "pq_running") for i in infos])
        return [_node_view(info, row) for info, row in zip(infos, rows, strict=True)]


def _node_view(info: NodeInfo, row: Any) -> NodeView:
    beat, used, running = map(_text, row)
    return NodeView(
        name=info.name,
        state="up" if beat else "lost",
        host=info.host,
        pid=info.pid,
        cores=len(info.cores),
        used=int(used or 0),
        shared_cores=info.shared_cores,
        running=int(running or 0),
        last_beat=from_iso(beat),
    )

