"""Calls of an executor on their way to the server: those whose tasks are alike go together, and share a record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.tasks.functions import Packed
from pilotq.broker.tasks.model import Task
from pilotq.broker.tasks.submit_context import capture_context

if TYPE_CHECKING:
    from pilotq.broker.client.executor import TaskFuture


class Put(NamedTuple):
    """A call that is to be submitted: its task is like ``base``."""

    future: TaskFuture
    base: Task
    payload: bytes  # made by functions.pack_call


class Batch(NamedTuple):
    """Calls of one submission; ``alike``: their tasks differ in nothing else."""

    puts: list[Put]
    alike: bool


def batches(puts: Iterable[Put], above: int) -> list[Batch]:
    """Calls as they are to be submitted: by themselves if so many are alike, all others together."""
    groups: dict[int, list[Put]] = {}  # by what their tasks are like
    last: list[Put] = []
    for put in puts:
        if not last or put.base is not last[0].base:
            last = last if last and put.base == last[0].base else groups.setdefault(id(put.base), [])
        last.append(put)
    found = [Batch(group, alike=True) for group in groups.values() if len(group) > above]
    few = [put for group in groups.values() if len(group) <= above for put in group]
    return [*found, Batch(few, alike=False)] if few else found


def submit(broker: Broker, batch: Batch, key: str) -> list[str]:
    """The ids of its tasks."""
    context, puts = capture_context(functions=True), batch.puts
    if batch.alike:
        return broker.enqueue_calls(puts[0].base, [put.payload for put in puts], key=key, context=context)
    tasks = [msgspec.structs.replace(put.base, function=Packed(put.payload)) for put in puts]
    return broker.enqueue_many(tasks, key=key, context=context)
