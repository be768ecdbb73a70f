"""Compares other pilot-job managers and executors with pilotq, in turn (A B A B), on this machine's cores.

Each is installed by pip into an environment of its own, or unpacked from Debian's package, and runs in
a home of its own; nothing is left of either. Both sides are started anew for each measurement, are warm when it counts,
and are measured by the same code (benchmarks/peer/clock.py), from the first submit to the end of the last task as the
client sees it: commands, functions and a chain. All that is on by default is on; ``settings`` names what a peer was
configured with to make it faster. A side that does not start, or does not do all of its tasks, has no figure: the rest
is measured all the same, and the benchmark fails in the end. A plot goes to docs/plots/peers.svg.

    python -m benchmarks peers      # PILOTQ_PEERS=Dask,xargs: only these; PILOTQ_PEERS_ROUNDS=N, PILOTQ_PEERS_SECONDS=S
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.environments import install, unpack
from benchmarks.figures import Figure
from benchmarks.guard import guarded, leave
from benchmarks.peer.clock import CHAIN, LINKS, TRUE, Play, nothing, rate, right
from benchmarks.pilots import pilot
from benchmarks.simulation.tables import PLOTS
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
    """``side`` is its module in benchmarks/peer, which knows how to do ``plays``. Without a ``version`` the package is
    Debian's; without a ``package`` it is there already."""

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
    Peer("Dask", "distributed", "2026.8.0", "on_dask", ("commands", "functions", CHAIN),
         "LocalCluster, a process for each core; commands are functions that start them"),
    Peer("QCG-PilotJob", "qcg-pilotjob", "0.14.2", "on_qcg", ("commands", CHAIN), "LocalManager, a job of iterations"),
    Peer("GNU parallel", "parallel", "", "on_parallel", ("commands",), "with --joblog"),
    Peer("xargs", "", "", "on_xargs", ("commands",), "-P, records nothing"),
    Peer("pinned C loop", "", "", "on_pinned_loop", ("commands",), "records nothing"),
)  # fmt: skip


def run() -> list[Figure]:
    signal.signal(signal.SIGTERM, leave)  # so that all below is left in order
    rounds, seconds = (
        int(os.environ.get("PILOTQ_PEERS_ROUNDS", "3")),
        float(os.environ.get("PILOTQ_PEERS_SECONDS", "5")),
    )
    wanted = os.environ.get("PILOTQ_PEERS", "")
    peers = [peer for peer in PEERS if not wanted or peer.name in wanted.split(",")]
    cores = len(os.sched_getaffinity(0))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    failed: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-pilotq-") as name:
        home = Path(name)
        programs: dict[Peer, Path] = {}
        for peer in peers:
            try:
                programs[peer] = installed(peer, home / (peer.package or peer.side))
            except SystemExit as error:
                failed |= {(peer.name, play): str(error) for play in peer.plays}
        for number in range(rounds):
            for peer, folder in programs.items():
                for play in peer.plays:
                    if (peer.name, play) in failed:
                        continue
                    load = os.getloadavg()[0]
                    ours = measured(OURS.get(play, play), seconds)
                    try:
                        theirs = beside(peer, play, folder, home / "rate.json", cores, seconds)
                    except SystemExit as error:
                        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
                            raise  # it is this benchmark that is ended
                        failed[peer.name, play] = str(error)
                        print(f"  round {number + 1}, {peer.name}, {play} FAILED: {error}", flush=True)
                        continue
                    print(f"  round {number + 1}, {peer.name}, {play}: {ours:,.0f}/s, {theirs:,.0f}/s, load {load:.1f}",
                          flush=True)  # fmt: skip
                    found.setdefault((peer.name, play), []).append((ours, theirs))
    all_plays = [(peer, play) for peer in peers for play in peer.plays]
    plot({f"{peer.name}: {WHAT[play]}": ratio(found[peer.name, play])
          for peer, play in all_plays if (peer.name, play) in found})  # fmt: skip
    return [
        figure(peer, play, found[peer.name, play])
        if (peer.name, play) not in failed
        else Figure(f"{WHAT[play]}, against {peer.name}", math.nan, "x", detail=f"FAILED: {failed[peer.name, play]}")
        for peer, play in all_plays
    ]


def installed(peer: Peer, place: Path) -> Path:
    """The folder of the peer's programs, with a Python."""
    if peer.version:
        return install(place, f"{peer.package}=={peer.version}")
    if peer.package:
        return unpack(place, peer.package)
    return Path(sys.executable).parent


def ratio(pairs: list[tuple[float, float]]) -> float:
    return median(a / b for a, b in pairs)


def plot(ratios: Mapping[str, float]) -> None:
    """Bars of how many times as fast we are."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pilotq"
    from matplotlib import pyplot as plt

    drawing, panel = plt.subplots(figsize=(8, 0.32 * len(ratios) + 1))
    bars = panel.barh(list(ratios), list(ratios.values()), color=["C0" if r >= 1 else "C1" for r in ratios.values()])
    panel.bar_label(bars, fmt="%.2g", padding=3, fontsize="small")
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.invert_yaxis()
    panel.set_xlabel("pilotq is so many times as fast")
    drawing.tight_layout()
    PLOTS.mkdir(exist_ok=True)
    drawing.savefig(PLOTS / "peers.svg", metadata={"Date": None})
    plt.close(drawing)


def figure(peer: Peer, play: str, pairs: list[tuple[float, float]]) -> Figure:
    ours, theirs = (median(column) for column in zip(*pairs, strict=True))
    beside = [a / b for a, b in pairs]
    detail = f"{ours:,.0f}/s against {theirs:,.0f}/s, rounds {', '.join(f'{one:.2f}' for one in beside)}"
    what = f"{WHAT[play]}, against {peer.name} {peer.version}".rstrip()
    return Figure(what, ratio(pairs), "x", 1.0, detail=f"{detail}; {peer.settings}")


def beside(peer: Peer, play: str, programs: Path, report: Path, cores: int, seconds: float) -> float:
    """The peer's rate."""
    report.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(programs.parent),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    python = programs / "python"
    side = [str(python) if python.exists() else sys.executable, "-m", f"benchmarks.peer.{peer.side}"]
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
