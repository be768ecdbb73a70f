"""Compares other pilot-job managers and executors with pilotq, in turn (A B A B), on this machine's cores.

Each is installed from the package index into an environment of its own, and runs in a home of its own; nothing is left
of either. Both sides are started anew for each measurement, are warm when it counts, and are measured by the same code
(benchmarks/peer/clock.py), from the first submit to the end of the last task as the client sees it: commands, functions
and a chain. On either side everything that is on by default is on; ``settings`` names what a peer was configured with
to make it faster. A side that does not start, or does not do all of its tasks, ends the benchmark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.environments import install
from benchmarks.figures import Figure
from benchmarks.guard import guarded, leave
from benchmarks.peer.clock import CHAIN, LINKS, TRUE, Play, nothing, rate, right
from benchmarks.pilots import pilot
from pilotq.broker import Broker, Executor, Task

WAIT_S = 600.0  # for one measurement
WHAT = {
    "commands": TRUE,
    "without output": f"{TRUE}, its files of output off, ours as ever",
    "functions": "no-op functions, results compared",
    CHAIN: f"chain of {LINKS} x {TRUE}",
}
OURS = {"without output": "commands"}  # what of ours stands beside it, where that has another name


class Peer(NamedTuple):
    """``side`` is its module in benchmarks/peer, which knows how to do ``plays``."""

    name: str
    package: str
    version: str
    side: str
    plays: tuple[str, ...]
    settings: str


PEERS = (
    Peer("HyperQueue", "hyperqueue", "0.27.0", "on_hyperqueue", ("commands", "without output", "functions", CHAIN),
         "LocalCluster"),
    Peer("Parsl", "parsl", "2026.10.26", "on_parsl", ("commands", "functions", CHAIN),
         "HighThroughputExecutor, not encrypted, prefetching 20, no log"),
    Peer("executorlib", "executorlib", "1.11.0", "on_executorlib", ("commands", "functions", CHAIN),
         "persistent workers; commands are functions that start them"),
    Peer("RADICAL-Pilot", "radical.pilot", "1.103.2", "on_radical", ("commands",), "local.localhost"),
)  # fmt: skip


def run(rounds: int = 3, seconds: float = 5.0) -> list[Figure]:
    signal.signal(signal.SIGTERM, leave)  # so that all below is left in order
    cores = len(os.sched_getaffinity(0))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="pilotq-bench-") as name:
        home = Path(name)
        programs = {peer: install(home / peer.package, f"{peer.package}=={peer.version}") for peer in PEERS}
        for number in range(rounds):
            for peer in PEERS:
                for play in peer.plays:
                    ours = measured(OURS.get(play, play), seconds)
                    theirs = beside(peer, play, programs[peer], home / "rate.json", cores, seconds)
                    print(f"  round {number + 1}, {peer.name}, {play}: {ours:,.0f}/s, {theirs:,.0f}/s", flush=True)
                    found.setdefault((peer.name, play), []).append((ours, theirs))
    return [figure(peer, play, found[peer.name, play]) for peer in PEERS for play in peer.plays]


def figure(peer: Peer, play: str, pairs: list[tuple[float, float]]) -> Figure:
    ours, theirs = (median(column) for column in zip(*pairs, strict=True))
    beside = [a / b for a, b in pairs]
    detail = f"{ours:,.0f}/s against {theirs:,.0f}/s, rounds {', '.join(f'{ratio:.2f}' for ratio in beside)}"
    what = f"{WHAT[play]}, against {peer.name} {peer.version}"
    return Figure(what, median(beside), "x", 1.0, detail=f"{detail}; {peer.settings}")


def beside(peer: Peer, play: str, programs: Path, report: Path, cores: int, seconds: float) -> float:
    """The peer's rate."""
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(programs.parent),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    side = [str(programs / "python"), "-m", f"benchmarks.peer.{peer.side}"]
    guarded([*side, str(cores), str(seconds), str(report), play], environment, WAIT_S)
    return float(report.read_text())


def measured(play: str, seconds: float) -> float:
    """Our rate."""
    with system() as plays:
        return rate(plays, play, seconds)


@contextlib.contextmanager
def system() -> Iterator[Mapping[str, Play]]:
    with pilot() as directory, Broker.connect(directory) as broker, Executor(directory) as executor:

        def finish(tasks: list[Task]) -> Callable[[], int]:
            counts = broker.wait(broker.enqueue_many(tasks))
            return lambda: counts.finished

        def commands(number: int) -> Callable[[], int]:
            return finish([Task(command=[TRUE]) for _ in range(number)])

        def functions(number: int) -> Callable[[], int]:
            values = list(executor.map(nothing, range(number)))
            return lambda: right(values)

        def chain(number: int) -> Callable[[], int]:
            return finish([
                Task(command=[TRUE], name=f"t{n}", after=[f"t{n - 1}"] if n else [])
                for n in range(number)
            ])  # fmt: skip

        yield {"commands": commands, "functions": functions, CHAIN: chain}
