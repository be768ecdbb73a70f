"""A plugin for pytest: submitit's own tests use the pilot of PILOTQ_DIR where they use `LocalExecutor`.

It is loaded before submitit's tests, which take the class from its module. What a test finds under that name is
submitit's cluster "pilotq", so `AutoExecutor(cluster="local", local_setup=...)` is one, too.
"""

from __future__ import annotations

from submitit.local import local
from submitit_pilotq import PilotqExecutor, PilotqJob


class LocalExecutor(PilotqExecutor):
    """submitit makes the name of a cluster of that of its class."""


local.LocalExecutor = LocalExecutor
local.LocalJob = PilotqJob
