"""`PilotMetrics`: the state of a running pilot, and what its journal says, as text for Prometheus.

FAMILIES is the list of what is exported; docs/metrics.md and docs/grafana.json are checked against it. Labels are
bounded: names that differ in their numbers only count as one (``fold-*``), and what is beyond a bound is ``(other)``.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.overview import Overview
from pilotq.broker.client.overview_tally import pattern_of
from pilotq.broker.errors import PilotqError
from pilotq.broker.log import log
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store import keys
from pilotq.broker.store.connection import ReplyError
from pilotq.broker.store.journal import Journal, JournalEntry, JournalReader
from pilotq.broker.store.resources import parse_allocation
from pilotq.broker.tasks.array_outcomes import count_indices

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

NAMES_MAX = 50  # names of tasks that have series of their own
NODES_MAX = 250  # nodes that have
OTHER = "(other)"
POLL_S = 1.0  # how often the journal is looked at
TROUBLE_S = 4.0  # to wait longer when it cannot be read
PIECE, PAUSE_S = 500, 0.001  # entries that are read at a time, and what is left to a scrape after them
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WAITS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 21600.0, 86400.0)
STARTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0, 600.0)
RUNS = (0.01, 0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 14400.0, 86400.0)


class Family(NamedTuple):
    """One metric: counter, gauge or histogram; its labels; its text."""

    kind: str
    labels: tuple[str, ...]
    text: str


FAMILIES: Final[dict[str, Family]] = {
    # of the journal
    "pilotq_tasks_ended_total": Family("counter", ("status", "reason"), "Tasks that ended, elements of arrays too."),
    "pilotq_executions_total": Family("counter", ("name", "status", "reason"), "Executions that ended."),
    "pilotq_retries_total": Family("counter", ("name",), "Executions after which the task was queued again."),
    "pilotq_core_seconds_total": Family("counter", ("name",), "Cores times seconds that executions held them."),
    "pilotq_cpu_seconds_total": Family("counter", ("name",), "CPU time that executions used."),
    "pilotq_queue_wait_seconds": Family("histogram", ("name",), "From submit to launch, of first executions."),
    "pilotq_start_latency_seconds": Family("histogram", (), "From hand-out to launch; what is prefetched waits."),
    "pilotq_run_seconds": Family("histogram", ("name",), "From launch to end."),
    "pilotq_journal_bytes": Family("gauge", (), "Size of the journal."),
    "pilotq_journal_unread_bytes": Family("gauge", (), "Bytes of it that these metrics have not read yet."),
    "pilotq_journal_stream_entries": Family("gauge", (), "Entries that the journal is to get."),
    # of the pilot now
    "pilotq_tasks": Family("gauge", ("state",), "Tasks by state, elements of arrays one each."),
    "pilotq_tasks_submitted_total": Family("counter", (), "Tasks accepted, elements of arrays one each."),
    "pilotq_waiting_tasks": Family("gauge", ("queue", "priority", "shape"), "Tasks that wait for resources."),
    "pilotq_nodes": Family("gauge", ("state",), "Nodes by state: up, lost, drained, retired, quarantined."),
    "pilotq_cores": Family("gauge", (), "Cores of all nodes."),
    "pilotq_cores_used": Family("gauge", (), "Cores that are reserved."),
    "pilotq_gpus": Family("gauge", (), "GPUs of all nodes."),
    "pilotq_gpus_used": Family("gauge", (), "GPUs that executions with a record have, parts of GPUs as parts."),
    "pilotq_memory_bytes": Family("gauge", (), "Memory of all nodes that count it."),
    "pilotq_memory_used_bytes": Family("gauge", (), "Memory of it that executions with a record asked for."),
    "pilotq_node_cores": Family("gauge", ("node",), "Cores of a node."),
    "pilotq_node_cores_used": Family("gauge", ("node",), "Cores of it that are reserved."),
    "pilotq_node_running": Family("gauge", ("node",), "Slots of it in which tasks run."),
    "pilotq_paused": Family("gauge", (), "1 while nothing new is started."),
    "pilotq_server_memory_bytes": Family("gauge", (), "Memory of the server."),
    "pilotq_server_clients": Family("gauge", (), "Connections to the server."),
    "pilotq_server_commands_total": Family("counter", (), "Commands that the server has processed."),
    "pilotq_server_cpu_seconds_total": Family("counter", (), "CPU time of the server."),
}  # fmt: skip


class _Histogram:
    """Durations in buckets."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        seconds = max(seconds, 0.0)
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        total, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class JournalTotals:
    """Sums over the entries of a journal, by name and by outcome. Not for several threads."""

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, ...]] = Counter()  # status, reason
        self.executions: Counter[tuple[str, ...]] = Counter()  # name, status, reason
        self.retries: Counter[tuple[str, ...]] = Counter()
        self.core_seconds: dict[tuple[str, ...], float] = defaultdict(float)
        self.cpu_seconds: dict[tuple[str, ...], float] = defaultdict(float)
        self.waits: dict[tuple[str, ...], _Histogram] = {}
        self.starts: dict[tuple[str, ...], _Histogram] = {(): _Histogram(STARTS)}
        self.runs: dict[tuple[str, ...], _Histogram] = {}
        self._names: dict[str, tuple[str]] = {}  # pattern -> label
        self._canceled: Counter[str] = Counter()  # elements that were counted so, by array

    def add(self, entry: JournalEntry) -> None:
        """Count one entry."""
        if entry.elements:
            # Elements have entries of their own, but for those that never ran.
            without = count_indices(entry.elements.get("canceled", "")) - self._canceled[entry.id]
            if without > 0:
                self.ended["canceled", entry.reason] += without
                self._canceled[entry.id] += without
            return
        if entry.final:
            self.ended[entry.status, entry.reason] += 1
            if entry.array and entry.status == "canceled":
                self._canceled[entry.array] += 1
        if not entry.execution:
            return
        name = self._label(entry.name)
        self.executions[name[0], entry.status, entry.reason] += 1
        if not entry.final and entry.joining is None:
            self.retries[name] += 1
        if entry.started is None:
            return
        if entry.execution == 1 and entry.queued is not None:
            _histogram(self.waits, name, WAITS).add(entry.started - entry.queued)
        if entry.handed is not None:
            self.starts[()].add(entry.started - entry.handed)
        if entry.ended is not None:
            ran = max(entry.ended - entry.started, 0.0)
            _histogram(self.runs, name, RUNS).add(ran)
            self.core_seconds[name] += ran * sum(len(part.cores) for part in parse_allocation(entry.cpus))
        self.cpu_seconds[name] += entry.cpu or 0.0

    def values(self) -> dict[str, dict[tuple[str, ...], Any]]:
        """The sums now, by family and labels; a histogram as its buckets and its sum."""
        counters: dict[str, Mapping[tuple[str, ...], float]] = {
            "pilotq_tasks_ended_total": self.ended, "pilotq_executions_total": self.executions,
            "pilotq_retries_total": self.retries, "pilotq_core_seconds_total": self.core_seconds,
            "pilotq_cpu_seconds_total": self.cpu_seconds,
        }  # fmt: skip
        histograms = {
            "pilotq_queue_wait_seconds": self.waits, "pilotq_start_latency_seconds": self.starts,
            "pilotq_run_seconds": self.runs,
        }  # fmt: skip
        found: dict[str, dict[tuple[str, ...], Any]] = {name: dict(values) for name, values in counters.items()}
        for name, values in histograms.items():
            found[name] = {labels: (one.buckets(), one.sum) for labels, one in values.items()}
        return found

    def _label(self, name: str) -> tuple[str]:
        pattern = pattern_of(name)
        found = self._names.get(pattern)
        if found is None:
            found = (pattern if len(self._names) < NAMES_MAX else OTHER,)
            if len(self._names) < NAMES_MAX:
                self._names[pattern] = found
        return found


