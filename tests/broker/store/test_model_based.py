"""The whole store against a model: whatever is done in whatever order, each task is in one place and counts once."""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
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

from pilotq.broker.errors import StateLost, Superseded
from pilotq.broker.store import keys
from pilotq.broker.store.messages import Run
from pilotq.broker.store.requeue import requeue
from pilotq.broker.store.store import Store
from pilotq.broker.tasks.dependencies import FIELDS
from pilotq.broker.tasks.model import ArrayRange
from pilotq.broker.tasks.states import ENDED
from tests.support.engine import ONE, QUEUE_ID, Engine, fixtures, task

engine, server, node = fixtures
CRASH_LIMIT = 3
BAD = ENDED - {"finished"}
COUNTED = {"finished": "finished", "failed": "failed", "stopped": "failed", "canceled": "canceled"}


@dataclass
class Unit:
    """One task as the model knows it: a plain one, or an element."""

    id: str
    retries: int
    parents: list[tuple[str, str]]  # units or arrays, and the letters of the ends that release it
    array: str = ""
    status: str = "waiting"
    execution: int = 0
    crashes: int = 0
    cancel: bool = False  # it was to be stopped while it ran
    rq: bool = False  # by RQ's button, which sets the status at once
    met: bool = False  # an element that has a record of its own
    finals: int = 0  # ends of executions that count
    again: bool = False  # it was retried: its executions go on with any higher number
    ends: int = 0  # how often it had ended before it was retried
    waits: list[tuple[str, str]] = field(default_factory=list)  # those of its parents that are still to release it

    def __post_init__(self) -> None:
        self.waits = list(self.parents)


@dataclass
class Model:
    units: dict[str, Unit] = field(default_factory=dict)
    arrays: dict[str, list[str]] = field(default_factory=dict)
    each: set[str] = field(default_factory=set)  # arrays that wait element by element
    retries: dict[str, int] = field(default_factory=dict)  # of arrays, and how often they ended before a retry
    ends: Counter[str] = field(default_factory=Counter)

    def end_of(self, name: str) -> str:
        """The letter of its end; empty while it has not ended."""
        words = [self.units[i].status for i in self.arrays.get(name, [name])]
        if not all(w in ENDED for w in words):
            return ""
        return "k" if not any(w in BAD for w in words) else "f"

    def met(self, dependency: tuple[str, str]) -> bool:
        """It has ended as required. Those that are drawn here tell nothing but `k` from the other letters."""
        end = self.end_of(dependency[0])
        return bool(end) and end in dependency[1]

    def missed(self, dependency: tuple[str, str]) -> bool:
        end = self.end_of(dependency[0])
        return bool(end) and end not in dependency[1]

    def settle(self) -> None:
        """What release_dependents.lua does until nothing is left: tasks are omitted, transitively."""
        changed = True
        while changed:
            changed = False
            for unit in self.units.values():
                if unit.status == "waiting" and any(map(self.missed, unit.waits)):
                    unit.status, changed = "canceled", True

    def retry(self, units: list[Unit], *, anew: bool) -> None:
        """``anew``: they wait for their parents again. What these have released by now stays released."""
        for unit in self.units.values():
            unit.waits = [d for d in unit.waits if not self.met(d)] if unit.status == "waiting" else unit.waits
        for unit in units:
            unit.waits = list(unit.parents) if anew or unit.array in self.each else []
            unit.ends += 1
            unit.status, unit.cancel, unit.rq, unit.crashes, unit.again = "waiting", False, False, 0, True
            unit.retries = self.retries.get(unit.array, unit.retries)
            unit.met = False

    def ready(self) -> list[str]:
        return [u.id for u in self.units.values() if u.status == "waiting" and all(map(self.met, u.waits))]

    def requeue(self, unit: Unit) -> None:
        unit.status = "canceled" if unit.cancel else "waiting"

    def end(self, unit: Unit, outcome: str, *, slot: bool) -> str:
        """An execution that stands ends with this outcome: the verdict."""
        if unit.cancel and (outcome != "finished" or unit.rq):
            unit.status = "canceled"
            return "ok"
        if outcome == "failed" and unit.retries:
            unit.retries -= 1
        elif outcome == "lost":
            unit.crashes += slot
            if slot and unit.crashes >= CRASH_LIMIT:
                unit.status = "failed"
                return "ok"
        elif outcome != "requeue":
            unit.status = outcome
            return "ok"
        self.requeue(unit)
        return "retry"


