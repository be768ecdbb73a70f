"""What is looked for in file systems that may hang."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pilotq.broker.store.resources import NodeInfo
from pilotq.workers.execution.launch_builder import NotYetError, UnlaunchableError
from pilotq.workers.multinode import launch_models
from pilotq.workers.multinode.launch_models import Found, ParallelLaunchModel

NOTHING: Any = None


def never() -> Found:
    raise AssertionError


def test_a_lookup_that_hangs_is_given_up_though_others_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_models, "LOOKUP_WAIT_S", 0.0)
    model = ParallelLaunchModel(NOTHING, str(tmp_path), NodeInfo("n1", 1, "h", 1, [0]), {}, NOTHING, lambda _: None)
    with pytest.raises(NotYetError):
        model._look_up(1, never)
    model._lookups[1].give_up_at = time.monotonic() - 1
    with pytest.raises(NotYetError):
        model._look_up(2, never)
    with pytest.raises(UnlaunchableError, match="has not answered"):
        model._look_up(1, never)


def test_whatever_a_lookup_meets_is_said_of_its_task(tmp_path: Path) -> None:
    def find() -> Found:
        raise ValueError("embedded null byte")

    model = ParallelLaunchModel(
        NOTHING, str(tmp_path), NodeInfo("n1", 1, "h", 1, [0]), {}, NOTHING, lambda action: action()
    )
    with pytest.raises(ValueError, match="embedded null byte"):
        model._look_up(1, find)
