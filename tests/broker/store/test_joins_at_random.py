"""Tasks that join, whatever is done in whatever order: no end comes too early, and none is missed."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pilotq.broker.client.submit import submit
from pilotq.broker.store.messages import Run
from pilotq.broker.store.requeue import requeue
from pilotq.broker.tasks.states import ENDED
from tests.support.engine import SHARED, Engine, array, fixtures, task

engine, server, node = fixtures


class Machine(RuleBasedStateMachine):
    engine: Engine

    @initialize()
    def empty(self) -> None:
        self.engine.reset()
        self.ids: list[str] = []  # tasks and arrays
        self.held: list[Run] = []
        self.children: dict[str, set[str]] = defaultdict(set)  # of this life of each task that joins
        self.retried_late: set[str] = set()  # children that run again after the end of what joined them

    def _status(self, task_id: str) -> str:
        return self.engine.status(task_id) or ""

    @precondition(lambda self: len(self.ids) < 20)
    @rule(data=st.data(), joins=st.booleans(), retries=st.integers(0, 1), size=st.integers(1, 2))
    def submit(self, data: st.DataObject, joins: bool, retries: int, size: int) -> None:
        open_ones = [i for i in self.ids if "pq_join" in self.engine.hash(i) and self._status(i) not in ENDED]
        submitter = data.draw(st.sampled_from(["", *(open_ones or self.ids)]))
        one = array(2) if size == 2 else task(join=joins, retries=retries)
        has_ended = submitter and self._status(submitter) in ENDED
        joined = bool(submitter) and "pq_join" in self.engine.hash(submitter) and not has_ended
        (task_id,) = submit(self.engine.link, self.engine.store, [one], SHARED, None, submitter=submitter)
        self.ids.append(task_id)
        if joined:
            self.children[submitter].add(task_id)

    @rule(count=st.integers(1, 4))
    def claim(self, count: int) -> None:
        self.held += self.engine.claim(count)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), outcome=st.sampled_from(["finished"] * 3 + ["failed"] * 3 + ["stopped", "requeue", "return"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        handed = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if outcome == "return":
            self.engine.return_unstarted([handed])
        else:
            self.engine.complete([handed], outcome, "exit" if outcome == "failed" else "")

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from(self.ids)))

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        self.engine.release_dependents()
        bad = [i for i in self.ids if self._status(i) in ("failed", "stopped", "canceled")]
        task_id = data.draw(st.sampled_from(bad or self.ids))
        has_ended = self._status(task_id) in ENDED
        answer = requeue(self.engine.store, [task_id])[task_id]
        if has_ended and answer == "queued":
            self.children.pop(task_id, None)
            for parent, children in self.children.items():
                # What joined it has ended, or cancels its children: then it is waited for no more.
                if task_id in children and (self._status(parent) in ENDED or "pq_cancel" in self.engine.hash(parent)):
                    self.retried_late.add(task_id)

    @rule()
    def release(self) -> None:
        self.engine.release_dependents()
        self.engine.inbox()

    @invariant()
    def nothing_ends_before_its_children(self) -> None:
        if self.engine.link.call("LLEN", "pilotq:release"):
            return
        for parent, children in self.children.items():
            open_ones = [c for c in children - self.retried_late if self._status(c) not in ENDED]
            record = self.engine.hash(parent)
            if record["status"] in ENDED:
                assert not open_ones
            elif not children & self.retried_late:
                assert int(record["pq_open_children"]) == len(open_ones)
                assert "pq_joining" not in record or open_ones
            if record["status"] == "finished" and not children & self.retried_late:
                assert all(self._status(c) == "finished" for c in children)

    def teardown(self) -> None:
        """Everything ends when all that runs has."""
        if not hasattr(self, "ids"):
            return
        for _ in range(50):
            self.held += self.engine.claim(20)
            if not self.held and not self.engine.link.call("LLEN", "pilotq:release"):
                break
            self.engine.complete(self.held)
            self.held = []
            self.engine.release_dependents()
        assert {self._status(task_id) for task_id in self.ids} <= ENDED
        assert not self.ids or self.engine.nothing_left()


def test_joins_at_random(engine: Engine) -> None:
    class OnThisServer(Machine):
        pass

    OnThisServer.engine = engine
    run_state_machine_as_test(
        OnThisServer,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
