"""QCG-PilotJob: its LocalManager, one job whose iterations are the tasks; a chain is of single jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from qcg.pilotjob.api.job import Jobs  # type: ignore[import-not-found]
from qcg.pilotjob.api.manager import LocalManager  # type: ignore[import-not-found]

from benchmarks.peer.clock import CHAIN, TRUE, Play, main

_used = iter(range(1_000_000))  # names of jobs, each once


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:
    manager = LocalManager(["--nodes", str(cores), "--wd", "."])

    def commands(number: int) -> Callable[[], int]:
        name = f"j{next(_used)}"
        manager.wait4(manager.submit(Jobs().add(name=name, exec=TRUE, iteration=number, numCores=1)))
        data = manager.info([name])["jobs"][name]["data"]
        return lambda: int(data["iterations"]["finished"]) if data["status"] == "SUCCEED" else 0

    def chain(number: int) -> Callable[[], int]:
        jobs, names = Jobs(), [f"c{next(_used)}" for _ in range(number)]
        for before, name in zip(["", *names], names, strict=False):
            jobs.add(name=name, exec=TRUE, numCores=1, after=[before] if before else [])
        manager.submit(jobs)
        manager.wait4(names)
        found = manager.status(names)["jobs"]
        return lambda: sum(job["data"]["status"] == "SUCCEED" for job in found.values())

    try:
        yield {"commands": commands, CHAIN: chain}
    finally:
        manager.finish()
        manager.cleanup()


if __name__ == "__main__":
    main(system)
