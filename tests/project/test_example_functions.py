"""examples/functions on a private pilot: what it prints is true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.functions.scan import exponent
from tests.support.paths import ROOT

PROGRAM = ROOT / "examples" / "functions" / "scan.py"


def test_the_exponent_is_the_known_one() -> None:
    assert exponent(4.0) == pytest.approx(0.6931, abs=0.05)  # log 2
    assert exponent(3.5) < 0 < exponent(3.7)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PILOTQ_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, str(PROGRAM), "--points", "200", "--nodes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    values = [3.4 + 0.6 * n / 199 for n in range(200)]
    chaotic = [r for r in values if exponent(r) > 0]
    first = f"{len(chaotic) / 200:.1%} of 200 parameters are chaotic\nthe first is r = {chaotic[0]:.3f}\n"
    assert done.stdout == first, done.stderr
    assert not list(tmp_path.glob("pilotq-*"))
