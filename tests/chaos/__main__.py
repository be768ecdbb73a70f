"""Random faults done to a pilot while it works, and what became of its tasks.

    python -m tests.chaos [--seconds 60] [--seed N] [--keep]

Producers submit batches all the time: short and long tasks, arrays, chains, retries, hostile ones. Meanwhile parts are
killed and stopped, the network of one node is cut (as root), the supervisor is killed, or all parts at one moment, and
the pilot goes on. Then everything is healed, and once all has ended the judge (judge.py) says what is wrong; the exit
code is 1 if anything is. The seed decides what is done and in which order, not what the machine makes of it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pilotq.broker import ArrayRange, Request, Task
from pilotq.broker.errors import PilotqError
from pilotq.broker.store.journal import Journal
from tests.chaos.judge import FINISHED, Expected, History, judge
from tests.support.fault_rig import CHILDREN, HELD, Rig, Work, by_task
from tests.support.network_namespace import CUT, FarNode, possible
from tests.support.waiting import wait_until

# Chance may strike an innocent task more than three times. It must strike while that runs: once a task was lost nothing
# begins behind it before its end is known.
CRASH_LIMIT = 8
SETTINGS = {
    "node_timeout_margin_s": 1.0, "connect_s": 0.5, "reply_s": 1.0, "crash_limit": CRASH_LIMIT, "keep_records": 1000,
    "stop_wait_s": 10.0, "bundle_above": 30,
}  # fmt: skip
CONTACT_S = 3.0
HEAL_S = 180.0
OPEN_TASKS = 400  # producers wait while so many have not ended
SHOWN = 20
LOG_LINES = 15  # of each part, when tasks have not ended
CRASHED = ("failed", "crash limit")
HOSTILE: dict[str, tuple[Task, frozenset[tuple[str, str]]]] = {
    "leaves a daemon": (Task(script="setsid sleep 300 & exit 0"), FINISHED),
    "ignores SIGTERM": (Task(script="trap '' TERM; while :; do sleep 0.1; done", time_limit=0.5),
                        frozenset({("failed", "time limit")})),
    "stops itself": (Task(script="kill -STOP $$", time_limit=0.5), frozenset({("failed", "time limit")})),
    "floods its output": (Task(script="head -c 3000000 /dev/zero; exit 0"), FINISHED),
    "leaves many behind": (Task(script="for i in $(seq 20); do sleep 300 & done; exit 3"),
                           frozenset({("failed", "exit")})),
    "closes its files": (Task(script="exec 0<&- 1>&- 2>&-; exit 0"), FINISHED),
    "kills its launcher": (Task(script="kill -9 $PPID; sleep 5"), frozenset({CRASHED})),
    "kills its worker": (Task(script="kill -9 $(cut -d' ' -f4 /proc/$PPID/stat); sleep 5"), frozenset({CRASHED})),
}  # fmt: skip


class Chaos:
    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.producing = random.Random(seed + 1)
        apart = possible()
        self.rig = Rig(folder, "n1:1,n2:1,n3:1" if apart else "n1:1,n2:1,n3:1,n4:1", **SETTINGS)
        self.far = FarNode(self.rig) if apart else None
        self.done: Counter[str] = Counter()
        self.work: list[tuple[Work, list[Expected]]] = []
        self.over = threading.Event()

    def start(self) -> None:
        far = self.far
        self.rig.start(**({"bind": [far.here], "contact": CONTACT_S} if far is not None else {}))
        if far is not None:
            far.start()

    # -- producers --------------------------------------------------------------------------------------------------

    def batch(self) -> tuple[list[Task], list[Expected]]:
        r, rnd = self.rig, self.producing
        tasks = [r.probe(rnd.choice((0, 0, 0.01, 0.05))) for _ in range(rnd.randint(10, 60))]
        tasks += [r.probe(rnd.uniform(0.2, 2.0)) for _ in range(rnd.randint(0, 3))]
        tasks.append(r.probe(code=5, retries=1, backoff=rnd.choice((0.0, 0.3))))
        tasks += [r.probe(name="a", array=ArrayRange(0, rnd.randint(1, 40))), r.probe(name="b", after=["a"])]
        tasks += [r.probe(after=["b"], priority=rnd.randint(-1, 1)), r.probe(request=Request(nodes=(2, 2)))]
        tasks.append(r.probe("{value}", values=[rnd.choice(("0", "0", "0.02")) for _ in range(rnd.randint(2, 30))]))
        # Of a class of their own: they are a bundle of functions.
        tasks += [r.call(rnd.choice((0, 0, 0.01)), priority=2) for _ in range(rnd.choice((0, 5, 45)))]
        tasks += [r.joining() for _ in range(rnd.randint(0, 1))]
        expected = [Expected(most=1 + task.retries) for task in tasks]
        if rnd.random() < 0.4:
            kind = rnd.choice(list(HOSTILE))
            task, endings = HOSTILE[kind]
            tasks.append(task)
            expected.append(Expected(endings=endings, writes=False))
            self.done[f"task that {kind}"] += 1
        return tasks, expected

    def produce(self) -> None:
        while not self.over.is_set():
            if self.open() > OPEN_TASKS:
                self.over.wait(0.2)
                continue
            tasks, expected = self.batch()
            try:
                self.work.append((self.rig.submit(tasks), expected))
            except AssertionError:
                return  # the end has come before a server that accepts: nothing was promised

    def open(self) -> int:
        with suppress(PilotqError), self.rig.broker() as broker:
            return broker.counts().left
        return OPEN_TASKS + 1

    # -- faults -----------------------------------------------------------------------------------------------------

    def harm(self) -> None:
        cuts = 4 if self.far is not None else 0
        kinds = {"kill": 10, "stop": 6, "supervisor killed": 1, "pilot killed": 1, "cut": cuts}
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        part = self.random.choice(("dispatcher", "worker", "worker", "launcher", "launcher", "server"))
        pause = self.random.uniform(0.2, 2.0)
        if kind == "supervisor killed":
            self.rig.kill_supervisor()
            self.note(kind)
        elif kind == "pilot killed":
            self.rig.kill_all()  # `tend` goes on with it
            self.note(kind)
        elif kind == "cut":
            assert self.far is not None
            direction, length = self.random.choice(list(CUT)), self.random.uniform(0.3, 2.5 * CONTACT_S)
            self.far.cut(direction)
            self.over.wait(length)
            self.far.reconnect()
            self.note(f"network cut ({direction})")
        elif pids := self.rig.processes(part):
            pid = self.random.choice(pids)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
                self.note(f"{part} {'killed' if kind == 'kill' else 'stopped'}")
                if kind == "stop":
                    self.over.wait(pause)
                    os.kill(pid, signal.SIGCONT)
        self.tend()
        self.over.wait(pause / 2)

    def note(self, what: str) -> None:
        self.done[what] += 1

    def tend(self) -> None:
        """What a job step or a user would do: start again what nobody else starts."""
        self.rig.restart()
        if self.far is not None and self.far.worker is not None and self.far.worker.poll() is not None:
            self.far.start(wait=False)

    @property
    def faults(self) -> int:
        lethal = ("task that kills its launcher", "task that kills its worker")
        own = sum(number for what, number in self.done.items() if not what.startswith("task"))
        # Of a pilot that was killed as a whole each core may have held as many as that (HELD), and not one.
        own += (HELD - 1) * self.done["pilot killed"]
        return own + CRASH_LIMIT * sum(self.done[what] for what in lethal)

    # -- the whole run ----------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        self.start()
        producer = threading.Thread(target=self.produce)
        producer.start()
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                self.harm()
        finally:
            self.over.set()
            producer.join()

    def calm(self) -> bool:
        self.tend()
        with suppress(PilotqError), self.rig.broker() as broker:
            nodes = broker.nodes()
            wanted = len(self.rig.plans) + (self.far is not None)
            return broker.counts().left == 0 and len(nodes) == wanted and not any(node.used for node in nodes)
        return False

    def unfinished(self) -> Iterator[str]:
        """What is known of the nodes and of tasks that have not ended: where they are, and what they wait for."""
        with suppress(PilotqError), self.rig.broker() as broker:
            yield str(broker.counts())
            yield from map(str, broker.nodes())
            open_tasks = [view for status in ("started", "queued") for view in broker.tasks(status=status, limit=SHOWN)]
            for view in open_tasks:
                yield f"{view}; {broker.explain(view.id)}"
        assert self.rig.pilot is not None
        for name in ("supervisor", "dispatcher", *(f"worker-{plan.name}" for plan in self.rig.plans), "far"):
            log = self.rig.folder / "far.log" if name == "far" else Path(self.rig.pilot.log(name))
            with suppress(OSError):
                yield from (f"{name}: {line}" for line in log.read_text().splitlines()[-LOG_LINES:])

    def history(self) -> History:
        assert self.rig.pilot is not None
        accepted: dict[str, Expected] = {}
        for work, expected in self.work:
            for task_id, task, one in zip(work.ids, work.tasks, expected, strict=True):
                names = [f"{task_id}_{n}" for n in range(task.size)] if task.is_array else [task_id]
                accepted.update(dict.fromkeys(names, one))
        entries = Journal(self.rig.pilot.journal).entries()
        lines = by_task(line for line in entries if not line.submission.startswith(CHILDREN))
        return History(accepted, lines, list(self.rig.ledger()), self.faults, 4, self.rig.of_tasks())

    def complete(self) -> bool:
        history = self.history()
        return all(any(line.final for line in history.lines.get(me, ())) for me in history.accepted)

    def end(self) -> None:
        if self.far is not None:
            self.far.remove()
        else:
            self.rig.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--keep", action="store_true", help="keep the pilot's directory")
    options = parser.parse_args()
    print(f"chaos: seed {options.seed}, {options.seconds:g} s", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(folder, options.seed)
    wrong = []
    try:
        chaos.run(options.seconds)
        healed = time.monotonic()
        for condition, what in ((chaos.calm, "all ended, and no core in use"), (chaos.complete, "all in the journal")):
            try:
                wait_until(condition, seconds=HEAL_S, what=what)
            except AssertionError as error:
                wrong.append(str(error))
                print(*chaos.unfinished(), sep="\n", flush=True)
        healed = time.monotonic() - healed
        history = chaos.history()
        wrong += judge(history)
        wrong += [text for work, _ in chaos.work for text in chaos.rig.ended_before_children(work)]
    finally:
        chaos.end()
    executions = sum(line[2] == "begin" for line in history.ledger)
    for what, number in sorted(chaos.done.items()):
        print(f"{number:6}  {what}")
    print(
        f"chaos: {len(history.accepted)} tasks accepted, {executions} executions with a ledger, {chaos.faults} faults, "
        f"all ended {healed:.1f} s after the last one; {len(wrong)} things are wrong"
    )
    for text in wrong[:SHOWN]:
        print(f"wrong: {text}")
    if wrong or options.keep:
        print(f"chaos: everything is kept in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
