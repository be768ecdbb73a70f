"""Records that others have damaged: each costs the task that it is of, and nothing else of the call."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.errors import PilotqError
from pilotq.broker.store import keys
from pilotq.broker.store.messages import Run
from pilotq.broker.store.store import iso, pack
from pilotq.broker.tasks.states import ENDED
from tests.support.engine import ONE, Engine, array, fixtures, ids, task

engine, server, node = fixtures

Damage = tuple[str, bytes, bytes | None]  # key, field ("": the whole key), value (None: it is missing)
# Fields that are only shown.
SHOWN = frozenset({
    b"data", b"description", b"created_at", b"enqueued_at", b"started_at", b"ended_at", b"timeout", b"origin",
    b"pq_exit", b"pq_cpus", b"worker_name", b"records", b"total",
})  # fmt: skip


def damages(engine: Engine, records: list[str]) -> Iterator[Damage]:
    """Everything that can be wrong with these records."""
    for key in records:
        kind = engine.link.call("TYPE", key)
        if kind == b"hash":
            flat = engine.link.call("HGETALL", key)
            for field, value in zip(flat[::2], flat[1::2], strict=True):
                if field not in SHOWN:
                    yield key, field, None
                    yield key, field, b"1e999" if value.isdigit() else b"\xff\xfe"
        yield key, b"", None
        yield key, b"", b"a string" if kind != b"string" else b"a list"


def plant(engine: Engine, damage: Damage) -> None:
    key, field, value = damage
    if field:
        engine.link.call(*(("HDEL", key, field) if value is None else ("HSET", key, field, value)))
        return
    engine.link.call("DEL", key)
    if value is not None:
        engine.link.call(*(("SET", key, value) if value == b"a string" else ("RPUSH", key, value)))


def drain(engine: Engine) -> None:
    """Run all that can run, as a dispatcher and a node do, and repair what waits for nothing."""
    for _ in range(20):
        engine.release_dependents()
        engine.store.heads([ONE])
        runs = engine.claim(5)
        engine.complete(runs)
        if not runs and not engine.list():
            parents = engine.link.call("SMEMBERS", keys.PARENTS)
            engine.cancel(*(i.decode() for i in engine.store.run("cancel_orphans", engine.store.term, *parents)))
            if not engine.link.call("LLEN", keys.RELEASE):
                return
    raise AssertionError("it does not come to an end")


class Case:
    """A victim (a task, or an array with one element ahead) between healthy tasks, brought to a place in its life."""

    def __init__(self, engine: Engine, kind: str, place: str) -> None:
        self.engine = engine
        self.kind, self.place = kind, place
        self.handed: list[Run] = []
        self.ended: set[str] = set()

    def build(self) -> list[str]:
        """Submit and bring; returns the keys of the records that may be damaged."""
        engine = self.engine
        engine.reset()
        engine.register()
        self.handed = []
        parents: list[str] = []
        if self.place == "deferred":
            parents = engine.submit(task(name="parent"))
        victim = task(name="v", retries=1, after=list(parents)) if self.kind == "task" else (
            array(3, name="v", after=list(parents))
        )  # fmt: skip
        (self.first,) = engine.submit(task(name="first"), key="first")
        (self.victim,) = engine.submit(victim, key="of-the-victim")
        each = {"after_each": [self.victim]} if self.kind == "array" else {"after": [self.victim]}
        self.child = engine.submit((array(3, **each) if self.kind == "array" else task(**each)), key="child")[0]
        (self.last,) = engine.submit(task(name="last"), key="last")
        self.parent = parents[0] if parents else ""
        records = [keys.job(self.victim), keys.submission("of-the-victim")]
        if self.place == "started":
            self.handed = engine.claim(2 if self.kind == "task" else 3)
            records += [keys.job(h.id) for h in self.handed if self.kind == "array" and h.array]
        elif self.place == "ended":
            for _ in range(3):
                engine.complete(engine.claim(5), "failed", "exit")
            records += [keys.job(f"{self.victim}_1")]
        if self.kind == "array":
            records.append(keys.outcomes(self.victim))
            if self.place == "started":
                engine.complete([h for h in self.handed if h.array][:1])
                self.handed = [h for h in self.handed if not h.array] + [h for h in self.handed if h.array][1:]
        return [k for k in dict.fromkeys(records) if engine.link.call("EXISTS", k)]

    def open_tasks(self) -> list[str]:
        """Committed tasks that have not ended."""
        found = []
        for key in self.engine.admin.call("KEYS", keys.job("*")):
            if self.engine.link.call("TYPE", key) == b"hash" and self.engine.ttl(key.decode()) < 0:
                status = self.engine.link.call("HGET", key, "status") or b""
                found += [key.decode()] if status.decode("latin-1") not in ENDED else []
        return found

    def act(self, name: str) -> None:
        engine, now = self.engine, iso(1.0)
        if name == "complete":
            assert len(engine.complete(self.handed)) == len(self.handed)
        elif name == "lost":
            engine.report_lost(self.handed)
        elif name == "return":
            engine.return_unstarted(self.handed)
        elif name == "cancel":
            assert len(engine.cancel(self.victim, self.child)) == 2
            engine.complete([h for h in self.handed if h.name != "first"], "canceled")
            engine.complete([h for h in self.handed if h.name == "first"])
        elif name == "requeue":
            for task_id in (self.victim, f"{self.victim}_1"):
                engine.store.requeue([[task_id]])
            engine.complete(self.handed)
        elif name == "report":
            engine.store.run("report_started", *[x for h in self.handed for x in (h.id, 1, "n1[0]", now, "", "")])
            rows = [(h.id, h.execution, 1.0, ONE) for h in self.handed]
            assert engine.beat(pack(rows)) == 1
            engine.complete(self.handed)
        elif name == "commit":
            try:
                engine.submit(task(after=[self.victim]), task(after=[self.victim]))
            except (PilotqError, UnicodeDecodeError):
                pass  # it is refused as a whole
            engine.complete(self.handed)
        elif name == "cancel_orphans":
            engine.store.run("cancel_orphans", engine.store.term, self.victim, self.parent or "x")
            engine.complete(self.handed)


ACTS: dict[str, list[str]] = {
    "queued": ["claim", "cancel", "commit"],
    "deferred": ["release", "cancel", "cancel_orphans"],
    "started": ["complete", "lost", "return", "cancel", "report", "commit"],
    "ended": ["requeue"],
}


@pytest.mark.parametrize(("place", "act"), [(place, act) for place, acts in ACTS.items() for act in acts])
@pytest.mark.parametrize("kind", ["task", "array"])
def test_a_damaged_record_costs_only_its_task(engine: Engine, kind: str, place: str, act: str) -> None:
    case = Case(engine, kind, place)
    for damage in list(damages(engine, case.build())):
        case.build()
        plant(engine, damage)
        case.act(act)
        drain(engine)
        for healthy in filter(None, (case.first, case.last, case.parent)):
            expected = ("failed",) if place == "ended" else ("finished",)
            assert engine.status(healthy) in expected, (damage, healthy)
        if kind == "task" and damage[1] != b"pq_has_dependents":  # nobody would know then that something waits
            assert not case.open_tasks(), damage


@pytest.mark.parametrize(
    "field", ["status", "pq_spec", "pq_sub", "pq_name", "pq_shared", "pq_retries", "pq_array", "pq_next"]
)
def test_what_is_damaged_has_failed_with_a_sentence(engine: Engine, field: str) -> None:
    (victim,) = engine.submit(array(2) if field in ("pq_array", "pq_next") else task(), key="k")
    engine.link.call("HSET", keys.job(victim), field, b"\xff") if field != "pq_spec" else engine.link.call(
        "HDEL", keys.job(victim), field
    )
    assert engine.claim(3) == []
    assert (engine.status(victim), engine.hash(victim)["pq_reason"]) == ("failed", "refused")
    assert engine.list() == []
    ((entry, ending),) = msgspec.msgpack.decode(engine.link.call("XRANGE", keys.JOURNAL, "-", "+")[0][1][1])
    what = "is missing" if field == "pq_spec" else "is damaged"
    assert entry["message"].startswith(f"its record on the server is damaged: its field {field} {what}")
    assert ending["final"]
    number = 2 if field in ("pq_array", "pq_next") else 1
    assert engine.counts() == {"total": number, "failed": number} == engine.counts(keys.submission("k"))


def test_a_damaged_element_has_failed_with_its_index(engine: Engine) -> None:
    (a,) = engine.submit(array(3))
    engine.return_unstarted(engine.claim(2))
    engine.link.call("HSET", keys.job(f"{a}_1"), "pq_exec", "x")
    engine.claim(1)
    engine.claim(1)
    assert engine.outcomes(a, 3) == "020"
    entry = engine.final_entry(f"{a}_1")
    assert (entry["reason"], entry["array"], entry["index"]) == ("refused", a, 1)


def test_what_is_damaged_hides_no_other_task_from_readers(engine: Engine) -> None:
    victim, other = engine.submit(array(2), task())
    queries = TaskQueries(engine.link, None)
    for damage in list(damages(engine, [keys.job(victim)])):
        dumped = engine.admin.call("DUMP", damage[0])
        plant(engine, damage)
        found = [queries.views([victim, other])[1], *queries.tasks(None, 9), queries.task(other)]
        queries.task(victim)
        queries.task(f"{victim}_1")
        assert other in [view.id for view in found if view is not None], damage
        engine.admin.call("RESTORE", damage[0], 0, dumped, "REPLACE")


def test_a_job_with_the_id_of_a_deleted_task_waits_for_its_own_turn(engine: Engine) -> None:
    """RQ's delete, and an enqueue under the same id: the list of the class still holds the id, and others behind it."""
    first, victim, *rest = engine.submit(*(task() for _ in range(50)))
    engine.link.call("DEL", keys.job(victim))
    engine.link.call("HSET", keys.job(victim), "status", "queued", "origin", "default", "data", "x")
    assert ids(engine.claim(60)) == [first, *rest]
    assert engine.status(victim) == "queued"


@pytest.mark.parametrize("damage", [None, b"no status"], ids=["missing", "unknown"])
def test_an_element_that_waits_again_with_a_damaged_status_has_failed(engine: Engine, damage: bytes | None) -> None:
    (a,) = engine.submit(array(2))
    first, second = engine.claim(2)
    assert engine.return_unstarted([second]) == 1
    plant(engine, (keys.job(second.id), b"status", damage))
    assert engine.claim(5) == []
    engine.complete([first])
    assert (engine.outcomes(a, 2), engine.status(a)) == ("12", "failed")
    assert engine.final_entry(second.id)["reason"] == "refused" and engine.nothing_left()
