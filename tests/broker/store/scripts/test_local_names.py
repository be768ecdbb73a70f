"""The library of scripts leaves room: a function of Lua has at most 200 local names, and 60 from around it."""

from __future__ import annotations

from pilotq.broker.store.library import library
from tests.support.engine import Engine, fixtures

engine, server, node = fixtures
MORE_NAMES = 8  # at the top
MORE_USED = 4  # of these in each script


def test_there_is_room_for_more_names(engine: Engine) -> None:
    first, rest = library().text.split("\n", 1)
    names = [f"room{n}" for n in range(MORE_NAMES)]
    used = f"function()\nlocal _ = {{{', '.join(names[:MORE_USED])}}}\n"
    text = f"{first}\nlocal {', '.join(names)}\n" + rest.replace(", function()\n", f", {used}")
    assert text.count(used) > 20
    other = library().name[:-1] + "_"
    text = text.replace(library().name, other)
    assert engine.admin.call("FUNCTION", "LOAD", text) == other.encode(), "refused with: too many variables"
