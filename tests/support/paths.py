"""Folders of the repository, independent of the folder that a test is in."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
TESTS: Final = ROOT / "tests"
QCG_CASES: Final = TESTS / "qcg"
