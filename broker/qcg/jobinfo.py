"""`JobInfo`: the reply to `jobInfo` about one job, with numbers and times instead of texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

_NODE = re.compile(r"([^,\[\]]+)\[([^\]]*)\]")
_TIME = re.compile(r"(?:(-?\d+) days?, )?(\d+):(\d+):(\d+(?:\.\d+)?)")


class JobInfo:
    """One job, or one iteration of a job.

    ``nodes`` maps nodes to their cores (texts, as QCG-PilotJob has it), ``time`` is how long it ran, ``iterations``
    counts (start, stop, total, finished, failed), ``childs`` has a JobInfo for each iteration where they were asked
    for, ``history`` a line for each change of state. What is not known is None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.status: str | None = None
        self.nodes: dict[str, list[str]] | None = None
        self.total_cores: int | None = None
        self.wdir: str | None = None
        self.time: timedelta | None = None
        self.iteration: int | None = None
        self.iterations: dict[str, int] | None = None
        self.childs: list[JobInfo] | None = None
        self.history: list[str] | None = None
        self.messages: str | None = None

    @staticmethod
    def from_job(job_data: Mapping[str, Any]) -> JobInfo:
        """From ``data`` of one job in the reply to jobInfo."""
        info = JobInfo()
        info.name = job_data.get("jobName")
        info.status = job_data.get("status")
        info.nodes, info.total_cores = {}, 0
        info._take(job_data.get("runtime", {}))
        info.iterations = job_data.get("iterations", {})
        if "childs" in job_data:
            info.childs = [JobInfo.from_child(str(info.name), child) for child in job_data["childs"]]
        info.history = [line for line in job_data.get("history", "").splitlines() if line]
        info.messages = job_data.get("messages")
        return info

    @staticmethod
    def from_child(job_name: str, child_data: Mapping[str, Any]) -> JobInfo:
        """From one of the ``childs`` of a job."""
        info = JobInfo()
        info.iteration = child_data["iteration"]
        info.name = f"{job_name}:{info.iteration}"
        info.status = child_data["state"]
        info._take(child_data.get("runtime", {}))
        info.messages = child_data.get("messages")
        return info

    def _take(self, runtime: Mapping[str, Any]) -> None:
        self.wdir = runtime.get("wd")
        if runtime.get("allocation"):
            self.nodes = {name: cores.split(":") for name, cores in _NODE.findall(runtime["allocation"])}
            self.total_cores = sum(map(len, self.nodes.values()))
        if runtime.get("rtime"):
            self.time = _parse_time(runtime["rtime"])

    def __str__(self) -> str:
        return json.dumps({name: str(value) for name, value in vars(self).items()})


def _parse_time(text: str) -> timedelta | None:
    """The duration that Python writes as this text, with or without days and fractions."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = match.groups()
    return timedelta(days=int(days or 0), hours=int(hours), minutes=int(minutes), seconds=float(seconds))
