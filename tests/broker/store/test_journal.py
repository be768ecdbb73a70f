"""The journal: every ended execution once, whatever dies or fills up in between; and how it is read."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pilotq.broker.errors import JournalDamaged
from pilotq.broker.pilot.server import RunningServer, start_server
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.broker.store.journal_repair import damaged_lines, move_damaged_lines
from pilotq.broker.store.journal_runs import pack_entry
from pilotq.broker.store.journal_writer import JournalWriter, _items_of
from pilotq.broker.store.messages import ControlChanged
from tests.support.waiting import wait_until

FINISHED = {"status": "finished", "reason": "", "final": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = start_server(str(tmp_path_factory.mktemp("pilot")))
    yield server
    server.stop()


@pytest.fixture
def link(server: RunningServer) -> Iterator[Connection]:
    with closing(Connection(server.admin)) as link:
        link.call("FLUSHALL")
        yield link


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@contextmanager
def writer(path: Path, **options: Any) -> Iterator[JournalWriter]:
    with closing(JournalWriter(str(path), fsync_s=0.0, pilot="p", **options)) as writer:
        yield writer


def item(line: JournalEntry, **ending: Any) -> bytes:
    """As lib.lua packs it: the entry's bytes as they came, then a map."""
    return b"\x92" + msgspec.msgpack.encode(line) + msgspec.msgpack.encode({**FINISHED, **ending})


def entry(*items: bytes) -> bytes:
    return b"\xdc" + len(items).to_bytes(2, "big") + b"".join(items)


def add(link: Connection, *lines: JournalEntry, **ending: Any) -> str:
    """One entry of the stream, as one script call makes it."""
    data = entry(*(item(line, **ending) for line in lines))
    return str(link.call("XADD", keys.JOURNAL, "*", "e", data).decode())


def turn(writer: JournalWriter, link: Connection) -> None:
    """One turn of the supervisor's loop."""
    commands = writer.commands(1.0)
    writer.feed(link.pipeline(commands) if commands else [])


def ids(path: Path) -> list[str]:
    return [line.id for line in Journal(str(path)).entries()]


# -- writing ---------------------------------------------------------------------------------------------------------


def test_lines_go_from_the_stream_to_the_file_and_the_stream_is_trimmed(link: Connection, path: Path) -> None:
    first = add(link, JournalEntry("a", name="x", node="n1", exit_code=0), JournalEntry("b", execution=2))
    second = add(link, JournalEntry("c"), status="failed", reason="exit", final=False)
    with writer(path) as w:
        assert w.drain(link, 0.0)
    assert path.read_text() == (
        '{"pilotq_journal":1,"pilot":"p"}\n'
        f'{{"id":"a","name":"x","status":"finished","node":"n1","exit_code":0,"at":"{first}:0"}}\n'
        f'{{"id":"b","status":"finished","execution":2,"at":"{first}:1"}}\n'
        f'{{"id":"c","status":"failed","reason":"exit","final":false,"at":"{second}:0"}}\n'
    )
    assert path.stat().st_mode & 0o777 == 0o600
    assert link.call("XLEN", keys.JOURNAL) == 0


def test_more_entries_than_one_reading_takes(link: Connection, path: Path) -> None:
    expected = [f"t{n}" for n in range(450)]
    for task_id in expected:
        add(link, JournalEntry(task_id))
    with writer(path) as w:
        assert w.drain(link, 0.0)
    assert ids(path) == expected


def test_nothing_is_trimmed_before_it_is_on_disk(link: Connection, path: Path) -> None:
    with closing(JournalWriter(str(path), fsync_s=10.0)) as w:
        for now, length in ((0.0, 1), (1.0, 1), (2.0, 1), (11.0, 0)):
            if now == 0.0:
                add(link, JournalEntry("a"))
            w.feed(link.pipeline(w.commands(now)))
            assert link.call("XLEN", keys.JOURNAL) == length
    assert ids(path) == ["a"]


