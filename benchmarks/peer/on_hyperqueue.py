"""HyperQueue: server and worker as threads of this process, which is what its wheel offers.

Functions have no results there: these print what they would return, and the files of their output are compared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hyperqueue import Client, Job, LocalCluster  # type: ignore[import-not-found]
from hyperqueue.cluster import WorkerConfig  # type: ignore[import-not-found]

from benchmarks.peer.clock import CHAIN, TRUE, Play, main, nothing, right

LOOK_S = 0.02


class NotYetError(Exception):
    """Ends the client's own wait, which would look again only after a second."""


def printed(number: int) -> None:
    print(nothing(number))


def finish(client: Client, job: Job) -> Callable[[], int]:
    """Submit and wait; the function returned tells how many tasks finished."""
    submitted = client.submit(job)
    seen: dict[str, int] = {}

    def look(jobs: Mapping[int, dict[str, Any]]) -> None:
        seen.update(jobs[submitted.id])
        if not seen["completed"]:
            raise NotYetError

    while True:
        try:
            client.connection.wait_for_jobs([submitted.id], look)
            return lambda: seen["finished"]
        except NotYetError:
            time.sleep(LOOK_S)


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:
    with LocalCluster(worker_config=WorkerConfig(cores=cores)) as cluster:
        client = cluster.client()

        def commands(number: int) -> Callable[[], int]:
            job = Job()
            for _ in range(number):
                job.program([TRUE])
            return finish(client, job)

        def without_output(number: int) -> Callable[[], int]:
            job = Job()
            for _ in range(number):
                job.program([TRUE], stdout=None, stderr=None)
            return finish(client, job)

        def functions(number: int) -> Callable[[], int]:
            job, here = Job(), Path(f"functions-{time.monotonic_ns()}")
            for n in range(number):
                job.function(printed, args=(n,), stdout=str(here.absolute() / str(n)))
            finish(client, job)
            return lambda: right(int((here / str(n)).read_text() or -1) for n in range(number))

        def chain(number: int) -> Callable[[], int]:
            job = Job()
            last: list[Any] = []
            for _ in range(number):
                last = [job.program([TRUE], deps=last)]
            return finish(client, job)

        yield {"commands": commands, "without output": without_output, "functions": functions, CHAIN: chain}


if __name__ == "__main__":
    main(system)
