"""Executions that this node is the first of, and that have others too: their launch agents, their sweep, their losses.

When nothing of one lives here any more, every other node of it is asked to sweep, and only when all have confirmed does
it count as ended. A node that does not confirm in time keeps its part of the reservation, until it does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Protocol

from pilotq.broker.processes import log
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import (
    End,
    Guest,
    GuestEnded,
    GuestStop,
    Sweep,
    Swept,
    ToWorker,
    Withheld,
    format_allocation,
    parse_allocation,
)
from pilotq.workers.execution.escalation import Execution, Phase
from pilotq.workers.multinode.agent_server import Answer, Ask, Desk
from pilotq.workers.session import NodeLink

LOST = "worker lost"
STARTED = frozenset({Phase.RUNNING, Phase.NOTICED, Phase.ENDING, Phase.KILLED})
Tell = Callable[[str, ToWorker], None]


class Home(Protocol):
    """What the node does for its joints."""

    def stop_joint(self, e: Execution, reason: str) -> None:
        """End an execution."""

    def finish_joint(self, e: Execution, ended: float) -> None:
        """All nodes have confirmed, or were waited for long enough: it has ended."""

    def free_lane(self, number: int) -> None:
        """What was withheld of a lane is free."""


class Joint:
    """One execution. ``nodes`` are addresses of workers by name, ours too."""

    __slots__ = ("asks", "e", "ended", "folder", "give_up_at", "lost", "nodes", "pending", "round", "swept")

    def __init__(self, e: Execution, nodes: dict[str, str], folder: str) -> None:
        self.e = e
        self.nodes = nodes
        self.folder = folder
        self.asks: dict[int, int] = {}  # number of a guest -> connection of its agent
        self.lost: set[str] = set()  # names of nodes that are lost
        self.round = 0  # of sweeps; answers to earlier ones do not count
        self.pending: set[str] = set()  # names of the nodes that have not confirmed
        self.ended = 0.0  # unix seconds; of the last process here
        self.give_up_at: float | None = None  # monotonic; while it is being swept
        self.swept = False


class Joints:
    """``address`` is this worker's, ``tell`` sends a word to another one."""

    def __init__(self, link: NodeLink, address: str, settings: Settings, tell: Tell, home: Home) -> None:
        self._link = link
        self._address = address
        self._settings = settings
        self._tell = tell
        self._home = home
        self._desk = Desk()
        self._numbers = 0  # of guests
        self._joints: dict[int, Joint] = {}  # by the key of the execution
        self._withheld: dict[int, Joint] = {}  # by lane: ended, and not confirmed everywhere

    def begin(self, e: Execution, nodes: dict[str, str], folder: str) -> str:
        """An execution is about to be launched; returns the name of the socket for its agents."""
        self._joints[e.key] = Joint(e, nodes, folder)
        return self._desk.name() if len(nodes) > 1 else ""

    def goes_on(self, e: Execution) -> bool:
        """Whether its lane may: not when a part of its reservation is gone."""
        joint = self._joints.get(e.key)
        return joint is None or not (joint.lost or joint.pending)

    # -- launch agents ---------------------------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        return self._desk.filenos()

    def serve(self, ready: set[int]) -> None:
        asks, gone = self._desk.serve(ready)
        for connection, ask in asks:
            refusal = self._ask(connection, ask)
            if refusal:
                self._desk.answer(connection, Answer(255, "", f"pilotq-agent: {refusal}\n"))
        for connection in gone:
            for joint in self._joints.values():
                for number in [n for n, c in joint.asks.items() if c == connection]:
                    # Nobody waits for it any more: as with ssh, what was started for it goes.
                    self._to_all(joint, GuestStop(self._address, number))
                    del joint.asks[number]

    def _ask(self, connection: int, ask: Ask) -> str:
        """Pass on what an agent wants; why not, when it cannot have it."""
        joint = next((j for j in self._joints.values() if _named(j.e, ask.id, ask.execution)), None)
        if joint is None or joint.give_up_at is not None:
            return f"execution {ask.execution} of task {ask.id} does not run here, or is about to end"
        address = joint.nodes.get(ask.node)
        if address is None:
            return f"node {ask.node} is none of this task's, which are {', '.join(joint.nodes)}"
        self._numbers += 1
        joint.asks[self._numbers] = connection
        handed = joint.e.handed
        argv = [b"sh", b"-c", ask.command.encode()]
        self._tell(
            address,
            Guest(
                handed.id, handed.execution, self._address, self._numbers, joint.e.allocation, handed.shared, argv,
                ask.env, ask.cwd,
            ),
        )  # fmt: skip
        return ""

    # -- what others say -------------------------------------------------------------------------------------------

    def guest_ended(self, message: GuestEnded) -> None:
        for joint in self._joints.values():
            connection = joint.asks.pop(message.number, None)
            if connection is not None:
                out, err = (text.decode("utf-8", "replace") for text in (message.stdout, message.stderr))
                self._desk.answer(connection, Answer(message.status, out, err))
                if message.lost and joint.give_up_at is None:
                    self._home.stop_joint(joint.e, LOST)
                return

    def gone(self, address: str, *, clean: bool = False) -> None:
        """A node of ours is lost, or has left, by its worker's address: what uses it ends as lost.

        What is being ended already goes on with that: at the end of an allocation all nodes leave, those first that
        have started nothing of it (srun has), and it still has its time to write down how far it is.
        """
        for joint in [j for j in self._joints.values() if address in j.nodes.values()]:
            self._lose(joint, address, clean=clean)
        for joint in list(self._withheld.values()):
            self._confirm_late(joint, address)

    def undelivered(self, address: str, message: ToWorker) -> None:
        if isinstance(message, (Sweep, Guest)):
            self.gone(address)

    def _lose(self, joint: Joint, address: str, *, clean: bool) -> None:
        name = address.rpartition(":")[0]
        joint.lost.add(name)
        if joint.give_up_at is not None:
            self._confirmed(joint, name)
        elif not joint.e.reason:
            joint.e.wish = "free" if clean else joint.e.wish
            self._home.stop_joint(joint.e, LOST)

    def swept(self, message: Swept) -> None:
        address = f"{message.node}:{message.incarnation}"
        for joint in list(self._joints.values()):
            if joint.round == message.round and joint.nodes.get(message.node) == address:
                self._confirmed(joint, message.node)
        for joint in list(self._withheld.values()):
            if joint.round == message.round:
                self._confirm_late(joint, address)

    # -- the end ---------------------------------------------------------------------------------------------------

    def kill(self, e: Execution) -> None:
        """Its grace is over: what other nodes have of it is killed with it."""
        if (joint := self._joints.get(e.key)) is not None:
            self._sweep(joint, 0.0)

    def ending(self, e: Execution, ended: float, now: float) -> bool:
        """Nothing of it lives here. True when other nodes must be asked first: then ``finish`` follows."""
        joint = self._joints.get(e.key)
        if joint is None or joint.swept:
            return False
        if e.exited is None and e.phase not in STARTED:
            joint.swept = True
            return False  # nothing was started
        joint.ended = ended
        joint.give_up_at = now + self._settings.kill_grace_s + self._settings.confirm_s
        joint.pending = set(joint.nodes) - joint.lost
        self._sweep(joint, self._settings.kill_grace_s if not e.reason else 0.0)
        return True

    def forget(self, e: Execution) -> None:
        """It is being reported. Its files go."""
        joint = self._joints.pop(e.key, None)
        if joint is not None:
            for connection in joint.asks.values():
                self._desk.answer(connection, Answer(255, "", "pilotq-agent: the execution has ended\n"))
            shutil.rmtree(joint.folder, ignore_errors=True)

    def _sweep(self, joint: Joint, grace: float) -> None:
        self._numbers += 1
        joint.round = self._numbers
        handed = joint.e.handed
        self._to_all(joint, Sweep(self._address, handed.id, handed.execution, joint.round, grace))

    def _to_all(self, joint: Joint, message: ToWorker) -> None:
        for name, address in joint.nodes.items():
            if name not in joint.lost:
                self._tell(address, message)

    def _confirmed(self, joint: Joint, name: str) -> None:
        joint.pending.discard(name)
        if not joint.pending and joint.give_up_at is not None:
            self._over(joint)

    def _over(self, joint: Joint) -> None:
        """All nodes have confirmed, or were waited for long enough."""
        joint.swept = True
        e = joint.e
        if joint.lost and not e.reason and (e.exited is None or e.exited.status):
            # Its launcher saw the loss before anybody told us, and failed of it.
            e.reason, e.message = LOST, f"node {', '.join(sorted(joint.lost))} was lost"
        self._home.finish_joint(e, joint.ended)

    # -- time ------------------------------------------------------------------------------------------------------

    def next(self) -> float | None:
        return min((j.give_up_at for j in self._joints.values() if j.give_up_at is not None), default=None)

    def tick(self, now: float) -> None:
        for joint in list(self._joints.values()):
            if joint.give_up_at is not None and now >= joint.give_up_at:
                self._over(joint)

    def withheld(self, e: Execution) -> str:
        """What of a lane stays taken because nodes have not confirmed, as an allocation; empty when nothing does."""
        joint = self._joints.get(e.key)
        if joint is None or not joint.pending:
            return ""
        parts = tuple(part for part in parse_allocation(e.allocation) if part.node in joint.pending)
        text = format_allocation(parts)
        log(f"task {e.handed.id}: {', '.join(sorted(joint.pending))} did not confirm its end: {text} stays taken")
        self._withheld[e.lane] = joint
        return text

    def withhold(self, e: Execution, allocation: str) -> None:
        node, _, incarnation = self._address.rpartition(":")
        self._link.post_mail(Withheld(node, int(incarnation), e.lane, allocation))

    def _confirm_late(self, joint: Joint, address: str) -> None:
        name = address.rpartition(":")[0]
        if joint.nodes.get(name) != address:
            return
        joint.pending.discard(name)
        if not joint.pending and self._withheld.pop(joint.e.lane, None) is not None:
            log(f"task {joint.e.handed.id}: all nodes have confirmed its end by now")
            self._home.free_lane(joint.e.lane)
            self._link.post_ends([], [End(joint.e.lane, joint.e.handed.class_name, -1.0, False)])

    def close(self) -> None:
        self._desk.close()


def _named(e: Execution, task_id: str, execution: int) -> bool:
    return e.handed.id == task_id and e.handed.execution == execution
