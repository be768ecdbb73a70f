"""Workers started by a real ssh, through a real sshd on each node."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import PROGRAM, Cluster, run
from tests.support.waiting import wait_until

NODES = ("node1", "node2")
PORT = 2222
SERVER = """\
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
"""
CLIENT = """\
Host *
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@pytest.fixture
def ssh(cluster: Cluster) -> Iterator[Path]:
    """A folder with an ssh for PATH, which reaches these nodes and knows nothing of the user's own keys."""
    server = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    assert server is not None, "openssh-server is not installed"
    folder = cluster.folder / "ssh"
    folder.mkdir(mode=0o700)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "server").write_text(SERVER.format(port=PORT, folder=folder))
    (folder / "client").write_text(CLIENT.format(port=PORT, folder=folder))
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    command = [server, "-D", "-e", "-f", str(folder / "server")]
    running = [
        subprocess.Popen([PROGRAM, "exec", node, *command], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for node in NODES
    ]
    try:
        for node in NODES:
            wait_until(lambda node=node: run(str(folder / "bin" / "ssh"), node, "true").returncode == 0)
        yield folder / "bin"
    finally:
        for process in running:
            process.terminate()
            process.wait(20)


def test_workers_are_started_by_ssh(cluster: Cluster, ssh: Path) -> None:
    """On all nodes, with as many cores as were granted; and nothing of them stays."""
    words = "--dir p --start-method ssh --min-nodes 2 --array 0-39"
    job = cluster.submit(
        f"export PATH={ssh}:$PATH",
        f"pilotq run {words} -- bash -c 'echo $(hostname) $PILOTQ_CPUS >>at; sleep 0.1'; echo code $?",
        options=f"-w {','.join(NODES)} --ntasks-per-node=1 -t5",
    )
    assert job.await_end() == "COMPLETED", job.said()
    assert "40 tasks: 40 finished" in job.said() and "code 0" in job.said(), job.said()
    at = [line.split() for line in (cluster.folder / "at").read_text().splitlines()]
    assert {host for host, _ in at} == set(NODES)
    assert {len(cpus.split(",")) for _, cpus in at} == {1} and len({tuple(words) for words in at}) == 2
    assert run("pgrep", "-f", str(cluster.folder / "p")).stdout == ""
