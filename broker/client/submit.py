"""Submit: descriptions become staged records, and one commit makes them tasks, all or none."""

from __future__ import annotations

import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.errors import InvalidInput, NeverFits, PilotFailed, ServerRefused, UnknownTask
from pilotq.broker.rq.jobs import COMMAND_DATA
from pilotq.broker.scheduling.cluster import Cluster
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Argument, Link
from pilotq.broker.store.messages import NodeInfo
from pilotq.broker.store.store import Store, iso, pack
from pilotq.broker.tasks.functions import pack_call
from pilotq.broker.tasks.model import (
    CLASS_LIMIT,
    Request,
    Shared,
    Task,
    class_name,
    description,
    id_of,
    spec_of,
    validate,
)

CHUNK = 500
VALUES_BLOCK = 1000
EACH_LIMIT = 30  # arrays that an array may wait for element by element: each has a bit
_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ID = re.compile(rf"[0-9a-v]{{1,13}}(_[0-9]+)?|{_UUID}")  # ours, and what RQ gives to jobs of its producers
LARGE_BYTES = 1 << 20  # of descriptions: then the server is asked for its memory, too, and gets them in pieces
RQ_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")  # RQ's producers may name theirs as they like
BYTES_PER_TASK = 700  # of server memory, for the check before a large submit


Remember = Callable[[str], str | None]


def _nobody(_: str) -> None:
    """Where no journal is at hand."""


class Plan(NamedTuple):
    """A submit that was checked: what to write, and what to commit."""

    tasks: Sequence[Task]
    classes: list[str]  # class name of each task
    records: dict[str, str]  # class name -> its record (JSON)
    parents: list[list[str | int]]  # an int is the position of a task of this submission, text an id
    each: list[list[str | int]]
    total: int
    payloads: dict[int, bytes]  # position of a function -> its packed call


def check(tasks: Sequence[Task], nodes: Sequence[NodeInfo], known_classes: set[str]) -> Plan:
    """Refuse the whole submit if anything in it is wrong: raises InvalidInput or NeverFits. Pure."""
    names = _names(tasks)
    cluster = Cluster()
    for node in nodes:
        cluster.add_node(node)
    classes: list[str] = []
    records: dict[str, str] = {}
    parents, each = [], []
    seen: dict[tuple[str, int, Request], str] = {}
    payloads: dict[int, bytes] = {}
    for number, task in enumerate(tasks):
        where = f"task {task.name!r}" if task.name else f"task {number + 1}"
        validate(task, where)
        if task.function is not None:
            payloads[number] = pack_call(task.function, task.args, task.kwargs)
        kind = (task.queue, task.priority, task.shape())
        name = seen.get(kind)
        if name is None:
            shape = kind[2]
            if nodes and (why := cluster.never_fits(shape)):
                raise NeverFits(f"{where} can never run here: {why}")
            name = seen[kind] = class_name(*kind)
            record = {"queue": task.queue, "priority": task.priority, "request": shape}
            records[name] = msgspec.json.encode(record).decode()
        classes.append(name)
        parents.append([_resolve(p, names, where) for p in dict.fromkeys(task.after)])
        each.append([_resolve(p, names, where) for p in dict.fromkeys(task.after_each)])
        _check_each(task, each[-1], tasks, where)
    for queue in {t.queue for t in tasks}:
        count = sum(c.startswith(f"{queue}.") for c in known_classes | set(records))
        if count > CLASS_LIMIT:
            raise InvalidInput(
                f"queue {queue!r} would have {count} different kinds of request (priority, cores, time limit...), "
                f"at most {CLASS_LIMIT} are possible: make some of them equal"
            )
    _check_cycles(tasks, parents, each)
    return Plan(tasks, classes, records, parents, each, sum(t.size for t in tasks), payloads)


def _names(tasks: Sequence[Task]) -> dict[str, int]:
    names: dict[str, int] = {}
    for number, task in enumerate(tasks):
        if task.name is not None:
            if task.name in names:
                raise InvalidInput(f"task {number + 1}: the name {task.name!r} is given twice in this submission")
            names[task.name] = number
    return names


def _resolve(parent: str, names: dict[str, int], where: str) -> str | int:
    """A name of this submission, ``name:INDEX`` for one element of an array of it, or an id.

    ``=ID`` is an id even where a task of this submission has that name.
    """
    if parent.startswith("=") and RQ_ID.fullmatch(parent[1:]):
        return parent[1:]
    if parent in names:
        return names[parent]
    name, _, index = parent.rpartition(":")
    if name in names and index.isdigit():
        return f"@{names[name]}_{index}"  # its id is not known yet
    if ID.fullmatch(parent):
        return parent
    raise InvalidInput(f"{where}: after: there is no task {parent!r} in this submission, and it is no task id")


