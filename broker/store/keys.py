"""The names of all keys in Redis. No other Python module spells one; the scripts build theirs in lib.lua.

>>> job("1f"), inbox("n1", 2)
('rq:job:1f', 'pilotq:inbox:n1:2')


``rq:`` keys are RQ's own (RQ 3, default prefix), so that its tools see our tasks. ``pilotq:`` keys are ours.
PERMANENT lists the patterns that may have no TTL; a test fails on any other key without one.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

_CLASS: Final = re.compile(r"(.*)\.p-?[0-9]+\.[^.]*", re.DOTALL)
_EXECUTOR: Final = re.compile(r"@([0-9a-f]{12})\..*", re.DOTALL)
SCHEMA = "pilotq:schema"  # version of this data model
QUEUE_ID = "pilotq:queue-id"  # random name of this queue: another value means that the server lost its state
TERM = "pilotq:term"  # fencing token of the dispatcher that may write; grows with each new one
SEQ = "pilotq:seq"  # last task number given out
CLASSES = "pilotq:classes"  # hash: class name -> "", or unix seconds: since then its list is empty
DAMAGED_CLASSES = "pilotq:damaged-classes"  # hash: class name -> what stood in the place of its list
CHANGED_CLASSES = "pilotq:classes:changed"  # set: classes whose lists have got what the dispatcher has not read
SUBMISSIONS = "pilotq:submissions"  # sorted set: keys of submissions that have not ended, by their first task number
PARENTS = "pilotq:parents"  # set: ids that something waits for; the reconciler finds here one that was deleted
NODES = "pilotq:nodes"  # hash: node name -> NodeInfo (JSON) of the live incarnation
EXPECTED_NODES = (
    "pilotq:expected-nodes"  # list: names of nodes that the supervisor starts itself, as ordered by the user
)
NEXT_INCARNATION = "pilotq:next-incarnation"  # counter: the last incarnation (fencing token) given to a node
HOLDERS = "pilotq:holders"  # hash: number in the scores of leases of tasks -> name:incarnation, and the reverse
LEASES = "pilotq:leases"  # hash: <array>:<first position> -> elements of the lease without an end and a record
COUNTS = "pilotq:counts"  # hash: total, finished, failed, canceled tasks since the queue began
SHARED_REFS = "pilotq:shared-refs"  # hash: key of a shared record -> submissions that use it and have not ended
EVENTS = "pilotq:events"  # list the dispatcher blocks on: messages of workers, supervisor and clients
WAKEUP = "pilotq:wakeup"  # list, as a rule of one element, that the dispatcher blocks on: "there is new work"
RELEASE = "pilotq:release"  # list: ended parents whose dependents are still to be released or omitted
JOURNAL = "pilotq:journal"  # stream: one entry per script call that ended executions
CONTROL = "pilotq:control"  # hash of what is asked of the dispatcher: paused, stop, contact, min_nodes
STATUS = "pilotq:status"  # hash of what is reported to all: busy (slots), journal (its trouble), hold, full
USAGE = "pilotq:usage"  # hash: node name -> "cores reserved, tasks running" as the dispatcher knows them
ALLOCATION_ENDS = "pilotq:allocation-ends"  # hash: Slurm job -> "when its nodes get nothing new, grace, notice"
DRAINED = "pilotq:drained"  # hash: node name -> "state reason": drained or retired, by its user
LEAVING = "pilotq:leaving"  # set: names of nodes whose workers were told to leave for good, as they were retired
QUARANTINE = "pilotq:quarantine"  # hash: node name -> the reason for which the dispatcher has quarantined it
SUSPENDED = "rq:suspended"  # set by `rq suspend`: nothing is handed out
QUEUES = "rq:queues"
RATE_LIMITS = "rq:rl-keys"  # set: names of RQ's rate limits
RQ_READ = "pilotq:rq-read"  # channel: the dispatcher reads the lists of RQ's producers
COMPACTED = "rq:queue:_compact:*"  # where RQ's compact holds a list for a moment
WORKERS = "rq:workers"

PERMANENT = (
    SCHEMA, QUEUE_ID, TERM, SEQ, CLASSES, CHANGED_CLASSES, SUBMISSIONS, PARENTS, NODES, EXPECTED_NODES,
    NEXT_INCARNATION, COUNTS, SHARED_REFS, EVENTS, WAKEUP, RELEASE, JOURNAL, CONTROL, STATUS, USAGE, ALLOCATION_ENDS,
    DRAINED, LEAVING, QUARANTINE, LEASES, HOLDERS, RATE_LIMITS, SUSPENDED, QUEUES, WORKERS,
    "rq:queue:*", "rq:wip:*", "rq:finished:*", "rq:failed:*", "rq:canceled:*", "rq:deferred:*", "rq:workers:*",
    "rq:scheduled:*", "rq:ready:*", "rq:rl:*",
    # These live as long as tasks that have not ended need them; ends set a TTL or delete them.
    "rq:job:*", "pilotq:shared:*", "pilotq:submit:*", "pilotq:inbox:*", "pilotq:dependents:*", "pilotq:outcomes:*",
    "pilotq:children:*", "pilotq:values:*", "pilotq:elementwise:*", "pilotq:staged:*", "pilotq:leases:*",
    "pilotq:recorded:*", "pilotq:returned:*",
)  # fmt: skip


def job(task_id: str) -> str:
    return f"rq:job:{task_id}"


def queue(name: str) -> str:
    return f"rq:queue:{name}"


def queue_of(class_name: str) -> str:
    """The user's queue of a class list, as queue_of in lib.lua: ``default.p10.2c`` -> ``default``."""
    match = _CLASS.fullmatch(class_name)
    return match[1] if match else class_name


