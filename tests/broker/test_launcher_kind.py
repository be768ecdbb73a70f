"""Which launcher serves: PILOTQ_LAUNCHER, and what is said where it asks for what cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pilotq.broker import launcher_kind
from pilotq.broker.errors import InvalidInput
from tests.support.command_line import prompt


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_kind, "MODULE", "pilotq.workers.launcher._never_built")


def test_without_a_wish_the_native_one_serves_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_kind, "MODULE", "json")
    assert launcher_kind.launcher_kind({}) == "native"
    assert launcher_kind.launcher_kind({"PILOTQ_LAUNCHER": "python"}) == "python"


def test_where_it_is_not_built_that_in_python_serves_unless_native_is_asked_for(unbuilt: None) -> None:
    assert launcher_kind.launcher_kind({}) == "python"
    with pytest.raises(InvalidInput, match="was not built when pilotq was installed"):
        launcher_kind.launcher_kind({"PILOTQ_LAUNCHER": "native"})


def test_one_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_another_machine.so").write_bytes(b"\x7fELF of another machine")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(launcher_kind, "MODULE", "of_another_machine")
    assert launcher_kind.launcher_kind({}) == "python"
    with pytest.raises(InvalidInput, match="it cannot be loaded: .*of_another_machine"):
        launcher_kind.launcher_kind({"PILOTQ_LAUNCHER": "native"})
    assert "of_another_machine" not in sys.modules


def test_a_wrong_wish_is_refused_before_anything_starts(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    for command in (["start"], ["run", "--", "true"]):
        done = cli(*command, PILOTQ_LAUNCHER="fast")
        assert done.returncode == 2
        assert "PILOTQ_LAUNCHER is 'fast': it can be native or python, or unset" in done.stderr
    assert not list(tmp_path.glob(".pilotq/*/journal*"))


def test_doctor_says_which_one_serves(tmp_path: Path) -> None:
    cli = prompt(tmp_path)
    done = cli("doctor", PILOTQ_LAUNCHER="fast")
    assert done.returncode == 3 and "PILOTQ_LAUNCHER is 'fast'" in done.stdout
    assert "launcher       python" in cli("doctor", PILOTQ_LAUNCHER="python").stdout
    kind = launcher_kind.launcher_kind({})
    assert f"launcher       {kind}" in cli("doctor").stdout
