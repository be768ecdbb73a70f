"""The jobs of the application: plain functions, as for any worker of RQ."""

from __future__ import annotations

import os
import random
from typing import Any

from rq import get_current_job
from rq.job import Job


def hits(seed: int, tries: int) -> int:
    """How many of so many random points of a square lie in its circle."""
    generator = random.Random(seed)
    return sum(generator.random() ** 2 + generator.random() ** 2 < 1 for _ in range(tries))


def cores() -> int:
    """How many cores this job may use."""
    return len(os.sched_getaffinity(0))


def once_broken() -> int:
    """Fails at first; how often it was tried stands in the job's own notes."""
    job = get_current_job()
    assert job is not None
    job.meta["tries"] = job.meta.get("tries", 0) + 1
    job.save_meta()
    if job.meta["tries"] == 1:
        raise ValueError("it broke")
    return int(job.meta["tries"])


def pi(ids: list[str], tries: int) -> float:
    """From the results of all those jobs."""
    job = get_current_job()
    assert job is not None
    found = [Job.fetch(job_id, connection=job.connection).return_value() for job_id in ids]
    return 4 * sum(found) / (tries * len(found))


def note(job: Job, connection: Any, result: float) -> None:
    """Called when `pi` has succeeded."""
    connection.set(f"pi:{job.id}", result, ex=3600)
