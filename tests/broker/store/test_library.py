"""The library of scripts on a server: it is there once, is loaded where it is missing, and keeps nothing of a call."""

from __future__ import annotations

import re

import msgspec
import pytest

from pilotq.broker.errors import ServerRefused
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.library import SHARED, install, library, load, scripts, source
from pilotq.broker.store.store import Store
from tests.support.engine import QUEUE_ID, Engine, fixtures

engine, server, node = fixtures


def functions(engine: Engine) -> list[str]:
    [found] = [dict(zip(one[::2], one[1::2], strict=True)) for one in engine.admin.call("FUNCTION", "LIST")]
    return sorted(function[1].decode() for function in found[b"functions"])


def test_a_server_gets_it_with_the_first_call(engine: Engine) -> None:
    engine.admin.call("FUNCTION", "FLUSH")
    assert engine.store.cancel(["1f"]) == ["unknown"]
    assert functions(engine) == sorted(map(library().function, scripts()))


def test_who_loads_it_again_changes_nothing(engine: Engine) -> None:
    other = Connection(engine.link.address)
    for link in (engine.link, other):
        load(link)
    other.close()
    assert len(functions(engine)) == len(scripts())


def test_another_version_is_beside_it(engine: Engine) -> None:
    load(engine.link)
    text = library().text.replace(library().name, "pilotq_other")
    engine.admin.call("FUNCTION", "LOAD", text)
    assert len(engine.admin.call("FUNCTION", "LIST")) == 2
    assert engine.store.cancel(["1f"]) == ["unknown"]


def test_a_full_server_gets_it_and_loses_those_of_other_versions(engine: Engine) -> None:
    engine.admin.call("FUNCTION", "FLUSH")
    engine.admin.call("FUNCTION", "LOAD", library().text.replace(library().name, "pilotq_other"))
    engine.admin.call("CONFIG", "SET", "maxmemory", 1)
    try:
        with pytest.raises(ServerRefused, match="OOM"):
            load(engine.link)
        install(engine.admin)
        assert engine.admin.call("CONFIG", "GET", "maxmemory")[1] == b"1"
        assert engine.store.cancel(["1f"]) == ["unknown"]
    finally:
        engine.admin.call("CONFIG", "SET", "maxmemory", 0)
    assert functions(engine) == sorted(map(library().function, scripts()))


def test_who_may_not_load_it_is_told_what_to_do(engine: Engine) -> None:
    engine.admin.call("FUNCTION", "FLUSH")
    engine.admin.call("ACL", "SETUSER", "older", "on", ">secret", "~*", "&*", "+@all", "-function|load")
    older = Connection(msgspec.structs.replace(engine.link.address, user="older", password="secret"))
    try:
        with pytest.raises(ServerRefused, match="allow FUNCTION LOAD there"):
            Store(older, QUEUE_ID, engine.store.settings).cancel(["1f"])
    finally:
        older.close()
        engine.admin.call("ACL", "DELUSER", "older")


# Constants and functions that are not in capitals, or are made behind where they are declared.
MADE_ONCE = {"joins", "with_open_canceled", "rq_ended", "rq_count_in", "drop_leases", "number_leased", "end_waiting",
             "end_elements"}  # fmt: skip


def test_nothing_at_the_top_of_a_file_is_left_for_the_next_call() -> None:
    shared = "".join(map(source, SHARED))
    named = re.findall(r"^local (?!function)([\w, ]+?)(?: = |$| --)", shared, re.MULTILINE)
    names = {name.strip() for group in named for name in group.split(",")}
    begin = shared[shared.index("local function begin(argv)") :].partition("\nend\n")[0]
    left = {name for name in names if not name.isupper()} - MADE_ONCE
    assert left and left <= set(re.findall(r"\w+", begin))
