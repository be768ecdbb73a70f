"""What holds for every script: terms and queue ids are respected, and headers say what is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files

import pytest

from pilotq.broker.errors import StateLost, Superseded
from pilotq.broker.store.connection import ReplyError
from pilotq.broker.store.store import ClaimTarget, Store
from pilotq.broker.tasks.states import EVENT_SCRIPTS, STATUSES, TABLE
from tests.support.engine import NODE, ONE, QUEUE_ID, Engine, fixtures, task

engine, server, node = fixtures
LIBRARIES = {"lib", "lib_leases", "lib_rq", "lib_joins", "lib_commit"}
NO_TRANSITION = {
    "cancel_orphans",
    "count_vanished",
    "deregister",
    "drop_idle_classes",
    "guarded_write",
    "heads",
    "heartbeat",
    "part_rq",
    "read_rq",
    "register",
    "report_started",
    "send",
    "trim",
}
SCRIPTS = {
    f.name.removesuffix(".lua"): f.read_text()
    for f in files("pilotq.broker.store.scripts").iterdir()
    if f.name.endswith(".lua")
}


# -- other terms and queues -------------------------------------------------------------------------------------------

TERMED: dict[str, Callable[[Store], object]] = {
    "heads": lambda s: s.heads([ONE]),
    "claim": lambda s: s.claim([(ONE, [ClaimTarget(NODE, 1, "n1[0]")])]),
    "release_dependents": lambda s: s.release_dependents(10),
    "drop_idle_classes": lambda s: s.run("drop_idle_classes", s.term, 9, 60, ONE),
    "trim": lambda s: s.run("trim", s.term, "finished", "default", "1"),
    "read_rq": lambda s: s.run("read_rq", s.term, 10, 1, "default"),
    "route_rq": lambda s: s.run("route_rq", s.term, 1, "x", 1, "k", 0, "default", "1", 1, 0, 0, "", ""),
    "part_rq": lambda s: s.run("part_rq", s.term, 1, 9, "default", "1", 1, ""),
    "enqueue_due": lambda s: s.run("enqueue_due", s.term, 1, "x", 10, 1, 9, "default"),
    "free_rate_slots": lambda s: s.run("free_rate_slots", s.term, 1, "x", 0),
    "cancel_orphans": lambda s: s.run("cancel_orphans", s.term, "1"),
    "count_vanished": lambda s: s.count_vanished(["default"]),
}


@pytest.mark.parametrize("name", TERMED)
def test_an_older_term_may_nothing(engine: Engine, name: str) -> None:
    engine.submit(task())
    old = Store(engine.link, QUEUE_ID, engine.settings, term=engine.store.term)
    engine.store.take_term()
    before = engine.dump()
    with pytest.raises(Superseded):
        TERMED[name](old)
    assert engine.dump() == before


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - LIBRARIES))
def test_another_queue_stops_every_script(engine: Engine, name: str) -> None:
    engine.submit(task())
    before = engine.dump()
    with pytest.raises(StateLost):
        Store(engine.link, "another", engine.settings).run(name, *["1"] * 12)
    assert engine.dump() == before


# -- what headers say -------------------------------------------------------------------------------------------------


def test_every_script_is_in_the_table_or_no_transition() -> None:
    named = set(EVENT_SCRIPTS.values())
    assert named | NO_TRANSITION | LIBRARIES == set(SCRIPTS)
    assert not named & NO_TRANSITION
    assert {event for _, event in TABLE} == set(EVENT_SCRIPTS)
    assert {s for s, _ in TABLE} | set(TABLE.values()) <= STATUSES


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_headers_name_events_arguments_and_answers(name: str) -> None:
    header = re.match(r"(?:--.*\n)+", SCRIPTS[name])
    assert header is not None
    text, code = " ".join(header[0].replace("--", " ").split()), SCRIPTS[name][header.end() :]
    if name in LIBRARIES:
        return
    assert text.startswith(f"{name}: ")
    assert "ARGV: 1 queue id" in text
    arguments, answers = text.partition("ARGV:")[2].split("Returns", 1)
    used = {int(n) for n in re.findall(r"ARGV\[(\d+)\]", code)}
    assert used <= {int(n) for n in re.findall(r"\b(\d+)(?:\.\.\.)? \w", arguments)} | {1, 2}
    events = {e for e, script in EVENT_SCRIPTS.items() if script == name}
    assert events <= set(re.findall(r"\w+", text.partition("ARGV:")[0].rpartition("Event")[2])) or not events
    passed_on = {"finished", "failed", "stopped"}  # answered by cancel as they stand in the record
    words = set(re.findall(r"return .*?\{?'(\w+)'", code)) | set(re.findall(r"and '(\w+)' or '\w+'", code))
    assert set(re.findall(r"'(\w+)'", answers)) <= words | passed_on


def test_a_broken_script_says_where(engine: Engine) -> None:
    with pytest.raises(ReplyError):
        engine.store.run("commit", "k", 1, "x", 1, 1, 1, 1, b"\xc1")
