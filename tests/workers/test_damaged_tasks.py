"""Whatever is wrong with one task refuses that task, and touches nothing else on its node."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rq import Queue

from pilotq.broker import Task
from pilotq.broker.store import keys
from pilotq.broker.store.messages import Run, decode_inbox
from pilotq.broker.tasks.spec import FLAG_ARRAY, FLAG_FUNCTION, FLAG_RQ_JOB, FLAG_VALUES, Spec
from tests.support.live_pilot import live_pilot, worker_of
from tests.support.waiting import wait_until
from tests.support.worker_host import Host, alive

pack = msgspec.msgpack.encode
# A text that is no UTF-8, NaN, numbers too large, other types, data that ends too early.
ODD: tuple[bytes, ...] = (
    b"\xa2\xff\xfe", b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xcf" + b"\xff" * 8, b"\xc0", b"\x80", b"\x91\xc0", b"\xc4\x01\0",
    pack(-1), pack("\0"), pack("x" * 300), pack(-math.inf), b"\x81\xc0\xc0", b"\x91" * 2000 + b"\xc0",
)  # fmt: skip


def innocent(host: Host) -> tuple[list[int], int]:
    """A task that runs all the time beside the damaged ones: its process, and the launchers."""
    path = host.directory / "innocent.pid"
    host.run("innocent", "bash", "-c", f"echo $$ > {path}.new; mv {path}.new {path}; exec sleep 600", slot=1000)
    pid = int(host.until(lambda: path.exists() and path.read_text(), "the innocent one"))
    return [*host.launchers(), host.process.pid], pid


CASES: list[tuple[str, dict[str, Any]]] = [
    ("retry_on", {"retry_on": "none", "retries": 1}),
    ("no number", {"time_limit": math.nan}),
    ("no number", {"time_limit": -1.0}),
    ("no number", {"backoff": math.inf}),
    ("unknown", {"model": "lam"}),
    ("no command", {"argv": []}),
    ("no place", {"launch_at": 7}),
    ("context", {"shared": "gone"}),
    ("without cores", {"allocation": "n1[]"}),
    ("ValueError", {"allocation": "n1[x]"}),
    ("No closing quotation", {"allocation": "n1[0:1]", "model": "openmpi",
                              "model_opts": {"mpirun": b"/bin/true", "mpirun_args": b"--foo 'bar"}}),
    ("value", {"flags": FLAG_ARRAY | FLAG_VALUES, "argv": ["echo", "{value}"], "array": "short", "position": 9}),
    ("value", {"flags": FLAG_ARRAY | FLAG_VALUES | FLAG_FUNCTION, "array": "short", "position": 9}),
    ("job", {"flags": FLAG_RQ_JOB}),
    ("Starting it failed", {"cwd": "a\0b"}),
    ("failed", {"env": {"a=b": "c"}}),
]  # fmt: skip


def test_what_is_wrong_with_a_description_refuses_that_task(tmp_path: Path) -> None:
    with Host(tmp_path, prefetch_after=1, chain_s=3600.0, quarantine_after=0) as host:
        host.to_session("values", "short", ["one"])
        processes, pid = innocent(host)
        for number, (word, wrong) in enumerate(CASES):
            argv = wrong.pop("argv", ["true"])
            host.run(f"t{number}", *argv, slot=number + 1, class_name=f"c{number}", **wrong)
            ending = host.end_of(f"t{number}")
            assert (ending.report.outcome, ending.report.reason) == ("failed", "launch"), ending
            # The test's session has its own words for what a server lacks.
            assert word in ending.entry.message or wrong.get("array") or word in ("context", "job", "directory")
        # Behind one that runs, where its launcher would start it by itself.
        host.run("first", "sleep", "0.05", slot=900, class_name="chain")
        host.run("bad", "true", class_name="chain", retry_on="none", retries=1)
        host.run("last", "true", class_name="chain")
        assert [host.end_of(name).report.outcome for name in ("first", "bad", "last")] == [
            "finished",
            "failed",
            "finished",
        ]
        assert alive(pid) and all(map(alive, processes)) and processes[:-1] == host.launchers()


def damaged_run(chance: random.Random, number: int, directory: Path) -> bytes:
    """A message of claim.lua, of which the record was damaged: fields of it, or of its specification."""
    spec = Spec(
        [b"true", b"{index}"], cwd=os.fsencode(directory), env={b"A": b"{value}"},
        flags=chance.choice((0, FLAG_ARRAY, 9, 2, 3, 32, 64)),
        model=chance.choice(("default", "openmpi", "mpich")), model_opts={"mpirun": b"/bin/true"}, retries=1,
    )  # fmt: skip
    parts = [bytes(part) for part in msgspec.msgpack.decode(pack(spec), type=list[msgspec.Raw])]
    for _ in range(chance.randrange(3)):
        parts[chance.randrange(len(parts))] = chance.choice(ODD)
    packed = b"\xdc" + len(parts).to_bytes(2, "big") + b"".join(parts)
    if chance.random() < 0.3:
        data = bytearray(packed)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        packed = bytes(data)[: chance.choice((None, chance.randrange(len(packed))))]
    run = Run(
        f"t{number}", 1, number, chance.choice(("n1[0]", "n1[0:1]")), f"c{number}", "name", 1.0, 2.0, "base", "arr",
        1, 0, 1, "sub", packed,
    )  # fmt: skip
    fields = [bytes(part) for part in msgspec.msgpack.decode(pack(run), type=list[msgspec.Raw])]
    for _ in range(chance.randrange(3)):
        fields[chance.randrange(6, len(fields))] = chance.choice(ODD[:-1])
    return b"\xdc" + len(fields).to_bytes(2, "big") + b"".join(fields)


def test_random_damage_in_records_ends_nothing_but_its_task(tmp_path: Path) -> None:
    chance = random.Random(11)
    with Host(tmp_path, quarantine_after=0) as host:
        host.to_session("values", "arr", ["one", "two"])
        processes, pid = innocent(host)
        for number in range(1, 401):
            host.to_session("message", damaged_run(chance, number, tmp_path))
        host.until(lambda: len(host.endings) == 400, "ends of all")
        assert {ending.report.outcome for ending in host.endings.values()} <= {"finished", "failed"}
        assert alive(pid) and all(map(alive, processes)) and processes[:-1] == host.launchers()


@pytest.mark.parametrize("damage", ODD[:-1], ids=range(len(ODD) - 1))
def test_a_damaged_message_leaves_those_beside_it(damage: bytes) -> None:
    run = Run("t", 1, 1, "n1[0]", "c", "", 1.0, 2.0, "base", "", -1, 0, 0, "", pack(Spec([b"true"])))
    whole = pack(run)
    fields = [bytes(part) for part in msgspec.msgpack.decode(whole, type=list[msgspec.Raw])]
    # Its name; what is no message at all; and whole ones around them.
    broken = b"\xdc" + len(fields).to_bytes(2, "big") + b"".join([*fields[:6], damage, *fields[7:]])
    messages, sentences = decode_inbox(b"\x94" + whole + broken + damage + whole)
    assert messages[0] == messages[-1] == run
    assert sentences
    for message in messages[1:-1]:
        assert isinstance(message, Run) and (message.id, message.slot) == ("t", 1)


def test_damaged_records_in_the_server_refuse_their_tasks(tmp_path: Path) -> None:
    """Of what is handed to one node at once, each with another thing wrong with it."""
    with live_pilot(tmp_path, "n1:3") as live:
        innocent_id = live.enqueue("sleep", "600")
        wait_until(lambda: live.broker.task(innocent_id).status == "started")
        worker = worker_of(live, "n1")
        gate = live.enqueue("sh", "-c", f"while ! [ -e {tmp_path}/go ]; do sleep 0.01; done")
        odd = live.enqueue("sh", "-c", f"while ! [ -e {tmp_path}/go ]; do sleep 0.01; done")
        wait_until(lambda: live.broker.task(odd).status == "started")
        ids = [live.enqueue("echo", "x", after=[gate], retries=1) for _ in range(8)]
        values = live.broker.enqueue(Task(command=["echo", "{value}"], values=["a", "b"], after=[gate]))
        call = live.broker.link.call
        spec = call("HGET", keys.job(ids[0]), "pq_spec")
        call("HSET", keys.job(ids[0]), "pq_spec", b"\xdc")
        call("HSET", keys.job(ids[1]), "pq_spec", spec[:-3])
        call("HSET", keys.job(ids[2]), "pq_spec", "")
        call("HDEL", keys.job(ids[3]), "pq_spec")
        call("HSET", keys.job(ids[4]), "pq_name", b"\xff\xfe")
        call("HSET", keys.job(ids[5]), "pq_shared", "nowhere")
        call("HSET", keys.job(ids[6]), "pq_retries", "many")
        call("DEL", keys.values(values))
        call("DEL", keys.job(odd))
        call("SET", keys.job(odd), "not a record")  # what runs cannot even be reported
        (tmp_path / "go").touch()
        for number in (0, 1, 2, 3, 5):
            view = live.ended(ids[number])
            assert (view.status, view.reason) == ("failed", "refused" if number == 3 else "launch"), view
        wait_until(
            lambda: call("HGET", keys.job(ids[6]), "status") == b"failed", what="end of the one with odd retries"
        )
        assert live.ended(ids[7]).status == "finished"
        assert live.ended(f"{values}_1").reason == "launch"
        assert live.broker.task(innocent_id).status == "started"
        assert worker == worker_of(live, "n1")


def test_the_deletion_of_a_job_that_a_node_has_already_ends_nothing_else(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:2") as live:
        innocent_id = live.enqueue("sleep", "600")
        wait_until(lambda: live.broker.task(innocent_id).status == "started")
        worker = worker_of(live, "n1")
        queue = Queue(connection=live.broker.redis)
        warm = [queue.enqueue("time.time") for _ in range(20)]
        wait_until(lambda: all(job.get_status() == "finished" for job in warm), what="short jobs")
        first = queue.enqueue("time.sleep", 1)
        wait_until(lambda: live.broker.task(first.id).status == "started")
        jobs = [queue.enqueue("time.time") for _ in range(3)]
        wait_until(lambda: live.broker.task(jobs[0].id).reason == "handed", what="prefetched")
        jobs[0].delete()
        wait_until(lambda: jobs[2].get_status() == "finished", what="those behind it")
        assert live.broker.task(innocent_id).status == "started"
        assert worker == worker_of(live, "n1")
