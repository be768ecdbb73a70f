"""The library of scripts on a server: it is there once, is loaded where it is missing, and keeps nothing of a call."""

from __future__ import annotations

import re

from pilotq.broker.store.connection import Connection
from pilotq.broker.store.library import SHARED, library, load, scripts, source
from tests.support.engine import Engine, fixtures

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


def test_nothing_at_the_top_of_a_file_is_left_for_the_next_call() -> None:
    """Tables there are constants, in capitals, or hold functions."""
    for name in SHARED:
        tables = re.findall(r"^local ([\w, ]+) = \{", source(name), re.MULTILINE)
        assert {table for table in tables if not table.isupper()} <= {"joins"}, name
