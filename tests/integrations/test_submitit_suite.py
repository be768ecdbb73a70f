"""submitit's own tests, which its package has, on a pilot: those that use an executor which runs jobs."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.live_pilot import live_pilot
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.skipif(find_spec("submitit_pilotq") is None, reason="submitit is not installed"),
    pytest.mark.timeout(300),
]
WAIT_S = 240.0
# Left out as a whole: core/test_async.py, core/test_core.py and slurm/test_slurm.py (executors that run nothing, and
# imitations of Slurm's commands), local/test_debug.py (jobs in the program itself), test_documentation.py (links in
# submitit's repository).
FILES = (
    "local/test_local.py", "auto/test_auto.py", "core/test_plugins.py", "core/test_utils.py", "test_helpers.py",
    "test_pickle.py",
)  # fmt: skip
# Tests of these files that cannot hold here, by the reason.
LEFT_OUT = {
    "they look at the child process of a LocalJob, or ask for its states": (
        "local/test_local.py::test_local_job", "local/test_local.py::test_killed", "local/test_local.py::test_cancel",
        "local/test_local.py::test_make_subprocess",
    ),
    "they count the plugins that are installed, and this one is": (
        "core/test_plugins.py::test_find_good_plugin", "core/test_plugins.py::test_skip_bad_plugin",
    ),
    "they copy submitit's repository": (
        "test_helpers.py::test_snapshot", "test_helpers.py::test_snapshot_excludes",
        "test_helpers.py::test_job_use_snapshot_cwd", "test_helpers.py::test_job_use_snapshot_modules",
    ),
    "in their times, of 1.5 s to 3 s, Python does not start on a busy machine: test_submitit.py has longer ones": (
        "test_helpers.py::test_as_completed",
        "local/test_local.py::test_requeuing", "local/test_local.py::test_custom_checkpoint",
        "core/test_utils.py::test_command_function_deadlock",
    ),
    "it takes two minutes": ("local/test_local.py::test_long_running_job",),
}  # fmt: skip
# One of each kind that must be among those that pass: the class was replaced where they use it.
SURE = ("test_get_first_task_error", "test_setup", "test_redirect_stdout_stderr", "test_nested_pickling")


def test_the_tests_of_submitit_pass_on_a_pilot(tmp_path: Path) -> None:
    package = Path(str(importlib.import_module("submitit").__file__)).parent
    left_out = [f"--deselect={test}" for tests in LEFT_OUT.values() for test in tests]
    with live_pilot(tmp_path, "n1:4") as live:
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(package), "-p", "no:cacheprovider",
                "-p", "tests.support.submitit_suite", "--basetemp", str(tmp_path / "suite"), "-rA", *left_out, *FILES,
            ],
            cwd=package, env={**os.environ, "PILOTQ_DIR": live.pilot.directory, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
        tasks = live.broker.counts()
    assert done.returncode == 0, done.stdout
    assert f"{sum(map(len, LEFT_OUT.values()))} deselected" in done.stdout, "submitit has other tests now"
    passed = set(re.findall(r"^PASSED \S+::(\w+)", done.stdout, re.MULTILINE))
    assert passed.issuperset(SURE) and tasks.total >= 25, done.stdout
