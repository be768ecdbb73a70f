"""How this machine holds tasks to the memory that they ask for."""

from __future__ import annotations

from pilotq.broker.store.resources import BY_CGROUP, BY_WATCHER
from pilotq.workers.cgroups import find_base


def memory_by(policy: str) -> str:
    """NodeInfo.memory_by of a node of this machine; ``policy`` is one of quantities.MEMORY_POLICIES."""
    if policy == "reserve":
        return ""
    return BY_CGROUP if policy == "limit" and find_base()[0] else BY_WATCHER


def why_no_cgroup() -> str:
    """A sentence; empty where tasks can have cgroups."""
    return find_base()[1]
