"""`OverviewReader`: makes one `Overview` after another, and reads at each only what may have changed."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator

from pilotq.broker.client.explain import Explainer
from pilotq.broker.client.node_views import gpu_view
from pilotq.broker.client.overview import (
    ExecutionView,
    FailureGroup,
    NodeOverview,
    Overview,
    Progress,
    QueueOverview,
    Sample,
)
from pilotq.broker.client.overview_census import ArrayState, Census
from pilotq.broker.client.overview_tally import SAMPLE_S, SAMPLES, GroupTally, Tally, pattern_of
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.client.snapshot import snapshot_of
from pilotq.broker.client.views import Counts, seconds_left
from pilotq.broker.store import keys
from pilotq.broker.store.bundles import Bundles
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.leases import LeaseRecord, number_leased, task_leases
from pilotq.broker.store.registry import decode_texts, read_nodes, user_queues
from pilotq.broker.store.resources import NodeInfo, class_info
from pilotq.broker.store.store import from_iso
from pilotq.broker.store.value_blocks import BLOCK

NAMED_MAX = 4096  # executions that are named
READ_MAX = 500  # records of executions that are read at one update
BLOCKS_MAX = 16  # of bundles, that are read for names at one update: a block has 1,000 tasks
CLASSES_MAX = 1000  # classes whose lengths are read
SHOWN_CLASSES, SHOWN_PROGRESS, SHOWN_FAILURES = 30, 100, 100
SLOW_S = 5.0  # how often nodes and queues are read
EXPLAIN_S, EXPLAIN_SHARE = 1.0, 20  # one class is explained at a time, which takes at most this part of the time
RATE_S = 60.0
FIELDS = ("pq_name", "pq_array_of", "pq_class", "pq_node", "pq_cpus", "started_at", "pq_running", "pq_slot")


class _Known:
    """What was read of an execution that a node has."""

    __slots__ = ("class_name", "has_slot", "nameless", "view")

    def __init__(self, view: ExecutionView, class_name: str, has_slot: bool, nameless: bool) -> None:
        self.view = view
        self.class_name = class_name
        self.has_slot = has_slot
        self.nameless = nameless  # its name was not read yet

    @property
    def launched(self) -> bool:
        return self.view.started is not None

    @property
    def is_complete(self) -> bool:
        return self.launched and not self.nameless


class OverviewReader:
    """Reads one running pilot. Not for several threads."""

    def __init__(self, link: Connection, queries: TaskQueries, directory: str) -> None:
        self._link = link
        self._queries = queries
        self._bundles = Bundles(link)
        self._directory = directory
        self._tally = Tally(queries.journal)
        self._census = Census()
        self._census.begin(link)
        self._known: dict[str, _Known] = {}  # by member of a wip registry
        self._turn: deque[str] = deque()  # of these, those that are to be read again
        self._queues: list[str] = []
        self._infos: list[NodeInfo] = []
        self._beats: dict[str, bool] = {}
        self._nodes: dict[str, NodeOverview] = {}
        self._slow = self._explain = 0.0  # when to read these again (monotonic)
        self._why: dict[str, QueueOverview] = {}
        self._ends: deque[tuple[float, int]] = deque()  # monotonic, tasks ended by then
        self._uses: dict[int, tuple[int, int]] = {}  # number of a sample -> cores used, cores

    def update(self, seconds: float) -> Overview:
        """The pilot now; so much of the journal is read as takes no longer than ``seconds``."""
        now, clock = time.time(), time.monotonic()
        if clock >= self._slow:
            self._read_slow()
            self._slow = time.monotonic() + SLOW_S
        self._tally.update(seconds)
        counts, control, status, usage, drained, quarantine, seq, classes, suspended, *deferred = self._link.pipeline([
            ("HMGET", keys.COUNTS, "total", "finished", "failed", "canceled"),
            ("HMGET", keys.CONTROL, "paused", "stop"), ("HMGET", keys.STATUS, "slots", "journal"),
            ("HGETALL", keys.USAGE), ("HGETALL", keys.DRAINED), ("HGETALL", keys.QUARANTINE), ("GET", keys.SEQ),
            ("HLEN", keys.CLASSES), ("EXISTS", keys.SUSPENDED),
            *(("ZCARD", keys.registry("deferred", queue)) for queue in self._queues),
        ])  # fmt: skip
        total, finished, failed, canceled = (int(value or 0) for value in counts)
        found = Overview(
            at=now, counts=Counts(total=total, finished=finished, failed=failed, canceled=canceled),
            deferred=sum(deferred), paused=bool(control[0]), notes=_notes(control, status[1], suspended),
            seconds=float(SAMPLE_S),
        )  # fmt: skip
        self._census.forget(self._tally.take_ended())
        self._census.update(self._link, int(seq or 0))
        leased = self._executions(found, int(status[0] or 0))
        closed = {name: f"quarantined {why}" for name, why in decode_texts(quarantine).items()} | decode_texts(drained)
        self._use(found, decode_texts(usage), closed)
        found.waiting = max(found.counts.left - found.running - found.prefetched, 0)
        self._rates(found, clock)
        self._progress(found, leased)
        self._queue(found, classes)
        self._failures(found)
        found.behind = self._tally.behind
        return found

    # -- nodes and what they have -----------------------------------------------------------------------------------

    def _read_slow(self) -> None:
        self._queues = user_queues(self._link)
        self._infos = sorted(read_nodes(self._link), key=lambda info: info.name)
        names = [info.name for info in self._infos]
        beats = self._link.pipeline([("EXISTS", keys.worker(name)) for name in names]) if names else []
        self._beats = {name: bool(beat) for name, beat in zip(names, beats, strict=True)}
        self._nodes = {
            info.name: NodeOverview(
                name=info.name, state="up", host=info.host, cores=info.cores, threads=info.threads,
                shared_cores=info.shared_cores, memory=info.memory,
                gpus=[gpu_view(name, info.gpu_facts.get(name)) for name in info.gpus],
            )
            for info in self._infos
        }  # fmt: skip

    def _use(self, found: Overview, usage: dict[str, str], closed: dict[str, str]) -> None:
        for name, node in self._nodes.items():
            state, _, node.why = closed.get(name, "").partition(" ")
            node.state = (state or "up") if self._beats[name] else "lost"
            used, _, running = usage.get(name, "").partition(" ")
            node.used, node.running, node.memory_used = int(used or 0), int(running or 0), 0
            found.cores, found.used = found.cores + len(node.cores), found.used + node.used
        for execution in found.executions:
            for part in execution.cores.split("],") if execution.memory else ():
                if (there := self._nodes.get(part.partition("[")[0])) is not None:
                    there.memory_used += execution.memory
        found.nodes = list(self._nodes.values())

    def _executions(self, found: Overview, slots: int) -> Counter[str]:
        """Add what nodes have; returns the number of elements that leases hold, by array."""
        commands = [(("ZCARD", key), ("ZREVRANGE", key, 0, NAMED_MAX - 1))
                    for key in (keys.registry("wip", queue) for queue in self._queues)]  # fmt: skip
        replies = self._link.pipeline([command for pair in commands for command in pair])
        handed = sum(replies[::2])
        members = {member.decode("utf-8", "replace") for part in replies[1::2] for member in part}
        arrays = {member for member in members if member.endswith(":0")}
        handed -= len(arrays)
        members -= arrays
        for member in self._known.keys() - members:
            del self._known[member]
        fresh = [member for member in members if member not in self._known][:READ_MAX]
        while self._turn and len(fresh) < READ_MAX:
            member = self._turn.popleft()
            if member in self._known and not self._known[member].is_complete:
                fresh.append(member)
                if len(fresh) > len(self._turn):
                    break
        self._read(fresh)
        found.executions = [known.view for known in self._known.values()][:NAMED_MAX]
        leased = self._leases()
        handed += sum(leased.values())
        slots_read = sum(known.has_slot for known in self._known.values())
        found.running = max(slots_read, min(handed, slots))
        found.prefetched = max(handed - found.running, 0)
        found.unnamed = max(handed - len(found.executions), 0)
        return leased

    def _read(self, members: list[str]) -> None:
        ids = [keys.job(member.rpartition(":")[0]) for member in members]
        rows = self._link.read_hashes(ids, *FIELDS) if ids else []
        names = self._names_in_bundles(members, rows)
        classes = [(row[FIELDS.index("pq_class")] or b"").decode("utf-8", "replace") for row in rows]
        leases = task_leases(self._link, [(m, keys.queue_of(name)) for m, name in zip(members, classes, strict=True)])
        for member, row, lease in zip(members, rows, leases, strict=True):
            name, array, class_name, node, cpus, started, running, slot = (
                value.decode("utf-8", "replace") if value else "" for value in row
            )
            task_id, _, execution = member.rpartition(":")
            info = class_info(class_name)
            if not name and array in self._census.arrays:
                name = self._census.arrays[array].name
            view = ExecutionView(
                id=task_id, execution=int(execution) if execution.isdigit() else 0, array=array,
                name=names.get(member, name) or "",
                node=(lease.address if lease is not None else node).rpartition(":")[0],
            )  # fmt: skip
            if running and cpus:
                view.cores = cpus
                view.started = _time(started)
                view.memory = info.request.memory if info is not None else 0
            has_slot = bool(slot) or (lease is not None and lease.has_slot)
            known = self._known[member] = _Known(view, class_name, has_slot, member in names and names[member] is None)
            if not known.is_complete:
                self._turn.append(member)

    def _names_in_bundles(self, members: list[str], rows: list[list[bytes | None]]) -> dict[str, str | None]:
        """Names of tasks of bundles by member; None of those that are to be read at another update."""
        found: dict[str, str | None] = {}
        places: dict[tuple[str, int], str] = {}
        for member, row in zip(members, rows, strict=True):
            array, known = (row[1] or b"").decode("utf-8", "replace"), self._known.get(member)
            if known is not None and not known.nameless:
                found[member] = known.view.name
            elif array and not row[0] and (index := member.rpartition(":")[0].removeprefix(f"{array}_")).isdigit():
                places[array, int(index)] = member
        self._bundles.learn(array for array, _ in places)
        bundled = sorted(place for place in places if self._bundles.is_bundle(place[0]))
        found |= dict.fromkeys(places[place] for place in bundled)
        blocks = sorted({(bundle, position // BLOCK) for bundle, position in bundled})[:BLOCKS_MAX]
        for bundle, position in bundled:
            if (bundle, position // BLOCK) in blocks:
                one = self._bundles.member(bundle, position)
                found[places[bundle, position]] = one.name if one is not None else ""
        return found

    def _leases(self) -> Counter[str]:
        leased = number_leased(self._link)
        for node in self._nodes.values():
            node.elements = {}
        arrays = list(leased)[:NAMED_MAX]
        for array, members in zip(
            arrays, self._link.pipeline([("ZRANGE", keys.leases(a), 0, NAMED_MAX) for a in arrays]), strict=True
        ):
            for member in members:
                lease = LeaseRecord.read(array, member)
                if (there := self._nodes.get(lease.address.rpartition(":")[0])) is not None:
                    there.elements[array] = there.elements.get(array, 0) + lease.number
        return leased

    # -- progress ---------------------------------------------------------------------------------------------------

    def _rates(self, found: Overview, clock: float) -> None:
        ends = self._ends
        ends.append((clock, found.counts.ended))
        while len(ends) > 2 and ends[1][0] < clock - RATE_S:
            ends.popleft()
        if clock - ends[0][0] >= SAMPLE_S:
            found.rate = max(ends[-1][1] - ends[0][1], 0) / (clock - ends[0][0])
        else:
            found.rate = sum(group.rate(found.at) for group in self._tally.groups.values())
        found.left_s = seconds_left(found.counts.left, found.running, found.rate)
        last = int(found.at // SAMPLE_S)
        self._uses[last] = (found.used, found.cores)
        for number in [number for number in self._uses if number <= last - SAMPLES]:
            del self._uses[number]
        for number in range(last - SAMPLES + 1, last + 1):
            used, cores = self._uses.get(number, (None, None))
            found.history.append(Sample(float(number * SAMPLE_S), self._tally.samples.get(number, 0), used, cores))

    def _progress(self, found: Overview, leased: Counter[str]) -> None:
        handed, elements = Counter[str](), Counter(leased)
        for execution in found.executions:
            if execution.array:
                elements[execution.array] += 1
            else:
                handed[pattern_of(execution.name)] += 1
        for array, state in self._census.arrays.items():
            found.progress.append(self._of_array(array, state, elements[array], found.at))
        names = self._census.names
        for (array, name), group in self._tally.groups.items():
            if (not array and name not in names and name != "\0") or (array and array not in self._census.arrays):
                found.progress.append(_progress(group, array, group.name, 0, 0, found.at))
        for name, number in names.items():
            tally = self._tally.groups.get(("", name)) or GroupTally(name)
            found.progress.append(_progress(tally, "", name, number, handed[name], found.at))
        known = sum(one.total - one.finished - one.failed - one.canceled for one in found.progress)
        found.progress.sort(key=lambda one: (one.waiting + one.handed == 0, -one.handed, -one.total, one.name or ""))
        del found.progress[SHOWN_PROGRESS:]
        if (others := found.counts.left - known) > 0 and not self._tally.behind:
            found.progress.append(Progress(name=None, total=others, waiting=others))

    def _of_array(self, array: str, state: ArrayState, handed: int, now: float) -> Progress:
        tally = self._tally.groups.get((array, "")) or GroupTally(state.name)
        canceled = min(max(tally.outcomes["canceled"], 0), state.unfinished)
        one = Progress(
            name=state.name, array=array, total=state.size, finished=state.ended - state.unfinished,
            failed=state.unfinished - canceled, canceled=canceled,
            handed=min(handed, state.size - state.ended), rate=tally.rate(now),
        )  # fmt: skip
        one.waiting = state.size - state.ended - one.handed
        one.left_s = seconds_left(one.waiting + one.handed, one.handed, one.rate)
        return one

    # -- queue and failures -----------------------------------------------------------------------------------------

    def _queue(self, found: Overview, classes: int) -> None:
        if classes <= CLASSES_MAX:
            names = self._link.call("HKEYS", keys.CLASSES)
        else:
            _, flat = self._link.call("HSCAN", keys.CLASSES, 0, "COUNT", CLASSES_MAX)
            names = flat[::2]
        texts = [name.decode("utf-8", "replace") for name in names]
        lengths = self._link.pipeline([("LLEN", keys.queue(name)) for name in texts]) if texts else []
        waiting = {name: int(length) for name, length in zip(texts, lengths, strict=True) if length}
        for state in self._census.arrays.values():
            if state.class_name in waiting and state.following < state.size:
                waiting[state.class_name] += state.size - state.following - 1
        infos = {name: info for name in waiting if (info := class_info(name)) is not None}
        order = sorted(infos, key=lambda name: (-infos[name].priority, -waiting[name], name))
        shown = [
            QueueOverview(name=name, queue=infos[name].queue, priority=infos[name].priority,
                          shape=infos[name].request.label(), waiting=waiting[name])
            for name in order[:SHOWN_CLASSES]
        ]  # fmt: skip
        found.more_classes = max(len(order) - len(shown), 0) + max(classes - len(texts), 0)
        self._why = {one.name: self._why.get(one.name, one) for one in shown}
        self._explain_one(shown)
        for one in shown:
            known = self._why[one.name]
            one.first, one.why, one.until = known.first, known.why, known.until
        found.queue = shown

    def _explain_one(self, shown: list[QueueOverview]) -> None:
        """Explain the first task of the class that was explained longest ago."""
        began = time.monotonic()
        if not shown or began < self._explain:
            return
        one = next((one for one in shown if not self._why[one.name].first), None)
        name = one.name if one is not None else next(iter(self._why))
        first = self._link.call("LINDEX", keys.queue(name), 0)
        views = self._queries.views([first.decode("utf-8", "replace")]) if first is not None else [None]
        known = self._why.pop(name)
        if views[0] is not None:
            now = time.time()
            why = Explainer(
                self._link, self._queries, self._directory, now,
                lambda nodes: snapshot_of(self._link, nodes, self._reservations(), now),
            ).explain(views[0])  # fmt: skip
            known = QueueOverview(
                name=name, queue="", priority=0, shape="", first=why.id, why=why.why, until=why.until
            )  # fmt: skip
        self._why[name] = known
        ended = time.monotonic()
        self._explain = ended + max(EXPLAIN_S, (ended - began) * EXPLAIN_SHARE)

    def _reservations(self) -> Iterator[tuple[str, str, float | None]]:
        for known in self._known.values():
            if known.launched:
                yield known.view.cores, known.class_name, known.view.started

    def _failures(self, found: Overview) -> None:
        groups: list[FailureGroup] = sorted(self._tally.failures.values(), key=lambda group: -group.number)
        found.failures = groups[:SHOWN_FAILURES]
        found.more_failures = self._tally.more_failures + sum(group.number for group in groups[SHOWN_FAILURES:])


def _progress(tally: GroupTally, array: str, name: str, still: int, handed: int, now: float) -> Progress:
    """The progress of a group of which so many have not ended."""
    outcomes = tally.outcomes
    one = Progress(
        name=name, array=array, finished=outcomes["finished"], failed=outcomes["failed"],
        canceled=outcomes["canceled"], handed=min(handed, still), rate=tally.rate(now),
    )  # fmt: skip
    one.waiting = still - one.handed
    one.total = one.finished + one.failed + one.canceled + still
    one.left_s = seconds_left(one.waiting + one.handed, one.handed, one.rate)
    return one


def _time(text: str) -> float | None:
    try:
        return from_iso(text)
    except ValueError:
        return None


def _notes(control: list[bytes | None], journal: bytes | None, suspended: int) -> list[str]:
    """Why nothing at all is started."""
    paused, stop = control
    notes = []
    if stop:
        notes.append("the pilot is ending")
    elif paused:
        notes.append("the pilot is paused: nothing new starts")
    if journal:
        notes.append(f"nothing new starts while the journal cannot be written: {journal.decode('utf-8', 'replace')}")
    if suspended:
        notes.append("nothing new starts: the queues are suspended, until `pilotq exec -- rq resume`")
    return notes