def _check_each(task: Task, each: list[str | int], tasks: Sequence[Task], where: str) -> None:
    if each and task.after:
        raise InvalidInput(f"{where}: give after or after_each, not both")
    if len(each) > EACH_LIMIT:
        raise InvalidInput(f"{where}: after_each: at most {EACH_LIMIT} arrays, not {len(each)}")
    for parent in each:
        if isinstance(parent, str) and "_" in parent:
            raise InvalidInput(f"{where}: after_each: {parent!r} is one element, name its array")
        if isinstance(parent, int) and not (tasks[parent].is_array and tasks[parent].size == task.size):
            raise InvalidInput(
                f"{where}: after_each: {tasks[parent].name!r} must be an array of {task.size} elements, as this one"
            )


def _check_cycles(tasks: Sequence[Task], parents: list[list[str | int]], each: list[list[str | int]]) -> None:
    """Raise with the path when tasks wait for each other. Iterative: chains may be 100,000 long."""
    state = bytearray(len(tasks))  # 0 new, 1 on the path, 2 done
    for root in range(len(tasks)):
        if state[root] or not (parents[root] or each[root]):
            continue
        path: list[tuple[int, Iterator[int]]] = [(root, iter(_inner(parents[root], each[root])))]
        state[root] = 1
        while path:
            number, rest = path[-1]
            following = next(rest, None)
            if following is None:
                state[number] = 2
                path.pop()
            elif state[following] == 1:
                loop = [n for n, _ in path]
                loop = [*loop[loop.index(following) :], following]
                text = " -> ".join(tasks[n].name or f"task {n + 1}" for n in loop)
                raise InvalidInput(f"after: these tasks wait for each other: {text}")
            elif state[following] == 0:
                state[following] = 1
                path.append((following, iter(_inner(parents[following], each[following]))))


def _inner(parents: list[str | int], each: list[str | int]) -> list[int]:
    found = []
    for parent in [*parents, *each]:
        if isinstance(parent, int):
            found.append(parent)
        elif parent.startswith("@"):
            found.append(int(parent[1:].partition("_")[0]))
    return found


def submit(
    link: Link, store: Store, tasks: Sequence[Task], shared: Shared, key: str | None, remember: Remember = _nobody
) -> list[str]:
    """Check, stage and commit; returns the ids in order. Nothing is visible unless all of it is.

    ``remember`` tells the status of a parent whose record is not kept any more; None if there was no such task.
    """
    key = key or secrets.token_hex(8)
    replies = link.pipeline(
        [("HVALS", keys.NODES), ("HKEYS", keys.CLASSES), ("INCRBY", keys.SEQ, len(tasks)), ("SMEMBERS", keys.PLANNED)]
    )
    nodes = [msgspec.json.decode(record, type=NodeInfo) for record in replies[0]]
    if {name.decode() for name in replies[3]} - {node.name for node in nodes}:
        nodes = []  # some are still starting, or are started again: what they can hold is not known
    plan = check(tasks, nodes, {name.decode() for name in replies[1]})
    payloads = sum(map(len, plan.payloads.values()))
    if len(tasks) >= CHUNK or payloads >= LARGE_BYTES:
        _check_memory(link, len(tasks), payloads)
    failpoints.at("submit checked")
    first = int(replies[2]) - len(tasks) + 1
    ids = [id_of(first + n) for n in range(len(tasks))]
    _stage(link, store, plan, ids, shared, key)
    failpoints.at("submit staged")
    work = {**_work(plan, ids), "shared": shared.key(), "past": {}}
    while True:
        answer = store.commit(key, first, len(tasks), plan.total, work)
        word = answer[0].decode()
        parent = answer[1].decode() if word == "unknown" else ""
        status = remember(parent) if parent and not any(parent in each for each in plan.each) else None
        if status is None:
            break
        work["past"][parent] = status
    if word == "again":
        return [id_of(int(answer[1]) + n) for n in range(int(answer[2]))]
    if word == "unknown":
        raise UnknownTask(f"after: there is no task {answer[1].decode()!r} here (any more)")
    if word == "unequal":
        raise InvalidInput(f"after_each: {answer[1].decode()!r} is no array of as many elements as the one that waits")
    if word == "gone":
        raise PilotFailed("the submit took too long and its staged records have expired: submit again")
    return ids


