"""QCG-PilotJob's Python interface, its requests and its reports, implemented on a pilot of pilotq.

A program that can be edited changes one line: ``from pilotq.broker.qcg import Jobs, LocalManager``; its
exceptions are in pilotq.broker.qcg.errors. For one that cannot, `install` puts this package in the place of
``qcg.pilotjob.api`` and ``qcg.pilotjob.executor_api``, before the program's own imports:

    python -c "import pilotq.broker.qcg as q, runpy; q.install(); runpy.run_path('program.py', run_name='__main__')"

`pilotq qcg install` does it for all programs of a Python environment, and for ``python -m qcg.pilotjob.service``.

Names are imported when they are first used: neither this package nor `install` loads anything that is not needed.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # importing typing would take longer than all of this
if TYPE_CHECKING:
    from typing import Any

    from pilotq.broker.qcg.aliases import install
    from pilotq.broker.qcg.executor import BasicTemplate, QCGPJExecutor, QCGPJFuture, QCGPJTemplate
    from pilotq.broker.qcg.jobinfo import JobInfo
    from pilotq.broker.qcg.jobs import Jobs
    from pilotq.broker.qcg.manager import LocalManager, Manager

_HOMES = {
    "BasicTemplate": "executor", "JobInfo": "jobinfo", "Jobs": "jobs", "LocalManager": "manager", "Manager": "manager",
    "QCGPJExecutor": "executor", "QCGPJFuture": "executor", "QCGPJTemplate": "executor", "install": "aliases",
}  # fmt: skip
__all__ = [
    "BasicTemplate", "JobInfo", "Jobs", "LocalManager", "Manager", "QCGPJExecutor", "QCGPJFuture", "QCGPJTemplate",
    "install",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
