"""The documents are true: generated pages are fresh, commands run as shown, tables are complete, links lead somewhere.

In a document a fence whose head names a file (``toml tasks.toml``) is that file. In a ``console`` fence lines that
begin with ``$ `` are commands; they run in order, in one folder for each document. A command exits with 0, or with N
where its line ends in ``# exit N``. Lines below a command are what it prints, both streams together: ``...`` stands
for anything, on a line of its own for any number of lines. Without such lines the output is not compared. In a table
whose last column is called ``pilotq`` the commands of that column run, too, where they stand.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from docs.generate import NOT_DRAWN, PAGES, PARTS, package_arrows, packages_of_code, with_parts

from pilotq.broker import ArrayRange, Broker, Request, Task
from pilotq.broker.client.views import Counts, Explanation, NodeView, TaskView
from pilotq.broker.store import keys
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.taskfiles import qcg
from pilotq.broker.taskfiles.native import Entry
from tests.support.command_line import TIMEOUT, environment, prompt
from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOOKS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages whose commands need a tool: its module, its name.
TOOLS = {
    "docs/hq.md": ("hq_pilotq", "hq"),
    "docs/python-pools.md": ("joblib_pilotq", "joblib"),
    "docs/snakemake.md": ("snakemake", "Snakemake"),
    "docs/submitit.md": ("submitit_pilotq", "submitit"),
}
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = r"^\| [^|]* \| pilotq \|\n\|---\|---\|\n((?:\|[^\n]*\|\n)+)"
SHOWN_PARTS = re.compile(f"{FENCE.pattern}|{TABLE}", re.MULTILINE | re.DOTALL)
CELL = re.compile(r"\| `(pilotq [^`]*)` \|$", re.MULTILINE)
COMMAND = re.compile(r"^\$ (.*?)(?:\s+# exit (\d+))?\n((?:(?!\$ ).*\n)*)", re.MULTILINE)

PROGRESS = re.compile(r"^pilotq: .* running, after .*\n", re.MULTILINE)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def book(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_fresh(page: str) -> None:
    assert book(f"docs/{page}") == PAGES[page](), "run `python docs/generate.py`"


@pytest.mark.parametrize("page", PARTS)
def test_a_generated_part_is_fresh(page: str) -> None:
    assert book(f"docs/{page}") == with_parts(page), "run `python docs/generate.py`"


def reachable(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows, and those that follow from several of them."""
    found = set(arrows)
    while more := {(a, d) for a, b in found for c, d in arrows if b == c} - found:
        found |= more
    return found


def test_the_picture_of_packages_shows_what_the_table_says() -> None:
    drawn = set(package_arrows())
    table = {
        (package, name)
        for package, (_, imports) in packages_of_code().items()
        for name in imports
        if package not in NOT_DRAWN and name not in NOT_DRAWN
    }
    assert reachable(drawn) == reachable(table)
    assert all(arrow not in reachable(drawn - {arrow}) for arrow in drawn), "an arrow that follows from others"


# -- what is shown ----------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A file to write (``file``), or a command to run."""

    file: str
    text: str
    code: int = 0
    output: str = ""


def shown(text: str) -> list[Shown]:
    """Files and commands of a document, in their order."""
    found = []
    for kind, file, body, table in SHOWN_PARTS.findall(text):
        found += [Shown("", line) for line in CELL.findall(table)]
        if file:
            found.append(Shown(file, body))
        elif kind == "console":
            commands = COMMAND.findall(body)
            assert commands and body.startswith("$ "), f"a console begins with a command:\n{body}"
            found += [Shown("", line, int(code or 0), output) for line, code, output in commands]
    return found


def fits(output: str, expected: str) -> bool:
    """Whether the output is as shown, with ``...`` for anything."""
    lines = [re.escape(line).replace(re.escape("..."), ".*") + "\n" for line in expected.splitlines()]
    pattern = "".join(r"(?:.*\n)*" if line == ".*\n" else line for line in lines)
    return re.fullmatch(pattern, output) is not None


def test_three_dots_stand_for_anything() -> None:
    assert fits("took 3 s\na\nb\nend\n", "took ... s\n...\nend\n")
    assert fits("end\n", "...\nend\n")
    assert not fits("took 3 s\nmore\n", "took ... s\n")
    assert not fits("a.c\nx\n", "abc\n...\n")


def test_commands_in_tables_are_found_in_their_place() -> None:
    table = "| there | pilotq |\n|---|---|\n| `a -b` | `pilotq a` |\n| `c` | `pilotq b 'c'` |\n\ntext\n"
    text = f"```console\n$ one\n```\n\n{table}```console\n$ two\n```\n| x | y |\n|---|---|\n| `z` | `pilotq z` |\n"
    assert [step.text for step in shown(text)] == ["one", "pilotq a", "pilotq b 'c'", "two"]


