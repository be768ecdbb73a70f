"""xargs -P of findutils: a process for each line, and no record of any of them but its exit code."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Mapping

from benchmarks.peer.clock import TRUE, Play, main


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:
    def commands(number: int) -> Callable[[], int]:
        lines = "".join(f"{n}\n" for n in range(number))
        done = subprocess.run(["xargs", "-P", str(cores), "-n", "1", TRUE], input=lines, text=True, check=False)
        # It exits with 123 if any command has failed.
        return lambda: number if done.returncode == 0 else 0

    yield {"commands": commands}


if __name__ == "__main__":
    main(system)
