"""How often the dispatcher asks the server before a task that comes to an idle pilot is handed to its node."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable

from pilotq.broker.scheduling.dispatcher import Dispatcher
from pilotq.broker.store import keys
from pilotq.broker.store.messages import ControlChanged
from pilotq.broker.store.store import pack
from tests.support.engine import QUEUE_ID, Engine, FakeNode, fixtures, pump, task
from tests.support.running_dispatcher import RunningDispatcher
from tests.support.waiting import wait_until

engine, server, node = fixtures
LONG = 9.0  # nothing is done from time to time meanwhile
CLIENT, CLAIM, WAIT = 2, 1, 1


class Reads:
    """Counts what the server reads from its sockets: a piece for each round trip. Its own questions do not count."""

    def __init__(self, engine: Engine) -> None:
        self._ask = engine.admin.call
        self._own = 0
        self._before = 0
        self._before = self.since()

    def since(self) -> int:
        info = self._asked("INFO", "stats").decode()
        total = int(info.partition("total_reads_processed:")[2].split()[0])
        return total - self._own - self._before

    def dispatcher_waits(self) -> bool:
        return b"cmd=blmpop" in self._asked("CLIENT", "LIST")

    def _asked(self, *command: str) -> bytes:
        self._own += 1
        answer: bytes = self._ask(*command)
        return answer


def test_one_call_after_the_wake_up(engine: Engine, node: Callable[..., FakeNode]) -> None:
    engine.reset(reconcile_s=LONG, retract_after_s=4 * LONG)
    with RunningDispatcher(engine) as running:
        n1 = node()
        pump([n1], lambda: running.dispatcher.inventory.nodes)
        reads = Reads(engine)
        for number in (1, 2):  # with the first one the server gets the scripts
            wait_until(reads.dispatcher_waits)
            before = reads.since()
            engine.submit(task())
            assert select.select(n1.link.filenos(), [], [], 20)[0]
            wait_until(reads.dispatcher_waits)
            made = reads.since() - before
            pump([n1], lambda: n1.running)
            n1.finish(*n1.running)
            pump([n1], lambda number=number: engine.counts().get("finished") == number)  # type: ignore[misc]
            pump([n1], lambda: not running.dispatcher.inventory.slots and not n1.link.unsent())
        running.dispatcher.stop = True
        engine.link.call("RPUSH", keys.EVENTS, pack(ControlChanged()))
    assert made == CLIENT + CLAIM + WAIT


def test_what_waited_for_a_task_is_handed_out_when_its_end_is_read(
    engine: Engine, node: Callable[..., FakeNode]
) -> None:
    n1 = node()
    with contextlib.closing(Dispatcher(engine.running.address, QUEUE_ID, engine.settings)) as dispatcher:
        dispatcher._take_over()

        def turned(condition: Callable[[], object]) -> bool:
            dispatcher._turn()
            n1.turn()
            return bool(condition())

        first, second = engine.submit(task(name="first"), task(after=["first"]))
        wait_until(lambda: turned(lambda: first in n1.running))
        wait_until(lambda: turned(lambda: not engine.link.call("EXISTS", keys.EVENTS, keys.WAKEUP)))
        n1.finish(first)
        pump([n1], lambda: not n1.link.unsent())
        dispatcher._turn()
        pump([n1], lambda: n1.running, seconds=2.0)
        assert list(n1.running) == [second]
