"""The pilot's directory: made, locked, found, read; and whether the server holds its queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pilotq.broker.errors import InvalidInput, NoPilot, PilotExists, PilotFailed, StateLost, Superseded
from pilotq.broker.pilot import lock as lock_module
from pilotq.broker.pilot.directory import (
    SCHEMA_VERSION,
    ConnectionInfo,
    Pilot,
    create,
    establish_queue_id,
    find,
    write_private,
)
from pilotq.broker.pilot.lock import STALE_S, Holder, Lock, holder
from pilotq.broker.pilot.server import start_server
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PILOTQ_DIR", raising=False)
    return tmp_path


def connection(directory: str) -> ConnectionInfo:
    return ConnectionInfo(
        address=Address(path="/run/s.sock", user="pilotq", password="secret"), queue_id="e", pilot="p", host="h", pid=1,
        version="0", directory=directory, started=1.5,
    )  # fmt: skip


def modes(path: Path) -> set[int]:
    return {p.stat().st_mode & 0o777 for p in (path, *path.rglob("*"))}


# -- making ----------------------------------------------------------------------------------------------------------


def test_by_default_each_pilot_has_a_directory_of_its_own(here: Path) -> None:
    first, second = create(), create()
    assert first.directory != second.directory
    assert Path(first.directory).parent == here / ".pilotq"
    assert (here / ".pilotq" / "current").resolve() == Path(second.directory)
    assert sorted(p.name for p in (here / ".pilotq").iterdir()) == sorted([first.id, second.id, "current"])


def test_a_pilot_that_is_taken_up_is_itself_and_the_current_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = create()
    # By the link: another pilot turns it, and the first one must not write there from then on.
    assert create(".pilotq/current").directory == first.directory
    assert find(".pilotq/current").directory == first.directory
    monkeypatch.setenv("PILOTQ_DIR", ".pilotq/current")
    assert find().directory == first.directory
    monkeypatch.delenv("PILOTQ_DIR")
    second = create()
    assert find().directory == second.directory
    assert create(first.directory).directory == first.directory
    assert find().directory == first.directory, "what was taken up last"
    create("elsewhere")
    assert find().directory == first.directory


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_a_directory_is_private_whatever_the_umask(here: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        pilot = create("one")
    finally:
        os.umask(before)
    assert modes(Path(pilot.directory)) == {0o700}


def test_an_old_directory_is_taken_up_and_closed_to_others(here: Path) -> None:
    pilot = create("one")
    Path(pilot.journal).write_text("kept")
    os.chmod(pilot.directory, 0o755)
    assert create("one") == pilot
    assert Path(pilot.journal).read_text() == "kept"
    assert Path(pilot.directory).stat().st_mode & 0o777 == 0o700


def test_somebodys_project_is_never_closed_to_others(here: Path) -> None:
    here.chmod(0o755)
    (here / "thesis.tex").write_text("x")
    with pytest.raises(InvalidInput, match="neither empty nor a pilot's directory"):
        create(str(here))
    assert here.stat().st_mode & 0o777 == 0o755
    with pytest.raises(InvalidInput, match="it is a file"):
        create("thesis.tex")


def test_a_place_that_cannot_be_written_is_a_sentence(here: Path) -> None:
    (here / "file").write_text("x")
    with pytest.raises(InvalidInput, match=r"file/one cannot be the pilot's directory \(.*File exists\); .*--dir"):
        create("file/one")


def test_write_private_replaces_in_one_step(here: Path) -> None:
    path = here / "f"
    path.write_text("old")
    path.chmod(0o666)
    write_private(str(path), b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
    assert os.listdir(here) == ["f"]


# -- finding ---------------------------------------------------------------------------------------------------------


def test_find_takes_the_named_one_then_the_environment_then_the_current(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, named, environment = create(), create("named"), create("environment")
    (here / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(here / "a" / "b")
    assert find() == current
    monkeypatch.setenv("PILOTQ_DIR", environment.directory)
    assert find() == environment
    assert find(named.directory) == named
    assert find("../../named") == named


def test_no_pilot_says_where_it_looked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoPilot, match=rf"neither {here} nor .*\.pilotq/current; .*`pilotq start`"):
        find()
    with pytest.raises(NoPilot, match=r"nowhere \(--dir\) is no pilot's directory"):
        find("nowhere")
    monkeypatch.setenv("PILOTQ_DIR", "nowhere")
    with pytest.raises(NoPilot, match=r"nowhere \(PILOTQ_DIR\) is no pilot's directory"):
        find()


# -- what others may change --------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> str:
    """Makes it somebody else's, or open to others; returns what a refusal says about it."""
    if how != "foreign":
        path.chmod(int(how, 8))
        return rf"{path} can be written by others \(mode {how}\)"
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, -1, follow_symlinks=False)
    return rf"{path} .*belongs to another user \(uid 12345\)"