def test_output_that_is_no_text_comes_back_as_it_was(link: Connection, path: Path) -> None:
    add(link, JournalEntry("a", stdout=b"\xff\x00\n", stderr="läuft".encode()), JournalEntry("b", stdout=b"plain"))
    with writer(path) as w:
        assert w.drain(link, 0.0)
    assert b'"stdout_b64":"/wAK"' in path.read_bytes()
    a, b = Journal(str(path)).entries()
    assert (a.stdout, a.stderr, b.stdout) == (b"\xff\x00\n", "läuft", "plain")


def test_outcomes_of_an_array_become_ranges_of_indices(link: Connection, path: Path) -> None:
    # As RQ's BITFIELD writes them: finished x5, failed, canceled x2, not ended, finished x8.
    for position, outcome in enumerate([1] * 5 + [2] + [3] * 2 + [0] + [1] * 8):
        link.call("BITFIELD", keys.outcomes("a"), "SET", "u2", f"#{position}", outcome)
    script = """
        local line = cmsgpack.pack({id = 'a', name = 'n', submission = ''})
        local outcomes = redis.call('GET', KEYS[2])
        local changes = {status = 'failed', reason = 'elements', final = true, ended = 12.5, queued = 3,
            outcomes = outcomes, array = ARGV[1] == '2' and '10:2:17' or '0:1:17'}
        redis.call('XADD', KEYS[1], '*', 'e', '\\220\\0\\1\\146' .. line .. cmsgpack.pack(changes))
    """
    for variant in "12":
        link.call("EVAL", script, 2, keys.JOURNAL, keys.outcomes("a"), variant)
    with writer(path) as w:
        assert w.drain(link, 0.0)
    plain, stepped = Journal(str(path)).find("a")[::-1]
    assert (plain.status, plain.reason, plain.ended, plain.queued) == ("failed", "elements", 12.5, 3.0)
    assert plain.elements == {"finished": "0-4,9-16", "failed": "5", "canceled": "6-7"}
    assert stepped.elements == {"finished": "10-18:2,28-42:2", "failed": "20", "canceled": "22-24:2"}


def test_an_entry_that_cannot_be_read_stops_no_other(link: Connection, path: Path, capfd: Any) -> None:
    add(link, JournalEntry("a"))
    broken = link.call("XADD", keys.JOURNAL, "*", "e", b"\xc1nonsense").decode()
    add(link, JournalEntry("b"))
    with writer(path) as w:
        assert w.drain(link, 0.0)
    assert ids(path) == ["a", "b"]
    assert f"entry {broken} cannot be read" in capfd.readouterr().err
    (aside,) = path.parent.glob("journal.damaged-*")
    assert msgspec.json.decode(aside.read_bytes())["at"] == broken


def test_an_ending_that_cannot_be_is_left_out_and_the_others_of_its_entry_are_not(link: Connection, path: Path) -> None:
    ending = {"outcomes": b"\x01", "array": "0:1"}  # without the number of elements
    data = entry(item(JournalEntry("a")), item(JournalEntry("b"), **ending), item(JournalEntry("c")))
    place = link.call("XADD", keys.JOURNAL, "*", "e", data).decode()
    with writer(path) as w:
        assert w.drain(link, 0.0)
    assert ids(path) == ["a", "c"]
    (aside,) = path.parent.glob("journal.damaged-*")
    assert msgspec.json.decode(aside.read_bytes())["at"] == f"{place}:1"
    assert link.call("XLEN", keys.JOURNAL) == 0


# -- crashes ---------------------------------------------------------------------------------------------------------


WRITE = """
import sys, time
from pilotq.broker.store.journal_repair import damaged_lines, move_damaged_lines
from pilotq.broker.store.journal_writer import JournalWriter
from pilotq.broker.store.connection import Connection, parse_url
link = Connection(parse_url(sys.stdin.readline().strip()))
writer = JournalWriter(sys.argv[1], fsync_s=0.001)
while True:
    writer.feed(link.pipeline([("PING",), *writer.commands(time.monotonic())])[1:])
"""


