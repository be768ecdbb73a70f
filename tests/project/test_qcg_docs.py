"""docs/from-qcg-pilotjob.md describes everything that the code has: its tables against the code's own."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from pilotq.broker.qcg import errors, executor, jobinfo, jobs, manager
from pilotq.broker.qcg.service.address import ADDRESS
from pilotq.broker.qcg.service.requests import _HANDLERS
from pilotq.broker.slurm.step_environment import step_environment
from pilotq.broker.taskfiles import qcg
from pilotq.broker.taskfiles.qcg_variables import LAUNCH_VARIABLES, REQUEST_VARIABLES
from pilotq.cli.qcg.options import ignored_options, parse, parser, pilot_arguments
from tests.support.paths import ROOT

BOOK = (ROOT / "docs" / "from-qcg-pilotjob.md").read_text(encoding="utf-8")
# What qcg-pm-service 0.14.2 --help lists.
ORIGINAL = """
    --net --net-port --net-pub-port --net-port-min --net-port-max --file --file-path --wd --envschema --resources
    --report-format --report-file --nodes --log --system-core --disable-nl --show-progress --governor --parent --id
    --tags --slurm-partition-nodes --slurm-limit-nodes-range-begin --slurm-limit-nodes-range-end
    --slurm-resources-file --resume --enable-proc-stats --enable-rt-stats --wrapper-rt-stats --nl-init-timeout
    --nl-ready-threshold --disable-pub --nl-start-method --help
"""


def section(title: str) -> str:
    """The text below a heading."""
    return re.split(r"^## ", BOOK.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]


def first_cells(title: str) -> set[str]:
    """What stands in backquotes in the first column of the section's table."""
    rows = re.findall(r"^\| ([^|]*) \|", section(title), re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def test_options() -> None:
    known = {name for action in parser()._actions for name in action.option_strings if name.startswith("--")}
    assert first_cells("Options of the service") == known - {"--owner"}
    assert set(ORIGINAL.split()) <= known


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_CPUS_PER_NODE": "2(x4)"}


@pytest.mark.parametrize(
    ("words", "pilot"),
    [
        ("", "--resources auto"),
        ("--slurm-limit-nodes-range-begin 1 --slurm-limit-nodes-range-end 3", "--resources auto --nodes 2-3"),
        ("--slurm-limit-nodes-range-end 9", "--resources auto"),
        ("--nl-ready-threshold 0.6 --nl-start-method SSH", "--resources auto --min-nodes 3 --start-method ssh"),
        ("--nl-ready-treshold 0", "--resources auto --min-nodes 1"),
        ("--nodes 2 --nl-ready-threshold 0.6", "--resources local --nodes 2"),
        ("--resources local --nl-ready-threshold 0.6", "--resources local"),
    ],
)
def test_options_in_an_allocation(words: str, pilot: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    options = parse(["--file-path", "f", *words.split()])
    assert pilot_arguments(options) == ["--envschema", "auto", *pilot.split()]
    ignored = list(ignored_options(options))
    assert bool(ignored) == ("local" in pilot), ignored


def test_requests() -> None:
    assert first_cells("Requests") == set(_HANDLERS)


def test_keys_of_jobs() -> None:
    assert first_cells("Jobs") == set(qcg.KEYS) | {"params"}


def test_words_and_variables() -> None:
    words = set(re.findall(r"`(\w+)`", section("Variables in jobs")))
    assert words == REQUEST_VARIABLES | LAUNCH_VARIABLES
    documented = first_cells("Environment of tasks")
    of_worker = set(re.findall(r'"(QCG_PM_\w+)"', (ROOT / "workers" / "execution" / "launch_builder.py").read_text()))
    assert documented == set(step_environment(("a",), (1,))) | of_worker | {
        ADDRESS,
        executor.JOB_ID,
        "OMP_NUM_THREADS",
        "SLURM_HOSTFILE",
    }


def public(kind: Any) -> set[str]:
    """Methods and properties that a class brings itself, or takes from another class of ours."""
    owners = [base for base in kind.__mro__ if base.__module__.startswith("pilotq")]
    return {
        name
        for base in owners
        for name, value in vars(base).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, (staticmethod, classmethod, property)))
    }


@pytest.mark.parametrize("kind", [
    jobs.Jobs, manager.Manager, manager.LocalManager, jobinfo.JobInfo, executor.QCGPJExecutor, executor.QCGPJFuture,
    executor.BasicTemplate, executor.QCGPJTemplate,
])  # fmt: skip
def test_calls(kind: Any) -> None:
    documented = first_cells("Python")
    assert kind.__name__ in documented
    assert public(kind) - documented == set()


def test_errors() -> None:
    kinds = {
        name for name, kind in vars(errors).items() if inspect.isclass(kind) and kind.__module__ == errors.__name__
    }
    assert kinds <= first_cells("Python")
