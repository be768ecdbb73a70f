"""The end of the allocation: nothing starts that cannot end, tasks get a signal, the next allocation goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pilotq.broker.store.journal import Journal, JournalEntry
from tests.slurm.cluster import Cluster, run
from tests.support.waiting import wait_until

# Writes down that it got the signal, and ends; else it goes on for ever.
NOTICED = "trap 'echo noticed >>notes; exit 3' USR1; echo up >>notes; while :; do sleep 0.1; done"


def lines(folder: Path) -> list[JournalEntry]:
    return list(Journal(str(folder / "p" / "journal.jsonl")).entries())


def test_a_pilot_ends_before_its_allocation_and_the_next_one_goes_on(cluster: Cluster) -> None:
    """Tasks get the signal of the user's choice, are queued again without being charged, and the exit code is 0."""
    (cluster.folder / "tasks.json").write_text(
        json.dumps({"tasks": [{"name": "short", "command": ["true"]}, {"name": "long", "script": NOTICED}]})
    )
    job = cluster.submit(
        "pilotq run --dir p --grace 52s --notice-signal USR1 tasks.json", "echo code $?", options="-N2 --exclusive -t1"
    )
    assert job.await_end() == "COMPLETED", job.said()
    said = job.said()
    assert "pilotq: the allocation is ending: go on in the next one with `pilotq run --resume" in said
    assert "code 0" in said and "1 of 2 tasks ended" in said
    assert (cluster.folder / "notes").read_text() == "up\nnoticed\n"
    (cut,) = [line for line in lines(cluster.folder) if not line.final]
    assert (cut.name, cut.reason) == ("long", "walltime")
    # The same line again: what has finished is not run again, what was cut short goes on.
    (cluster.folder / "notes").unlink()
    again = cluster.submit("pilotq run --dir p tasks.json", options="-N2 --exclusive -t5")
    wait_until((cluster.folder / "notes").exists, seconds=60)
    (task,) = [t for t in json.loads(run("pilotq", "list", "--dir", str(cluster.folder / "p"), "--json").stdout)
               if t["name"] == "long"]  # fmt: skip
    assert task["execution"] == 2
    assert run("pilotq", "cancel", "--dir", str(cluster.folder / "p"), task["id"]).returncode == 0
    assert again.await_end() == "FAILED"
    assert "1 finished, 1 canceled" in again.said()
    assert sum(line.name == "short" for line in lines(cluster.folder)) == 1


def test_what_cannot_end_in_time_is_not_begun(cluster: Cluster) -> None:
    """Until the allocation is made longer: its end is asked for again."""
    job = cluster.submit(
        "pilotq start --dir p --grace 20s --background",
        "pilotq enqueue --dir p --time-request 10m --name long -- hostname",
        "pilotq enqueue --dir p --time-request 10s --name short -- hostname",
        "pilotq wait --dir p; echo code $?",
        "pilotq stop --dir p",
        options="-N1 --exclusive -t5",
        allocation_poll_s=0.5,
    )
    pilot = str(cluster.folder / "p")

    def statuses() -> dict[str, str]:
        shown = run("pilotq", "list", "--dir", pilot, "--json")
        return {t["name"]: t["status"] for t in json.loads(shown.stdout)} if shown.returncode == 0 else {}

    wait_until(lambda: statuses().get("short") == "finished", seconds=60, what="the short task")
    assert statuses()["long"] == "queued"
    why = run("pilotq", "explain", "--dir", pilot, "long").stdout
    assert "it may take 600 s, but the nodes that could hold it take nothing new in" in why, why
    run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    assert job.await_end() == "COMPLETED", job.said()
    assert "code 0" in job.said()


@pytest.mark.timeout(300)
def test_a_script_that_submits_itself_again_until_all_is_done(cluster: Cluster) -> None:
    """Each allocation has room for some of the tasks."""
    (cluster.folder / "chain.sh").write_text(
        "#!/bin/bash\n#SBATCH -N1 --exclusive -t1 -o chain-%j.out\n"
        "pilotq run --dir p --grace 40s --time-request 5s --array 0-11 -- sleep 3.{index}\n"
        'left=$(pilotq status --dir p --left)\necho left $left\n[ "$left" = 0 ] || sbatch chain.sh\n'
    )
    job = cluster.submit("sbatch chain.sh", options="-N1 -t1")
    assert job.await_end() == "COMPLETED", job.said()

    def done() -> bool:
        return any("left 0" in path.read_text() for path in cluster.folder.glob("chain-*.out"))

    wait_until(done, seconds=200, what=str([path.read_text() for path in cluster.folder.glob("chain-*.out")]))
    outs = [path.read_text() for path in cluster.folder.glob("chain-*.out")]
    assert len(outs) >= 2, outs
    ended = [line for line in lines(cluster.folder) if line.array and line.final]
    assert sorted(line.index or 0 for line in ended) == list(range(12))
    assert {line.status for line in ended} == {"finished"}


def test_a_cancelled_job_loses_nothing(cluster: Cluster) -> None:
    """Batch script and workers are signalled together."""
    job = cluster.submit("exec pilotq run --dir p --array 0-19 -- sleep 600", options="-N4 --exclusive -t5")
    pilot = str(cluster.folder / "p")

    def running() -> int:
        shown = run("pilotq", "status", "--dir", pilot, "--json")
        return int(json.loads(shown.stdout)["running"]) if shown.returncode == 0 else 0

    wait_until(running, seconds=60)
    job.cancel()
    assert job.await_end() == "CANCELLED"
    begin = time.time()
    again = cluster.submit("pilotq start --dir p", options="-N4 --exclusive -t5")
    wait_until(running, seconds=90, what=again.said())
    counts = json.loads(run("pilotq", "status", "--dir", pilot, "--json").stdout)
    assert counts["tasks"]["left"] == counts["tasks"]["total"] == 20
    # Nobody was charged: those that ran are where they were, with an execution more.
    assert {line.reason for line in lines(cluster.folder)} <= {"pilot ended", "walltime"}
    assert all(line.ended is None or line.ended < begin + 60 for line in lines(cluster.folder))
    assert run("pilotq", "stop", "--now", "--dir", pilot).returncode == 0
    assert again.await_end() == "COMPLETED"


def test_an_allocation_that_is_killed_without_a_word_loses_nothing(cluster: Cluster) -> None:
    line = "pilotq run --dir p --array 0-7 -- bash -c 'echo >>began.{index}; until [ -e go ]; do sleep 0.1; done'"
    job = cluster.submit(line, options="-N4 --exclusive -t5")
    wait_until(lambda: len(list(cluster.folder.glob("began.*"))) == 8, seconds=60, what=job.said())
    run("scancel", "--signal=KILL", "--full", job.number)
    assert job.await_end() in ("CANCELLED", "FAILED")
    again = cluster.submit(line, options="-N4 --exclusive -t5")
    begun = [cluster.folder / f"began.{index}" for index in range(8)]
    wait_until(lambda: all(len(path.read_text()) == 2 for path in begun), seconds=90, what=again.said())
    (cluster.folder / "go").touch()
    assert again.await_end() == "COMPLETED", again.said()
    ended = [line.index for line in lines(cluster.folder) if line.array and line.final]
    assert sorted(index or 0 for index in ended) == list(range(8))