def keyspace_channel(key: str, db: int = 0) -> str:
    """The channel where the server says what is done to a list or set, if it is set up to say so."""
    return f"__keyspace@{db}__:{key}"


def rate_limited(limit: str) -> str:
    """Sorted set: jobs that wait for a slot of RQ's rate limit."""
    return f"rq:rl:{limit}:rate_limited"


def command_channel(worker_name: str) -> str:
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


def staged(first: int) -> str:
    """List: the work of a large submission, by its first task number, in pieces that are still to become tasks."""
    return f"pilotq:staged:{first}"


def completed(name: str) -> str:
    """Stream: how tasks of the executor with this name have ended, and their results; it removes what it has read."""
    return f"pilotq:completed:{name}"


@lru_cache(maxsize=256)
def executor_of(submission_key: str) -> str:
    """The name of the executor that has made a submission, as executor_of in lib.lua; empty when nobody's."""
    match = _EXECUTOR.fullmatch(submission_key)
    return match[1] if match else ""


def outcomes(array_id: str) -> str:
    """Two bits an element, by position: 0 not ended, 1 finished, 2 failed, 3 canceled or omitted."""
    return f"pilotq:outcomes:{array_id}"


def leases(array_id: str) -> str:
    """Sorted set, by first position: "first count execution slots time address" of each lease of elements."""
    return f"pilotq:leases:{array_id}"


def recorded(array_id: str) -> str:
    """A bit for each position: the element has left its lease with a record of its own."""
    return f"pilotq:recorded:{array_id}"


def values(array_id: str) -> str:
    """Hash: block number -> zlib(msgpack list) of 1,000 values."""
    return f"pilotq:values:{array_id}"


def returned(bundle: str) -> str:
    """Sorted set: packed (position, results of the functions from there on), by that position."""
    return f"pilotq:returned:{bundle}"


def dependents(task_id: str) -> str:
    """List of the ids that wait for this whole task."""
    return f"pilotq:dependents:{task_id}"


def children(task_id: str) -> str:
    """List of the tasks and arrays that were submitted from within a task that joins."""
    return f"pilotq:children:{task_id}"


def elementwise(array_id: str) -> str:
    """List of the arrays whose element i waits for element i of this one."""
    return f"pilotq:elementwise:{array_id}"