def test_killed_at_any_moment_no_line_is_lost_or_doubled(server: RunningServer, link: Connection, path: Path) -> None:
    expected: list[str] = []
    for kill in range(6):
        with subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdin=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            process.stdin.write(server.admin.url() + "\n")
            process.stdin.flush()
            size = path.stat().st_size if path.exists() else 0
            while len(expected) < 3000 * (kill + 1):
                batch = [f"t{len(expected) + n}" for n in range(30)]
                add(link, *(JournalEntry(task_id, stdout="x" * 50) for task_id in batch))
                expected += batch
                if len(expected) % 3000 == 1500:
                    wait_until(lambda size=size: path.exists() and path.stat().st_size > size)
            process.kill()
    with writer(path) as w:
        assert w.drain(link, 0.0)
    assert ids(path) == expected
    assert link.call("XLEN", keys.JOURNAL) == 0


def test_a_torn_end_is_cut_and_written_again(link: Connection, path: Path) -> None:
    for number in range(3):
        add(link, *(JournalEntry(f"t{number}{letter}", name="n") for letter in "abc"))
    with writer(path) as w:  # its trims are never sent: so it looks when the machine dies before
        for _ in range(3):
            w.feed([link.call(*c) if c[0] == "XREAD" else None for c in w.commands(1.0)])
    whole = path.read_bytes()
    assert len(ids(path)) == 9
    # Cut anywhere, also with what some file systems leave behind after a power loss.
    for rest in (b"", b"\0" * 100, b"\0" * 100 + b"\n", b'{"id":"t', b"17\n"):
        for size in (0, 5, whole.index(b"\n") + 1, *range(whole.index(b"\n") + 2, len(whole), 23), len(whole)):
            path.write_bytes(whole[:size] + rest)
            with writer(path) as w:
                for _ in range(3):
                    w.feed([link.call(*c) if c[0] == "XREAD" else None for c in w.commands(1.0)])
            assert path.read_bytes() == whole, (size, rest)


def test_what_a_killed_writer_had_not_trimmed_is_trimmed_by_the_next(link: Connection, path: Path) -> None:
    add(link, JournalEntry("a"))
    add(link, JournalEntry("b"))
    with writer(path) as w:
        for _ in range(2):
            w.feed([link.call(*c) if c[0] == "XREAD" else None for c in w.commands(1.0)])
    assert link.call("XLEN", keys.JOURNAL) == 2
    with writer(path) as w:
        assert w.drain(link, 0.0)
        assert link.call("XLEN", keys.JOURNAL) == 0  # also the last entry, of which the file holds every line
        add(link, JournalEntry("c"))
        assert w.drain(link, 0.0)
    assert ids(path) == ["a", "b", "c"]
    assert link.call("XLEN", keys.JOURNAL) == 0


# -- a full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill_up(w: JournalWriter, link: Connection, expected: list[str]) -> None:
    """1,200 lines of 2 KB into a file that takes 1 MB."""
    for start in range(0, 600, 50):
        add(link, *(JournalEntry(task_id, stdout="x" * 2000) for task_id in expected[start : start + 50]))
    for _ in range(5):
        turn(w, link)
    assert "cannot be written (File too large)" in w.trouble
    # The stream does not hold much yet: only then it would be a reason to pause.
    assert link.call("HGET", keys.STATUS, "journal") is None
    for start in range(600, 1200, 50):
        add(link, *(JournalEntry(task_id, stdout="x" * 2000) for task_id in expected[start : start + 50]))
    turn(w, link)
    turn(w, link)
    assert link.call("HGET", keys.STATUS, "journal") == w.trouble.encode()
    assert link.call("LPOP", keys.EVENTS) == msgspec.msgpack.encode(ControlChanged())
    assert link.call("XLEN", keys.JOURNAL) == 24
    assert not w.drain(link, 0.0)


