"""Fails a test that leaves anything behind, and in CI a test that is skipped for a reason that is not on the list.

The leak check is cheap (two listings of /proc and one of the descriptors) and exact: only what is new since the
test began counts, so servers that a module shares do not. It works on Linux, which has /proc.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import SHARED, wait_until

PROC = Path("/proc")
SCRATCH = Path("/tmp")
SKIPS = Path(__file__).parent / "skips.txt"
GRACE_S = 3.0


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves a child, a process of its pilot, an open descriptor or a scratch folder behind.

    It is set up before every other fixture of the test, so it checks after those have cleaned up. Processes and
    folders get GRACE_S to go: a process that was asked to end may still be ending when the test is over.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    pids, files, folders = _pids(), _descriptors(), _folders()
    yield
    home = (request.node.funcargs or {}).get("tmp_path")
    # A folder must be there the whole time: others start servers meanwhile, and their folders come before they listen.
    started, stayed = _started(pids, home), _folders() - folders
    with contextlib.suppress(AssertionError):
        wait_until(lambda: (not started and not stayed) or _update_left(started, stayed, pids, home), seconds=GRACE_S)
    stayed -= _of_other_workers(stayed, tmp_path_factory.getbasetemp()) if stayed else set()
    left = [*started.values(), *(f"folder {path}" for path in sorted(stayed))]
    for pid in started:  # so that one failure stays one
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    if _descriptors() - files:
        gc.collect()  # a descriptor that only a reference cycle keeps open is no leak of the test
        with contextlib.suppress(AssertionError):  # nor one that a thread of its module has open at this moment
            wait_until(lambda: not _descriptors() - files, seconds=GRACE_S)
        new = sorted(number for number, *_ in _descriptors() - files)
        left += [f"descriptor {number} -> {os.readlink(f'/proc/self/fd/{number}')}" for number in new]
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)


def _update_left(started: dict[str, str], stayed: set[str], pids: set[str], home: Path | None) -> bool:
    """Bring both up to date; True when nothing is left."""
    found = _started(pids, home)
    started.clear()
    started.update(found)
    stayed &= _folders()
    return not started and not stayed


def _started(before: set[str], home: Path | None) -> dict[str, str]:
    """pid -> description of our children, and of processes that carry this test's folder, new since ``before``."""
    found = {}
    for pid in _pids() - before - SHARED:
        try:
            state, parent = (PROC / pid / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (PROC / pid / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            child = parent == str(os.getpid())
            if child or (home is not None and state != "Z" and _carries(pid, home)):
                kind = "zombie" if state == "Z" else "child" if child else "process"
                found[pid] = f"{kind} {pid} ({command or 'not waited for'})"
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile, or is another user's
    return found


def _carries(pid: str, home: Path) -> bool:
    """Whether a process belongs to a pilot below ``home``: by PILOTQ_DIR, or by an argument that names a path there."""
    mark = os.fsencode(home)
    variables = (PROC / pid / "environ").read_bytes().split(b"\0")
    if any(v.startswith(b"PILOTQ_DIR=" + mark) for v in variables):
        return True
    return mark in (PROC / pid / "cmdline").read_bytes()


def _pids() -> set[str]:
    return {name for name in os.listdir(PROC) if name.isdigit()}


def _descriptors() -> set[tuple[int, int, int]]:
    """Number, device and inode: unlike a link's text they stay when the file is renamed or removed."""
    found = set()
    for name in os.listdir(PROC / "self/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue  # the descriptor of the listing itself
        found.add((int(name), status.st_dev, status.st_ino))
    return found


def _folders() -> set[str]:
    """Folders of servers' sockets that no server listens in: a living server of ours is found as a process."""
    found = {str(path) for scratch in {SCRATCH, Path(tempfile.gettempdir())} for path in scratch.glob("pilotq-*")}
    if not found:
        return found
    listening = (PROC / "net/unix").read_text(errors="replace")
    return {path for path in found if f" {path}/" not in listening}


def _of_other_workers(folders: set[str], base: Path) -> set[str]:
    """Those of these folders that a server is configured for whose files are in the folders of another worker of xdist:
    a busy machine may take long to start it, or to end it."""
    found = set()
    for home in {*base.parent.glob("popen-gw*"), *SCRATCH.glob("tests-gw*")} - {base, Path(tempfile.gettempdir())}:
        for file in home.rglob("server.conf"):
            with contextlib.suppress(FileNotFoundError):
                text = file.read_text(errors="replace")
                found |= {folder for folder in folders if f"unixsocket {folder}/" in text}
    return found


# -- skips ------------------------------------------------------------------------------------------------------------

_unlisted = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts us in the background has SIGINT ignored, and what we start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if worker := os.environ.get(
        "PYTEST_XDIST_WORKER"
    ):  # what its tests leave in such a folder is not charged to others
        os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix=f"tests-{worker}-", dir=SCRATCH)
    config.stash[_unlisted] = []
    config.pluginmanager.register(Skips(config), "pilotq-skips")


def pytest_unconfigure() -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)


class Skips:
    """Collects skips whose reason is not on the list; with CI=true they fail the run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        lines = SKIPS.read_text(encoding="utf-8").splitlines()
        self.allowed = {line.strip() for line in lines if line.strip() and not line.startswith("#")}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if reason not in self.allowed:
                self.config.stash[_unlisted].append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if os.environ.get("CI") == "true" and self.config.stash[_unlisted] and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if os.environ.get("CI") == "true" and self.config.stash[_unlisted]:
            terminalreporter.section(f"skipped, but not for a reason listed in {SKIPS.name}", red=True)
            for line in self.config.stash[_unlisted]:
                terminalreporter.line(line)
