"""Chained launches: the launcher starts the next one by itself, and what it has not begun can be retracted."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pilotq.broker.store.messages import Leave, RetractTasks, StateRequest
from pilotq.workers.execution.launcher_pool import KNOWN_MAX
from pilotq.workers.protocol import Begun, Exited, Forget, GroupSwept, Launch, Refused, Retract, Retracted, Started
from tests.support.launcher_driver import CPUS, Driver, hanging_program
from tests.support.waiting import wait_until
from tests.support.worker_host import Host, alive, children

pytestmark = pytest.mark.usefixtures("each_launcher")

MASK = "grep Cpus_allowed_list /proc/self/status"
HEAD = "read word <go; echo head >>order"
# So that every prefetched task is chained as soon as one task of its class has ended, and stays so.
CHAINED = {"prefetch_after": 1, "chain_s": 3600.0, "started_after_s": 3600.0, "heartbeat_s": 0.1}


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    os.mkfifo(tmp_path / "go")
    driver = Driver(tmp_path)
    yield driver
    driver.close()


def go(folder: Path) -> None:
    (folder / "go").write_text("now\n")


def chain(records: list[Launch]) -> list[Launch]:
    for before, record in pairwise(records):
        record.after = before.key
    return records


def launch_chain(driver: Driver, *commands: str, head: str = HEAD) -> list[int]:
    """Send launches in one chain; the first one waits for `go`. Returns their keys."""
    records = chain([driver.prepare("sh", "-c", command) for command in (head, *commands)])
    driver.send(*records)
    return [record.key for record in records]


# -- the launcher -----------------------------------------------------------------------------------------------------


def test_a_chain_is_run_in_order_one_at_a_time_on_its_cpus(driver: Driver, tmp_path: Path) -> None:
    chains = [
        [driver.prepare("sh", "-c", f"mkdir on{n} && {MASK} && sleep 0.01 && rmdir on{n} && echo {k} >>order{n}",
                        cpus=[cpu]) for k in range(8)]
        for n, cpu in enumerate(CPUS[:2])
    ]  # fmt: skip
    for one in chains:
        driver.send(*chain(one))
    for n, one in enumerate(chains):
        for record in one:
            exited = driver.get(Exited, record.key)
            assert exited.status == 0
            assert int(exited.stdout.data.split()[1]) == CPUS[n]
            assert exited.started <= exited.ended
        assert (tmp_path / f"order{n}").read_text().split() == list("01234567")


def test_a_task_gets_its_own_cpus_also_after_many_with_others(driver: Driver) -> None:
    for cpus in ([CPUS[0]], [CPUS[-1]], []):
        keys = [driver.launch("sh", "-c", MASK, cpus=cpus) for _ in range(12)]
        found = {driver.get(Exited, key).stdout.data.split()[1].decode() for key in keys}
        assert found == {str(cpus[0]) if cpus else everywhere()}


def everywhere() -> str:
    status = Path("/proc/self/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("Cpus_allowed_list"))


def test_what_is_retracted_never_starts_and_the_chain_closes_up(driver: Driver, tmp_path: Path) -> None:
    head, _, second, third = launch_chain(driver, "echo 1 >>order", "echo 2 >>order", "echo 3 >>order")
    driver.send(Retract(second))
    driver.get(Retracted, second)
    driver.get(Started, head)
    driver.send(Retract(head), Retract(4711))
    go(tmp_path)
    driver.get(Exited, third)
    assert (tmp_path / "order").read_text() == "head\n1\n3\n"
    assert [driver.find(kind, second) for kind in (Begun, Exited, Refused)] == [None] * 3
    assert driver.find(Retracted, head) is None


def test_a_chain_goes_on_behind_what_was_refused_retracted_or_has_ended(driver: Driver, tmp_path: Path) -> None:
    _, refused, retracted, last = launch_chain(driver, "exec true", "true", "echo last >>order")
    more = driver.prepare("no-such-program", after=last)
    driver.send(more, Retract(retracted))
    driver.send(driver.prepare("true", after=more.key))
    go(tmp_path)
    assert driver.get(Refused, more.key).reason == "not found"
    assert driver.get(Exited, more.key + 1).status == 0
    assert driver.get(Exited, driver.launch("true", after=refused)).status == 0
    assert (tmp_path / "order").read_text() == "head\nlast\n"


def test_the_next_one_waits_until_nothing_of_the_one_before_is_left(driver: Driver, tmp_path: Path) -> None:
    stray = "setsid sh -c 'read word <go; echo stray >>order' & exit 0"
    head, after = launch_chain(driver, "echo after >>order", head=stray)
    assert driver.get(Exited, head).remaining >= 1
    assert driver.run("true").status == 0
    assert driver.find(Begun, after) is None
    go(tmp_path)
    driver.get(GroupSwept, head)
    driver.get(Exited, after)
    assert (tmp_path / "order").read_text() == "stray\nafter\n"


def test_of_what_the_pipe_of_a_dead_launcher_does_not_tell_nothing_began(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    records = chain([driver.prepare("touch", f"ran{n}") for n in range(200)])
    driver.send(*records)
    wait_until((tmp_path / "ran3").exists)
    driver.process.kill()
    driver.process.wait()
    driver.drain()
    begun = [record.key for record in driver.seen if isinstance(record, Begun)]
    ended = [record.key for record in driver.seen if isinstance(record, Exited)]
    assert begun == [record.key for record in records[: len(begun)]]
    assert begun[:-1] == ended or begun == ended
    ran = {int(path.name.removeprefix("ran")) for path in tmp_path.glob("ran*")}
    assert ran <= set(range(len(begun)))
    for end in (driver.down, driver.up, driver.wake):
        os.close(end)


def test_a_chain_waits_while_nobody_reads_how_far_it_came(driver: Driver, tmp_path: Path) -> None:
    # Each leaves more in the pipe than fits with the others.
    keys = launch_chain(driver, *[f"head -c 4000 /dev/zero; touch ran{n}" for n in range(40)], head="exit 0")
    wait_until(lambda: len(os.read(driver.wake, 100)) > 0)
    driver.get(Exited, keys[-1])
    assert len(list(tmp_path.glob("ran*"))) == 40


def test_what_is_chained_keeps_the_context_that_is_forgotten(driver: Driver, tmp_path: Path) -> None:
    head, after = launch_chain(driver, 'echo "$MINE" >>order')
    driver.get(Started, head)
    old = driver.base("old", MINE="forgotten")
    last = driver.prepare("sh", "-c", 'echo "$MINE" >>order', base=old, after=after)
    late = driver.prepare("true", base=old)
    driver.send(last, Forget(), late)
    assert driver.get(Refused, late.key).reason == "launch"
    go(tmp_path)
    driver.get(Exited, last.key)
    assert (tmp_path / "order").read_text() == "head\n\nforgotten\n"
    driver.base()
    assert driver.run("true").status == 0


# -- the worker -------------------------------------------------------------------------------------------------------


def begin(host: Host, *names: str, head: str = HEAD, **spec: float) -> None:
    """Slot 1 has a task that waits for `go`, and the named ones, which write their names, are chained behind it."""
    os.mkfifo(host.directory / "go")
    host.run("warm", "true", slot=1)
    host.end_of("warm")
    for name in names:
        host.run(name, "sh", "-c", f"echo {name} >>order")
    host.run("head", "sh", "-c", f"touch runs; {head}", slot=1, **spec)
    host.until((host.directory / "runs").exists)


def order(host: Host) -> list[str]:
    return (host.directory / "order").read_text().split()


def test_chained_tasks_follow_in_order_on_the_cpu_of_their_slot(tmp_path: Path) -> None:
    with Host(tmp_path, **CHAINED) as host:
        names = [f"t{n}" for n in range(40)]
        for name in names:
            host.run(name, "sh", "-c", f"echo {name} >>order; {MASK}")
        host.run("first", "true", slot=3, allocation="n1[1]")
        ends = [host.end_of(name) for name in names]
    assert order(host) == names
    assert {str(e.entry.stdout).split()[1] for e in ends} == {"1"}
    assert [(e.end.slot, e.end.kept) for e in ends if e.end] == [(3, True)] * 39 + [(3, False)]
    assert {e.report.allocation for e in ends} == {"n1[1]"}
    assert all(e.entry.started and e.entry.ended and e.entry.started <= e.entry.ended for e in ends)


def test_for_the_dispatcher_what_is_chained_is_prefetched(tmp_path: Path) -> None:
    with Host(tmp_path, **CHAINED) as host:
        begin(host, "a", "b", "c")
        host.send(StateRequest(3))
        ((state,),) = host.until(lambda: host.reported("state"))
        assert (state.slots, state.prefetched) == ([(1, "n1[0]", "c")], {"c": 3})


def test_what_is_chained_behind_a_long_task_goes_elsewhere_in_its_order(tmp_path: Path) -> None:
    with Host(tmp_path, **{**CHAINED, "started_after_s": 0.1}) as host:
        begin(host, "a", "b", "c")
        host.until(lambda: host.reported("starts"))
        host.run("other", "true", slot=2, allocation="n1[1]")
        assert {host.end_of(name).report.allocation for name in "abc"} == {"n1[1]"}
        assert order(host) == ["a", "b", "c"]
        assert "head" not in host.endings
        go(tmp_path)
        host.end_of("head")


def test_a_retract_reaches_what_is_chained_the_newest_first(tmp_path: Path) -> None:
    with Host(tmp_path, **CHAINED, chain_max=3) as host:
        begin(host, "a", "b", "c", "d")
        host.send(RetractTasks("c", 3))
        host.until(lambda: len(host.reported("back")) == 2)
        go(tmp_path)
        host.end_of("a")
    assert host.reported("back") == [([("d", 1)], {"c": 1}), ([("b", 1), ("c", 1)], {"c": 2})]
    assert order(host) == ["head", "a"]


def test_a_chained_task_is_canceled_and_the_others_go_on(tmp_path: Path) -> None:
    with Host(tmp_path, **CHAINED) as host:
        begin(host, "a", "b", "c")
        host.stop("b")
        canceled = host.end_of("b")
        go(tmp_path)
        assert [host.end_of(name).report.outcome for name in ("head", "a", "c")] == ["finished"] * 3
    assert (canceled.report.outcome, canceled.report.started) == ("canceled", "")
    assert canceled.end is not None and (canceled.end.slot, canceled.end.seconds, canceled.end.kept) == (0, -1.0, False)
    assert order(host) == ["head", "a", "c"]


def test_behind_a_task_that_is_over_its_limit_the_chain_goes_on(tmp_path: Path) -> None:
    with Host(tmp_path, **CHAINED) as host:
        begin(host, "a", "b", time_limit=0.2)
        head, a, b = (host.end_of(name) for name in ("head", "a", "b"))
    assert (head.report.reason, a.report.outcome, b.report.outcome) == ("time limit", "finished", "finished")
    assert [e.end.kept for e in (head, a, b) if e.end] == [True, True, False]
    assert order(host) == ["a", "b"]


def test_leaving_returns_what_is_chained(tmp_path: Path) -> None:
    with Host(tmp_path, **CHAINED) as host:
        begin(host, "a", "b")
        host.send(Leave(0.5))
        assert host.wait() == 0
    assert [task for tasks, _ in host.reported("back") for task in tasks] == [("a", 1), ("b", 1)]
    assert host.endings["head"].report.reason == "pilot ended"
    assert not (tmp_path / "order").exists()


def test_what_a_dead_launcher_had_not_begun_is_not_lost(tmp_path: Path) -> None:
    with Host(tmp_path, **CHAINED) as host:
        begin(host, "a", "b", "c")
        (launcher,) = host.launchers()
        os.kill(launcher, signal.SIGKILL)
        head = host.end_of("head")
        rest = [host.end_of(name) for name in "abc"]
    assert (head.report.reason, head.end is not None and head.end.kept) == ("worker lost", True)
    assert [e.report.outcome for e in rest] == ["finished"] * 3
    assert order(host) == ["a", "b", "c"]


def test_a_launcher_that_dies_in_the_middle_of_a_start_has_lost_only_that_one(tmp_path: Path) -> None:
    # The child on its way to exec still has the launcher's ends of the pipes, so that they do not close.
    with hanging_program(tmp_path / "held") as held, Host(tmp_path, **CHAINED) as host:
        host.run("warm", "true", slot=1)
        host.end_of("warm")
        host.run("held", str(held))
        for name in "ab":
            host.run(name, "sh", "-c", f"echo {name} >>order")
        host.run("head", "true", slot=1)
        (launcher,) = host.launchers()
        host.until(lambda: host.endings.get("head") and children(launcher), "the start that hangs")
        os.kill(launcher, signal.SIGKILL)
        assert host.end_of("held").report.reason == "worker lost"
        assert [host.end_of(name).report.outcome for name in "ab"] == ["finished"] * 2
    assert order(host) == ["a", "b"]


def test_a_launcher_gets_slots_again_that_it_had_to_forget(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        for number in range(2 * KNOWN_MAX + 10):
            host.run(f"t{number}", "no-such-program", slot=number + 1, allocation=f"n1[0;g{number}]")
        host.run("again", "true", slot=number + 2, allocation="n1[0;g0]")
        assert host.end_of("again").report.outcome == "finished"
        assert host.end_of(f"t{number}").report.reason == "not found"


def test_a_launch_that_a_dead_launcher_never_came_to_is_made_by_the_next_one(tmp_path: Path) -> None:
    with Host(tmp_path) as host:
        host.run("warm", "true", slot=1)
        host.end_of("warm")
        (launcher,) = host.launchers()
        os.kill(launcher, signal.SIGSTOP)
        host.run("a", "echo", "here", slot=1)
        host.send(StateRequest(1))
        host.until(lambda: host.reported("state"))
        os.kill(launcher, signal.SIGKILL)
        a = host.end_of("a")
        assert not alive(launcher)
    assert (a.report.outcome, a.entry.stdout) == ("finished", "here\n")
