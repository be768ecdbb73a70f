"""Defines the interface between a node and the part of it that runs tasks over several nodes.

`Node` knows nothing of other nodes. It calls a `NodeHooks`, which knows them (multinode/node.py);
the hooks change what the node does by `NodeActions` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pilotq.broker.store.messages import ToWorker
from pilotq.workers.execution.execution import Execution
from pilotq.workers.memory_watch import MemoryWatch, WatchedTask
from pilotq.workers.protocol import FromLauncher


class NodeActions(Protocol):
    """What a node does for its hooks."""

    def stop_execution(self, e: Execution, reason: str) -> None:
        """End an execution that still runs, with the usual grace."""

    def finish_execution(self, e: Execution, ended: float) -> None:
        """Go on with an end that was deferred: all nodes have confirmed it, or were waited for long enough."""

    def beside(self, action: Callable[[], None]) -> None:
        """Do something with files that may hang, in a thread beside the loop."""

    def memory_of(self, class_name: str) -> int:
        """The bytes that a task of this class may use on each node; 0: any."""

    @property
    def memory_watch(self) -> MemoryWatch:
        """Measures processes here. What is found above its limit, and is not the node's own, is told `over_limit`."""

    def free_slot(self, number: int) -> None:
        """The part of a slot that stayed reserved after its task had ended is free."""


class NodeHooks(Protocol):
    """What a node calls on the part that runs tasks over several nodes. No method waits.

    An execution over several nodes meets these moments on its first node::

        it runs          receive, serve, tick (its launch agents and its other nodes)
        grace is over    killing
        it has ended     defer_end -> True: the other nodes are asked to confirm
        ... everywhere   NodeActions.finish_execution: defer_end -> False, unconfirmed, may_go_on, forget
    """

    @property
    def busy(self) -> bool:
        """Whether anything is done here for executions of other nodes."""

    def receive(self, message: ToWorker, now: float) -> None:
        """A message that is not about this node alone."""

    def receive_record(self, record: FromLauncher) -> bool:
        """A launcher's record of no execution of this node; True if it was of a process for another node's."""

    def over_limit(self, task: WatchedTask, why: str, now: float) -> None:
        """What was started for another node's execution uses too much memory: ``why`` is a sentence for people."""

    def filenos(self) -> list[int]:
        """Descriptors to wait on for reading; then `serve` is called."""

    def serve(self, ready: set[int]) -> None:
        """Read from those that are ready."""

    def next(self) -> float | None:
        """Monotonic time at which `tick` wants to be called."""

    def tick(self, now: float) -> None:
        """Do what is due."""

    def leave(self, grace: float, now: float) -> None:
        """The node ends all it has, within the grace."""

    def launcher_ended(self, number: int) -> None:
        """A launcher has died or was given up, with all that it had started."""

    def remote_executions(self) -> list[tuple[str, str]]:
        """First node's worker and allocation of each execution of another node that something was started for here."""

    # -- the end of an execution of this node ----------------------------------------------------------------------

    def killing(self, e: Execution) -> None:
        """Its grace is over: it is about to get SIGKILL."""

    def defer_end(self, e: Execution, ended: float, now: float) -> bool:
        """Nothing of it lives on this node. True if other nodes must confirm first: `finish_execution` follows."""

    def unconfirmed(self, e: Execution) -> str:
        """The part of its allocation that stays reserved after its end, as nodes have not confirmed it; or empty."""

    def keep_reserved(self, e: Execution, allocation: str) -> None:
        """It was reported; the dispatcher must learn that this part of its slot stays reserved."""

    def may_go_on(self, e: Execution) -> bool:
        """Whether the slot may go to another task: not when a part of it is lost or not confirmed."""

    def forget(self, e: Execution) -> None:
        """It has been reported, or was returned before it had started."""

    def close(self) -> None:
        """The worker ends."""
