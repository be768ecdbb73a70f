"""Bundles: many tasks of one submission that are alike share a record; every call takes each of them all the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import msgspec
import pytest

from pilotq.broker.client import commit
from pilotq.broker.client import submit as client_submit
from pilotq.broker.client.completions import Completions
from pilotq.broker.client.queries import TaskQueries
from pilotq.broker.client.results import OutputFiles, fetch, values_in_bundles
from pilotq.broker.errors import InvalidInput
from pilotq.broker.store import keys
from pilotq.broker.store.bundles import Bundles
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.journal_runs import pack_entry
from pilotq.broker.store.leases import read_leases
from pilotq.broker.store.requeue import requeue
from pilotq.broker.store.store import pack
from pilotq.broker.tasks.functions import decode_payload, pack_call
from pilotq.broker.tasks.model import Request, Task
from pilotq.broker.tasks.spec import Member, is_bundle
from pilotq.workers.execution.leased_ends import runs_of
from tests.support.engine import NODE, ONE, SHARED, Engine, array, end_report, fixtures, ids, leased_end, task

engine, server, node = fixtures
LATER = "default.p0.1c-t60"


@pytest.fixture(autouse=True)
def small_bundles(engine: Engine) -> None:
    engine.reset(bundle_above=3)


def different(count: int, **fields: object) -> list[Task]:
    return [task("echo", str(n), name=f"n{n}", **fields) for n in range(count)]


def members(engine: Engine, bundle: str, count: int) -> list[Member | None]:
    bundles = Bundles(engine.link)
    return [bundles.member(bundle, position) for position in range(count)]


def queries(engine: Engine) -> TaskQueries:
    return TaskQueries(engine.link, None)


def test_more_tasks_than_the_bound_share_a_record(engine: Engine) -> None:
    found = engine.submit(*different(2500), key="k")
    assert found == [f"1_{n}" for n in range(2500)]
    assert engine.list() == ["1"] and engine.counts() == {"total": 2500}
    jobs = [key for key in engine.all_keys() if key.startswith("rq:job:")]
    assert jobs == ["rq:job:1"] and engine.ttl(jobs[0]) < 0 and engine.ttl(keys.values("1")) < 0
    assert engine.link.call("HLEN", keys.values("1")) == 3
    one, last = (members(engine, "1", 2500)[n] for n in (0, 2499))
    assert one is not None and (one.name, one.spec.argv) == ("n0", [b"echo", b"0"])
    assert last is not None and (last.name, last.spec.argv) == ("n2499", [b"echo", b"2499"])
    assert engine.hash("1")["description"] == "echo 0 (and 2,499 more)"
    assert engine.submit(task()) == ["2"], "a bundle takes one number"


def test_functions_share_a_record_like_commands(engine: Engine) -> None:
    engine.submit(*[Task(function="math:sqrt", args=(n,)) for n in range(6)])
    assert engine.list() == ["1"]
    found = [one and decode_payload(one.spec.argv[0]) for one in members(engine, "1", 6)]
    assert [one and (one.name, pickle.loads(one.arguments)) for one in found] == [
        ("math:sqrt", ((n,), {})) for n in range(6)
    ]


def test_as_few_as_the_bound_are_by_themselves(engine: Engine) -> None:
    assert engine.submit(*different(3)) == ["1", "2", "3"] == engine.list()


def test_they_are_handed_out_in_leases_and_end_without_records(engine: Engine) -> None:
    engine.submit(*different(6))
    handed = engine.claim(4)
    assert ids(handed) == ["1_0", "1_1", "1_2", "1_3"] and all(is_bundle(h.spec) for h in handed)
    (lease,) = read_leases(engine.link)
    assert (lease.first, lease.number) == (0, 4)
    assert engine.complete_runs(handed) == ["ok"] * 4
    assert engine.complete_runs(engine.claim(4)) == ["ok"] * 2
    assert engine.counts() == {"total": 6, "finished": 6} and engine.nothing_left()
    assert engine.status("1") == "finished" and engine.status("1_3") is None


def test_the_same_key_gives_the_same_ids_whatever_is_submitted(engine: Engine) -> None:
    tasks = [*different(2), array(2, name="a"), *different(3, time_limit=60)[:0], task(after=["a"]), *different(9)[2:]]
    found = engine.submit(*tasks, key="k")
    assert found == ["1_0", "1_1", "2", "3", *(f"1_{n}" for n in range(2, 9))]
    engine.settings = engine.store.settings = msgspec.structs.replace(engine.settings, bundle_above=100)
    assert engine.submit(task(), key="k") == found
    assert engine.counts() == {"total": 12}


def test_each_class_and_number_of_retries_has_a_bundle(engine: Engine) -> None:
    tasks = [t for n in range(4) for t in (task(str(n)), task(str(n), time_limit=60), task(str(n), retries=2))]
    assert engine.submit(*tasks) == [f"{bundle}_{n}" for n in range(4) for bundle in (1, 2, 3)]
    assert engine.list() == ["1", "3"] and engine.list(LATER) == ["2"]
    assert engine.hash("3")["pq_retries"] == "2" and "pq_retries" not in engine.hash("1")


@pytest.mark.parametrize(
    "odd",
    [
        {"after": ["n0"]}, {"values": ["a", "b"]}, {"memory_grow": 2.0, "memory_max": 1 << 30, "retries": 1},
        {"qcg": True}, {"command": ["true", "x" * 5000]}, {"command": None, "function": "math:sqrt", "after": ["n0"]},
    ],
)  # fmt: skip
def test_what_needs_more_than_a_bundle_has_stays_by_itself(engine: Engine, odd: dict[str, object]) -> None:
    odd = {**odd, "request": Request(memory=1 << 20)} if "memory_grow" in odd else odd
    special = msgspec.structs.replace(task(name="odd"), **odd)
    found = engine.submit(*different(5), special)
    bundle = found[1].partition("_")[0]
    assert [i.partition("_")[0] == bundle for i in found] == ["n0" not in (special.after or ()), *[True] * 4, False]
    assert engine.hash(bundle)["pq_bundle"] == "1" and "pq_bundle" not in engine.hash(found[-1])


def test_many_that_need_more_than_a_bundle_has_are_none(engine: Engine) -> None:
    assert engine.submit(*[task("true", "x" * 5000) for _ in range(5)]) == engine.list()


def test_a_task_that_others_name_is_by_itself_and_releases_them(engine: Engine) -> None:
    found = engine.submit(*different(6), task(after=["n4"], time_limit=60))
    assert found[4] == "2" and found[5] == "1_4" and engine.status(found[6]) == "deferred"
    assert sorted(engine.run_all()) == sorted(found[:6])
    assert engine.list(LATER) == [found[6]]


def test_a_later_submission_may_wait_for_one_of_a_bundle(engine: Engine) -> None:
    found = engine.submit(*different(6))
    (waiting,) = engine.submit(task(after=[found[2]], time_limit=60))
    first, second = engine.claim(2), engine.claim(2)
    engine.complete_runs(first)
    engine.release_dependents()
    assert engine.status(waiting) == "deferred"
    engine.complete_runs(second)
    engine.release_dependents()
    assert engine.list(LATER) == [waiting]


def test_a_wrong_one_refuses_all(engine: Engine) -> None:
    for wrong, text in [
        (task("echo", name="a/b"), "name 'a/b'"), (task("echo", "\0"), "NUL"), (task(""), "command is empty"),
        (Task(command=["echo", 7]), "list of texts"), (task("echo", script="x"), "exactly one"),  # type: ignore[list-item]
        (task("echo", name="n1"), "is the name of task 2"), (task("x" * 200_000), "has 200,000 bytes"),
    ]:  # fmt: skip
        with pytest.raises(InvalidInput, match=text):
            engine.submit(*different(6), wrong)
    assert not [key for key in engine.all_keys() if key.startswith(("rq:", "pilotq:values"))]


def test_tasks_differ_in_all_that_a_description_has(engine: Engine) -> None:
    tasks = [
        task("a", env={"A": "1"}), task("a", env={"A": "2"}), task("a", cwd="sub"), task("b", cwd="sub"),
        Task(script="echo 1\necho 2"), task("echo", "{attempt}"), task("echo", "caf\u00e9"),
        task("a", stdout="{id}.out"),
    ]  # fmt: skip
    engine.submit(*tasks)
    found = [member.spec for member in members(engine, "1", len(tasks)) if member is not None]
    assert [s.env for s in found][:3] == [{b"A": b"1"}, {b"A": b"2"}, {}]
    assert [(s.argv, s.cwd) for s in found][2:4] == [([b"a"], b"sub"), ([b"b"], b"sub")]
    assert found[4].script == b"echo 1\necho 2" and found[6].argv == [b"echo", "caf\u00e9".encode()]
    assert [bool(s.flags) for s in found] == [False] * 5 + [True, False, True]


def test_one_of_them_is_found_and_shown_by_name(engine: Engine) -> None:
    found = engine.submit(*different(6))
    engine.complete_runs(engine.claim(1))
    (failed,) = engine.claim(1)
    engine.claim(1)
    engine.complete([failed], "failed", "exit")
    asked = queries(engine)
    assert [asked.find(f"n{n}") for n in range(6)] == [[i] for i in found] and not asked.find("n6")
    views = [asked.task(i) for i in found]
    seen = [(v.name, v.command, v.status, v.array, v.index) for v in views if v is not None]
    statuses = ["finished", "failed", "started", "queued", "queued", "queued"]
    assert seen == [(f"n{n}", f"echo {n}", statuses[n], "1", None) for n in range(6)]
    assert [(v.id, v.name, v.status) for v in asked.tasks(None, 100)] == [
        ("1_2", "n2", "started"), *((f"1_{n}", f"n{n}", "queued") for n in (5, 4, 3)), ("1_1", "n1", "failed"),
    ]  # fmt: skip
    assert [v.id for v in asked.tasks("queued", 2)] == ["1_5", "1_4"]


@pytest.mark.parametrize("packed", [pack, pack_entry])
def test_the_kept_record_of_one_says_which_it_was(engine: Engine, packed: Callable[[JournalEntry], bytes]) -> None:
    engine.submit(*different(6))
    report = end_report(engine.claim(2)[1], "failed", "exit")
    report.entry = packed(
        JournalEntry("1_1", name="n1", command="echo 1", array="1", queued=1.0, handed=1.0, ended=1.0)
    )
    engine.store.run("complete", *engine.store.complete_arguments(NODE, engine.next_call(), b"event", [report]))
    assert (engine.hash("1_1")["pq_name"], engine.hash("1_1")["description"]) == ("n1", "echo 1")


def test_each_can_be_canceled_and_run_again(engine: Engine) -> None:
    found = engine.submit(*different(8))
    handed = engine.claim(2)
    assert engine.cancel(found[0], found[5]) == ["stopping", "canceled"]
    engine.complete(handed[:1], "canceled", "canceled")
    engine.complete(handed[1:], "failed", "exit")
    assert requeue(engine.store, [found[1], found[5]]) == {found[1]: "queued", found[5]: "queued"}
    (again,) = (h for h in engine.claim(9) if h.id == found[1])
    assert is_bundle(again.spec) and again.execution == 2 and again.position == 1 and again.array == "1"
    assert engine.cancel("1") == ["stopping"]


def test_a_whole_bundle_runs_again_where_it_did_not_finish(engine: Engine) -> None:
    engine.submit(*different(5))
    handed = engine.claim(5)
    engine.complete_runs(handed[:2])
    engine.complete(handed[2:], "failed", "exit")
    assert engine.status("1") == "failed"
    assert requeue(engine.store, ["1"]) == {"1": "queued"}
    assert ids(engine.claim(9)) == ["1_2", "1_3", "1_4"]


def test_bundles_of_a_large_submission_are_committed_in_pieces(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIECE_TASKS": 5, "LARGE_TASKS": 8}.items():
        monkeypatch.setattr(commit, name, value)
    tasks = [t for n in range(12) for t in (task(str(n)), array(2, time_limit=60))]
    found = engine.submit(*tasks, key="k")
    assert found[::2] == [f"1_{n}" for n in range(12)] and engine.list() == ["1"] and len(engine.list(LATER)) == 12
    assert engine.submit(*tasks, key="k") == found and engine.ttl(keys.values("1")) < 0
    assert engine.counts() == {"total": 36}


def test_a_member_that_was_damaged_is_shown_without_its_description(engine: Engine) -> None:
    found = engine.submit(*different(6))
    engine.link.call("HSET", keys.values("1"), 0, b"no block")
    view = queries(engine).task(found[3])
    assert view is not None and (view.status, view.name) == ("queued", "")
    engine.link.call("DEL", keys.values("1"))
    assert queries(engine).find("n3") == []
    assert engine.list(ONE) == ["1"]


# -- calls of an executor ---------------------------------------------------------------------------------------------

EXECUTOR = "0123456789ab"
KEY = f"@{EXECUTOR}.1"


def submit_calls(engine: Engine, count: int, *sizes: int, base: Task = Task()) -> list[str]:  # noqa: B008  # frozen
    """Calls of one function, and some with arguments of so many bytes behind them."""
    payloads = [pack_call("math:sqrt", (n,), {}) for n in range(count)]
    payloads += [pack_call("builtins:len", (bytes(size),), {}) for size in sizes]
    return client_submit.submit_calls(engine.link, engine.store, base, payloads, SHARED, KEY)


def told(engine: Engine) -> list[tuple[str, str, bytes]]:
    """What the executor is told: id, status, value."""
    completions = Completions(engine.link, EXECUTOR)
    return sorted((e.id, e.status, e.value) for e in completions.read())


def test_calls_of_an_executor_share_a_record_but_for_large_ones(engine: Engine) -> None:
    engine.reset(bundle_calls_above=4)
    found = submit_calls(engine, 5, 10_000)
    assert found == [*(f"1_{n}" for n in range(5)), "2"] and engine.counts() == {"total": 6}
    assert submit_calls(engine, 5, 10_000) == found, "the same key gives the same ids"
    assert engine.hash("1")["description"] == "math:sqrt(...) (and 4 more)" and "pq_bundle" not in engine.hash("2")
    one = members(engine, "1", 5)[3]
    assert one is not None and decode_payload(one.spec.argv[0]).name == "math:sqrt"
    engine.reset(bundle_calls_above=5)
    assert submit_calls(engine, 5, 10_000) == [str(n) for n in range(1, 7)], "too few"
    engine.reset(bundle_calls_above=4)
    limited = submit_calls(engine, 6, base=Task(time_limit=9.0, name="n"))
    one = members(engine, limited[0].partition("_")[0], 1)[0]
    assert one is not None and (one.name, one.spec.time_limit) == ("n", 9.0)


def test_results_of_calls_come_in_runs_and_nothing_of_them_is_kept(engine: Engine) -> None:
    found = submit_calls(engine, 6)
    handed = engine.claim(6)
    values = [str(n).encode() for n in range(6)]
    assert engine.complete_runs(handed, values=values) == ["ok"] * 6
    assert told(engine) == [(i, "finished", v) for i, v in zip(found, values, strict=True)]
    assert engine.complete_runs(handed, values=values) == ["ok"] * 6, "repeated, it is told once"
    assert len(told(engine)) == 6 and engine.counts() == {"total": 6, "finished": 6}
    assert not [key for key in engine.all_keys() if key.startswith("rq:results:")]


def test_a_call_that_failed_or_was_canceled_is_told_by_itself(engine: Engine) -> None:
    found = submit_calls(engine, 6)
    handed = engine.claim(3)
    engine.complete([handed[1]], "failed", "exception", text="trace")
    assert engine.store.cancel([found[4]]) == ["canceled"]
    assert told(engine) == [(found[1], "failed", b""), (found[4], "canceled", b"")]
    engine.complete_runs([handed[0]], values=[b"0"])
    assert engine.store.cancel(["1"]) and told(engine)[-1][:2] == (found[5], "canceled")


def functions(engine: Engine, count: int) -> list[str]:
    return engine.submit(*[Task(function=pow, args=(n, 2)) for n in range(count)])


def test_results_of_functions_stay_with_their_bundle(engine: Engine) -> None:
    found = functions(engine, 12)
    handed = engine.claim(12)
    values = [pickle.dumps(n * n) for n in range(12)]
    for part in (handed[:3], handed[3:4], handed[5:9]):
        positions = [h.position for h in part]
        assert engine.complete_runs(part, values=[values[p] for p in positions]) == ["ok"] * len(part)
    engine.complete([handed[4]], "failed", "exception", text="trace")
    key = keys.returned("1")
    assert engine.link.call("ZCARD", key) == 3 and engine.ttl(key) > engine.settings.failed_ttl_s
    assert not [name for name in engine.all_keys() if name.startswith("rq:results:") and not name.endswith("_4")]
    everything = [*found[:4], *found[5:9]]
    assert values_in_bundles(engine.link, found) == {i: values[int(i[2:])] for i in everything}
    for some in ([found[8]], [found[0], found[8]], [found[4]], [found[11]], ["x_1", "1_", "1_-1", "1_99", "1"], []):
        assert values_in_bundles(engine.link, some) == {i: values[int(i[2:])] for i in some if i in everything}
    outcomes = fetch(engine.link, [found[2], found[4], found[7]], OutputFiles(None))
    assert [o.value for o in outcomes if o is not None] == [4, None, 49]
    assert engine.complete_runs(handed[9:], values=values[9:]) == ["ok"] * 3
    assert 0 < engine.ttl(key) <= engine.settings.failed_ttl_s
    assert requeue(engine.store, ["1"]) == {"1": "queued"}
    assert engine.ttl(key) < 0, "those that finished have theirs while others run again"


def test_results_of_a_bundle_go_with_its_record(engine: Engine) -> None:
    functions(engine, 4)
    engine.complete_runs(engine.claim(4), values=[b"x"] * 4)
    assert 0 < engine.ttl(keys.returned("1")) <= engine.settings.finished_ttl_s
    engine.store.run("trim", engine.store.term, "finished", "default", "1")
    assert not engine.link.call("EXISTS", keys.returned("1"), keys.job("1"))


def test_a_bundle_of_functions_that_is_deleted_leaves_no_results(engine: Engine) -> None:
    functions(engine, 4)
    handed = engine.claim(4)
    engine.complete_runs(handed[:2], values=[b"x"] * 2)
    engine.link.call("DEL", keys.job("1"))
    engine.complete_runs(handed[2:], values=[b"x"] * 2)
    assert not engine.link.call("EXISTS", keys.returned("1"))


def test_results_without_room_are_reported_one_by_one(engine: Engine) -> None:
    submit_calls(engine, 6)
    handed = engine.claim(6)
    used = int(engine.admin.call("INFO", "memory").decode().partition("used_memory:")[2].split()[0])
    engine.admin.call("CONFIG", "SET", "maxmemory", used + 20_000)
    try:
        ends = [leased_end(h, bytes(4000)) for h in handed]
        [(run, _)] = runs_of(ends, "n1")
        arguments = engine.store.complete_arguments(NODE, engine.next_call(), b"event", [], [run])
        assert engine.store.run("complete", *arguments) == [b"apart"]
        assert engine.complete(handed, text="x" * 30_000) == ["full"] * 6
    finally:
        engine.admin.call("CONFIG", "SET", "maxmemory", 0)
    assert told(engine) == [] and engine.counts() == {"total": 6}


def test_what_a_function_notes_in_its_job_becomes_a_part_of_its_record(engine: Engine) -> None:
    found = submit_calls(engine, 6)
    handed = engine.claim(1)
    engine.link.call("HSET", keys.job(found[0]), "meta", b"noted")
    assert engine.complete(handed, text="value") == ["ok"]
    assert engine.hash(found[0])["meta"] == "noted" and engine.status(found[0]) == "finished"
    assert engine.ttl(keys.job(found[0])) > 0 and told(engine)[0][1] == "finished"


@pytest.mark.parametrize("field", ["pq_array", "pq_left"])
def test_calls_of_a_record_that_was_damaged_do_not_stay_open(engine: Engine, field: str) -> None:
    engine.reset(bundle_calls_above=4)
    found = submit_calls(engine, 5)
    engine.link.call("HSET", keys.job("1"), field, b"?")
    engine.complete_runs(engine.claim(9))
    completions = Completions(engine.link, EXECUTOR)
    known = {ended.id for ended in completions.read()}
    completions.poll(found, OutputFiles(None))
    assert known | {task_id for task_id, _ in completions.missed()} >= set(found)
