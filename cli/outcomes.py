"""The sentences that tell what became of tasks that were to be canceled, or to run again."""

from __future__ import annotations

from typing import Final

from pilotq.broker.tasks.states import WAITING

AGAIN: Final = frozenset({"queued", "deferred"})
# The answers of Broker.retry, except statuses of tasks that have nothing to run again.
RETRY: Final = {
    "queued": "runs again",
    "deferred": "runs again when what it depends on has finished",
    "dependency": "waits for a task that has not finished: retry that one, too",
    "never": "runs only if what it depends on does not finish, and that finished: there is nothing to run again",
    "ending": "was canceled, and still runs: try again when it has ended",
    "damaged": "has a record on the server that is damaged: submit it again",
    "gone": "is only in the journal: submit it again",
    "changed": "was changing meanwhile: try again",
    "unknown": "is only in the journal: submit it again",
    "finished": "has finished: there is nothing to run again",
}
CANCEL: Final = {
    "canceled": "canceled",
    "stopping": "is running, and is being ended",
    "unknown": "is not known",
    "started": "goes on, if its node has begun it",
}
NOTHING_WAITS: Final = "nothing of it waits"  # of an array, with `cancel --waiting`


def retry_sentence(word: str, before: str) -> str:
    """What an answer of `Broker.retry` means for a task with the status ``before``; a text that follows its id."""
    if word in AGAIN and before in WAITING:
        return f"is {before}: it has not ended"
    return RETRY.get(word, f"is {word}: it has not ended")


def cancel_sentence(word: str) -> str:
    """What an answer of `Broker.cancel` means; a text that follows the task's id."""
    return CANCEL.get(word, f"had already ended: {word}")