def _check_memory(link: Link, records: int, payloads: int) -> None:
    """Refuse before anything is written when the server would pass 80 % of its memory."""
    info = dict(line.split(":", 1) for line in link.call("INFO", "memory").decode().splitlines() if ":" in line)
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    need = records * BYTES_PER_TASK + payloads
    if limit and used + need > 0.8 * limit:
        raise ServerRefused(
            f"the server's memory is short: these {records:,} tasks need about {need:,} bytes, "
            f"{used:,} of {limit:,} are used: submit fewer, an array, or wait until tasks have ended"
        )


def _stage(link: Link, store: Store, plan: Plan, ids: list[str], shared: Shared, key: str) -> None:
    """Write all hashes with a TTL; nothing refers to them before the commit."""
    link.stream(_staged(store, plan, ids, shared, key))


def _staged(store: Store, plan: Plan, ids: list[str], shared: Shared, key: str) -> Iterator[list[tuple[Argument, ...]]]:
    ttl = store.settings.stage_ttl_s
    now = time.time()
    stamp, at, shared_key = iso(now), f"{now:.6f}", shared.key()
    # It may be there already, for ever or for a while: it stays at least as long as the rest.
    commands: list[tuple[Argument, ...]] = [
        ("SET", keys.shared(shared_key), pack(shared), "NX", "EX", ttl),
        ("EXPIRE", keys.shared(shared_key), ttl, "GT"),
    ]
    size = 0
    for number, task in enumerate(plan.tasks):
        waits = plan.parents[number] or plan.each[number]
        spec = pack(spec_of(task, plan.payloads.get(number)))
        fields: list[Argument] = [
            # What scripts read most often stands first: a small hash is searched from its front.
            "status", "deferred" if waits else "queued", "pq_exec", "0", "origin", plan.classes[number],
            "pq_class", plan.classes[number], "pq_spec", spec, "pq_shared", shared_key, "pq_sub", key,
            "pq_at", at, "data", COMMAND_DATA, "created_at", stamp, "enqueued_at", stamp, "timeout", "-1",
            "description", description(task),
        ]  # fmt: skip
        if task.name is not None:
            fields += ["pq_name", task.name]
        if waits:
            fields += ["pq_after", " ".join(_id_at(parent, ids) for parent in waits)]
        if task.retries:
            fields += ["pq_retries", task.retries]
        if task.is_array:
            span = task.array
            start, step = (span.start, span.step) if span is not None else (0, 1)
            fields += ["pq_array", f"{start}:{step}:{task.size}", "pq_next", 0, "pq_left", task.size]
        job = keys.job(ids[number])
        commands += [("HSET", job, *fields), ("EXPIRE", job, ttl)]
        if task.values is not None:
            blocks = _blocks(task.values)
            commands += [("HSET", keys.values(ids[number]), *blocks), ("EXPIRE", keys.values(ids[number]), ttl)]
        size += len(spec)
        if len(commands) >= 2 * CHUNK or size >= LARGE_BYTES:
            yield commands
            failpoints.at("submit staging")
            commands, size = [], 0
    yield commands


def _blocks(values: list[str]) -> list[Argument]:
    blocks: list[Argument] = []
    for first in range(0, len(values), VALUES_BLOCK):
        blocks += [first // VALUES_BLOCK, zlib.compress(pack(values[first : first + VALUES_BLOCK]), 1)]
    return blocks


def _work(plan: Plan, ids: list[str]) -> dict[str, Any]:
    """The argument of commit.lua: which ids go where."""
    groups: dict[str, list[str]] = {}
    waits, each, extra = [], [], []
    for number, task in enumerate(plan.tasks):
        name = plan.classes[number]
        if plan.parents[number]:
            parents = [_id_at(p, ids) for p in plan.parents[number]]
            waits.append((ids[number], name, plan.records[name], parents, task.size))
        elif plan.each[number]:
            parents = [_id_at(p, ids) for p in plan.each[number]]
            each.append((ids[number], name, plan.records[name], parents, task.size))
        else:
            groups.setdefault(name, []).append(ids[number])
        if task.values is not None:
            extra.append(keys.values(ids[number]))
    return {
        "groups": [(name, plan.records[name], members) for name, members in groups.items()],
        "waits": waits,
        "each": each,
        "extra": extra,
    }


def _id_at(parent: str | int, ids: list[str]) -> str:
    """The id of a parent as `_resolve` names it, when those of its submission are known."""
    if isinstance(parent, int):
        return ids[parent]
    if parent.startswith("@"):
        number, _, index = parent[1:].partition("_")
        return f"{ids[int(number)]}_{index}"
    return parent
