"""The requests to play, and how; apart from cli/qcg/play.py, which takes long to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

from pilotq.broker.pilot.start import SupervisorOptions


class Plan(NamedTuple):
    """The input of cli/qcg/play.py. ``wd`` is the directory of the jobs, ``report_file`` stands below the pilot's.

    ``net``: programs may send requests, too; with ``stays`` until one asks to finish. ``owner``: when this process ends
    the pilot ends at once (0: nobody's). ``system_cores``: how many cores no job can have.
    """

    bodies: Sequence[Any]
    wd: str
    options: SupervisorOptions
    replies: TextIO | None = None
    env_policy: str = "submit"
    report_file: str = "jobs.report"
    report_format: str = "json"
    net: bool = False
    stays: bool = False
    owner: int = 0
    system_cores: int = 0
