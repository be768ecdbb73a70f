"""Dask distributed: a LocalCluster with a process for each core.

It has no tasks that are programs: functions start them.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distributed import Client, LocalCluster  # type: ignore[import-not-found]

from benchmarks.peer.clock import CHAIN, TRUE, Play, main, nothing, right


def command(before: int) -> int:  # noqa: ARG001  # waited for, and different for each: equal calls run once
    return subprocess.call([TRUE])


def link(number: int, before: int) -> int:  # noqa: ARG001  # as above
    return subprocess.call([TRUE])


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:
    cluster = LocalCluster(n_workers=cores, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, Client(cluster) as client:

        def commands(number: int) -> Callable[[], int]:
            codes = client.gather(client.map(command, range(number), pure=False))
            return lambda: codes.count(0)

        def functions(number: int) -> Callable[[], int]:
            values = client.gather(client.map(nothing, range(number), pure=False))
            return lambda: right(values)

        def chain(number: int) -> Callable[[], int]:
            futures: list[Any] = [client.submit(command, 0, pure=False)]
            while len(futures) < number:
                futures.append(client.submit(link, len(futures), futures[-1], pure=False))
            codes = client.gather(futures)
            return lambda: codes.count(0)

        yield {"commands": commands, "functions": functions, CHAIN: chain}


if __name__ == "__main__":
    main(system)
