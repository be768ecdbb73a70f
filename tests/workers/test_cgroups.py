"""Which processes are moved into a cgroup, which cgroups are left alone, and what the kernel's counters mean."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from pilotq.workers import cgroups
from pilotq.workers.machine.cleanup import clean_node
from pilotq.workers.process_tree import processes
from tests.support.waiting import wait_until


@pytest.fixture
def mount() -> Path:
    try:
        return Path(cgroups._own_cgroup()[1])
    except (OSError, StopIteration):
        pytest.skip("tasks cannot have cgroups here")


def test_what_a_process_has_started_before_it_is_moved_is_moved_too(mount: Path) -> None:
    try:
        path = Path(tempfile.mkdtemp(prefix="pilotq-test-", dir=mount))
    except OSError:
        pytest.skip("tasks cannot have cgroups here")
    script = "sleep 1000 & setsid sleep 1000 & wait"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as process:

        def started() -> list[int]:
            return [process.pid, *(p.pid for p in processes().values() if p.parent == process.pid)]

        try:
            wait_until(lambda: len(started()) == 3, what="both have started")
            cgroups.enter(str(path), process.pid)
            assert {int(pid) for pid in (path / "cgroup.procs").read_text().split()} == set(started())
        finally:
            for pid in started():
                os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cgroups.remove(str(path)) is None and not path.exists(), what="the cgroup is removed")


@pytest.mark.parametrize(
    ("place", "refused"), [("user@7.service/app.slice/x.scope", True), ("system.slice/slurmstepd.scope/step", False)]
)
def test_a_users_scope_is_left_alone_unless_it_was_delegated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, refused: bool
) -> None:
    own = tmp_path / place
    own.mkdir(parents=True)
    (own / "cgroup.controllers").write_text("cpu memory")
    for name in ("cgroup.procs", "cgroup.subtree_control"):
        (own / name).touch()
    monkeypatch.setattr(cgroups, "_own_cgroup", lambda: (str(own), str(tmp_path)))
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    base, why = cgroups.find_base()
    assert (base == "" and "`systemd-run --user --scope" in why) if refused else (base, why) == (str(own), "")


@pytest.mark.parametrize(
    ("events", "local", "used"),
    [
        ("oom 1\noom_kill 2", None, 99),
        ("oom 0\noom_kill 0", None, 0),
        ("oom 0\noom_kill 1", None, 0),
        ("oom 1\noom_kill 1", "oom 0", 0),
        ("oom 2\noom_kill 1", "oom 1", 99),
    ],
)
def test_a_kill_for_another_limit_is_none_for_its_own(
    tmp_path: Path, events: str, local: str | None, used: int
) -> None:
    (tmp_path / "memory.events").write_text(f"low 0\n{events}\n")
    (tmp_path / "memory.peak").write_text("99\n")
    if local is not None:
        (tmp_path / "memory.events.local").write_text(f"low 0\n{local}\n")
    assert cgroups.killed_at(str(tmp_path)) == used


def test_what_a_dead_worker_leaves_is_removed_with_what_is_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders without files are removed as cgroups are."""
    prefix = cgroups.prefix_of("/pilot", "n0")
    (tmp_path / f"{prefix}7" / "pilotq-members" / "deeper").mkdir(parents=True)
    (tmp_path / f"{prefix}8").mkdir()
    other = tmp_path / f"{cgroups.prefix_of('/pilot', 'n1')}7"
    other.mkdir()
    monkeypatch.setattr(cgroups, "find_base", lambda: (str(tmp_path), ""))
    clean_node("/pilot", "n0")
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    ("own", "name", "text", "kills"),
    [
        ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3", 3),
        ("", "memory.events", "oom 4\noom_kill 2\noom_group_kill 1", 2),
    ],
)
def test_kills_are_counted_in_the_own_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, name: str, text: str, kills: int
) -> None:
    """A neighbour's do not count; where no cgroup tells, the machine's do."""

    def own_cgroup(controller: str = "") -> tuple[str, str]:
        if controller != own:
            raise FileNotFoundError
        return str(tmp_path), str(tmp_path)

    monkeypatch.setattr(cgroups, "_own_cgroup", own_cgroup)
    assert cgroups.oom_kills()[0] == cgroups.MACHINE_KILLS
    (tmp_path / name).write_text(text + "\n")
    assert cgroups.oom_kills() == (str(tmp_path / name), kills)
