"""Measures the live page of `pilotq dashboard`: its first paint, its updates, and what ten open pages cost a pilot.

A large pilot is one of 100 pretended nodes with 100,000 waiting tasks; Chromium paints, where it is installed.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.parts import cpu, parts
from benchmarks.pilots import pilot
from benchmarks.pretended.pilot import pretended_pilot
from benchmarks.served import Served, served
from pilotq.broker import ArrayRange, Broker, Task
from pilotq.broker.store.connection import Connection
from tests.support.browser import browser, find
from tests.support.waiting import wait_until

NODES, CORES, WAITING = 100, 128, 100_000
UPDATES = 30
PAGES = 10


def server_seconds(link: Connection) -> float:
    """What the server has spent on commands so far, without those that wait."""
    lines = link.call("INFO", "commandstats").decode().splitlines()
    used = (line.partition("usec=")[2].partition(",")[0] for line in lines if line.startswith("cmdstat_"))
    return sum(map(int, used)) / 1e6


def first_and_updates(directory: str) -> list[Figure]:
    """The figures of a page that is opened on the pilot in this directory."""
    with served("dashboard", directory) as shown:
        wait_until(lambda: shown.open("api/events").readline() != b"", seconds=60)
        firsts = []
        for _ in range(5):
            began = time.perf_counter()
            for path in ("", "page.css", "page.js"):
                shown.open(path).read()
            with shown.open("api/events") as answer:
                while not answer.readline().startswith(b"data: "):
                    pass
            firsts.append(time.perf_counter() - began)
        with shown.open("api/events") as answer:
            sizes = [len(line) for line in itertools.islice(_data(answer), UPDATES)]
        found = [
            Figure("page, its files and its first state", statistics.median(firsts), "s", 0.2, False,
                   f"worst {max(firsts):.3f} s; {sizes[0]:,} bytes of state"),
            Figure("page, an update", max(sizes[1:]) / 1000, "KB", 20, False,
                   f"median {statistics.median(sizes[1:]):,.0f} bytes"),
        ]  # fmt: skip
        return [*painted(shown), *found]


def server_time(directory: str) -> list[Figure]:
    """What the server spends on an update, when the first ones have read what is read once."""
    times = []
    with Broker.connect(directory) as broker:
        for _ in range(3 * UPDATES):
            before = server_seconds(broker.link)
            broker.overview()
            times.append(1000 * (server_seconds(broker.link) - before))
            time.sleep(0.2)
    last = times[UPDATES:]
    return [
        Figure("page, server time of an update", statistics.median(last), "ms", 5, False,
               f"90 % below {sorted(last)[len(last) * 9 // 10]:.1f} ms, worst {max(last):.1f} ms; of all commands "
               "meanwhile")
    ]  # fmt: skip


def painted(shown: Served) -> list[Figure]:
    if find() is None:
        return []
    times = []
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder), "pilotq", shown.password) as found:
        found.look(1200, 900)
        for _ in range(6):
            found.open("about:blank")
            found.open(shown.url)
            found.await_value("document.documentElement.dataset.shown")
            times.append(found.value("performance.getEntriesByName('shown')[0].startTime") / 1000)
    return [
        Figure("page, first paint with figures and map", statistics.median(times[1:]), "s", 0.2, False,
               f"the first one of a new browser {times[0]:.3f} s, worst of the others {max(times[1:]):.3f} s")
    ]  # fmt: skip


def with_pages(number: int, tasks: int = 3000, rounds: int = 3) -> list[Figure]:
    """How fast short tasks end with no page open, and with so many, in turn."""
    with (
        pilot("--nodes", "n1:2,n2:2") as directory,
        served("dashboard", directory) as shown,
        Broker.connect(directory) as broker,
    ):
        watched = parts(directory)

        def work() -> tuple[float, float]:
            before, began = cpu(watched), time.monotonic()
            broker.wait([broker.enqueue(Task(command=["/bin/true"], array=ArrayRange(0, tasks - 1)))])
            return tasks / (time.monotonic() - began), 1e6 * (cpu(watched) - before)["dispatcher"] / tasks

        work()
        alone, together = [], []
        for _ in range(rounds):
            alone.append(work())
            answers = [shown.open("api/events") for _ in range(number)]
            readers = [threading.Thread(target=_read, args=(answer,)) for answer in answers]
            for reader in readers:
                reader.start()
            together.append(work())
            for answer in answers:
                assert answer.fp is not None
                answer.fp.raw._sock.shutdown(2)  # type: ignore[attr-defined]
            for reader in readers:
                reader.join()
    (rate, spent), (rate_with, spent_with) = (
        tuple(statistics.median(one[i] for one in some) for i in (0, 1)) for some in (alone, together)
    )
    return [
        Figure(f"tasks per second with {number} pages open, over those with none", rate_with / rate, "", 0.95, True,
               f"{rate_with:,.0f}/s and {rate:,.0f}/s; the dispatcher spent {spent_with:.0f} and {spent:.0f} us a task")
    ]  # fmt: skip


def _data(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    return (line for line in answer if line.startswith(b"data: "))


def _read(answer: http.client.HTTPResponse) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        while answer.readline():
            pass


def run() -> list[Figure]:
    with pretended_pilot(NODES, CORES) as large:
        tasks = WAITING + NODES * CORES
        large.broker.enqueue(Task(command=["sleep", "600"], name="large", array=ArrayRange(0, tasks - 1)))
        wait_until(lambda: large.broker.running() == NODES * CORES, seconds=120)
        found = first_and_updates(large.directory) + server_time(large.directory)
    return found + with_pages(PAGES)
