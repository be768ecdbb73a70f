"""The states of a task and their transitions as one table, (status, event) -> status; scripts are checked against it.

Statuses are RQ's own words (an unknown one would break every dashboard); ``pq_reason`` says more, from REASONS.
``rate_limited`` and ``ready_to_enqueue`` are entered by RQ's own producers only.
"""

from __future__ import annotations

from typing import Final

WAITING: Final = frozenset({"created", "deferred", "scheduled", "queued", "rate_limited", "ready_to_enqueue"})
ACTIVE: Final = frozenset({"started"})
ENDED: Final = frozenset({"finished", "failed", "stopped", "canceled"})
STATUSES: Final = WAITING | ACTIVE | ENDED

# Events are named for what a script does; EVENT_SCRIPTS says which (broker/store/scripts/<script>.lua). The record of
# an array is queued until its last element was handed out, then started until the last one has ended.
TABLE: Final[dict[tuple[str, str], str]] = {
    ("created", "commit"): "queued",
    ("created", "commit_deferred"): "deferred",
    ("created", "commit_omitted"): "canceled",
    ("deferred", "release"): "queued",
    ("deferred", "omit"): "canceled",
    ("deferred", "cancel"): "canceled",
    ("queued", "claim"): "started",
    ("queued", "cancel"): "canceled",
    ("started", "return"): "queued",
    ("started", "return_canceled"): "canceled",  # it was to be stopped while it was on its way back
    ("started", "lost"): "queued",
    ("started", "crash_limit"): "failed",
    ("started", "end_finished"): "finished",
    ("started", "end_failed"): "failed",
    ("started", "end_retried"): "queued",
    ("started", "end_requeued"): "queued",  # ended through no fault of its own: the pilot ends, or its node is suspect
    ("started", "end_stopped"): "stopped",
    ("started", "end_canceled"): "canceled",
    ("started", "end_joining"): "deferred",  # its process has ended, and it waits for its children
    ("deferred", "join_finished"): "finished",
    ("deferred", "join_failed"): "failed",
    ("deferred", "join_stopped"): "stopped",
    ("deferred", "join_canceled"): "canceled",
    ("started", "cancel"): "started",  # the worker has the message; the status changes when its processes are gone
    # Of a task that has children, and no process: these are canceled, and it ends when they have.
    ("queued", "cancel_joining"): "deferred",
    ("deferred", "cancel_joining"): "deferred",
    ("scheduled", "cancel_joining"): "deferred",
    ("canceled", "cancel_joining"): "deferred",
    ("canceled", "end_joining"): "deferred",
    ("started", "return_joining"): "deferred",
    ("canceled", "return_joining"): "deferred",
    # The user wants it again. RQ's own requeue sets the status first, and puts it into the user's queue.
    ("failed", "requeue"): "queued",
    ("stopped", "requeue"): "queued",
    ("canceled", "requeue"): "queued",
    ("queued", "requeue"): "queued",
    ("failed", "requeue_deferred"): "deferred",
    ("stopped", "requeue_deferred"): "deferred",
    ("canceled", "requeue_deferred"): "deferred",
    # RQ's own job.cancel() sets the status first, of waiting and of running tasks, and tells nobody.
    ("canceled", "cancel"): "canceled",
    ("canceled", "end_canceled"): "canceled",
    ("canceled", "return_canceled"): "canceled",
    # Jobs of RQ's own producers. What they enqueue is queued, deferred, scheduled or rate_limited before we know of it.
    ("queued", "route"): "queued",
    ("queued", "refuse"): "failed",
    ("deferred", "adopt"): "deferred",
    ("deferred", "adopt_ready"): "queued",
    ("deferred", "adopt_omitted"): "canceled",
    ("deferred", "refuse"): "failed",
    ("deferred", "release_limited"): "rate_limited",
    ("scheduled", "due"): "queued",
    ("scheduled", "due_limited"): "rate_limited",
    ("ready_to_enqueue", "pick_up"): "queued",
    ("ready_to_enqueue", "due_limited"): "rate_limited",
    ("rate_limited", "rate_slot"): "queued",
    ("started", "end_later"): "scheduled",  # RQ's Retry and Repeat, with an interval
    ("scheduled", "cancel"): "canceled",
    ("ready_to_enqueue", "cancel"): "canceled",
    ("rate_limited", "cancel"): "canceled",
    ("queued", "requeue_undone"): "failed",  # RQ's requeue, of what cannot run again
}

# Events that meet only what RQ's own producers and buttons have made.
RQ_EVENTS: Final = frozenset({
    "route", "refuse", "adopt", "adopt_ready", "adopt_omitted", "release_limited", "due", "due_limited", "pick_up",
    "rate_slot", "end_later", "requeue_undone",
})  # fmt: skip

EVENT_SCRIPTS: Final = {
    "commit": "commit", "commit_deferred": "commit", "commit_omitted": "commit", "release": "release_dependents",
    "omit": "release_dependents", "cancel": "cancel", "claim": "claim", "return": "return_unstarted",
    "return_canceled": "return_unstarted", "lost": "complete", "crash_limit": "complete", "end_finished": "complete",
    "end_failed": "complete", "end_retried": "complete", "end_requeued": "complete", "end_stopped": "complete",
    "end_canceled": "complete", "requeue": "requeue", "requeue_deferred": "requeue", "route": "route_rq",
    "refuse": "route_rq", "adopt": "route_rq", "adopt_ready": "route_rq", "adopt_omitted": "route_rq",
    "requeue_undone": "route_rq", "release_limited": "release_dependents", "due": "enqueue_due",
    "end_joining": "complete", "join_finished": "release_dependents", "join_failed": "release_dependents",
    "join_stopped": "release_dependents", "join_canceled": "release_dependents", "cancel_joining": "cancel",
    "return_joining": "return_unstarted",
    "due_limited": "enqueue_due", "pick_up": "enqueue_due", "rate_slot": "free_rate_slots", "end_later": "complete",
}  # fmt: skip

# The closed list of reasons, with the sentence that `explain` and the tables show.
REASONS: Final[dict[str, str]] = {
    "": "",
    "exit": "ended with a non-zero exit code",
    "signal": "was killed by a signal",
    "exception": "raised an exception",
    "interpreter": "ended its Python interpreter before it returned",
    "result": "returned what cannot be stored",
    "time limit": "ran longer than its time limit",
    "memory": "used too much memory",
    "canceled": "was canceled by its user",
    "stopped": "was stopped by its user",
    "dependency": "a task it depends on did not end as required",
    "not found": "its program, directory or input file does not exist or may not be used",
    "launch": "could not be started",
    "launch hangs": "starting it did not return (a file system or device hangs)",
    "output": "its output file could not be written",
    "crash limit": "its worker died under it too often",
    "worker lost": "its worker died",
    "pilot ended": "the pilot ended before it did",
    "gave way": "was ended for tasks that are not nice, and waits again",
    "walltime": "the allocation it ran in ended before it did",
    "node": "failed at once on a node where others did so before it: another node tries it",
    "elements": "some of its tasks did not finish",
    "children": "some of its children did not finish",
    "failures": "more tasks failed than may: what waited was canceled",
    "refused": "asks for what cannot be",
    "retries": "asked for more retries than it may have",
    "returned retry": "asked to be tried again",
    "unkillable": "one of its processes could not be killed",
}
