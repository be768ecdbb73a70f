"""Runs a million short tasks and measures what grows with their number: half come in batches, half in one array.

Nothing here is fast or slow by itself: what counts is the last tenth but one against the second: all is warm, and tasks
still wait.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from benchmarks.figures import Figure
from benchmarks.pilots import pilot
from pilotq.broker import ArrayRange, Broker, Task

BATCH, WAITING = 1_000, 5_000  # submitted at once; kept waiting
PROBES = 10  # of the latency, at each look
LOOKS = 10


class Look(NamedTuple):
    """``memory`` in bytes and ``files``: the sums over the pilot's processes, without tasks."""

    ended: int
    rate: float
    memory: dict[str, int]
    files: int
    keys: int
    server: int
    latency: float


def run(number: int = 1_000_000) -> list[Figure]:
    looks: list[Look] = []
    with pilot() as directory, Broker.connect(directory) as broker:
        parts = _parts(directory)
        began, before = time.monotonic(), 0
        for ended in _play(broker, number):
            if ended >= number * (len(looks) + 1) // LOOKS:
                now = time.monotonic()
                looks.append(_look(broker, parts, ended, (ended - before) / (now - began)))
                print(f"  {looks[-1]}", flush=True)
                began, before = now, ended
        journal = os.path.getsize(os.path.join(directory, "journal.jsonl"))
    return list(_figures(looks, number, journal))


def _play(broker: Broker, number: int) -> Iterator[int]:
    """Keep the pilot busy until so many tasks have ended; says from time to time how many have."""
    submitted, ended = 0, 0
    while ended < number:
        counts = broker.counts()
        ended = counts.total - counts.left
        if submitted >= number:
            time.sleep(0.2)
        elif submitted >= number // 2:
            broker.enqueue(Task(command=["/bin/true"], array=ArrayRange(0, number - submitted - 1)))
            submitted = number
        elif counts.left < WAITING:
            broker.enqueue_many([Task(command=["/bin/true"])] * BATCH)
            submitted += BATCH
        else:
            time.sleep(0.05)
        yield ended


def _look(broker: Broker, parts: dict[str, psutil.Process], ended: int, rate: float) -> Look:
    latencies = []
    for _ in range(PROBES):
        began = time.perf_counter()
        broker.wait([broker.enqueue(Task(command=["/bin/true"], priority=1_000))])
        latencies.append(time.perf_counter() - began)
    info = broker.redis.info("memory")
    return Look(
        ended, rate, {name: part.memory_info().rss for name, part in parts.items()},
        sum(part.num_fds() for part in parts.values()), int(broker.redis.dbsize()), int(info["used_memory"]),
        statistics.median(latencies),
    )  # fmt: skip


def _parts(directory: str) -> dict[str, psutil.Process]:
    """The pilot's processes by what they are."""
    words = {"server.conf": "server", "pilotq dispatcher": "dispatcher", "pilotq worker": "worker"}
    words |= {"workers.launcher": "launcher", "pilotq supervisor": "supervisor"}
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            found.update({name: process for word, name in words.items() if word in line and directory in line})
    return found


def _figures(looks: list[Look], number: int, journal: int) -> Iterator[Figure]:
    first, last = looks[1], looks[-2]
    for name in last.memory:
        detail = f"{first.memory[name] / 1e6:.1f} MB to {last.memory[name] / 1e6:.1f} MB"
        yield Figure(f"memory of the {name}, last of {number:,} tasks over the first fifth",
                     last.memory[name] / first.memory[name], "", 1.2, False, detail)  # fmt: skip
    yield Figure("descriptors of all, the same", last.files / first.files, "", 1.1, False,
                 f"{first.files} to {last.files}")  # fmt: skip
    yield Figure("keys in the server", last.keys / first.keys, "", 1.1, False, f"{first.keys:,} to {last.keys:,}")
    yield Figure("its data", last.server / first.server, "", 1.2, False,
                 f"{first.server / 1e6:.1f} MB to {last.server / 1e6:.1f} MB")  # fmt: skip
    yield Figure("latency of an urgent task, submitted and waited for", last.latency / first.latency, "", 1.5, False,
                 f"{first.latency * 1e3:.0f} ms to {last.latency * 1e3:.0f} ms")  # fmt: skip
    yield Figure("tasks a second", last.rate / first.rate, "", 0.8, True, f"{first.rate:,.0f}/s to {last.rate:,.0f}/s")
    yield Figure("journal", journal / number, "bytes a task")
