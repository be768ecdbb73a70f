"""EasyVVUQ, which cannot be edited, as a client of QCG-PilotJob and with an `Executor` as its pool.

In an environment of its own (.ci/run has it).
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.live_pilot import left_of
from tests.support.paths import TESTS

CAMPAIGN = TESTS / "vvuq" / "campaign.py"


@pytest.mark.timeout(600)  # each of its tasks imports EasyVVUQ, which takes seconds
@pytest.mark.skipif(find_spec("easyvvuq") is None, reason="EasyVVUQ is not installed")
def test_a_campaign_through_either_pool_has_the_statistics_of_a_serial_one(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, CAMPAIGN, tmp_path], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["executor"] == "pilotq.broker.qcg.executor"
    assert found["states"] == {str(number): "SUCCEED" for number in range(1, 10)}
    assert found["serial"]["runs"] == 9 and found["serial"]["std"] > 0
    assert found["pilot"] == found["calls"] == found["serial"]
    assert not left_of(str(tmp_path))
