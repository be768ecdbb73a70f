"""executorlib: persistent workers (its block allocation), and for all but the chain without looking for dependencies.

It has no tasks that are programs: functions start them.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from executorlib import SingleNodeExecutor  # type: ignore[import-not-found]

from benchmarks.peer.clock import CHAIN, TRUE, Play, main, nothing, right

REFRESH_S = 0.001


def command(before: int = 0) -> int:  # noqa: ARG001  # waited for
    return subprocess.call([TRUE])


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:
    def start(**settings: Any) -> SingleNodeExecutor:
        return SingleNodeExecutor(max_workers=cores, block_allocation=True, hostname_localhost=True, **settings)

    def commands(number: int) -> Callable[[], int]:
        codes = [future.result() for future in [plain.submit(command) for _ in range(number)]]
        return lambda: codes.count(0)

    def functions(number: int) -> Callable[[], int]:
        values = [future.result() for future in [plain.submit(nothing, n) for n in range(number)]]
        return lambda: right(values)

    def chain(number: int) -> Callable[[], int]:
        linked = looking()
        futures: list[Any] = [linked.submit(command)]
        while len(futures) < number:
            futures.append(linked.submit(command, futures[-1]))
        codes = [future.result() for future in futures]
        return lambda: codes.count(0)

    @functools.cache
    def looking() -> SingleNodeExecutor:
        """Started by the first chain, which is not measured: it would look all the time, also beside the others."""
        return opened.enter_context(start(refresh_rate=REFRESH_S))

    with contextlib.ExitStack() as opened, start(disable_dependencies=True) as plain:
        yield {"commands": commands, "functions": functions, CHAIN: chain}


if __name__ == "__main__":
    main(system)
