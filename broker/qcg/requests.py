"""Requests of QCG-PilotJob and their replies: `Requests.handle` is the whole interface.

    requests = Requests(broker, wd="/data/run")
    reply = requests.handle({"request": "submit", "jobs": [{"name": "a", "execution": {"exec": "date"}}]})
    # {"code": 0, "message": "1 jobs submitted", "data": {"submitted": 1, "jobs": ["a"]}}
    requests.settle()       # jobs that wait for a name nobody has submitted are omitted
    requests.handle({"request": "status", "options": {"allJobsFinished": True}})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pilotq.broker.client import Broker


class Requests:
    """The requests of one service. Not for several threads; several processes may serve the same pilot.

    What jobs there are stands in the pilot's directory (``qcg-jobs.jsonl``), so a service that is started again
    knows them all. ``wd`` is the directory that jobs' relative paths are below (default: the current one),
    ``total_cores`` what iteration schedulers share out (default: what the pilot has), ``env_schema`` is ``common`` or
    ``slurm`` (tasks get the SLURM_* variables too), ``instance`` and ``interfaces`` are only shown by ``status``.
    """

    def __init__(
        self, broker: Broker, *, wd: str | None = None, total_cores: int | None = None, env_schema: str = "common",
        instance: str = "", interfaces: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def handle(self, request: Any) -> dict[str, Any]:
        """The reply: ``code`` (0 done, 1 refused), and ``message`` and ``data`` as that request has them.

        Never raises for what a request says; raises ServerUnavailable and StateLost as Broker does.
        """
        raise NotImplementedError

    def settle(self) -> Mapping[str, str]:
        """No more submits come for now: omit jobs that wait for unknown ones; returns name -> why.

        Until then such jobs are held (QUEUED): a job may be submitted before the one it waits for. An interactive
        service calls it after each submit, which is QCG-PilotJob's way (unknown is omitted).
        """
        raise NotImplementedError
