"""The context of a submission: environment, directory, umask and soft limits."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.submit_context import SubmitContext, capture_context, environment

SHOW = (
    "import sys, msgspec; from pilotq.broker.tasks.submit_context import capture_context; "
    "sys.stdout.buffer.write(msgspec.msgpack.encode(capture_context(sys.argv[1])))"
)


def captured(policy: str, cwd: Path, env: dict[bytes, bytes], umask: int = 0o022) -> SubmitContext:
    done = subprocess.run(
        [sys.executable, "-c", SHOW, policy], cwd=cwd, env=env, umask=umask, stdout=subprocess.PIPE, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])),
    )  # fmt: skip
    return msgspec.msgpack.decode(done.stdout, type=SubmitContext)


def test_a_submitter_is_captured_with_all_that_tasks_inherit(tmp_path: Path) -> None:
    env = {b"PATH": b"/bin", b"COLOUR": b"r\xc3\xb6d", b"BAD": b"\xff", b"B\xffD": b"x", b"PILOTQ_DIR": b"/d"}
    found = captured("submit", tmp_path, env, umask=0o027)
    del env[b"PILOTQ_DIR"]
    assert found.env == env | {k: v for k, v in found.env.items() if k == b"LC_CTYPE"}
    assert found.cwd == bytes(tmp_path)
    assert found.umask == 0o027
    assert found.limits[resource.RLIMIT_CORE] == 0
    assert found.limits[resource.RLIMIT_NOFILE] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_other_policies(tmp_path: Path) -> None:
    env = {b"PATH": b"/bin", b"HOME": b"/h", b"LC_TIME": b"C", b"COLOUR": b"red"}
    assert captured("worker", tmp_path, env).env == {}
    clean = captured("clean", tmp_path, env).env
    assert {b"PATH": b"/bin", b"HOME": b"/h", b"LC_TIME": b"C"}.items() <= clean.items()
    assert b"COLOUR" not in clean
    with pytest.raises(InvalidInput, match="submit, worker, clean"):
        capture_context("mine")


def test_a_task_that_submits_does_not_pass_on_its_own_variables() -> None:
    mine = {b"PILOTQ_TASK_ID": b"1", b"PILOTQ_CPUS": b"0,1", b"QCG_PM_NPROCS": b"2", b"KEPT": b"x"}
    assert environment({**mine, b"OMP_NUM_THREADS": b"2"}) == {b"KEPT": b"x"}
    assert environment({**mine, b"OMP_NUM_THREADS": b"1"}) == {b"KEPT": b"x", b"OMP_NUM_THREADS": b"1"}, "their own"
    assert environment({b"OMP_NUM_THREADS": b"2"}) == {b"OMP_NUM_THREADS": b"2"}


def test_the_umask_is_the_same_afterwards() -> None:
    before = os.umask(0o031)
    try:
        assert capture_context().umask == 0o031
        assert os.umask(0o031) == 0o031
    finally:
        os.umask(before)


def test_a_directory_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    here = os.getcwd()
    os.chdir(gone)
    try:
        gone.rmdir()
        with pytest.raises(InvalidInput, match="does not exist any more"):
            capture_context()
    finally:
        os.chdir(here)
