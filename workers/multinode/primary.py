"""Keeps the tasks over several nodes whose first node is this one: their launch agents, lost nodes, and end.

When nothing of an execution lives here any more, every other node of it is asked to sweep, and only when all have
confirmed does it count as ended. A node that does not confirm in time keeps its part of the reservation, until it does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

from pilotq.broker.log import log
from pilotq.broker.os_strings import encode, from_utf8
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import (
    ExecutionEnd,
    PartlyReleased,
    RemoteEnded,
    StartRemote,
    StopRemote,
    Sweep,
    Swept,
    ToWorker,
)
from pilotq.broker.store.resources import format_allocation, parse_allocation
from pilotq.workers.execution.execution import Execution, Phase
from pilotq.workers.execution.hooks import NodeActions
from pilotq.workers.multinode.agent_server import AgentReply, AgentRequest, AgentServer
from pilotq.workers.session import Session

NODE_LOST = "worker lost"
STARTED = frozenset({Phase.RUNNING, Phase.NOTICED, Phase.ENDING, Phase.KILLED})
Send = Callable[[str, ToWorker], None]


class MultinodeTask:
    """One execution over several nodes. ``nodes`` are addresses of their workers by name, this one's too."""

    __slots__ = (
        "agents", "e", "ended", "folder", "give_up_at", "lost_nodes", "nodes", "sweep_round", "swept", "unconfirmed",
    )  # fmt: skip

    def __init__(self, e: Execution, nodes: dict[str, str], folder: str) -> None:
        self.e = e
        self.nodes = nodes
        self.folder = folder
        self.agents: dict[int, int] = {}  # number of a remote process -> connection of its agent
        self.lost_nodes: set[str] = set()  # names of nodes that are lost
        self.sweep_round = 0  # of sweeps; answers to earlier ones do not count
        self.unconfirmed: set[str] = set()  # names of the nodes that have not confirmed
        self.ended = 0.0  # unix seconds; of the last process here
        self.give_up_at: float | None = None  # monotonic; while it is being swept
        self.swept = False


