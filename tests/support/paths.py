"""Folders of the repository, wherever the test that needs them stands."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
TESTS: Final = ROOT / "tests"
QCG_CASES: Final = TESTS / "qcg"
