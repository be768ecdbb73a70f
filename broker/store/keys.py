"""Every key in Redis, as a function. No other Python module spells one; the scripts build theirs in lib.lua.

``rq:`` keys are RQ's own (RQ 3, default prefix), so that its tools see our tasks. ``pilotq:`` keys are ours.
PERMANENT lists the patterns that may have no TTL; a test fails on any other key without one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_CLASS: Final = re.compile(r"(.*)\.p-?[0-9]+\.[^.]*", re.DOTALL)
SCHEMA = "pilotq:schema"  # version of this data model
EPOCH = "pilotq:epoch"  # random name of this queue's life: another value means that the server lost its state
TERM = "pilotq:term"  # number of the dispatcher that may write; grows with each new one
SEQ = "pilotq:seq"  # last task number given out
CLASSES = "pilotq:classes"  # hash: class name -> its queue, priority and request (JSON)
RETIRED = "pilotq:retired"  # the same of classes that nothing needs but a retry
PARENTS = "pilotq:parents"  # set: what something waits for; one that is gone is found by it
NODES = "pilotq:nodes"  # hash: node name -> NodeInfo (JSON) of the live incarnation
PLANNED = "pilotq:planned"  # set: names of the nodes that the supervisor starts itself
BORN = "pilotq:born"  # last incarnation given to a node
COUNTS = "pilotq:counts"  # hash: total, finished, failed, canceled tasks since the queue began
SHARES = "pilotq:shares"  # hash: content key of a Shared record -> submissions that use it and have not ended
MAIL = "pilotq:mail"  # list the dispatcher blocks on: reports of workers, wishes of clients
BELL = "pilotq:bell"  # capped list the dispatcher blocks on: "there is new work"
RELEASE = "pilotq:release"  # list: ended parents whose dependents are still to be released or omitted
JOURNAL = "pilotq:journal"  # stream: one entry per script call that ended executions
WISH = "pilotq:wish"  # hash of standing wishes: paused, stop; and of answers: busy (lanes), journal (its trouble)
USED = "pilotq:used"  # hash: node name -> "cores reserved, tasks running" as the dispatcher knows them
ENDS = "pilotq:ends"  # hash: Slurm job -> "when its nodes get nothing new, grace, notice": see deadline.py
CLOSED = "pilotq:closed"  # hash: node name -> "state reason": drained or retired, by its user
ASIDE = "pilotq:aside"  # hash: node name -> the reason for which the dispatcher has put it aside
SUSPENDED = "rq:suspended"  # set by `rq suspend`: nothing is handed out
QUEUES = "rq:queues"
RATE_LIMITS = "rq:rl-keys"  # set: names of RQ's rate limits
READ = "pilotq:read"  # channel: the dispatcher reads the lists of RQ's producers
COMPACTED = "rq:queue:_compact:*"  # where RQ's compact holds a list for a moment
WORKERS = "rq:workers"

PERMANENT = (
    SCHEMA, EPOCH, TERM, SEQ, CLASSES, NODES, PLANNED, BORN, COUNTS, SHARES, MAIL, BELL, RELEASE, JOURNAL, WISH,
    RETIRED, PARENTS, RATE_LIMITS, USED, ENDS, CLOSED, ASIDE, SUSPENDED, QUEUES, WORKERS,
    "rq:queue:*", "rq:wip:*", "rq:finished:*", "rq:failed:*", "rq:canceled:*", "rq:deferred:*", "rq:workers:*",
    "rq:scheduled:*", "rq:ready:*", "rq:rl:*",
    # These live as long as tasks that have not ended need them; ends set a TTL or delete them.
    "rq:job:*", "pilotq:shared:*", "pilotq:submit:*", "pilotq:inbox:*", "pilotq:kids:*", "pilotq:bits:*",
    "pilotq:values:*", "pilotq:each:*",
)  # fmt: skip


def job(task_id: str) -> str:
    return f"rq:job:{task_id}"


def queue(name: str) -> str:
    return f"rq:queue:{name}"


def queue_names(members: Iterable[bytes], classes: Iterable[bytes]) -> list[str]:
    """The queues of users among the members of QUEUES: all but the lists of these classes."""
    names = {member.decode().removeprefix("rq:queue:") for member in members}
    return sorted(names - {name.decode() for name in classes})


def queue_of(class_name: str) -> str:
    """The user's queue of a class list, as queue_of in lib.lua: ``default.p10.2c`` -> ``default``."""
    match = _CLASS.fullmatch(class_name)
    return match[1] if match else class_name


def said_of(key: str, db: int = 0) -> str:
    """The channel where the server says what is done to a list or set, if it is set up to say so."""
    return f"__keyspace@{db}__:{key}"


def waits_for_slot(limit: str) -> str:
    """Sorted set: jobs that wait for a slot of RQ's rate limit."""
    return f"rq:rl:{limit}:rate_limited"


def commands(worker_name: str) -> str:
    """The channel where RQ's tools send commands to a worker."""
    return f"rq:pubsub:{worker_name}"


def registry(kind: str, queue_name: str) -> str:
    """``kind`` is wip, finished, failed, canceled, deferred or scheduled."""
    return f"rq:{kind}:{queue_name}"


def dependencies(task_id: str) -> str:
    """RQ's set of what a job of its own producers waits for."""
    return f"rq:job::{task_id}:dependencies"


def results(task_id: str) -> str:
    return f"rq:results:{task_id}"


def worker(name: str) -> str:
    return f"rq:worker:{name}"


def inbox(node: str, incarnation: int) -> str:
    return f"pilotq:inbox:{node}:{incarnation}"


def shared(key: str) -> str:
    return f"pilotq:shared:{key}"


def submission(key: str) -> str:
    return f"pilotq:submit:{key}"


def told(name: str) -> str:
    """List: ids of ended tasks of the executor with this name."""
    return f"pilotq:told:{name}"


def bits(array_id: str) -> str:
    """Two bits an element, by position: 0 not ended, 1 finished, 2 failed, 3 canceled or omitted."""
    return f"pilotq:bits:{array_id}"


def values(array_id: str) -> str:
    """Hash: block number -> zlib(msgpack list) of 1,000 values."""
    return f"pilotq:values:{array_id}"


def kids(task_id: str) -> str:
    """List of the ids that wait for this whole task."""
    return f"pilotq:kids:{task_id}"


def each(array_id: str) -> str:
    """List of the arrays whose element i waits for element i of this one."""
    return f"pilotq:each:{array_id}"