@pytest.mark.parametrize("how", ["0777", "0770", "0702", "1777", "foreign"])
def test_a_place_for_pilots_that_others_may_change_is_neither_used_nor_looked_into(here: Path, how: str) -> None:
    home = here / ".pilotq"
    pilot = create()
    before = sorted(home.rglob("*"))
    said = spoil(home, how)
    for attempt in (create, lambda: create(pilot.directory), lambda: create(".pilotq/new"), find):
        with pytest.raises(InvalidInput, match=said):
            attempt()
    assert sorted(home.rglob("*")) == before
    os.chown(home, os.geteuid(), -1)
    home.chmod(0o755)
    assert find() == pilot and create()


@pytest.mark.parametrize("how", ["0777", "0770", "0702", "foreign"])
def test_a_pilots_directory_that_others_may_change_is_not_used(
    here: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pilot = create()
    path = Path(pilot.directory)
    said = spoil(path, how)
    for attempt in (find, lambda: find(pilot.directory), lambda: create(pilot.directory)):
        with pytest.raises(InvalidInput, match=said):
            attempt()
    monkeypatch.setenv("PILOTQ_DIR", pilot.directory)
    with pytest.raises(InvalidInput, match=said):
        find()


def test_links_of_others_are_not_followed(here: Path) -> None:
    pilot = create("mine")
    (here / ".pilotq").symlink_to(here / "mine")
    (here / "mine" / "current").symlink_to(here / "mine")
    assert find() == pilot, "a link of one's own is as good as a directory"
    said = spoil(here / ".pilotq", "foreign")
    for attempt in (create, find):
        with pytest.raises(InvalidInput, match=said):
            attempt()


def test_a_folder_inside_that_is_not_the_users_is_not_used(here: Path) -> None:
    create("one")
    spoil(here / "one" / "logs", "foreign")
    with pytest.raises(InvalidInput, match=r"one/logs belongs to another user"):
        create("one")


def test_an_empty_directory_is_closed_to_others_before_it_is_used(here: Path) -> None:
    (here / "one").mkdir()
    (here / "one").chmod(0o777)
    assert modes(Path(create("one").directory)) == {0o700}


# -- the connection --------------------------------------------------------------------------------------------------


def test_a_connection_is_private_and_comes_back_as_it_was_written(here: Path) -> None:
    pilot = create("one")
    before = os.umask(0)
    try:
        pilot.write_connection(connection(pilot.directory))
    finally:
        os.umask(before)
    assert (Path(pilot.directory) / "connection.json").stat().st_mode & 0o777 == 0o600
    assert pilot.connection() == connection(pilot.directory)
    assert pilot.await_connection(0) == connection(pilot.directory)
    pilot.remove_connection()
    pilot.remove_connection()
    with pytest.raises(NoPilot, match=r"no pilot runs in .*`pilotq start`"):
        pilot.await_connection(0.02)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_connection_that_others_can_read_is_refused(here: Path, mode: int) -> None:
    pilot = create("one")
    pilot.write_connection(connection(pilot.directory))
    path = Path(pilot.directory) / "connection.json"
    path.chmod(mode)
    with pytest.raises(InvalidInput, match=f"can be read by others.*`chmod 600 {path}`"):
        pilot.connection()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_connection_of_another_user_is_refused(here: Path) -> None:
    pilot = create("one")
    pilot.write_connection(connection(pilot.directory))
    os.chown(Path(pilot.directory) / "connection.json", 12345, -1)
    with pytest.raises(InvalidInput, match=r"belongs to another user \(uid 12345\)"):
        pilot.connection()


def test_a_connection_is_never_read_through_a_link(here: Path) -> None:
    pilot, other = create("one"), create("other")
    other.write_connection(connection(other.directory))
    os.symlink(os.path.join(other.directory, "connection.json"), os.path.join(pilot.directory, "connection.json"))
    with pytest.raises(InvalidInput, match="cannot be read"):
        pilot.connection()


# -- the lock --------------------------------------------------------------------------------------------------------


HOLD = """
import sys
from pilotq.broker.pilot.lock import Lock
from pilotq.broker.errors import PilotExists
try:
    lock = Lock.take(sys.argv[1])
except PilotExists:
    print("refused", flush=True)
else:
    print("taken", flush=True)
sys.stdin.read()
"""


def contender(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_lock_is_held_by_one_and_given_back(here: Path) -> None:
    path = here / "lock"
    lock = Lock.take(str(path))
    who = holder(str(path))
    assert who is not None
    assert (who.pid, path.stat().st_mode & 0o777) == (os.getpid(), 0o600)
    with pytest.raises(PilotExists, match=rf"process {os.getpid()} on {who.host}.*`pilotq stop --dir {here}`"):
        Lock.take(str(path))
    lock.heartbeat()
    lock.release()
    assert os.listdir(here) == []
    assert holder(str(path)) is None


def test_the_lock_of_a_killed_holder_is_taken_over(here: Path) -> None:
    with contender(here / "lock") as process:
        assert answer(process) == "taken"
        with pytest.raises(PilotExists, match=f"process {process.pid}"):
            Lock.take(str(here / "lock"))
        process.kill()
        process.wait()
    assert holder(str(here / "lock")) is None
    Lock.take(str(here / "lock")).release()


def test_a_zombie_holds_nothing_and_a_reused_number_neither(here: Path) -> None:
    with contender(here / "lock") as process:
        assert answer(process) == "taken"
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert holder(str(here / "lock")) is None
        process.wait()
    who = Holder.here()
    (here / "lock").write_bytes(msgspec.json.encode(msgspec.structs.replace(who, start=(who.start or 0) - 1)))
    assert holder(str(here / "lock")) is None


@pytest.mark.parametrize("content", [msgspec.json.encode(Holder("far", "another boot", 1, 1, "t")), b""])
def test_a_holder_elsewhere_is_judged_by_its_heartbeat(here: Path, content: bytes) -> None:
    path = here / "lock"
    path.write_bytes(content)
    now = path.stat().st_mtime
    os.utime(path, (now, now - STALE_S + 10))
    with pytest.raises(PilotExists):
        Lock.take(str(path))
    os.utime(path, (now, now - STALE_S - 1))
    lock = Lock.take(str(path))
    assert path.stat().st_mtime >= now
    lock.release()
    assert os.listdir(here) == []


def test_beats_show_in_the_time_of_the_file(here: Path) -> None:
    path = here / "lock"
    lock = Lock.take(str(path))
    os.utime(path, (0, 0))
    lock.heartbeat()
    assert path.stat().st_mtime > 0
    lock.release()


def test_a_holder_that_was_taken_for_dead_learns_it(here: Path) -> None:
    path = here / "lock"
    first = Lock.take(str(path))
    path.unlink()
    second = Lock.take(str(path))
    with pytest.raises(Superseded, match="taken over by another pilot"):
        first.heartbeat()
    first.close()
    second.heartbeat()
    second.release()


def test_of_many_that_find_a_dead_lock_one_takes_it(here: Path) -> None:
    for _ in range(3):
        (here / "lock").write_bytes(msgspec.json.encode(msgspec.structs.replace(Holder.here(), pid=2**22 + 1)))
        with ExitStack() as stack:
            processes = [stack.enter_context(contender(here / "lock")) for _ in range(6)]
            assert sorted(map(answer, processes)) == ["refused"] * 5 + ["taken"]
            for process in processes:
                process.communicate()
        assert os.listdir(here) == ["lock"]


def test_a_lock_taken_between_look_and_removal_is_put_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = here / "lock"
    path.write_bytes(msgspec.json.encode(Holder("dead", Holder.here().machine, 1, None, "t")))
    others: list[Lock] = []
    living = lock_module._living

    def slow_look(*seen: Any) -> Holder | None:
        found = living(*seen)
        if not others:  # meanwhile another one removes the dead lock and takes it
            path.unlink()
            others.append(Lock.take(str(path)))
        return found

    monkeypatch.setattr(lock_module, "_living", slow_look)
    with pytest.raises(PilotExists):
        Lock.take(str(path))
    others[0].heartbeat()
    others[0].release()
    assert os.listdir(here) == []


# -- the queue the server holds ---------------------------------------------------------------------------------------


@pytest.fixture
def link(here: Path) -> Iterator[Connection]:
    server = start_server(create("one").directory)
    with closing(Connection(server.admin)) as link:
        yield link
    server.stop()


def test_an_empty_server_gets_a_queue_id_once(here: Path, link: Connection) -> None:
    pilot = create("one")
    queue_id = establish_queue_id(pilot, link)
    assert len(queue_id) == 16
    assert link.call("MGET", keys.QUEUE_ID, keys.SCHEMA) == [queue_id.encode(), SCHEMA_VERSION.encode()]
    assert establish_queue_id(pilot, link) == queue_id
    # Died between the server's answer and its own note: the queue is the same.
    os.unlink(pilot.path("server", "queue-id"))
    assert establish_queue_id(pilot, link) == queue_id


def test_a_server_that_lost_its_state_is_noticed(here: Path, link: Connection) -> None:
    pilot = create("one")
    establish_queue_id(pilot, link)
    link.call("SET", keys.QUEUE_ID, "another")
    with pytest.raises(StateLost, match=f"does not hold the tasks of {pilot.directory}.*it holds another queue"):
        establish_queue_id(pilot, link)
    link.call("FLUSHALL")
    with pytest.raises(StateLost, match="it is empty"):
        establish_queue_id(pilot, link)
    assert link.call("DBSIZE") == 0


def test_data_of_another_version_is_refused(here: Path, link: Connection) -> None:
    link.call("MSET", keys.SCHEMA, "99", keys.QUEUE_ID, "e")
    with pytest.raises(
        PilotFailed,
        match=f"version 99, this pilotq knows version {SCHEMA_VERSION}: use the pilotq that made it, or",
    ):
        establish_queue_id(Pilot(str(here / "one")), link)


def test_a_directory_of_an_older_pilot_is_refused_and_left_as_it_is(here: Path, link: Connection) -> None:
    pilot = Pilot(str(here / "one"))
    sentence = f"the data of {pilot.directory} is of version 1, .*: use the pilotq that made it, or start a new pilot"
    link.call("MSET", keys.SCHEMA, "1", "pilotq:epoch", "e")
    for _ in range(2):
        with pytest.raises(PilotFailed, match=sentence):
            establish_queue_id(pilot, link)
        assert sorted(link.call("KEYS", "*")) == [b"pilotq:epoch", keys.SCHEMA.encode()]
        Path(pilot.path("server", "epoch")).write_text("e")
    link.call("FLUSHALL")
    with pytest.raises(PilotFailed, match=f"version 1, this pilotq knows version {SCHEMA_VERSION}"):
        establish_queue_id(pilot, link)
    assert link.call("DBSIZE") == 0


def test_a_connection_that_another_version_wrote_is_refused(here: Path) -> None:
    pilot = create("one")
    pilot.write_connection(connection(pilot.directory))
    path = Path(pilot.directory) / "connection.json"
    path.write_text(path.read_text().replace('"queue_id"', '"epoch"'))
    with pytest.raises(PilotFailed, match="written by another version of pilotq: use the pilotq that started this"):
        pilot.connection()