def dependencies(fields: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, FIELDS[field]) for field, names in fields.items() for name in names]


class Machine(RuleBasedStateMachine):
    engine: Engine

    @initialize()
    def empty(self) -> None:
        self.engine.reset()
        self.model = Model()
        self.held: list[tuple[Run, bool]] = []  # executions that stand, and whether they got a slot
        self.past: list[Run] = []

    # -- submitting -------------------------------------------------------------------------------------------------

    def _parents(self, data: st.DataObject) -> dict[str, list[str]]:
        """Some tasks by the field that names them."""
        names = [*(u.id for u in self.model.units.values()), *self.model.arrays]
        chosen = data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
        found: dict[str, list[str]] = {}
        for name in chosen:
            found.setdefault(data.draw(st.sampled_from([*FIELDS, "after"])), []).append(name)
        return found

    @precondition(lambda self: len(self.model.units) < 30)
    @rule(data=st.data(), count=st.integers(1, 4), retries=st.integers(0, 2))
    def submit_tasks(self, data: st.DataObject, count: int, retries: int) -> None:
        fields = self._parents(data)
        parents = dependencies(fields)
        for task_id in self.engine.submit(*[task(retries=retries, **fields)] * count):
            self.model.units[task_id] = Unit(task_id, retries, parents)

    @precondition(lambda self: len(self.model.units) < 30)
    @rule(data=st.data(), size=st.integers(1, 5), retries=st.integers(0, 1), by_element=st.booleans())
    def submit_array(self, data: st.DataObject, size: int, retries: int, by_element: bool) -> None:
        indices = sorted(data.draw(st.sets(st.integers(0, 12), min_size=size, max_size=size)))
        span = ArrayRange.of(indices)
        like = [a for a, members in self.model.arrays.items() if len(members) == size]
        if by_element and like:
            each = data.draw(st.lists(st.sampled_from(like), min_size=1, max_size=2, unique=True))
            (name,) = self.engine.submit(task(array=span, retries=retries, after_each=each))
            parents = [[(self.model.arrays[p][n], "k") for p in each] for n in range(size)]
            self.model.each.add(name)
        else:
            fields = self._parents(data)
            (name,) = self.engine.submit(task(array=span, retries=retries, **fields))
            parents = [dependencies(fields)] * size
        self.model.retries[name] = retries
        self.model.arrays[name] = [f"{name}_{n}" for n in indices]
        for member, waits_for in zip(self.model.arrays[name], parents, strict=True):
            self.model.units[member] = Unit(member, retries, waits_for, name)

    @precondition(lambda self: len(self.model.units) < 30)
    @rule(size=st.integers(2, 5), retries=st.integers(0, 1))
    def submit_bundle(self, size: int, retries: int) -> None:
        """To all but those who look into it, it is an array."""
        store = self.engine.store
        store.settings = msgspec.structs.replace(self.engine.settings, bundle_above=1)
        members = self.engine.submit(*[task(str(n), retries=retries) for n in range(size)])
        store.settings = self.engine.settings
        name = members[0].partition("_")[0]
        assert members == [f"{name}_{n}" for n in range(size)]
        self.model.retries[name], self.model.arrays[name] = retries, members
        for member in members:
            self.model.units[member] = Unit(member, retries, [], name)

    # -- running ----------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 8), slot=st.booleans())
    def claim(self, count: int, slot: bool) -> None:
        pending = self.engine.link.call("EXISTS", keys.RELEASE)
        ready = self.model.ready()
        handed = self.engine.claim(count, slot=int(slot))
        assert len(handed) == len({h.id for h in handed}) <= count
        if not pending:
            assert len(handed) == min(count, len(ready))
        for h in handed:
            unit = self.model.units[h.id]
            assert h.id in ready
            unit.execution = max(unit.execution + 1, h.execution if unit.again else 0)
            unit.status, unit.met = "started", True
            assert (h.execution, h.retries, h.array) == (unit.execution, unit.retries, unit.array)
            self.held.append((h, slot))

    def _take(self, data: st.DataObject) -> tuple[Run, bool]:
        found = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.past.append(found[0])
        return found

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(["finished"] * 4 + ["failed", "failed", "stopped", "canceled", "requeue", "lost"]),
    )
    def end(self, data: st.DataObject, outcome: str) -> None:
        h, slot = self._take(data)
        verdict = self.model.end(self.model.units[h.id], outcome, slot=slot)
        assert (self.engine.report_lost([h]) if outcome == "lost" else self.engine.complete([h], outcome)) == [verdict]
        self.model.units[h.id].finals += verdict == "ok"

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end_run(self, data: st.DataObject) -> None:
        """Elements that finished are reported as runs; those that have a record or another order, by themselves."""
        array_id = data.draw(st.sampled_from(sorted({h.array for h, _ in self.held})))
        mine = [(h, slot) for h, slot in self.held if h.array == array_id]
        if not array_id:
            return
        self.held = [one for one in self.held if one not in mine]
        self.past += [h for h, _ in mine]
        expected = [self.model.end(self.model.units[h.id], "finished", slot=slot) for h, slot in mine]
        assert self.engine.complete_runs([h for h, _ in mine]) == expected
        for h, _ in mine:
            self.model.units[h.id].finals += 1

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def report_started(self, data: st.DataObject) -> None:
        h, _ = data.draw(st.sampled_from(self.held))
        self.engine.report_started(h)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        h, _ = self._take(data)
        self.model.requeue(self.model.units[h.id])
        assert self.engine.return_unstarted([h]) == (self.model.units[h.id].status == "waiting")

    @precondition(lambda self: self.past)
    @rule(data=st.data(), outcome=st.sampled_from(["finished", "failed", "canceled", "lost", "requeue", "return"]))
    def say_it_again(self, data: st.DataObject, outcome: str) -> None:
        h = data.draw(st.sampled_from(self.past))
        before = self._tasks()
        if outcome == "return":
            assert self.engine.return_unstarted([h]) == 0
        else:
            (verdict,) = self.engine.report_lost([h]) if outcome == "lost" else self.engine.complete([h], outcome)
            unit = self.model.units[h.id]
            if unit.execution > h.execution and unit.status not in ENDED:
                assert verdict == "stale"
        assert self._tasks() == before

    # -- stopping ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.units)
    @rule(data=st.data(), rq=st.booleans())
    def cancel(self, data: st.DataObject, rq: bool) -> None:
        """By us, or by RQ's own button and then by the reconciler."""
        units, link = self.model.units, self.engine.link
        name = data.draw(st.sampled_from([*units, *self.model.arrays]))
        members = [units[i] for i in self.model.arrays.get(name, [name])]
        real = self.engine.status(name)
        pressed = rq and real in ("queued", "deferred", "started")
        if pressed:
            link.call("HSET", keys.job(name), "status", "canceled")
            link.call("LREM", keys.queue(ONE), 0, name)
            link.call("ZREM", keys.registry("deferred", "default"), name)
        (answer,) = self.engine.cancel(name)
        self.engine.inbox()
        if name in units and units[name].array and real is None and units[name].status not in ("waiting", "started"):
            # An element that has ended, and its record with it; or release_dependents.lua has still to do that.
            assert answer in (COUNTED[units[name].status], "stopping")
            return
        for unit in members:
            if unit.status == "waiting":
                unit.status = "canceled"
            elif unit.status == "started":
                unit.cancel = True
                unit.rq = unit.rq or (pressed and unit.id == name)

    @precondition(lambda self: self.model.units)
    @rule(data=st.data())
    def cancel_what_waits(self, data: st.DataObject) -> None:
        """Their nodes are told to end what they have not begun: here they have begun all of it."""
        name = data.draw(st.sampled_from([*self.model.units, *self.model.arrays]))
        members = [self.model.units[i] for i in self.model.arrays.get(name, [name])]
        if self.engine.status(name) == "canceled" and any(m.status not in ENDED for m in members):
            return  # by RQ, before: the reconciler's call ends what waits of it
        self.engine.store.cancel([name], waiting=True)
        self.engine.inbox()
        for unit in members:
            if unit.status == "waiting":
                unit.status = "canceled"

    @precondition(lambda self: self.model.units)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """Of what has ended and been followed: what is still to be omitted is omitted."""
        self.engine.release_dependents()
        self.model.settle()
        units = self.model.units
        name = data.draw(st.sampled_from([*units, *self.model.arrays]))
        members = [units[i] for i in self.model.arrays.get(name, [name])]
        over = all(m.status in ENDED for m in members)
        (answer,) = requeue(self.engine.store, [name]).values()
        wanted = [m for m in members if m.status in BAD]
        if answer not in ("queued", "deferred") or not wanted:
            unfinished = [p for m in members for p in m.parents if not self.model.met(p)]
            assert not wanted or unfinished or self._is_ending(members), (answer, members)
            return
        self.model.retry(wanted, anew=(over and name in self.model.arrays) or not members[0].array)
        if name in self.model.arrays and over:
            self.model.ends[name] += 1
        elif name not in self.model.arrays and members[0].array:
            siblings = [units[i] for i in self.model.arrays[members[0].array] if i != name]
            self.model.ends[members[0].array] += all(u.status in ENDED for u in siblings)

    def _is_ending(self, members: list[Unit]) -> bool:
        """An array whose record, or one of whose elements, is to be stopped and still runs."""
        siblings = [self.model.units[i] for m in members for i in self.model.arrays.get(m.array, [m.id])]
        return any(u.status == "started" for u in siblings)

    @rule(limit=st.integers(1, 5))
    def release(self, limit: int) -> None:
        self.engine.store.release_dependents(limit)

    @rule()
    def release_all(self) -> None:
        self.engine.release_dependents()

    # -- others -----------------------------------------------------------------------------------------------------

    @rule()
    def another_dispatcher(self) -> None:
        old = Store(self.engine.link, QUEUE_ID, self.engine.settings, term=self.engine.store.term)
        self.engine.store.take_term()
        before = self._tasks()
        with pytest.raises(Superseded):
            old.release_dependents(5)
        assert self._tasks() == before

    @rule()
    def another_queue(self) -> None:
        before = self._tasks()
        with pytest.raises(StateLost):
            Store(self.engine.link, "other", self.engine.settings).cancel(list(self.model.units)[:3])
        assert self._tasks() == before

    # -- what holds after each step ---------------------------------------------------------------------------------

    def _tasks(self) -> dict[str, Any]:
        return self.engine.dump(without=("rq:worker:", keys.EVENTS, keys.WAKEUP, keys.TERM))

    def _settled(self) -> bool:
        if not hasattr(self, "model") or self.engine.link.call("EXISTS", keys.RELEASE):
            return False
        self.model.settle()
        return True

    @invariant()
    def all_is_in_its_place(self) -> None:
        if not self._settled():
            return
        e = self.engine
        places = {i: [k] for k in ("deferred", "finished", "failed", "canceled") for i in e.registry(k)}
        listed, running = Counter(e.list()), Counter([*e.registry("wip"), *e.leased()])
        for name, members in self.model.arrays.items():
            self._look_at_array(name, [self.model.units[i] for i in members], places, listed, running)
        ready = set(self.model.ready())
        for unit in self.model.units.values():
            real = e.status(unit.id)
            expected = unit.status if unit.status != "waiting" else "queued" if unit.id in ready else "deferred"
            if unit.array and (real is None or (not unit.met and expected == "deferred")):
                assert running[f"{unit.id}:{unit.execution}"] == (unit.status == "started")
                continue
            if unit.status == "started" and real == "canceled":
                assert unit.rq
            else:
                assert real == expected, unit
            if real == "queued":
                assert listed[unit.id] == 1 or unit.again
            assert running[f"{unit.id}:{unit.execution}"] == (unit.status == "started")
            if not unit.array:
                kind = {"stopped": "failed"}.get(expected, expected)
                assert places.get(unit.id, []) == (
                    [kind] if kind in ("deferred", "finished", "failed", "canceled") else []
                )
            assert (e.ttl(keys.job(unit.id)) >= 0) == (unit.status in ENDED)
        started = sum(u.status == "started" for u in self.model.units.values())
        assert started == sum(not m.endswith(":0") for m in running)

    def _look_at_array(
        self, name: str, units: list[Unit], places: dict[str, list[str]], listed: Counter[str], running: Counter[str]
    ) -> None:
        digits = {"finished": "1", "failed": "2", "stopped": "2", "canceled": "3"}
        assert self.engine.outcomes(name, len(units)) == "".join(digits.get(u.status, "0") for u in units), units
        over = all(u.status in ENDED for u in units)
        status = self.engine.status(name)
        assert (status in ENDED and f"{name}:0" not in running) == over or status == "canceled", (status, units)
        assert (self.engine.ttl(keys.job(name)) >= 0) == over
        if over:
            assert (status == "finished") == all(u.status == "finished" for u in units) or status == "canceled"
            assert places[name] == [status]
        elif name not in self.model.each and status == "queued":
            assert listed[name] == 1 or self.model.ends[name]
        assert all(self.engine.ttl(k) != -1 for k in (keys.outcomes(name), keys.elementwise(name)) if over)

    @invariant()
    def all_counts_once(self) -> None:
        if not self._settled():
            return
        units = self.model.units.values()
        expected = Counter(COUNTED[u.status] for u in units if u.status in ENDED)
        if units:
            expected["total"] = len(units)
        assert self.engine.counts() == expected
        finals = Counter(entry["id"] for entry in self.engine.journal() if entry["final"])
        for unit in units:
            assert finals[unit.id] == (unit.finals if unit.array else unit.ends + (unit.status in ENDED)), unit
        for name, members in self.model.arrays.items():
            over = all(self.model.units[i].status in ENDED for i in members)
            assert finals[name] == self.model.ends[name] + over

    @invariant()
    def no_key_stays_for_ever(self) -> None:
        names = self.engine.all_keys()
        patterns = [p for p in keys.PERMANENT if not p.startswith("rq:job:")]
        immortal = [
            n for n, ttl in zip(names, self.engine.link.pipeline([("TTL", n) for n in names]), strict=True) if ttl < 0
        ]
        jobs = {n.removeprefix("rq:job:") for n in immortal if n.startswith("rq:job:")}
        assert all(n.startswith("rq:job:") or any(fnmatch.fnmatchcase(n, p) for p in patterns) for n in immortal)
        if hasattr(self, "model"):
            assert jobs <= {*self.model.units, *self.model.arrays}

    def teardown(self) -> None:
        """In the end everything can end."""
        if not hasattr(self, "model"):
            return
        e = self.engine
        e.release_dependents()
        for h, slot in self.held:
            self.model.units[h.id].finals += 1
            self.model.end(self.model.units[h.id], "finished", slot=slot)
            assert e.complete([h]) == ["ok"]
        self.held = []
        e.release_dependents()
        while handed := e.claim(10):
            e.complete(handed)
            e.release_dependents()
        counts = e.counts()
        assert counts.pop("total", 0) == sum(counts.values()) == len(self.model.units)
        kinds = ("rq:wip:", "rq:deferred:", "rq:queue:", "pilotq:dependents:", "pilotq:shared-refs")
        assert [k for k in e.all_keys() if k.startswith(kinds)] == []
        assert [k for k in e.all_keys() if k.startswith(("rq:job:", "pilotq:shared:")) and e.ttl(k) < 0] == []


def test_the_store_is_as_the_model(engine: Engine) -> None:
    class OnThisServer(Machine):
        pass

    OnThisServer.engine = engine
    run_state_machine_as_test(
        OnThisServer,
        settings=settings(
            max_examples=100, stateful_step_count=30, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
