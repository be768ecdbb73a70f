"""Every key in Redis, as a function. No other Python module spells one; the scripts build theirs in lib.lua.

``rq:`` keys are RQ's own (RQ 3, default prefix), so that its tools see our tasks. ``pilotq:`` keys are ours.
PERMANENT lists the patterns that may have no TTL; a test fails on any other key without one.
"""

from __future__ import annotations

SCHEMA = "pilotq:schema"  # version of this data model
EPOCH = "pilotq:epoch"  # random name of this queue's life: another value means that the server lost its state
TERM = "pilotq:term"  # number of the dispatcher that may write; grows with each new one
SEQ = "pilotq:seq"  # last task number given out
CLASSES = "pilotq:classes"  # hash: class name -> msgpack [queue, priority, request]
NODES = "pilotq:nodes"  # hash: node name -> msgpack NodeInfo of the live incarnation
BORN = "pilotq:born"  # last incarnation given to a node
COUNTS = "pilotq:counts"  # hash: total, finished, failed, canceled tasks since the queue began
MAIL = "pilotq:mail"  # list the dispatcher blocks on: reports of workers, wishes of clients
BELL = "pilotq:bell"  # capped list the dispatcher blocks on: "there is new work"
RELEASE = "pilotq:release"  # list: ended parents whose dependents are still to be released or omitted
JOURNAL = "pilotq:journal"  # stream: one entry per script call that ended executions
WISH = "pilotq:wish"  # hash of standing wishes: paused, stop
SUSPENDED = "rq:suspended"  # set by `rq suspend`: nothing is handed out
QUEUES = "rq:queues"
WORKERS = "rq:workers"

PERMANENT = (
    SCHEMA, EPOCH, TERM, SEQ, CLASSES, NODES, BORN, COUNTS, MAIL, BELL, RELEASE, JOURNAL, WISH, SUSPENDED, QUEUES, WORKERS,
    "rq:queue:*", "rq:wip:*", "rq:finished:*", "rq:failed:*", "rq:canceled:*", "rq:deferred:*", "rq:workers:*",
    # These live as long as tasks that have not ended need them; ends set a TTL or delete them.
    "rq:job:*", "pilotq:shared:*", "pilotq:submit:*", "pilotq:inbox:*", "pilotq:kids:*", "pilotq:bits:*",
    "pilotq:values:*", "pilotq:each:*",
)  # fmt: skip


def job(task_id: str) -> str:
    return f"rq:job:{task_id}"


def queue(name: str) -> str:
    return f"rq:queue:{name}"


def registry(kind: str, queue_name: str) -> str:
    """``kind`` is wip, finished, failed, canceled, deferred or scheduled."""
    return f"rq:{kind}:{queue_name}"


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
