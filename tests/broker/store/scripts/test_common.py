"""What holds for every script: terms and epochs are respected, and headers say what is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files

import pytest

from pilotq.broker.errors import StateLost, Superseded
from pilotq.broker.store.connection import ReplyError
from pilotq.broker.store.store import Slot, Store
from pilotq.broker.tasks.states import EVENT_SCRIPTS, STATUSES, TABLE
from tests.support.engine import EPOCH, NODE, ONE, Engine, fixtures, task

engine, server, node = fixtures
LIBRARIES = {"lib", "lib_rq"}
NO_TRANSITION = {
    "beat",
    "heads",
    "inbound",
    "launched",
    "orphans",
    "leave",
    "register",
    "settle",
    "tell",
    "tidy",
    "trim",
    "write",
}
SCRIPTS = {
    f.name.removesuffix(".lua"): f.read_text()
    for f in files("pilotq.broker.store.scripts").iterdir()
    if f.name.endswith(".lua")
}


# -- other terms and epochs -------------------------------------------------------------------------------------------

TERMED: dict[str, Callable[[Store], object]] = {
    "heads": lambda s: s.heads([ONE]),
    "claim": lambda s: s.claim([(ONE, [Slot(NODE, 1, "n1[0]")])]),
    "release": lambda s: s.release(10),
    "tidy": lambda s: s.run("tidy", s.term, 9, ONE),
    "trim": lambda s: s.run("trim", s.term, "finished", "default", "1"),
    "inbound": lambda s: s.run("inbound", s.term, 10, 1, "default"),
    "route": lambda s: s.run("route", s.term, 1, "x", 1, "k", 0, "default", "1", 1, 0, 0, "", ""),
    "due": lambda s: s.run("due", s.term, 1, "x", 10, 1, "default"),
    "limits": lambda s: s.run("limits", s.term, 1, "x"),
    "orphans": lambda s: s.run("orphans", s.term, "1"),
    "settle": lambda s: s.run("settle", s.term, "default"),
}


@pytest.mark.parametrize("name", TERMED)
def test_an_older_term_may_nothing(engine: Engine, name: str) -> None:
    engine.submit(task())
    old = Store(engine.link, EPOCH, engine.settings, term=engine.store.term)
    engine.store.take_term()
    before = engine.dump()
    with pytest.raises(Superseded):
        TERMED[name](old)
    assert engine.dump() == before


@pytest.mark.parametrize("name", sorted(set(SCRIPTS) - LIBRARIES))
def test_another_epoch_stops_every_script(engine: Engine, name: str) -> None:
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
    assert "ARGV: 1 epoch" in text
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
