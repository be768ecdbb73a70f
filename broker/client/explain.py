"""`Explainer`: why a task does not run yet, and when it may; or why it ended as it did. In sentences, from Redis.

Placement itself says what is missing (cluster.py, shortage.py), so that explanation and decision cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from pilotq.broker.client.joins import open_children, waits_for, way_to
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.client.record_views import array_of, indices_in
from pilotq.broker.client.snapshot import Snapshot, take_snapshot
from pilotq.broker.client.views import Explanation, TaskView
from pilotq.broker.scheduling.status import HoldStatus
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.registry import nodes_and_missing, unavailable_nodes
from pilotq.broker.store.resources import ClassInfo, NodeInfo, class_info, parse_allocation
from pilotq.broker.tasks.array_outcomes import ids_text
from pilotq.broker.tasks.dependencies import (
    ANY_END,
    END_LETTERS,
    FINISHED,
    NOT_FINISHED,
    Dependency,
    read_dependency,
)
from pilotq.broker.tasks.model import NICE
from pilotq.broker.tasks.states import REASONS

NAMED = 5  # tasks that are named where there are more
CHAIN = 100  # how far the cause of an omitted task is followed
SEARCHED_MAX = 100_000  # entries of a class list that are searched for the place of a task
SHORT = 60  # characters of ranges of elements
# Beginnings of texts of REASONS that continue a sentence with "it"; the others name a thing.
HOW_IT_WAITS = {ANY_END: ", however that ends", NOT_FINISHED: ", and runs only if that does not finish"}
PREDICATES = ("ended", "was", "ran", "could", "failed", "raised", "returned", "asks", "asked", "used")


class Explainer:
    """Explains the tasks of one running pilot; ``now`` is unix time: an explanation is of one moment.
    ``snapshot`` gives what runs on nodes; by default it is read for each task."""

    def __init__(
        self, link: Connection, queries: TaskQueries, directory: str, now: float,
        snapshot: Callable[[Sequence[NodeInfo]], Snapshot] | None = None,
    ) -> None:  # fmt: skip
        self._link = link
        self._queries = queries
        self._directory = directory
        self._now = now
        self._snapshot = snapshot or (lambda nodes: take_snapshot(link, nodes, queries.executions(), now))

    def explain(self, view: TaskView) -> Explanation:
        """The explanation of one task."""
        found = ended(view)
        if view.ended:
            if view.reason == "dependency":
                self._cause(view, found)
        elif view.array_size and view.status == "started":
            parts = "tasks" if view.is_bundle else "elements"
            found.why = [*_elements(view), f"it ends when the last of its {parts} has ended"]
        elif view.status == "started":
            self._started(view, found)
        elif view.status == "deferred":
            self._joining(view, found) if view.reason == "joining" else self._deferred(view, found)
            self._circle(view, found)
        elif view.status == "queued":
            found.why = _elements(view)
            self._queued(view, found)
        else:
            found.why = [self._of_rq(view)]
        return found

    # -- what runs, and what has ended ------------------------------------------------------------------------------

    def _started(self, view: TaskView, found: Explanation) -> None:
        cancel, class_name = self._fields(view.id, "pq_cancel", "pq_class")
        begun = view.times.get("started")
        if begun is None:
            shortage = self._link.call("HGET", keys.worker(view.node), "pq_shortage") if view.node else None
            if shortage:
                text = shortage.decode("utf-8", "replace").rstrip(".")
                found.why = [f"it is held back on node {view.node}, and tried again there: {text}"]
            else:
                found.why = [f"it was handed to node {view.node}, and starts there as soon as a task like it ends"]
        else:
            found.why = [f"it runs on {view.cores or view.node}, for {duration(max(self._now - begun, 0.0))}"]
            info = class_info(class_name)
            if info is not None and info.request.limit is not None:
                found.until = begun + info.request.limit
                left = found.until - self._now
                found.why.append(
                    f"by its time limit or time request it ends in {duration(max(left, 0.0))} at the latest"
                )
        if cancel:
            found.why.append("it was canceled: its worker ends its processes, with SIGTERM and then SIGKILL")

    def _cause(self, view: TaskView, found: Explanation) -> None:
        """Add the task that did not end as required, at the beginning of the chain of tasks omitted because of it."""
        current, behind, seen = view, view, {view.id}
        for _ in range(CHAIN):
            bad = next(
                (p for p, ends in self._parents(current.id) if p.ended and END_LETTERS[p.status] not in ends), None
            )
            if bad is None or bad.id in seen:
                break
            seen.add(bad.id)
            current, behind = bad, current
            if bad.reason != "dependency":
                break
        if current.status == "finished":
            found.tasks, found.commands = [current.id], []
            ran = ended(current).why[0].removeprefix("it ")
            which = "this task" if behind is view else _named(behind)
            found.why.append(f"{_named(current)} {ran}; {which} runs only if that does not finish")
        elif current is not view:
            found.tasks = [current.id]
            found.why.append(f"{_named(current)} {current.status}: {ended(current).why[0]}")

    # -- what waits for other tasks ---------------------------------------------------------------------------------

    def _joining(self, view: TaskView, found: Explanation) -> None:
        joining, bad, first, cancel = self._fields(
            view.id, "pq_joining", "pq_bad_children", "pq_bad_child", "pq_cancel"
        )
        status, _, reason = joining.partition(":")
        how = f"{status} ({reason})" if reason else status
        found.why = [f"its process has ended: {how}"]
        if view.open_children:
            found.why.append(f"it waits for {view.open_children:,} of its {_children(view.children)}")
            found.tasks = open_children(self._link, view.id)
            named = (self._queries.task(child) for child in found.tasks[:NAMED])
            found.why += [f"{_named(child)} is {child.status}" for child in named if child is not None]
        else:
            found.why.append("all of its children have ended: it is about to end")
        if cancel:
            found.why.append("it was canceled, and its children with it: it ends when they have")
        elif status == "finished" and bad.isdigit() and int(bad):
            name = f", the first of them {first}" if first else ""
            found.why.append(f"it will have failed: {_children(int(bad))} did not finish{name}")

    def _circle(self, view: TaskView, found: Explanation) -> None:
        """Add the way by which a task waits for itself, if there is one."""
        ways = waits_for(self._link, [view.id]).get(view.id, [])
        if way := way_to(self._link, ways, {view.id}):
            text = " -> ".join((view.id, *way))
            found.why.append(f"it can never end by itself, as it waits for itself: {text}; cancel one of them")

    def _deferred(self, view: TaskView, found: Explanation) -> None:
        parents = self._parents(view.id)
        waits_for = [(parent, ends) for parent, ends in parents if not parent.ended]
        found.tasks = [parent.id for parent, _ in waits_for]
        found.why = [
            f"it waits for {_named(parent)}, which is {parent.status}{HOW_IT_WAITS.get(ends, '')}"
            for parent, ends in waits_for[:NAMED]
        ]
        if len(waits_for) > NAMED:
            found.why.append(f"and for {len(waits_for) - NAMED:,} more")
        if not parents:
            found.why = ["what it waits for is not known any more: RQ's tools may still show its dependencies"]
        elif not waits_for:
            found.why = ["all that it waits for has ended: it is about to be released"]

    def _parents(self, task_id: str) -> list[tuple[TaskView, str]]:
        """What a task depends on, or an element of an array; without tasks that are not known any more.

        Each with the letters of the ends that release it (see dependencies.py).
        """
        after = self._fields(task_id, "pq_after")[0].split()
        if not after and (array := array_of(task_id)) is not None:
            text, each = self._fields(array, "pq_after", "pq_parents")
            after = self._same_elements(task_id, array, text.split()) if each else text.split()
        if not after:
            ends = "kf" if self._fields(task_id, "allow_dependency_failures")[0] == "1" else FINISHED
            members = self._link.call("SMEMBERS", keys.dependencies(task_id))
            after = sorted(Dependency(m.decode(), ends).text(m.decode()) for m in members)
        views = ((self._queries.task(parent), ends) for parent, ends in map(read_dependency, after))
        return [(view, ends) for view, ends in views if view is not None]

    def _same_elements(self, task_id: str, array: str, parents: Sequence[str]) -> list[str]:
        """The elements of these arrays at the position of this one."""
        index = int(task_id.rpartition("_")[2])
        own = indices_in(self._fields(array, "pq_array")[0])
        position = own.position(index) if own is not None else None
        found = []
        for parent in parents:
            indices = indices_in(self._fields(parent, "pq_array")[0])
            if indices is not None and position is not None and position < len(indices):
                found.append(f"{parent}_{indices[position]}")
            else:  # only the journal may know it
                found.append(f"{parent}_{index}")
        return found

    # -- what waits for its turn ------------------------------------------------------------------------------------

    def _queued(self, view: TaskView, found: Explanation) -> None:
        found.why += self._nothing_starts()
        name, suspect_node = self._fields(view.id, "pq_class", "pq_suspect_node")
        if suspect_node:
            why = f"it failed at once on node {suspect_node}, like others before it: another node is to try it"
            found.why.append(why)
        where = view.id
        if not name and (array := array_of(view.id)) is not None:
            where, (name,) = array, self._fields(array, "pq_class")
        info = class_info(name)
        if info is None:
            found.why.append("the dispatcher has not read it yet")
            return
        nodes, absent = nodes_and_missing(self._link)
        if absent:
            found.why.append(f"not all nodes have joined yet: {', '.join(sorted(absent))}")
        if not nodes:
            found.why.append("no node is there: `pilotq nodes` lists those that have joined")
            return
        found.why += self._closed_nodes(nodes)
        if info.priority == NICE:
            found.why.append("it comes after all that are not nice: it begins when none of them could have its cores")
        if self._is_full(name, info, found):
            return
        self._resources(name, info, self._snapshot(nodes), found)
        found.why += self._tasks_before(where, name, info)

    def _is_full(self, name: str, info: ClassInfo, found: Explanation) -> bool:
        """Add the limit of its array, if that has one; returns whether nothing else is in its way."""
        if not info.at_most:
            return False
        text = self._link.call("HGET", keys.STATUS, "full")
        if text and name in msgspec.json.decode(text):
            found.why.append(f"at most {info.at_most:,} elements of its array may run at a time, and as many do")
            return True
        found.why.append(f"at most {info.at_most:,} elements of its array may run at a time, and fewer do")
        return False

    def _closed_nodes(self, nodes: Sequence[NodeInfo]) -> Iterator[str]:
        """Nodes that are assigned nothing, and the number of nodes without which nothing starts."""
        least = int(self._link.call("HGET", keys.CONTROL, "min_nodes") or 0)
        if len(nodes) < least:
            yield f"nothing begins before {least} nodes have joined: {len(nodes)} have"
        for name, text in sorted(unavailable_nodes(self._link).items()):
            if any(node.name == name for node in nodes):
                state, _, reason = text.partition(" ")
                yield f"node {name} gets nothing new: it is {state}" + (f" ({reason})" if reason else "")

    def _nothing_starts(self) -> Iterator[str]:
        """Why no task at all is started."""
        (paused, stop), journal, suspended = self._link.pipeline(
            [("HMGET", keys.CONTROL, "paused", "stop"), ("HGET", keys.STATUS, "journal"), ("EXISTS", keys.SUSPENDED)]
        )
        if stop:
            yield f"the pilot is ending: `pilotq start --resume {self._directory}` goes on with what has not ended"
        elif paused:
            yield "nothing is handed out: the pilot is paused"
        if journal:
            yield f"nothing is handed out while the journal cannot be written: {journal.decode('utf-8', 'replace')}"
        if suspended:
            yield "nothing is handed out: the queues are suspended, until `pilotq exec -- rq resume`"

    def _resources(self, name: str, info: ClassInfo, seen: Snapshot, found: Explanation) -> None:
        """Add what is missing and when it will be free, or for which task it is held."""
        cluster, request = seen.cluster, info.request
        held = self._held(seen)
        found.why.append(cluster.waits_for(request))
        if cluster.never_fits(request) is not None:
            found.why.append("as the nodes are it can never run: it waits for a node that is large enough")
            return
        if held is not None and held.class_name == name:
            found.why.append(f"{held.cores} is being kept free for the first task like it")
            found.until = held.frees_at
        elif cluster.fits(request):
            if held is not None:
                found.why.append(
                    f"{held.cores} is being kept free for a task that has waited longer; with a --time-limit that is "
                    "short enough it could run there meanwhile"
                )
            return
        found.until = found.until or seen.free_by(request)
        if found.until is None:
            found.why.append("nobody knows when there will be room: what is in its way has no time limit")
        else:
            left = duration(max(found.until - self._now, 0.0))
            found.why.append(f"by the time limits of what runs there is room in {left} at the latest")

    def _held(self, seen: Snapshot) -> HoldStatus | None:
        text = self._link.call("HGET", keys.STATUS, "hold")
        held = msgspec.json.decode(text, type=HoldStatus) if text else None
        if held is None or not {part.node for part in parse_allocation(held.cores)} <= set(seen.cluster.names):
            return None
        return held

    def _tasks_before(self, task_id: str, name: str, info: ClassInfo) -> Iterator[str]:
        """How many tasks go before it."""
        names = [name.decode() for name in self._link.call("HKEYS", keys.CLASSES)]
        higher = [n for n in names if (other := class_info(n)) is not None and other.priority > info.priority]
        if number := sum(map(int, self._link.pipeline([("LLEN", keys.queue(n)) for n in higher]))):
            yield f"{_count(number)} of higher priority may go first"
        if place := self._link.call("LPOS", keys.queue(name), task_id, "MAXLEN", SEARCHED_MAX):
            yield f"{_count(int(place))} like it came earlier"

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _of_rq(self, view: TaskView) -> str:
        """Sentences for statuses that only jobs of RQ's producers have."""
        if view.status == "scheduled":
            score = self._link.call("ZSCORE", keys.registry("scheduled", view.queue), view.id)
            left = float(score) - self._now if score else 0.0
            return f"it is scheduled: its time comes in {duration(left)}" if left > 0 else "its time has come"
        if view.status == "rate_limited":
            (key,) = self._fields(view.id, "rate_limit_key")
            return f"its producer's rate limit {key!r} lets only so many of its kind run at a time"
        return "its producer has not finished to submit it"

    def _fields(self, task_id: str, *names: str) -> list[str]:
        values = self._link.call("HMGET", keys.job(task_id), *names)
        return [value.decode("utf-8", "replace") if value else "" for value in values]


