"""Submitting tasks: they are checked, written as staged records, and committed by one script, all or none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.client.bundles import MEMBER_MAX, bundled, shares_record, with_calls
from pilotq.broker.client.commit import StatusesInJournal, Submission, SubmitPlan, commit, dependency_text, parent_id
from pilotq.broker.errors import InvalidInput, NeverFits, ServerRefused
from pilotq.broker.os_strings import encode, printable
from pilotq.broker.rq.jobs import COMMAND_DATA
from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, Connection
from pilotq.broker.store.registry import decode_nodes
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.store.store import Store, iso, pack
from pilotq.broker.store.value_blocks import packed_blocks
from pilotq.broker.tasks.array_indices import text_of
from pilotq.broker.tasks.dependencies import Parents, check_cycles, resolve
from pilotq.broker.tasks.failure_limit import failures_allowed
from pilotq.broker.tasks.functions import Packed, pack_call
from pilotq.broker.tasks.model import Request, Task, class_name, description, id_of, limited_class_name
from pilotq.broker.tasks.quantities import size_text
from pilotq.broker.tasks.spec import BUNDLE_SPEC, MemberPacker, pack_spec, spec_of
from pilotq.broker.tasks.submit_context import SubmitContext
from pilotq.broker.tasks.validation import Rest, is_like, rest_of, validate

CHUNK = 500
CARRIED_TASKS = 500  # so many come with the call that commits them, and are not staged
CARRIED_FIELDS = 4000  # a script can pass on fewer than 8,000
AFTER_EACH_LIMIT = 30  # arrays that an array may wait for element by element: each has a bit
LARGE_BYTES = 1 << 20  # of descriptions: then the server is asked for its memory, too, and gets them in pieces
BYTES_PER_TASK = 700  # of server memory, for the check before a large submit


def _no_journal(_: Sequence[str]) -> dict[str, str]:
    """For a pilot whose journal cannot be read here."""
    return {}


def check(tasks: Sequence[Task], nodes: Sequence[NodeInfo]) -> SubmitPlan:
    """Refuse the whole submit if anything in it is wrong: raises InvalidInput or NeverFits. Pure."""
    plan = _plan(tasks)
    if nodes:
        _check_fit(plan, _cluster_of(nodes))
    return plan


def _plan(tasks: Sequence[Task]) -> SubmitPlan:
    """What can be told without the nodes; raises InvalidInput."""
    classes: list[str] = []
    likes: list[int] = []
    seen: dict[tuple[str, int, Request], str] = {}
    payloads: dict[int, bytes] = {}
    rest: Rest = ()
    for number, task in enumerate(tasks):
        if rest and is_like(task, rest):
            likes.append(likes[-1])
            classes.append(classes[-1])
            continue
        validate(task, _place(tasks, number))
        if task.function is not None:
            payloads[number] = pack_call(task.function, task.args, task.kwargs)
        kind = (task.queue, task.rank, task.shape())
        if kind not in seen:
            seen[kind] = class_name(*kind)
        rest = rest_of(task)
        likes.append(number)
        classes.append(seen[kind])
    parents = _check_dependencies(tasks)
    return SubmitPlan(tasks, classes, parents, sum(t.size for t in tasks), payloads, likes, {}, b"")


def _place(tasks: Sequence[Task], number: int) -> str:
    name = tasks[number].name
    return f"task {name!r}" if name else f"task {number + 1}"


def _cluster_of(nodes: Iterable[NodeInfo]) -> Cluster:
    cluster = Cluster()
    for node in nodes:
        cluster.add_node(node)
    return cluster


@lru_cache(maxsize=1)
def _cluster_of_records(records: tuple[bytes, ...]) -> tuple[Cluster, frozenset[str]]:
    """The nodes of these records, which seldom change, and their names."""
    nodes = decode_nodes(records)
    return _cluster_of(nodes), frozenset(node.name for node in nodes)


def _check_fit(plan: SubmitPlan, cluster: Cluster) -> None:
    """Raise NeverFits where these nodes can never hold a task."""
    seen = set()
    for number in dict.fromkeys(plan.likes):
        task = plan.tasks[number]
        if task.memory_max and (why := cluster.never_fits(task.largest_shape())):
            where = _place(plan.tasks, number)
            raise NeverFits(f"{where}: memory_max {size_text(task.memory_max)} can never be had here: {why}")
        if plan.classes[number] not in seen and (why := cluster.never_fits(task.shape())):
            raise NeverFits(f"{_place(plan.tasks, number)} can never run here: {why}")
        seen.add(plan.classes[number])


def _check_dependencies(tasks: Sequence[Task]) -> Parents:
    def place(number: int, field: str) -> str:
        name = tasks[number].name
        # A name that is given twice says nothing about the place.
        where = f"task {name!r}" if name and field not in ("", "name") else f"task {number + 1}"
        return f"{where}: {field}" if field else where

    parents = resolve(tasks, place)
    for number, arrays in parents.after_each.items():
        if number in parents.after:
            raise InvalidInput(f"{place(number, 'after_each')}: give after (or the like) or after_each, not both")
        if len(arrays) > AFTER_EACH_LIMIT:
            raise InvalidInput(f"{place(number, 'after_each')}: at most {AFTER_EACH_LIMIT} arrays, not {len(arrays)}")
    check_cycles(tasks, parents, place)
    return parents


def submit(
    link: Connection,
    store: Store,
    tasks: Sequence[Task],
    context: SubmitContext | Callable[[], SubmitContext],
    key: str | None,
    statuses_in_journal: StatusesInJournal = _no_journal,
    submitter: str = "",
) -> list[str]:
    """Check, stage and commit; returns the ids in order. Nothing is visible unless all of it is.

    ``context`` may be what makes it, while the server answers.
    ``submitter`` is the task of the same pilot within which this process runs: if that joins, these are its children.
    ``statuses_in_journal`` gives the statuses of parents whose records have expired, as far as there were such tasks.
    """
    # Of more tasks it is not known yet how many records they are: an array or a bundle takes one number.
    above = store.settings.bundle_above
    early = len(tasks) if len(tasks) <= above else 0
    prepared = _Prepared(lambda: _plan(tasks), context)
    return _submit(link, store, early, prepared, lambda plan: bundled(plan, above), key, statuses_in_journal, submitter)


def submit_calls(
    link: Connection,
    store: Store,
    base: Task,
    payloads: Sequence[bytes],
    context: SubmitContext,
    key: str,
    submitter: str = "",
) -> list[str]:
    """The same for calls of functions that are packed (`functions.pack_call`), each a task like ``base``."""
    members = MemberPacker().pack_calls(base, payloads) if shares_record(base) else []
    small = sum(len(member) <= MEMBER_MAX for member in members)
    if small <= store.settings.bundle_calls_above:
        tasks = [msgspec.structs.replace(base, function=Packed(payload)) for payload in payloads]
        return submit(link, store, tasks, context, key, submitter=submitter)
    first = msgspec.structs.replace(base, function=Packed(payloads[0]))
    prepared = _Prepared(lambda: _plan([first]), context)
    number = len(payloads) - small + 1

    def with_bundle(plan: SubmitPlan) -> SubmitPlan:
        return with_calls(plan, payloads, members)

    return _submit(link, store, number, prepared, with_bundle, key, _no_journal, submitter)


def _submit(
    link: Connection,
    store: Store,
    early: int,
    prepared: _Prepared,
    with_bundles: Callable[[SubmitPlan], SubmitPlan],
    key: str | None,
    statuses_in_journal: StatusesInJournal,
    submitter: str,
) -> list[str]:
    """``early``: how many records there will be, where that is known by now; else 0. ``with_bundles`` makes the plan
    with them of one whose tasks are checked."""
    key = key or os.urandom(8).hex()
    replies = link.pipeline(
        [
            ("HVALS", keys.NODES),
            ("INCRBY", keys.SEQ, early),
            ("LRANGE", keys.EXPECTED_NODES, 0, -1),
        ],
        prepared.make,
    )
    cluster, names = _cluster_of_records(tuple(replies[0]))
    # Where some are still starting, or are started again, it is not known what they can hold.
    if names and names.issuperset(name.decode() for name in replies[2]):
        _check_fit(prepared.plan, cluster)
    plan = with_bundles(prepared.plan)
    payloads = sum(map(len, plan.payloads.values())) + sum(map(plan.size_of, plan.members))
    if len(plan.tasks) >= CHUNK or payloads >= LARGE_BYTES:
        _check_memory(link, len(plan.tasks), payloads)
    if submitter:
        from pilotq.broker.client.joins import refuse_cycles  # most submits are made by no task

        refuse_cycles(link, submitter, plan)
    failpoints.hit("submit checked")
    last = int(replies[1] if early else link.call("INCRBY", keys.SEQ, len(plan.tasks)))
    classes = list(plan.classes)
    found = None
    while found is None:
        first = last - len(plan.tasks) + 1
        ids = [id_of(first + n) for n in range(len(plan.tasks))]
        for number, task in enumerate(plan.tasks):
            if task.array is not None and task.array.limit is not None and task.array.limit < len(task.array):
                plan.classes[number] = limited_class_name(classes[number], task.array.limit, ids[number])
        records = _Records(plan, ids, prepared.context, key)
        submission = Submission(plan, ids, first, key, prepared.context_key, records.carried(), submitter)
        if submission.carried or not _in_use(link, ids):
            found = commit(store, submission, statuses_in_journal, partial(_stage, link, store, records))
        if found is None:
            last = int(link.call("INCRBY", keys.SEQ, len(plan.tasks)))
    return found


class _Prepared:
    """What a submission needs of this process alone."""

    plan: SubmitPlan
    context: SubmitContext
    context_key: str

    def __init__(self, plan: Callable[[], SubmitPlan], context: SubmitContext | Callable[[], SubmitContext]) -> None:
        self._plan, self._context = plan, context

    def make(self) -> None:
        self.plan = self._plan()
        self.context = self._context if isinstance(self._context, SubmitContext) else self._context()
        self.context_key = self.context.key()


def _in_use(link: Connection, ids: list[str]) -> bool:
    """Whether a producer of RQ has given one of these ids to a job that the dispatcher has not seen yet."""
    parts = [ids[first : first + CHUNK] for first in range(0, len(ids), CHUNK)]
    return any(link.pipeline([("EXISTS", *map(keys.job, part)) for part in parts]))


def _check_memory(link: Connection, records: int, payloads: int) -> None:
    """Refuse before anything is written when the server would pass 80 % of its memory."""
    info = dict(line.split(":", 1) for line in link.call("INFO", "memory").decode().splitlines() if ":" in line)
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    need = records * BYTES_PER_TASK + payloads
    if limit and used + need > 0.8 * limit:
        raise ServerRefused(
            f"the server's memory is short: these {records:,} tasks need about {need:,} bytes, "
            f"{used:,} of {limit:,} are used: submit fewer, an array, or wait until tasks have ended"
        )


def _stage(link: Connection, store: Store, records: _Records) -> None:
    """Write all hashes with a TTL; nothing refers to them before the commit."""
    link.stream(_staging_commands(store, records))
    failpoints.hit("submit staged")


def _staging_commands(store: Store, records: _Records) -> Iterator[list[tuple[Argument, ...]]]:
    ttl, name = store.settings.stage_ttl_s, keys.shared(records.context.key())
    # It may be there already, for ever or for a while: it stays at least as long as the rest.
    commands: list[tuple[Argument, ...]] = [
        ("SET", name, pack(records.context), "NX", "EX", ttl),
        ("EXPIRE", name, ttl, "GT"),
    ]
    size = 0
    for number in range(len(records.ids)):
        for key, is_record, fields in records.hashes(number):
            commands += [("HSET", key, *(records.common if is_record else ()), *fields), ("EXPIRE", key, ttl)]
            size += _size(fields)
        if len(commands) >= 2 * CHUNK or size >= LARGE_BYTES:
            yield commands
            failpoints.hit("submit staging")
            commands, size = [], 0
    yield commands


def _size(fields: list[Argument]) -> int:
    return sum(len(value) for value in fields if isinstance(value, (str, bytes)))


class _Records:
    """The hashes of a submission: what all records have in common, and what is their own."""

    def __init__(self, plan: SubmitPlan, ids: list[str], context: SubmitContext, key: str) -> None:
        stamp = iso(time.time())
        self.plan, self.ids, self.context = plan, ids, context
        self.common: list[Argument] = [
            "pq_sub", key, "data", COMMAND_DATA, "created_at", stamp, "enqueued_at", stamp,
        ]  # fmt: skip

    def hashes(self, number: int) -> Iterator[tuple[str, bool, list[Argument]]]:
        """Of a task: key, whether it is the record, and its own fields, of each hash."""
        plan, task, task_id = self.plan, self.plan.tasks[number], self.ids[number]
        waits = [dependency_text(dependency, self.ids) for dependency in plan.parents.after.get(number, ())]
        waits += [parent_id(parent, self.ids) for parent in plan.parents.after_each.get(number, ())]
        members = plan.members.get(number)
        spec = pack_spec(spec_of(task, plan.payloads.get(number))) if members is None else BUNDLE_SPEC
        fields: list[Argument] = [
            "status", "deferred" if waits else "queued", "origin", plan.classes[number],
            "pq_class", plan.classes[number], "pq_spec", spec,
            "description", description(task) + (f" (and {len(members) - 1:,} more)" if members else ""),
        ]  # fmt: skip
        if members is not None:
            fields += ["pq_bundle", 1]
        if task.name is not None:
            fields += ["pq_name", printable(task.name)]
        if waits:
            fields += ["pq_after", " ".join(waits)]
        if task.retries:
            fields += ["pq_retries", task.retries]
        if task.join:
            fields += ["pq_join", 1]
        if task.is_array:
            ranges = task.array.ranges if task.array is not None else (range(task.size),)
            fields += ["pq_array", text_of(ranges), "pq_next", 0, "pq_left", task.size]
        if task.stop_on_failures:
            fields += ["pq_failures_max", failures_allowed(task.stop_on_failures, task.size)]
        yield keys.job(task_id), True, fields
        for blocks in _value_blocks(members or _values_of(task)):
            yield keys.values(task_id), False, blocks

    def carried(self) -> list[Argument]:
        """The arguments of commit.lua that hold all hashes; none when they are too much for one call."""
        if len(self.ids) > CARRIED_TASKS or self.plan.is_large:
            return []
        found: list[Argument] = [pack(self.context), len(self.common), *self.common]
        size = 0
        for number in range(len(self.ids)):
            for key, is_record, fields in self.hashes(number):
                found += (key, int(is_record), len(fields), *fields)
                size += _size(fields)
                if size >= LARGE_BYTES or len(fields) > CARRIED_FIELDS:
                    return []
        return found


def _values_of(task: Task) -> list[bytes]:
    # To a function a value is text; to a program it is an argument.
    text = (lambda value: value.encode("utf-8", "surrogatepass")) if task.function is not None else encode
    chosen = task.values or ()
    if task.array is not None and task.values is not None:
        chosen = [task.values[index] for index in task.array]
    return [text(value) for value in chosen]


def _value_blocks(values: list[bytes]) -> Iterator[list[Argument]]:
    """Numbers and contents of the blocks of values, LARGE_BYTES at a time."""
    found: list[Argument] = []
    size = 0
    for number, content in packed_blocks(values):
        found += (number, content)
        size += len(content)
        if size >= LARGE_BYTES:
            yield found
            found, size = [], 0
    if found:
        yield found
