"""GNU parallel, with a job log."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.peer.clock import TRUE, Play, main

EXIT = 6  # the column of the log


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:
    def commands(number: int) -> Callable[[], int]:
        log = Path("joblog")
        lines = "".join(f"{n}\n" for n in range(number))
        command = ["parallel", "--will-cite", "-j", str(cores), "--joblog", str(log), TRUE]
        subprocess.run(command, input=lines, text=True, check=True)
        return lambda: sum(line.split("\t")[EXIT] == "0" for line in log.read_text().splitlines()[1:])

    yield {"commands": commands}


if __name__ == "__main__":
    main(system)