def _histogram(
    found: dict[tuple[str, ...], _Histogram], name: tuple[str, ...], bounds: tuple[float, ...]
) -> _Histogram:
    if name not in found:
        found[name] = _Histogram(bounds)
    return found[name]


class PilotMetrics:
    """The metrics of one pilot. `text` may be called by several threads; it begins to read the journal."""

    def __init__(self, pilot: Pilot) -> None:
        self._pilot = pilot
        self._reader = JournalReader(Journal(pilot.journal), None)
        self._totals = JournalTotals()
        self._broker: Broker | None = None
        self._lock, self._summing = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Read the journal from now on, in a thread of its own; may be repeated."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, name="metrics of the journal", daemon=True)
            self._thread.start()

    def read_all(self) -> None:
        """Read what the journal holds by now, instead of `start`."""
        self._thread = threading.current_thread()
        for entry in self._reader.read():
            self._totals.add(entry)

    def close(self) -> None:
        self._ended.set()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()
        if self._broker is not None:
            self._broker.close()

    def text(self) -> bytes:
        """All metrics now; raises PilotqError where the server does not answer."""
        from prometheus_client.exposition import generate_latest

        with self._lock:
            self.start()
            return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        if self._broker is None:
            self._broker = Broker.connect(self._pilot.directory)
        try:
            overview, facts = self._broker.overview(seconds=0.0), self._facts(self._broker)
        except PilotqError:
            self._broker.close()
            self._broker = None
            raise
        values: dict[str, Any] = {**_of_overview(overview), **facts, **self._of_journal()}
        for name, family in FAMILIES.items():
            if name in values:
                yield _metric(name, family, values[name])

    def _follow(self) -> None:
        said = ""
        while not self._ended.is_set():
            try:
                self._read_news()
            except OSError as error:  # it may come back, as a file system does
                if str(error) != said:
                    log(f"the journal cannot be read, and its metrics stand still: {error}", level="warning")
                said = str(error)
                self._ended.wait(TROUBLE_S)
            self._ended.wait(POLL_S)

    def _read_news(self) -> None:
        news = self._reader.read()
        while piece := list(islice(news, PIECE)):
            with self._summing:
                for entry in piece:
                    self._totals.add(entry)
            if self._ended.wait(PAUSE_S):
                return

    def _of_journal(self) -> dict[str, Any]:
        try:
            size = os.stat(self._pilot.journal).st_size
        except FileNotFoundError:
            size = 0
        with self._summing:
            found = self._totals.values()
        return found | {
            "pilotq_journal_bytes": {(): size},
            "pilotq_journal_unread_bytes": {(): max(size - self._reader.offset, 0)},
        }

    @staticmethod
    def _facts(broker: Broker) -> dict[str, Any]:
        found: dict[str, Any] = {"pilotq_journal_stream_entries": {(): broker.link.call("XLEN", keys.JOURNAL)}}
        try:
            info = dict(line.partition(":")[::2] for line in broker.link.call("INFO").decode().splitlines())
        except ReplyError:  # a server of the user's own may not tell
            return found
        for name, wanted in {
            "pilotq_server_memory_bytes": ("used_memory",), "pilotq_server_clients": ("connected_clients",),
            "pilotq_server_commands_total": ("total_commands_processed",),
            "pilotq_server_cpu_seconds_total": ("used_cpu_user", "used_cpu_sys"),
        }.items():  # fmt: skip
            found[name] = {(): sum(float(info.get(key, 0)) for key in wanted)}
        return found


