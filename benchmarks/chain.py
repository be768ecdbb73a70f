"""Measures one dependency hop: tasks that each depend on the one before, without the run time of the tasks."""

from __future__ import annotations

from benchmarks.figures import Figure
from benchmarks.pilots import pilot
from pilotq.broker import Broker, Task
from pilotq.broker.store.journal import Journal


def run(number: int = 1_000) -> list[Figure]:
    with pilot() as directory:
        with Broker.connect(directory) as broker:
            tasks = [Task(command=["/bin/true"], name=f"t{n}", after=[f"t{n - 1}"] if n else []) for n in range(number)]
            broker.wait(broker.enqueue_many(tasks))
        journal = Journal(f"{directory}/journal.jsonl")
        while len(lines := [line for line in journal.entries() if line.execution]) < number:
            pass
    spans = [(line.started or 0.0, line.ended or 0.0) for line in lines]
    whole = max(e for _, e in spans) - min(s for s, _ in spans)
    busy = sum(e - s for s, e in spans)
    return [Figure(f"dependency hop, chain of {number:,}", (whole - busy) / number * 1e3, "ms", 3.0, False)]