def ended(view: TaskView, directory: str = "") -> Explanation:
    """Why a task ended as it did, as far as its own record says; ``directory``: of a pilot that has ended."""
    found = Explanation(id=view.id, name=view.name, status=view.status, output=view.stderr_tail)
    if not view.ended:
        found.why = [f"the pilot ended before it did: `pilotq start --resume {directory}` goes on with it"]
        return found
    begun, end = view.times.get("started"), view.times.get("ended")
    ran = "" if begun is None or end is None else f", after {duration(max(end - begun, 0.0))}"
    place = f" on {view.cores}" if view.cores else ""
    found.why = [_how(view) + ran + place, *_elements(view)]
    if view.execution > 1:
        found.why.append(f"that was execution {view.execution}: the journal has all of them")
    if view.execution and not view.array_size:
        found.commands.append(f"pilotq logs {view.id}")
    if view.status != "finished":
        found.commands.append(f"pilotq retry {view.id}")
    return found


def _how(view: TaskView) -> str:
    if view.status == "finished":
        return "it finished"
    why = REASONS.get(view.reason) or view.reason or view.status
    if view.reason == "exit":
        return f"it {why} ({view.exit_code})"
    more = view.message.rstrip(".") or (f"signal {view.signal}" if view.signal else "")
    return ("it " if why.startswith(PREDICATES) else "") + why + (f": {more}" if more else "")


def _elements(view: TaskView) -> list[str]:
    if view.is_bundle:
        return [f"tasks {outcome}: {ids_text(view.id, _short(ranges))}" for outcome, ranges in view.elements.items()]
    return [f"elements {outcome}: {_short(ranges)}" for outcome, ranges in view.elements.items()]


def _short(ranges: str) -> str:
    return ranges if len(ranges) <= SHORT else ranges[:SHORT].rpartition(",")[0] + ", ..."


def _named(view: TaskView) -> str:
    if view.is_bundle:
        return f"the tasks of bundle {view.id}"
    return f"task {view.id} ({view.name})" if view.name else f"task {view.id}"


def _children(number: int) -> str:
    return "1 child" if number == 1 else f"{number:,} children"


def _count(number: int) -> str:
    return "1 task or array" if number == 1 else f"{number:,} tasks or arrays"


def duration(seconds: float) -> str:
    """For people: ``0.4 s``, ``40 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, part, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
