"""What a launcher does with a launch whose cgroup cannot be used."""

from __future__ import annotations

from pathlib import Path

from pilotq.workers.process_tree import processes
from pilotq.workers.protocol import ConfinedLaunch, Launch, Refused
from tests.support.launcher_driver import Driver


def test_what_cannot_be_moved_into_its_cgroup_is_ended(each_launcher: str, tmp_path: Path) -> None:
    start = """
import os, sys
from pilotq.workers import cgroups
from pilotq.workers.launcher import launcher
cgroups.make = lambda path, limit: os.mkdir(path)  # a folder, which has no cgroup.procs
launcher.main(sys.argv[1:])
"""
    driver = Driver(tmp_path, program=("-c", start))
    launch = driver.prepare("sleep", "1000")
    fields = {name: getattr(launch, name) for name in Launch.__struct_fields__}
    driver.send(ConfinedLaunch(**fields, cgroup=str(tmp_path / "cgroup"), memory=1 << 30))
    refused = driver.get(Refused, launch.key)
    assert refused.message.startswith("It cannot be moved into its cgroup: No such file or directory")
    assert [process for process in processes().values() if process.parent == driver.process.pid] == []
    assert not (tmp_path / "cgroup").exists()
    driver.close()
