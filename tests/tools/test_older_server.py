"""A pilot on the oldest server that is supported, that of a distribution: what it holds is there after a stop."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.command_line import prompt
from tests.support.waiting import wait_until


def test_a_pilot_on_redis_7_goes_on_with_what_it_had(tmp_path: Path) -> None:
    server = shutil.which("redis-server")
    if server is None:
        (pytest.fail if os.environ.get("PILOTQ_TEST_TOOLS") == "1" else pytest.skip)("redis-server is not installed")
    cli = prompt(tmp_path)
    begun = tmp_path / "begun"
    assert cli("start", "--dir", "p", "--nodes", "n1:1", "--server", server).returncode == 0
    cut_off = cli("enqueue", "--dir", "p", "--", "sh", "-c", "test -e again || { : > begun; exec sleep 4321; }").stdout
    array = cli("enqueue", "--dir", "p", "--array", "1-50", "--", "true").stdout
    after = cli("enqueue", "--dir", "p", "--after", array.strip(), "--", "true").stdout
    wait_until(begun.exists, seconds=60)
    assert cli("stop", "--dir", "p").returncode == 0
    (tmp_path / "again").touch()
    assert cli("start", "--resume", "p", "--nodes", "n1:1", "--server", server).returncode == 0
    try:
        assert cli("wait", "--dir", "p", "--timeout", "60s").returncode == 0
        counts = json.loads(cli("status", "--dir", "p", "--json").stdout)["tasks"]
        assert counts["finished"] == counts["total"] == 52
        shown = json.loads(cli("show", "--dir", "p", cut_off.strip(), after.strip(), "--json").stdout)
        assert [task["status"] for task in shown] == ["finished", "finished"]
    finally:
        assert cli("stop", "--dir", "p", "--now").returncode == 0
