"""Memory limits by cgroups of version 2, where this machine lets us make some: as root in a container, or delegated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pilotq.workers.cgroups import find_base
from tests.support.command_line import Cli, in_background

USE = "kept = bytearray(400 << 20); kept[::4096] = kept[1::4096]"
pytestmark = pytest.mark.skipif(bool(find_base()[1]), reason="tasks cannot have cgroups here")


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with in_background(tmp_path_factory.mktemp("cgroups"), "--nodes", "2") as prompt:
        yield prompt


def run(cli: Cli, *command: str) -> str:
    """What is known of the task when it has ended."""
    task = cli("enqueue", *command).stdout.strip()
    cli("wait", task, "--timeout", "100s")
    return cli("explain", task).stdout


def test_the_kernel_ends_what_uses_too_much(cli: Cli) -> None:
    assert "the kernel limits their cgroups" in cli("nodes").stdout
    script = f"setsid {sys.executable} -I -S -c '{USE}' & wait; sleep 60"
    said = run(cli, "--memory", "100M", "--", "sh", "-c", script)
    assert "It used all of 100 MiB on n0: the kernel has killed it, in its cgroup" in said
    assert cli("list").stdout.splitlines()[1].split()[1:4] == ["failed", "memory", "137"]


def test_no_cgroup_is_left(cli: Cli) -> None:
    base = Path(find_base()[0])
    assert "it finished" in run(cli, "--memory", "100M", "--", "true")
    assert [
        path.name for path in base.iterdir() if path.name.startswith("pilotq-") and "members" not in path.name
    ] == []
