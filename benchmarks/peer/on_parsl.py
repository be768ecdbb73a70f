"""Parsl: its HighThroughputExecutor on this machine, without encryption, monitoring or logs, with prefetching."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import parsl  # type: ignore[import-not-found]
from parsl.config import Config  # type: ignore[import-not-found]
from parsl.executors import HighThroughputExecutor  # type: ignore[import-not-found]
from parsl.providers import LocalProvider  # type: ignore[import-not-found]

from benchmarks.peer.clock import CHAIN, TRUE, Play, main, nothing, right

PREFETCH = 20


def command(inputs: Any = ()) -> str:  # noqa: ARG001  # Parsl waits for them
    return "/bin/true"


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:
    workers = HighThroughputExecutor(
        address="127.0.0.1", max_workers_per_node=cores, prefetch_capacity=PREFETCH, encrypted=False,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    )  # fmt: skip
    run_command, run_function = parsl.bash_app(command), parsl.python_app(nothing)
    assert command() == TRUE

    def commands(number: int) -> Callable[[], int]:
        codes = [future.result() for future in [run_command() for _ in range(number)]]
        return lambda: codes.count(0)

    def functions(number: int) -> Callable[[], int]:
        values = [future.result() for future in [run_function(n) for n in range(number)]]
        return lambda: right(values)

    def chain(number: int) -> Callable[[], int]:
        futures: list[Any] = []
        for _ in range(number):
            futures.append(run_command(inputs=futures[-1:]))  # each needs the one before
        codes = [future.result() for future in futures]
        return lambda: codes.count(0)

    with parsl.load(Config(executors=[workers], strategy="none", initialize_logging=False)):
        yield {"commands": commands, "functions": functions, CHAIN: chain}


if __name__ == "__main__":
    main(system)
