"""The life of a task as one table, (status, event) -> status; the authority that scripts are checked against.

Statuses are RQ's own words (an unknown one would break every dashboard); ``pq_reason`` says more, from REASONS.
``rate_limited`` and ``ready_to_enqueue`` are entered by stock RQ producers only.
"""

from __future__ import annotations

from typing import Final

WAITING: Final = frozenset({"created", "deferred", "scheduled", "queued", "rate_limited", "ready_to_enqueue"})
ACTIVE: Final = frozenset({"started"})
ENDED: Final = frozenset({"finished", "failed", "stopped", "canceled"})
STATUSES: Final = WAITING | ACTIVE | ENDED

# Events are named for what a script does; EVENT_SCRIPTS says which (broker/scripts/<script>.lua). The record of an
# array is queued until its last element was handed out, then started until the last one has ended.
TABLE: Final[dict[tuple[str, str], str]] = {
    ("created", "commit"): "queued",
    ("created", "commit_deferred"): "deferred",
    ("created", "commit_omitted"): "canceled",
    ("deferred", "release"): "queued",
    ("deferred", "omit"): "canceled",
    ("deferred", "cancel"): "canceled",
    ("queued", "claim"): "started",
    ("queued", "cancel"): "canceled",
    ("started", "give_back"): "queued",
    ("started", "give_back_canceled"): "canceled",  # it was to be stopped while it was on its way back
    ("started", "lost"): "queued",
    ("started", "crash_limit"): "failed",
    ("started", "end_finished"): "finished",
    ("started", "end_failed"): "failed",
    ("started", "end_retried"): "queued",
    ("started", "end_free"): "queued",  # ended through no fault of its own: the pilot ends, or its node is doubted
    ("started", "end_stopped"): "stopped",
    ("started", "end_canceled"): "canceled",
    ("started", "cancel"): "started",  # the worker is told; the status changes when its processes are gone
    # The user wants it again. RQ's own requeue sets the status first, and puts it into the user's queue.
    ("failed", "retry"): "queued",
    ("stopped", "retry"): "queued",
    ("canceled", "retry"): "queued",
    ("queued", "retry"): "queued",
    ("failed", "retry_deferred"): "deferred",
    ("stopped", "retry_deferred"): "deferred",
    ("canceled", "retry_deferred"): "deferred",
    # RQ's own job.cancel() sets the status first, of waiting and of running tasks, and tells nobody.
    ("canceled", "cancel"): "canceled",
    ("canceled", "end_canceled"): "canceled",
    ("canceled", "give_back_canceled"): "canceled",
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
    ("rate_limited", "slot"): "queued",
    ("started", "end_later"): "scheduled",  # RQ's Retry and Repeat, with an interval
    ("scheduled", "cancel"): "canceled",
    ("ready_to_enqueue", "cancel"): "canceled",
    ("rate_limited", "cancel"): "canceled",
    ("queued", "requeue_undone"): "failed",  # RQ's requeue, of what cannot run again
}

# Events that meet only what RQ's own producers and buttons have made.
RQ_EVENTS: Final = frozenset({
    "route", "refuse", "adopt", "adopt_ready", "adopt_omitted", "release_limited", "due", "due_limited", "pick_up",
    "slot", "end_later", "requeue_undone",
})  # fmt: skip

EVENT_SCRIPTS: Final = {
    "commit": "commit", "commit_deferred": "commit", "commit_omitted": "commit", "release": "release",
    "omit": "release", "cancel": "cancel", "claim": "claim", "give_back": "give_back",
    "give_back_canceled": "give_back", "lost": "end", "crash_limit": "end", "end_finished": "end", "end_failed": "end",
    "end_retried": "end", "end_free": "end", "end_stopped": "end", "end_canceled": "end",
    "retry": "retry", "retry_deferred": "retry", "route": "route", "refuse": "route", "adopt": "route",
    "adopt_ready": "route", "adopt_omitted": "route", "requeue_undone": "route", "release_limited": "release",
    "due": "due", "due_limited": "due", "pick_up": "due", "slot": "limits", "end_later": "end",
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
    "canceled": "was canceled by its user",
    "stopped": "was stopped by its user",
    "dependency": "a task it depends on did not finish",
    "not found": "its program, directory or input file does not exist or may not be used",
    "launch": "could not be started",
    "launch hangs": "starting it did not return (a file system or device hangs)",
    "output": "its output file could not be written",
    "crash limit": "its worker died under it too often",
    "worker lost": "its worker died",
    "pilot ended": "the pilot ended before it did",
    "walltime": "the allocation it ran in ended before it did",
    "node": "failed at once on a node where others did so before it: another node tries it",
    "elements": "some of its elements did not finish",
    "refused": "asks for what cannot be",
    "retries": "asked for more retries than it may have",
    "returned retry": "asked to be tried again",
    "unkillable": "one of its processes could not be killed",
}
