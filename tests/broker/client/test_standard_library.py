"""The standard library's own tests of executors, where this interpreter has them, on `Executor`."""

from __future__ import annotations

import contextlib
import importlib
import unittest
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest

from pilotq.broker import Executor
from tests.support.live_pilot import live_pilot

# By version of Python they are in one module, or in several.
MODULES = ("executor", "test_wait", "test_as_completed", "test_shutdown")
SUITES = ("ExecutorTest", "WaitTests", "AsCompletedTests", "ExecutorShutdownTest")
# Those that are not about what an Executor of ours is.
OTHERS = {
    "test_max_workers_negative": "it has no number of workers",
    "test_cancel_futures": "its cancel_futures ends what runs, too",
    "test_interpreter_shutdown": "a program that names the class, in concurrent.futures",
    "test_submit_after_interpreter_shutdown": "the same",
    "test_hang_issue39205": "the same",
    "test_hang_gh83386": "the same",
    "test_hang_gh94440": "the same",
}


def standard_suites() -> list[type]:
    found = {}
    for module in ("test.test_concurrent_futures", *(f"test.test_concurrent_futures.{name}" for name in MODULES)):
        with contextlib.suppress(ModuleNotFoundError):
            have = vars(importlib.import_module(module))
            found.update({name: have[name] for name in SUITES if name in have})
    return list(found.values())


class OnAPilot(unittest.TestCase):
    """What the suites expect of the class that runs them."""

    worker_count = 2
    directory: ClassVar[str]

    @classmethod
    def setUpClass(cls) -> None:
        folder = cls.enter(TemporaryDirectory())
        cls.directory = cls.enter(live_pilot(Path(folder), "n1:5")).pilot.directory

    @classmethod
    def enter(cls, context: Any) -> Any:
        entered = context.__enter__()
        cls.addClassCleanup(context.__exit__, None, None, None)
        return entered

    def setUp(self) -> None:
        self.executor_type: Callable[..., Executor] = Executor
        self.executor = Executor(self.directory)

    def tearDown(self) -> None:
        self.executor.shutdown(wait=True)


FOUND = standard_suites()
if FOUND:
    for suite in FOUND:
        left_out = dict.fromkeys(name for name in OTHERS if hasattr(suite, name))
        globals()[f"Test{suite.__name__}"] = type(f"Test{suite.__name__}", (suite, OnAPilot), left_out)
    del suite
else:

    def test_the_tests_of_the_standard_library() -> None:
        pytest.skip("this interpreter was installed without the standard library's tests")
