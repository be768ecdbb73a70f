"""Every path of the repository that a document, the Makefile, a comment or a docstring names is there."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

from tests.support.paths import ROOT

FOLDERS = ("package", "broker", "workers", "cli", "integrations", "tests", "benchmarks", "examples", "docs")
PATH = re.compile(rf"(?<![\w./{{}}$-])(?:{'|'.join(FOLDERS)})/[\w*][\w./*-]*")
# An example of a name, or what only a build or a run makes.
NAMED_ONLY = re.compile(r"[A-Z]{2,}[./]|[A-Z]{2,}$|\*|^broker/x\.py|^tests/\.|^(benchmarks|examples/sweep)/results")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))]
TEXTS = [
    *(ROOT / name for name in ("Makefile", ".ci/run", "Dockerfile", "docker-compose.yml", "pyproject.toml")),
    *sorted(ROOT.glob("*.md")),
    *(path for path in FILES if path.suffix in (".md", ".toml", ".lua", ".txt")),
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def missing(text: str) -> set[str]:
    """The paths in a text at which there is nothing."""
    found = {match.rstrip(".-") for match in PATH.findall(text)}
    return {path for path in found if not NAMED_ONLY.search(path) and not (ROOT / path).exists()}


def test_what_is_missing_is_found() -> None:
    text = "see broker/errors.py, `tests/support/gone.py::x`, pilotq/broker/a.py, cli/commands/NAME.py and docs/*.md."
    assert missing(text) == {"tests/support/gone.py"}


def test_paths_in_texts_exist() -> None:
    found = {name(path): missing(path.read_text(encoding="utf-8")) for path in TEXTS}
    assert {path: gone for path, gone in found.items() if gone} == {}


def test_modules_and_scripts_that_designs_name_exist() -> None:
    """Also where a sentence names them without their folder."""
    names = {path.name for path in FILES}
    for path in [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "design").glob("*.md"))]:
        named = set(re.findall(r"`([a-z_0-9]+\.(?:py|lua))\b", path.read_text(encoding="utf-8")))
        assert named <= names, f"{name(path)} names {', '.join(sorted(named - names))}"


def said(source: str) -> str:
    """Comments and docstrings of a module."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(t.string for t in tokens if t.type == tokenize.COMMENT or t.string.startswith(('"""', 'r"""')))


def test_paths_in_comments_exist() -> None:
    found = {name(path): missing(said(path.read_text(encoding="utf-8"))) for path in FILES if path.suffix == ".py"}
    assert {path: gone for path, gone in found.items() if gone} == {}