def _of_overview(found: Overview) -> dict[str, Any]:
    counts, nodes = found.counts, found.nodes
    tasks = {
        "deferred": found.deferred, "queued": max(found.waiting - found.deferred, 0), "prefetched": found.prefetched,
        "running": found.running, "finished": counts.finished, "failed": counts.failed, "canceled": counts.canceled,
    }  # fmt: skip
    waiting = {(one.queue, str(one.priority), one.shape): one.waiting for one in found.queue}
    others = tasks["queued"] - sum(waiting.values())
    if found.more_classes and others > 0:
        waiting[OTHER, OTHER, OTHER] = others
    states = Counter(node.state for node in nodes)
    own = nodes[:NODES_MAX]
    return {
        "pilotq_tasks": {(state,): number for state, number in tasks.items()},
        "pilotq_tasks_submitted_total": {(): counts.total},
        "pilotq_waiting_tasks": waiting,
        "pilotq_nodes": {(s,): states[s] for s in ("up", "lost", "drained", "retired", "quarantined")},
        "pilotq_cores": {(): found.cores}, "pilotq_cores_used": {(): found.used},
        "pilotq_gpus": {(): sum(len(node.gpus) for node in nodes)},
        "pilotq_gpus_used": {(): _gpus(execution.cores for execution in found.executions)},
        "pilotq_memory_bytes": {(): sum(node.memory for node in nodes)},
        "pilotq_memory_used_bytes": {(): sum(node.memory_used for node in nodes)},
        "pilotq_node_cores": {(node.name,): len(node.cores) for node in own},
        "pilotq_node_cores_used": {(node.name,): node.used for node in own},
        "pilotq_node_running": {(node.name,): node.running for node in own},
        "pilotq_paused": {(): int(found.paused)},
    }  # fmt: skip


def _gpus(allocations: Iterable[str]) -> float:
    """How many GPUs these have; of a GPU that is shared the part."""
    used = 0.0
    for text in allocations:
        if ";" in text:
            for part in parse_allocation(text):
                used += sum(float(gpu.partition("@")[2] or 1) for gpu in part.gpus)
    return used


def _metric(name: str, family: Family, values: dict[tuple[str, ...], Any]) -> Metric:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.text, labels=family.labels)
        for labels, (buckets, total) in values.items():
            histogram.add_metric(labels, buckets, total)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name.removesuffix("_total"), family.text, labels=family.labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric
