"""Measures how long a scrape of `pilotq metrics` takes, with many tasks, waiting and ended, and many nodes."""

from __future__ import annotations

import statistics
import time

import msgspec

from benchmarks.figures import Figure
from benchmarks.pilots import keep_records, pilot
from benchmarks.served import served
from pilotq.broker import Broker, Task
from pilotq.broker.store.resources import NodeInfo

NODES, CORES = 100, 128


def measure(directory: str, rounds: int) -> tuple[list[float], int]:
    """Seconds of each scrape, once the journal is read, and the bytes of the last one."""
    with served("metrics", directory) as server:
        while b"\npilotq_journal_unread_bytes 0.0\n" not in server.read():
            time.sleep(0.1)
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            text = server.read()
            times.append(time.perf_counter() - began)
            time.sleep(0.2)
    return times, len(text)


def run(number: int = 100_000, rounds: int = 30) -> list[Figure]:
    with pilot("--nodes", "1") as directory, Broker.connect(directory) as broker:
        keep_records(broker)
        broker.pause(True)
        for index in range(NODES):
            info = NodeInfo(f"m{index}", 1, "nowhere", 1, list(range(CORES)))
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            broker.store.run("register", info.name, 1, msgspec.json.encode(info), b"", 480, "birth", now)
        ended = broker.enqueue_many([Task(command=["/bin/true", str(n)], name=f"ended-{n}") for n in range(number)])
        broker.cancel(ended)
        waiting = broker.enqueue_many([Task(command=["/bin/true", str(n)], name=f"waits-{n}") for n in range(number)])
        times, size = measure(directory, rounds)
        broker.cancel(waiting)
    what = f"scrape of metrics, {number:,} waiting, {number:,} ended, {NODES} nodes"
    worst = f"worst {1000 * max(times):.0f} ms, {size / 1024:.0f} KB"
    return [Figure(what, statistics.median(times), "s", 0.05, False, worst)]