def test_while_it_cannot_be_written_nothing_is_lost_and_it_says_so(link: Connection, path: Path, capfd: Any) -> None:
    expected = [f"t{n}" for n in range(1200)]
    with writer(path, pause_bytes=2_000_000) as w:
        with no_file_longer_than(1_000_000):
            fill_up(w, link, expected)
        turn(w, link)
        assert w.trouble == ""
        assert w.drain(link, 0.0)
        turn(w, link)
        turn(w, link)
        assert link.call("HGET", keys.STATUS, "journal") is None
        assert link.call("LPOP", keys.EVENTS) == msgspec.msgpack.encode(ControlChanged())
    assert ids(path) == expected
    assert capfd.readouterr().err.count("journal: ") == 2  # logged once, and that it is over


def test_after_a_failed_fsync_everything_behind_the_last_one_is_written_again(
    link: Connection, path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The kernel may have dropped any of it, and will say so only once."""
    with writer(path) as w:
        add(link, JournalEntry("a"))
        assert w.drain(link, 0.0)
        add(link, JournalEntry("b"))
        turn(w, link)
        synced = path.stat().st_size

        def dropped(file: int) -> None:
            os.pwrite(file, b"\0" * (path.stat().st_size - synced), synced)
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr("pilotq.broker.store.journal_writer.os.fsync", dropped)
            turn(w, link)
        assert "Input/output error" in w.trouble
        assert w.drain(link, 0.0) is False
        turn(w, link)
        assert w.drain(link, 0.0)
    assert ids(path) == ["a", "b"]
    assert "can be written again" in capfd.readouterr().err


# -- reading ---------------------------------------------------------------------------------------------------------


def test_no_journal_is_an_empty_one(path: Path) -> None:
    for _ in range(2):
        journal = Journal(str(path))
        assert [list(journal.entries()), journal.find("a"), journal.last(5), journal.tasks_by_name("n")] == [[]] * 4
        path.touch()


def test_finding_lines(link: Connection, path: Path) -> None:
    add(link, JournalEntry("a", execution=1, name="one"), status="failed", final=False)
    add(link, JournalEntry("aa", execution=1, name='tw"o'), JournalEntry("b", stdout='\n{"id":"a","name":"one",'))
    add(link, JournalEntry("a", execution=2, name="one"))
    with writer(path) as w:
        assert w.drain(link, 0.0)
    with path.open("ab") as file:
        file.write(b'{"id":"a","name":"one","exec')  # a line that is being written
    journal = Journal(str(path))
    assert [(line.execution, line.final) for line in journal.find("a")] == [(2, True), (1, False)]
    assert [line.id for line in journal.find("b")] == ["b"]
    assert journal.find("c") == []
    assert [line.execution for line in journal.tasks_by_name("one")] == [2, 1]
    assert [line.id for line in journal.tasks_by_name('tw"o')] == ["aa"]
    assert [line.id for line in journal.last(3)] == ["a", "b", "aa"]
    assert Counter(line.id for line in journal.last(99)) == Counter(a=2, aa=1, b=1)
    assert [line.id for line in journal.entries()] == ["a", "aa", "b", "a"]


GOOD = ['{"id":"a","name":"n","status":"finished"}', '{"id":"b","name":"n","status":"finished"}']
DAMAGES = [
    (b"\0" * 60, "it is no JSON"),
    (b'{"id":"x","name":"n"', "it is no JSON"),
    (b'{"id":"x","name":"caf\xe9"}', "it is not UTF-8"),
    pytest.param(b'{"id":"x","other":' + b"[" * 9999 + b"]" * 9999 + b"}", "it is no JSON", id="nested too deep"),
    (b"[]", "it is no entry of a journal"),
    (b'{"name":"n"}', "it is no entry of a journal"),
    (b'{"id":"x","name":"n","exit_code":"one"}', "it is no entry of a journal"),
    (b'{"id":"x","name":"n","cpus":"n1[a]"}', "it is no entry of a journal"),
    (b'{"id":"x","name":"n","elements":{"finished":"1-x"}}', "it is no entry of a journal"),
    (b'{"id":"x","name":"n","ended":1e300}', "it is no entry of a journal"),
    (b'{"id":"x","name":"n","stdout":5}', "it is no entry of a journal"),
    (b'{"id":"x","name":"n","stdout_b64":"%"}', "it is no entry of a journal"),
    (b'{"id":"x","name":"n","stderr_at":["output/x","0"]}', "it is no entry of a journal"),
]


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize(("damage", "why"), DAMAGES)
def test_a_line_that_cannot_be_read_is_named_and_all_others_are_told(
    path: Path, place: int, damage: bytes, why: str
) -> None:
    lines = [b'{"pilotq_journal":1,"pilot":"p"}', *map(str.encode, GOOD)]
    if place:
        lines.insert(place, damage)
    else:
        lines[0] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    journal = Journal(str(path))
    with pytest.warns(JournalDamaged, match=f"journal.jsonl: line {place + 1} cannot be read .{why}."):
        assert ids(path) == ["a", "b"]
    # A warning is an error in these tests: of each line there is one.
    assert [entry.id for entry in journal.last(9)] == ["b", "a"]
    assert [entry.id for entry in journal.tasks_by_name("n")] == ["b", "a"]
    assert [entry.id for entry in journal.find("a")] == ["a"]
    assert journal.find("x") == []
    assert [(line.number, line.why) for line in damaged_lines(str(path))] == [(place + 1, why)]
    count, aside = move_damaged_lines(str(path))
    assert (count, Path(aside).read_bytes()) == (1, damage + b"\n")
    assert ids(path) == ["a", "b"] and [entry.id for entry in journal.find("a")] == ["a"]
    assert move_damaged_lines(str(path)) == (0, "")
    assert {p.stat().st_mode & 0o777 for p in path.parent.iterdir()} == {0o600}


def test_of_many_damaged_lines_a_few_are_named(path: Path) -> None:
    path.write_bytes(b'{"pilotq_journal":1}\n' + b"x\n" * 1000)
    with pytest.warns(JournalDamaged) as told:
        assert ids(path) == []
    assert len(told) == 6 and "more lines cannot be read" in str(told[-1].message)


def test_whole_lines_that_a_writer_cuts_are_kept_beside_the_journal(link: Connection, path: Path, capfd: Any) -> None:
    add(link, JournalEntry("a"))
    add(link, JournalEntry("b", stdout_at=[b"/caf\xe9"]), JournalEntry("c"))
    with writer(path) as w:
        assert w.drain(link, 0.0)
    whole = path.read_bytes()
    damaged = whole[:-20] + b"\xff" * 10 + b"\n"
    path.write_bytes(damaged)
    with writer(path) as w:
        assert w.drain(link, 0.0)
    (aside,) = path.parent.glob("journal.damaged-*")
    assert aside.read_bytes() == damaged.splitlines(keepends=True)[-1]
    assert aside.name in capfd.readouterr().err
    assert [(line.id, line.stdout_at) for line in Journal(str(path)).entries()] == [("a", []), ("b", ["/caf\udce9"])]


def test_an_entry_without_the_names_of_its_fields_is_the_same() -> None:
    usual = JournalEntry(
        "1f", "", "finished", "", 3, True, "n1", "n1[0:1]", 100.0, 101.000001, 102.5, 103.25, 0, None, 4711, 1 << 20,
        0.0015, command="sim 7", submission="s1",
    )  # fmt: skip
    unusual = JournalEntry(
        "1f_7", "x", "failed", "exit", 1, True, "n1", "", 100.5, 99.5, None, 103.25, 3, 9, None, None, None, 1 << 30,
        60.0, "1f", 7, "sim", "it failed", b"\xff", "text", ["a", 1, 2], [b"/b"], "s",
    )  # fmt: skip
    for entry, ending in ((usual, None), (unusual, {"status": "failed", "reason": "exit", "final": True})):
        packed = b"\xdc\x00\x01\x92" + pack_entry(entry) + msgspec.msgpack.encode(ending)
        ((found, decided),) = _items_of(b"e", packed)
        assert (decided.status, decided.reason, decided.final) == (entry.status, entry.reason, True)
        found.status, found.reason = entry.status, entry.reason
        assert msgspec.to_builtins(found) == msgspec.to_builtins(entry)
    assert len(pack_entry(usual)) < 70