class PrimaryNode:
    """Keeps the executions of which this node is the first.

    ``address`` is this worker's, ``send`` sends to another one; ``memory_of`` is the limit of a class, on each node.
    """

    def __init__(
        self, session: Session, address: str, settings: Settings, send: Send, node: NodeActions,
        memory_of: Callable[[str], int],
    ) -> None:  # fmt: skip
        self._session = session
        self._memory_of = memory_of
        self._address = address
        self._settings = settings
        self._send = send
        self._node = node
        self._agent_server = AgentServer()
        self._numbers = 0  # of remote processes, and of sweeps
        self._tasks: dict[int, MultinodeTask] = {}  # by the key of the execution
        self._partly_released: dict[int, MultinodeTask] = {}  # by slot: ended, and not confirmed everywhere

    def add(self, e: Execution, nodes: dict[str, str], folder: str) -> str:
        """Enter an execution that is about to be launched; returns the name of the socket for its agents."""
        self._tasks[e.key] = MultinodeTask(e, nodes, folder)
        return self._agent_server.name() if len(nodes) > 1 else ""

    def may_go_on(self, e: Execution) -> bool:
        """Whether its slot may: not when a part of its reservation is lost."""
        task = self._tasks.get(e.key)
        return task is None or not (task.lost_nodes or task.unconfirmed)

    # -- launch agents ---------------------------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        return self._agent_server.filenos()

    def serve(self, ready: set[int]) -> None:
        requests, closed = self._agent_server.serve(ready)
        for connection, request in requests:
            try:
                refusal = self._start_remote(connection, request)
            except Exception as error:  # noqa: BLE001  # the boundary of one agent's request
                refusal = f"the request cannot be passed on: {error}"
            if refusal:
                self._agent_server.reply(connection, AgentReply(255, "", f"pilotq-agent: {refusal}\n"))
        for connection in closed:
            for task in self._tasks.values():
                for number in [n for n, c in task.agents.items() if c == connection]:
                    # Nobody waits for it any more: as with ssh, what was started for it goes.
                    self._send_to_all(task, StopRemote(self._address, number))
                    del task.agents[number]

    def _start_remote(self, connection: int, request: AgentRequest) -> str:
        """Pass on what an agent asks for; returns why not, when it cannot have it."""
        task = next((t for t in self._tasks.values() if _is_of(t.e, request.id, request.execution)), None)
        if task is None or task.give_up_at is not None:
            return f"execution {request.execution} of task {request.id} does not run here, or is about to end"
        address = task.nodes.get(request.node)
        if address is None:
            return f"node {request.node} is none of this task's, which are {', '.join(task.nodes)}"
        self._numbers += 1
        task.agents[self._numbers] = connection
        run = task.e.run
        env = {encode(from_utf8(name)): encode(from_utf8(value)) for name, value in request.env.items()}
        argv = [b"sh", b"-c", encode(from_utf8(request.command))]
        self._send(
            address,
            StartRemote(
                run.id, run.execution, self._address, self._numbers, task.e.allocation, run.shared, argv,
                env, encode(from_utf8(request.cwd)), self._memory_of(run.class_name),
            ),
        )  # fmt: skip
        return ""

    # -- messages of other workers ------------------------------------------------------------------------------------

    def remote_ended(self, message: RemoteEnded) -> None:
        for task in self._tasks.values():
            connection = task.agents.pop(message.number, None)
            if connection is not None:
                out, err = (text.decode("utf-8", "surrogateescape") for text in (message.stdout, message.stderr))
                self._agent_server.reply(connection, AgentReply(message.status, out, err))
                task.e.peak = max(task.e.peak, message.peak)
                if message.too_much and task.give_up_at is None:
                    task.e.message = task.e.message or message.too_much
                    self._node.stop_execution(task.e, "memory")
                elif message.lost and task.give_up_at is None:
                    self._node.stop_execution(task.e, NODE_LOST)
                return

    def node_lost(self, address: str, *, clean: bool = False) -> None:
        """A node is lost, or has left, by its worker's address: executions that use it end as lost.

        What is being ended already goes on with that: at the end of an allocation all nodes leave, those first that
        have started nothing of it (srun has), and it still has its grace to save its state.
        """
        for task in [t for t in self._tasks.values() if address in t.nodes.values()]:
            self._lose_node(task, address, clean=clean)
        for task in list(self._partly_released.values()):
            self._confirm_late(task, address)

    def undelivered(self, address: str, message: ToWorker) -> None:
        if isinstance(message, (Sweep, StartRemote)):
            self.node_lost(address)

    def _lose_node(self, task: MultinodeTask, address: str, *, clean: bool) -> None:
        name = address.rpartition(":")[0]
        task.lost_nodes.add(name)
        if task.give_up_at is not None:
            self._confirm(task, name)
        elif not task.e.reason:
            task.e.outcome = "requeue" if clean else task.e.outcome
            self._node.stop_execution(task.e, NODE_LOST)

    def swept(self, message: Swept) -> None:
        address = f"{message.node}:{message.incarnation}"
        for task in list(self._tasks.values()):
            if task.sweep_round == message.round and task.nodes.get(message.node) == address:
                self._confirm(task, message.node)
        for task in list(self._partly_released.values()):
            if task.sweep_round == message.round:
                self._confirm_late(task, address)

    # -- the end ---------------------------------------------------------------------------------------------------

    def killing(self, e: Execution) -> None:
        """Its grace is over: its processes on other nodes are killed with it."""
        if (task := self._tasks.get(e.key)) is not None:
            self._sweep(task, 0.0)

    def defer_end(self, e: Execution, ended: float, now: float) -> bool:
        """Nothing of it lives here. True when other nodes must be asked first: then `finish_execution` follows."""
        task = self._tasks.get(e.key)
        if task is None or task.swept:
            return False
        if e.exited is None and e.phase not in STARTED:
            task.swept = True
            return False  # nothing was started
        task.ended = ended
        task.give_up_at = now + self._settings.kill_grace_s + self._settings.sweep_confirm_s
        task.unconfirmed = set(task.nodes) - task.lost_nodes
        self._sweep(task, self._settings.kill_grace_s if not e.reason else 0.0)
        return True

    def forget(self, e: Execution) -> None:
        """It has been reported. Its files go."""
        task = self._tasks.pop(e.key, None)
        if task is not None:
            for connection in task.agents.values():
                self._agent_server.reply(connection, AgentReply(255, "", "pilotq-agent: the execution has ended\n"))
            self._node.beside(lambda: shutil.rmtree(task.folder, ignore_errors=True))

    def _sweep(self, task: MultinodeTask, grace: float) -> None:
        self._numbers += 1
        task.sweep_round = self._numbers
        run = task.e.run
        self._send_to_all(task, Sweep(self._address, run.id, run.execution, task.sweep_round, grace))

    def _send_to_all(self, task: MultinodeTask, message: ToWorker) -> None:
        for name, address in task.nodes.items():
            if name not in task.lost_nodes:
                self._send(address, message)

    def _confirm(self, task: MultinodeTask, name: str) -> None:
        task.unconfirmed.discard(name)
        if not task.unconfirmed and task.give_up_at is not None:
            self._finish(task)

    def _finish(self, task: MultinodeTask) -> None:
        """All nodes have confirmed, or were waited for long enough."""
        task.swept = True
        e = task.e
        if task.lost_nodes and not e.reason and (e.exited is None or e.exited.status):
            # Its launcher saw the loss before it was reported here, and failed because of it.
            e.reason, e.message = NODE_LOST, f"node {', '.join(sorted(task.lost_nodes))} was lost"
        self._node.finish_execution(e, task.ended)

    # -- time ------------------------------------------------------------------------------------------------------

    def next(self) -> float | None:
        return min((t.give_up_at for t in self._tasks.values() if t.give_up_at is not None), default=None)

    def tick(self, now: float) -> None:
        for task in list(self._tasks.values()):
            if task.give_up_at is not None and now >= task.give_up_at:
                self._finish(task)

    def unconfirmed(self, e: Execution) -> str:
        """The part of its allocation whose nodes have not confirmed its end: it stays reserved. Empty when all have."""
        task = self._tasks.get(e.key)
        if task is None or not task.unconfirmed:
            return ""
        parts = tuple(part for part in parse_allocation(e.allocation) if part.node in task.unconfirmed)
        text = format_allocation(parts)
        log(
            f"task {e.run.id}: {', '.join(sorted(task.unconfirmed))} did not confirm its end: {text} stays reserved",
            level="warning",
            task=e.run.id,
        )
        self._partly_released[e.slot] = task
        return text

    def keep_reserved(self, e: Execution, allocation: str) -> None:
        node, _, incarnation = self._address.rpartition(":")
        self._session.post_event(PartlyReleased(node, int(incarnation), e.slot, allocation))

    def _confirm_late(self, task: MultinodeTask, address: str) -> None:
        name = address.rpartition(":")[0]
        if task.nodes.get(name) != address:
            return
        task.unconfirmed.discard(name)
        if not task.unconfirmed and self._partly_released.pop(task.e.slot, None) is not None:
            log(f"task {task.e.run.id}: all nodes have confirmed its end by now", task=task.e.run.id)
            self._node.free_slot(task.e.slot)
            self._session.post_ends([], [ExecutionEnd(task.e.slot, task.e.run.class_name, -1.0, False)])

    def close(self) -> None:
        self._agent_server.close()


def _is_of(e: Execution, task_id: str, execution: int) -> bool:
    return e.run.id == task_id and e.run.execution == execution
