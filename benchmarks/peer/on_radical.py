"""RADICAL-Pilot: a pilot of its resource local.localhost. It has no dependencies between tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import radical.pilot as rp  # type: ignore[import-not-found]

from benchmarks.peer.clock import TRUE, Play, main

MINUTES = 15
READY_S = 120.0


@contextlib.contextmanager
def system(cores: int) -> Iterator[Mapping[str, Play]]:
    session = rp.Session()
    try:
        pilots, tasks = rp.PilotManager(session=session), rp.TaskManager(session=session)
        description = {"resource": "local.localhost", "runtime": MINUTES, "cores": cores, "exit_on_error": True}
        pilot = pilots.submit_pilots(rp.PilotDescription(description))
        tasks.add_pilots(pilot)
        pilot.wait(state=[rp.PMGR_ACTIVE, *rp.FINAL], timeout=READY_S)
        if pilot.state != rp.PMGR_ACTIVE:
            raise SystemExit(f"its pilot was {pilot.state} after {READY_S:g} s")

        def commands(number: int) -> Callable[[], int]:
            made = tasks.submit_tasks([rp.TaskDescription({"executable": TRUE}) for _ in range(number)])
            tasks.wait_tasks([task.uid for task in made])
            return lambda: sum(task.state == rp.DONE and task.exit_code == 0 for task in made)

        yield {"commands": commands}
    finally:
        session.close(download=False)


if __name__ == "__main__":
    main(system)
