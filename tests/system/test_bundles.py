"""Bundles on a real pilot: each of many different tasks is what it would be by itself, for all who ask."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from rq.job import Job

from pilotq.broker import ArrayRange, Request, Task
from pilotq.broker.client.archive import Archive
from pilotq.broker.errors import FunctionCanceled, InvalidInput, UnknownTask
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store.journal import Journal
from tests.support.command_line import in_background, prompt
from tests.support.live_pilot import LivePilot, live_pilot, worker_of
from tests.support.waiting import wait_until

SEVERAL = {"bundle_above": 3}
SHOW = "echo $PILOTQ_TASK_ID $PILOTQ_EXECUTION ${PILOTQ_INDEX-none} ${PILOTQ_ARRAY_ID-none} ${PILOTQ_VALUE-none}"


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("bundles"), **SEVERAL) as live:
        yield live


def shell(code: str, **fields: object) -> Task:
    return Task(command=["sh", "-c", code], **fields)  # type: ignore[arg-type]


def test_each_runs_with_what_it_has_for_itself(pilot: LivePilot, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from a file")
    tasks = [
        shell(SHOW, name="plain"), shell("echo $A {index} {value}", env={"A": "own"}), shell("pwd", cwd=str(tmp_path)),
        shell("cat", stdin=str(tmp_path / "in")), shell("echo out", stdout=str(tmp_path / "{id}.out")),
        Task(script="#!/bin/sh\necho script\n"), shell("echo {attempt}"), shell("printf '\\377'; printf x >&2"),
    ]  # fmt: skip
    ids = pilot.broker.enqueue_many(tasks)
    assert ids == [f"{ids[0][:-2]}_{n}" for n in range(8)]
    assert pilot.broker.wait(ids, timeout=60).finished == 8
    written = [pilot.output(i) for i in ids]
    assert written[0].decode() == f"{ids[0]} 1 none none none\n"
    assert written[1:4] == [b"own {index} {value}\n", f"{tmp_path}\n".encode(), b"from a file"]
    assert (tmp_path / f"{ids[4]}.out").read_bytes() == b"out\n"
    assert written[5:] == [b"script\n", b"1\n", b"\xff"]
    (line,) = pilot.lines(ids[0])
    assert (line.name, line.array, line.index, line.command) == ("plain", ids[0][:-2], None, f"sh -c {SHOW}")
    assert pilot.ended(ids[5]).command == "#!/bin/sh echo script"


def test_functions_that_share_a_record_return_what_each_returns(pilot: LivePilot) -> None:
    tasks = [Task(function=divmod, args=(n, 7)) for n in range(60)]
    tasks[30] = Task(function=divmod, args=(1, 0))
    tasks[40] = Task(function=bytes, args=(100_000,))
    ids = pilot.broker.enqueue_many(tasks)
    assert all("_" in task_id for task_id in ids)
    assert list(pilot.broker.results(ids[:30], timeout=60)) == [divmod(n, 7) for n in range(30)]
    assert pilot.broker.result(ids[59], timeout=60) == divmod(59, 7)
    results = pilot.broker.results(ids[29:])
    assert next(results) == divmod(29, 7)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert pilot.broker.result(ids[40]) == bytes(100_000) and pilot.broker.result(ids[41]) == divmod(41, 7)
    with Redis.from_url(pilot.broker.url) as connection:
        bundle = ids[0].partition("_")[0]
        assert (
            0 < connection.zcard(f"pilotq:returned:{bundle}") <= 58
        )  # on a busy machine some live for more than a moment
        assert 0 < connection.ttl(f"pilotq:returned:{bundle}") <= 7 * 86400
    with pytest.raises(UnknownTask):
        pilot.broker.results(["1f2g_3"])
    assert list(pilot.broker.results(iter(ids[:2]))) == [(0, 0), (0, 1)]


def test_functions_of_a_bundle_that_were_canceled_and_commands_have_no_result(pilot: LivePilot) -> None:
    pilot.broker.pause(True)
    ids = pilot.broker.enqueue_many([Task(function=divmod, args=(n, 7)) for n in range(6)])
    commands = pilot.broker.enqueue_many([Task(command=["true", str(n)]) for n in range(6)])
    (array,) = pilot.broker.enqueue_many([Task(function=divmod, args=(7,), array=ArrayRange(1, 3))])
    pilot.broker.cancel([ids[5], f"{array}_2"])
    pilot.broker.pause(False)
    for canceled in (ids[5], f"{array}_2"):
        with pytest.raises(FunctionCanceled, match="was canceled"):
            pilot.broker.result(canceled, timeout=60)
    with pytest.raises(InvalidInput, match="is no function"):
        pilot.broker.result(commands[0], timeout=60)
    assert pilot.broker.result(ids[0], timeout=60) == (0, 0) and pilot.broker.result(f"{array}_3", timeout=60) == (0, 3)


def test_what_fails_is_tried_again_and_shown_as_itself(pilot: LivePilot, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    ids = pilot.broker.enqueue_many(
        [shell("exit 0", name="good", retries=1), shell("echo why >&2; exit 7", name="bad", retries=1),
         shell(f"test -e {mark} || {{ touch {mark}; exit 1; }}; exit 0", name="second", retries=1),
         shell("sleep 100", name="slow", time_limit=0.3, retries=1), shell("true", retries=1, name="last")]
    )  # fmt: skip
    others = [i for i in ids if "_" not in i]
    assert len(others) == 1, "another time limit makes another class"
    assert [pilot.ended(i).status for i in ids] == ["finished", "failed", "finished", "failed", "finished"]
    view = pilot.broker.task(ids[1])
    assert (view.name, view.command, view.exit_code, view.execution) == ("bad", "sh -c echo why >&2; exit 7", 7, 2)
    assert [line.name for line in pilot.lines(ids[1])] == ["bad", "bad"] and view.index is None
    with Redis.from_url(pilot.broker.url) as connection:
        job = Job.fetch(ids[1], connection=connection)
        assert job.description == "sh -c echo why >&2; exit 7"
        assert "bad ended with" in (job.latest_result().exc_string or "")
    why = pilot.broker.explain(ids[1])
    assert why.name == "bad" and why.why[0].startswith("it ended with a non-zero exit code (7)")
    mine = {view.id: view.name for view in pilot.broker.tasks(status="failed")}
    assert mine[ids[1]] == "bad" and pilot.broker.find("second") == [ids[2]]
    assert pilot.broker.retry([ids[1]]) == {ids[1]: "queued"}
    wait_until(lambda: pilot.broker.task(ids[1]).execution == 4, what="two more executions")


def test_those_that_run_and_wait_can_be_stopped_one_by_one(pilot: LivePilot) -> None:
    ids = pilot.broker.enqueue_many(
        [Task(command=["sleep", f"{600 + n}"], name=f"s{n}", time_request=900) for n in range(8)]
    )
    wait_until(lambda: sum(v.reason == "running" for v in pilot.broker.tasks(status="started")) == 4, what="four run")
    rows = {v.id: v for v in pilot.broker.tasks()}
    seen = {rows[i].name: rows[i].command for i in ids}
    assert seen == {f"s{n}": f"sleep {600 + n}" for n in range(8)}
    waiting = next(i for i in ids if rows[i].status == "queued")
    running = next(i for i in ids if rows[i].reason == "running")
    assert "needs 1 core free" in " ".join(pilot.broker.explain(waiting).why)
    assert pilot.broker.cancel([waiting, running]) == {waiting: "canceled", running: "stopping"}
    assert pilot.ended(running).status == "canceled" and pilot.broker.task(running).name == rows[running].name
    assert pilot.broker.task(waiting).status == "canceled"
    listed = json.loads(pilot.cli("show", "--json", rows[waiting].name).stdout)
    assert [(row["id"], row["status"], row["name"]) for row in listed] == [(waiting, "canceled", rows[waiting].name)]
    bundle = ids[0].partition("_")[0]
    assert pilot.broker.open_ids() == [bundle]
    pilot.broker.cancel([bundle])
    assert pilot.broker.wait(ids, timeout=60).canceled == 8
    pilot.assert_calm()


def test_what_a_killed_worker_held_runs_again(pilot: LivePilot, tmp_path: Path) -> None:
    code = f"echo $PILOTQ_EXECUTION >> {tmp_path}/$0; test -e {tmp_path}/go || sleep 600"
    tasks = [Task(command=["sh", "-c", code, str(n)], name=f"k{n}", time_request=900) for n in range(40)]
    ids = pilot.broker.enqueue_many(tasks)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 4, what="four run")
    (tmp_path / "go").touch()
    os.kill(worker_of(pilot, "n1"), signal.SIGKILL)
    wait_until(lambda: list(pilot.broker.statuses(ids).values()).count("finished") == 38, what="all but two")
    pilot.broker.cancel(ids)
    assert pilot.broker.wait(ids, timeout=60).finished == 38
    again = [n for n in range(40) if (tmp_path / str(n)).read_text().split() == ["1", "2"]]
    assert len(again) == 2, "those that the killed worker ran"
    for n in again:
        assert [(line.execution, line.reason, line.name) for line in pilot.lines(ids[n])] == [
            (2, "", f"k{n}"), (1, "worker lost", f"k{n}"),
        ]  # fmt: skip


def test_tasks_over_several_nodes_and_later_dependents(pilot: LivePilot) -> None:
    wide = Request(nodes=(2, 2), cores=(1, 1))
    ids = pilot.broker.enqueue_many([shell(f"echo {n} $PILOTQ_NODES", request=wide) for n in range(4)])
    (last,) = pilot.broker.enqueue_many([shell("echo after", after=[ids[3]])])
    (each,) = pilot.broker.enqueue_many(
        [shell("echo {index}", array=ArrayRange(0, 3), after=[ids[0].partition("_")[0]])]
    )
    assert pilot.broker.wait([*ids, last, each], timeout=60).finished == 6
    assert [pilot.output(i) for i in ids] == [f"{n} 2\n".encode() for n in range(4)]


def test_commands_speak_of_its_tasks_by_their_ids(pilot: LivePilot) -> None:
    said = {}
    ids = pilot.broker.enqueue_many([shell(f"echo {n}; exit {n % 2}") for n in range(4)])
    assert pilot.broker.wait(ids, timeout=60).failed == 2
    bundle = ids[0].partition("_")[0]
    for verb in ("show", "explain", "logs", "retry"):
        done = pilot.cli(verb, bundle)
        said[verb] = (done.stdout + done.stderr).decode()
    said["show"] = said["show"].replace("elements: some of its tasks", "some of its tasks")  # the reason's word
    assert not [text for text in said.values() if "element" in text or "array" in text]
    assert f"  failed      {bundle}_1, {bundle}_3\n" in said["show"] and "\ntasks         4\n" in said["show"]
    assert f"tasks finished: {bundle}_0, {bundle}_2" in said["explain"]
    assert f"a bundle of 4 tasks, and each has its own output: name one, `pilotq logs {bundle}_0`" in said["logs"]
    assert said["retry"] == f"{bundle}_0 to {bundle}_3: runs again\n"
    assert pilot.broker.wait(ids, timeout=60).failed == 2
    (after,) = pilot.broker.enqueue_many([Task(command=["true"], after=[bundle])])
    assert f"tasks of bundle {bundle} failed" in " ".join(pilot.broker.explain(after).why)
    with pytest.raises(InvalidInput, match="exit codes, but no results") as error:
        pilot.broker.result(bundle)
    assert "array" not in str(error.value)


def test_a_list_has_what_was_canceled_before_a_node_had_it_and_no_bundles(tmp_path: Path) -> None:
    with live_pilot(tmp_path, **SEVERAL) as pilot:
        ids = pilot.broker.enqueue_many(
            [Task(command=["sleep", f"{600 + n}"], name=f"c{n}", time_request=900) for n in range(9)]
        )
        wait_until(lambda: sum(v.reason == "running" for v in pilot.broker.tasks(status="started")) == 4, what="four")
        bundle = ids[0].partition("_")[0]
        assert pilot.broker.cancel([bundle], waiting=True) == {bundle: "canceled"}
        wait_until(lambda: pilot.broker.counts().canceled == 5, what="those that wait are canceled")
        seen = {view.id: view for view in pilot.broker.tasks()}
        assert set(seen) == set(ids)
        facts = [(seen[i].name, seen[i].status, seen[i].reason, seen[i].command) for i in ids[4:]]
        assert facts == [(f"c{n}", "canceled", "canceled", f"sleep {600 + n}") for n in range(4, 9)]
        assert {view.id for view in pilot.broker.tasks(status="canceled")} == set(ids[4:])
        pilot.broker.cancel(ids)
        assert pilot.broker.wait(ids, timeout=60).canceled == 9
        wait_until(lambda: bool(pilot.lines(bundle)), what="its end in the journal")
        rows = [view.id for view in pilot.broker.tasks()]
        assert sorted(rows) == sorted(ids) == sorted(view.id for view in Archive(Pilot(pilot.pilot.directory)).tasks())
        assert [view.id for view in pilot.broker.tasks(limit=7)] == rows[:7]


def test_a_pilot_that_has_ended_goes_on_and_is_listed(tmp_path: Path) -> None:
    (tmp_path / "tasks.txt").write_text("".join(f"./step {n}\n" for n in range(60)))
    step = tmp_path / "step"
    step.write_text('#!/bin/sh\ntest "$1" -lt 40 || test -e go || sleep 600\necho "$1"\n')
    step.chmod(0o755)
    with in_background(tmp_path, "--nodes", "2,2") as cli:
        ids = cli("submit", "tasks.txt", PILOTQ_SETTINGS=json.dumps(SEVERAL)).stdout.split()
        assert [i.partition("_")[2] for i in ids] == [str(n) for n in range(60)]
        wait_until(lambda: json.loads(cli("status", "--json").stdout)["tasks"]["finished"] >= 20, seconds=60)
        assert cli("stop").returncode == 0
    cli = prompt(tmp_path)
    assert ids[0].partition("_")[0] not in [row["id"] for row in json.loads(cli("list", "--json").stdout)]
    done = [row["id"] for row in json.loads(cli("list", "--status", "finished", "--json").stdout)]
    assert len(done) >= 20 and cli("logs", done[0]).stdout == f"{ids.index(done[0])}\n"
    assert "bundle        " in cli("show", done[0]).stdout
    (tmp_path / "go").touch()
    directory = str((tmp_path / ".pilotq" / "current").resolve())
    with in_background(tmp_path, "--resume", directory, "--nodes", "2,2") as cli:
        assert cli("wait").returncode == 0
        assert cli("stop").returncode == 0
    pilot = Pilot(directory)
    finals = [entry.id for entry in Journal(pilot.journal).entries() if entry.final and not entry.elements]
    assert sorted(finals) == sorted(ids)
    with Archive(pilot) as archive:
        assert archive.counts().finished == 60 and archive.wait(ids).finished == 60
        assert archive.task(ids[59]).command == "./step 59" and archive.find("nobody") == []


def test_a_file_runs_and_its_summary_names_what_failed(tmp_path: Path) -> None:
    lines = [f"sh -c 'echo {n} >&2; exit {5 * (n == 7)}'\n" for n in range(12)]
    (tmp_path / "tasks.txt").write_text("".join(lines))
    cli, settings = prompt(tmp_path), json.dumps(SEVERAL)
    done = cli("run", "--nodes", "2", "--json", "tasks.txt", PILOTQ_SETTINGS=settings)
    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert (summary["tasks"]["finished"], summary["tasks"]["failed"]) == (11, 1)
    (failed,) = summary["failed"]
    assert failed["id"].endswith("_7") and failed["command"] == "sh -c echo 7 >&2; exit 5" and failed["exit_code"] == 5
    again = cli("run", "--nodes", "2", "--resume", summary["directory"], "tasks.txt", PILOTQ_SETTINGS=settings)
    assert again.returncode == 1 and "1 had failed before and did not run again" in again.stdout


def test_all_that_failed_and_all_that_waits_are_taken_at_once(pilot: LivePilot, tmp_path: Path) -> None:
    ids = pilot.broker.enqueue_many([shell(f"test -e {tmp_path}/good # {n}", retries=0) for n in range(6)])
    assert pilot.broker.wait(ids, timeout=60).failed == 6
    (tmp_path / "good").touch()
    bundle = ids[0].partition("_")[0]
    assert bundle in pilot.broker.retriable() and not set(ids) & set(pilot.broker.retriable())
    assert pilot.broker.retry([bundle]) == {bundle: "queued"}
    assert pilot.broker.wait(ids, timeout=60).finished == 6
    wait_until(lambda: [line.execution for line in pilot.lines(ids[3])][:1] == [2], what="both in the journal")
    held = pilot.broker.enqueue_many([Task(command=["sleep", f"{700 + n}"], time_request=1800) for n in range(9)])
    wait_until(lambda: sum(v.reason == "running" for v in pilot.broker.tasks(status="started")) == 4, what="four run")
    assert pilot.broker.cancel([held[0].partition("_")[0]], waiting=True)
    wait_until(lambda: list(pilot.broker.statuses(held).values()).count("canceled") == 5, what="five wait no more")
    pilot.broker.cancel(held)
    pilot.broker.wait(held, timeout=60)


def test_what_was_prefetched_and_canceled_stands_in_the_journal_by_its_name(pilot: LivePilot) -> None:
    short = pilot.broker.enqueue_many([Task(command=["true"], priority=3) for _ in range(40)])
    pilot.broker.wait(short, timeout=60)
    ids = pilot.broker.enqueue_many(
        [Task(command=["sleep", f"{600 + n}"], name=f"p{n}", priority=3) for n in range(12)]
    )
    wait_until(lambda: list(pilot.broker.statuses(ids).values()).count("started") > 6, what="some are prefetched")
    pilot.broker.cancel(ids)
    assert pilot.broker.wait(ids, timeout=60).canceled == 12
    wait_until(lambda: sum(bool(pilot.lines(i)) for i in ids) > 6, what="those that a node had in the journal")
    lines = {line.id: (line.name, line.command) for i in ids for line in pilot.lines(i)}
    assert lines == {i: (f"p{n}", f"sleep {600 + n}") for n, i in enumerate(ids) if i in lines}
