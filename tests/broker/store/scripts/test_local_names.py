"""Every script leaves room for more local names: a script of Lua has at most 200, and a longer one is not loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotq.broker.store import store
from tests.support.engine import Engine, fixtures

engine, server, node = fixtures
SCRIPTS = sorted(path.stem for path in (Path(store.__file__).parent / "scripts").glob("*.lua"))
ROOM = 8  # names


@pytest.mark.parametrize("name", [name for name in SCRIPTS if not name.startswith("lib")])
def test_there_is_room_for_more_names(engine: Engine, name: str) -> None:
    first, rest = store.script(name).text.split("\n", 1)
    more = ", ".join(f"room{n}" for n in range(ROOM))
    sha = engine.admin.call("SCRIPT", "LOAD", f"{first}\nlocal {more}\n{rest}")
    assert len(sha) == 40, "refused with: too many local variables"
