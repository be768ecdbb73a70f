"""`Batch`: what a file of tasks is read as."""

from __future__ import annotations

from typing import Any

import msgspec

from pilotq.broker.tasks.model import Task


class Batch(msgspec.Struct):
    """Tasks ready for ``Broker.enqueue_many``.

    Of a QCG-PilotJob file ``requests`` instead: as they are, to be handled one after the other. ``notes`` are sentences
    about directives, for people.
    """

    tasks: list[Task]
    requests: list[Any] | None = None
    notes: list[str] = []