def test_commands_codes_and_outputs_are_distinguished() -> None:
    console = "```console\n$ one\n$ two --x  # exit 4\nout\n\nmore\n$ three\n```\n"
    text = f"```toml a.toml\nx = 1\n```\n{console}```sh\n$ not\n```\n"
    assert shown(text) == [
        Shown("a.toml", "x = 1\n"), Shown("", "one"), Shown("", "two --x", 4, "out\n\nmore\n"), Shown("", "three"),
    ]  # fmt: skip


@pytest.mark.timeout(600)  # some pages show many commands, and each starts Python
@pytest.mark.parametrize("path", [p for p in BOOKS if "\n```console" in p.read_text()], ids=name)
def test_shown_commands_do_what_is_shown(path: Path, tmp_path: Path) -> None:
    module, tool = TOOLS.get(name(path), ("pilotq", ""))
    if find_spec(module) is None:
        pytest.skip(f"{tool} is not installed")
    # The commands `pilotq`, `python` and `rq` are those of this environment.
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        for step in shown(path.read_text(encoding="utf-8")):
            if step.file:
                (tmp_path / step.file).write_text(step.text)
                continue
            done = subprocess.run(
                ["bash", "-c", f"exec 2>&1\n{step.text}"], cwd=tmp_path, stdin=subprocess.DEVNULL,
                env=environment(PATH=tools, COLUMNS="120"), stdout=subprocess.PIPE, text=True, timeout=TIMEOUT,
            )  # fmt: skip
            assert done.returncode == step.code, f"$ {step.text}\n{done.stdout}"
            output = PROGRESS.sub("", done.stdout)  # only a slow machine shows it
            assert not step.output or fits(output, step.output), f"$ {step.text}\n{output}"
    finally:
        if (tmp_path / ".pilotq").exists():
            prompt(tmp_path)("stop", "--now")


# -- what is complete -------------------------------------------------------------------------------------------------


def words(text: str) -> set[str]:
    """What stands in backquotes, and its parts: `pq_out, pq_err` and `Broker.wait(ids)` count by their words."""
    return {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", code)}


@pytest.mark.parametrize(
    "kind",
    [Entry, qcg.Job, qcg.Execution, qcg.Resources, qcg.Amount, qcg.Iteration, qcg.Dependencies, qcg.Scheduler],
)
def test_every_key_of_files_is_documented(kind: Any) -> None:
    assert set(kind.__struct_fields__) - words(book("docs/files.md")) == set()


@pytest.mark.parametrize("kind", [Task, Request, ArrayRange, TaskView, NodeView, Counts, Explanation])
def test_every_field_of_python_is_documented(kind: Any) -> None:
    assert set(kind.__struct_fields__) - words(book("docs/python.md")) == set()


def test_every_key_of_the_journal_is_documented() -> None:
    assert set(JournalEntry.__struct_fields__) - words(book("docs/concepts.md")) == set()


def test_every_method_of_broker_is_documented() -> None:
    names = {n for n, _ in inspect.getmembers(Broker) if not n.startswith("_")}
    assert names - words(book("docs/python.md")) == set()


def test_make_faults_runs_every_file_of_the_table_of_faults() -> None:
    named = {
        file
        for row in tomllib.loads(book("docs/faults.toml"))["fault"]
        for file in re.findall(r"test_\w+\.py", row["tests"])
    }
    run = re.findall(r"^  (tests/\S+\.py)", book("Makefile"), re.MULTILINE)
    assert sorted(Path(path).name for path in run) == sorted(named)


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads(book("pyproject.toml"))["project"]
    lines = [line for group in (project["dependencies"], *project["optional-dependencies"].values()) for line in group]
    wanted = {re.split(r"[^\w-]", line)[0] for line in lines}
    assert set(re.findall(r"^\| `([\w-]+)`", book("docs/design/0002-dependencies.md"), re.MULTILINE)) == wanted


def test_every_key_field_and_script_in_redis_is_documented() -> None:
    text = book("docs/design/0004-data-in-redis.md")
    names = {value for key, value in vars(keys).items() if key.isupper() and isinstance(value, str)}
    names |= {f"{pattern.removesuffix('*')}" for pattern in keys.PERMANENT if pattern.endswith("*")}
    assert {n for n in names if f"`{n}" not in text} == set()
    scripts = sorted((ROOT / "broker" / "store" / "scripts").glob("*.lua"))
    assert scripts
    assert {p.name for p in scripts if f"`{p.name}`" not in text} == set()
    code = "".join(p.read_text() for p in [*scripts, *(ROOT / "broker").rglob("*.py")])
    documented = set(re.findall(r"pq_\w+", text))
    assert set(re.findall(r"\bpq_\w+", code)) == documented, "fields of hashes, documented and used"


@pytest.mark.parametrize("path", [*BOOKS, *(ROOT / n for n in ("CONTRIBUTING.md", "SECURITY.md"))], ids=name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        goal = path if not file else path.parent / file
        assert goal.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target
