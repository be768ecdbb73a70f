"""The checks of tests/conftest.py: each kind of leak fails the test and is named, and so does an unlisted skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import TESTS

HEAD = """
import os, subprocess, sys
import pytest


def start(*arguments, **options):
    return subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()", *arguments], **options)


def leave(command, **options):
    # Until it is executed whole it shows neither arguments nor variables.
    begun = f"while ! grep -q ^{command.split()[0]} /proc/$!/cmdline; do :; done"
    subprocess.run(["sh", "-c", f"{command} 2>/dev/null & {begun}"], **options)
"""


def inner_run(folder: Path, body: str, **environment: str) -> tuple[int, str]:
    """Run a test file under a copy of our conftest; returns exit code and output."""
    conftest = (TESTS / "conftest.py").read_text()
    assert "GRACE_S = 3.0" in conftest
    # Another test may run beside this one: what is left in /tmp would be charged to it.
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    assert 'Path("/tmp")' in conftest
    conftest = conftest.replace('Path("/tmp")', f"Path({str(scratch)!r})")
    conftest = conftest.replace("GRACE_S = 3.0", "GRACE_S = 0.1")
    (folder / "conftest.py").write_text(conftest)
    (folder / "skips.txt").write_text("# a comment\nallowed here\n")
    (folder / "test_inner.py").write_text(HEAD + body)
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV")) and k != "CI"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--basetemp={folder}/base", str(folder)],
        cwd=folder,
        env=outer | {"PYTHONPATH": str(TESTS.parent), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


LEAKS = {
    "child": ("def test_it():\n    pytest.kept = start(stdin=subprocess.PIPE)\n", "left behind: child "),
    "zombie": (
        "def test_it():\n    child = start(stdin=subprocess.DEVNULL)\n"
        "    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)\n    pytest.kept = child\n",
        "left behind: zombie ",
    ),
    "descriptor": ("def test_it():\n    os.open('/etc/hostname', os.O_RDONLY)\n", "-> /etc/hostname"),
    "folder": ("def test_it():\n    os.mkdir(os.environ['LEFT'])\n", "left behind: folder "),
    # The shell ends at once: what it started is nobody's child any more, and is found by its mark.
    "environment": (
        "def test_it(tmp_path):\n    env = dict(os.environ, PILOTQ_DIR=str(tmp_path / 'd'))\n"
        "    leave('sleep 600', env=env, close_fds=True)\n",
        "left behind: process ",
    ),
    "argument": (
        "def test_it(tmp_path):\n    leave(f'tail -f /dev/null {tmp_path}')\n",
        "left behind: process ",
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_fails_the_test_and_is_named(leak: str, tmp_path: Path) -> None:
    body, words = LEAKS[leak]
    code, output = inner_run(tmp_path, body, LEFT=str(tmp_path / "scratch" / "pilotq-left"))
    assert code == 1, output
    assert words in output


@pytest.mark.parametrize("other", ["popen-gw1", "scratch/tests-gw1-x"])
def test_a_folder_of_another_worker_is_not_charged_to_this_one(other: str, tmp_path: Path) -> None:
    theirs, ours = (tmp_path / "scratch" / name for name in ("pilotq-left", "pilotq-left-more"))
    files = tmp_path / other / "test_0" / "pilot" / "server"
    files.mkdir(parents=True)
    (files / "server.conf").write_text(f"port 0\nunixsocket {theirs}/s.sock\n")
    body = "def test_it():\n    os.mkdir(os.environ['THEIRS'])\n    os.mkdir(os.environ['OURS'])\n"
    code, output = inner_run(tmp_path, body, THEIRS=str(theirs), OURS=str(ours))
    assert code == 1 and f"left behind: folder {ours}\n" in output, output
    assert f"folder {theirs}\n" not in output and f"folder {theirs};" not in output


def test_a_worker_has_a_folder_for_what_its_tests_leave(tmp_path: Path) -> None:
    body = (
        "import tempfile\nfrom pathlib import Path\ndef test_it():\n"
        "    assert os.environ['TMPDIR'] == tempfile.gettempdir() and '/scratch/tests-gw0-' in tempfile.gettempdir()\n"
        "    tempfile.mkdtemp(prefix='pilotq-')\n"
    )
    code, output = inner_run(tmp_path, body, PYTEST_XDIST_WORKER="gw0")
    assert code == 1 and "left behind: folder " in output and "AssertionError" not in output, output
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_tidy_test_passes(tmp_path: Path) -> None:
    body = (
        "def test_it(tmp_path):\n    child = start(str(tmp_path), stdin=subprocess.PIPE)\n    child.communicate()\n"
        "    open(tmp_path / 'file', 'w').close()\n"
    )
    code, output = inner_run(tmp_path, body)
    assert code == 0, output


SKIPS = """
@pytest.mark.skip(reason="{reason}")
def test_skipped(): pass
def test_passed(): pass
"""


def test_an_unlisted_skip_fails_a_run_in_ci_only(tmp_path: Path) -> None:
    body = SKIPS.format(reason="not on the list")
    assert inner_run(tmp_path, body)[0] == 0
    code, output = inner_run(tmp_path, body, CI="true")
    assert code == 1
    assert "test_inner.py::test_skipped: not on the list" in output


def test_a_module_that_skips_itself_counts(tmp_path: Path) -> None:
    code, output = inner_run(tmp_path, "pytest.skip('not today', allow_module_level=True)\n", CI="true")
    assert code != 0
    assert "test_inner.py: not today" in output


def test_a_listed_skip_is_fine(tmp_path: Path) -> None:
    code, output = inner_run(tmp_path, SKIPS.format(reason="allowed here"), CI="true")
    assert code == 0, output
