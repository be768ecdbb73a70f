"""The pinned C loop (benchmarks/pinned_loop.c), which records nothing: the ceiling of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping

from benchmarks.compiled import compiled
from benchmarks.peer.clock import Play, main


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:  # noqa: ARG001  # all that this process may use
    program = compiled("pinned_loop", os.getcwd())

    def commands(number: int) -> Callable[[], int]:
        done = subprocess.run([program, str(number)], stdout=subprocess.DEVNULL, check=False)
        # It exits with 1 if any child has failed.
        return lambda: number if done.returncode == 0 else 0

    yield {"commands": commands}


if __name__ == "__main__":
    main(system)
