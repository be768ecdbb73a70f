"""Plans the tasks that the selfcheck submits, and what each of them must observe.

Everything that can differ between tasks repeats with a period of its own, and no two periods have a common divisor,
so that in some thousand tasks all combinations occur.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from pilotq.broker.tasks.model import ArrayRange, Request, Task
from pilotq.broker.tasks.submit_context import SubmitContext
from pilotq.cli.selfcheck import probe

PROBE = [sys.executable, "-I", "-S", os.path.abspath(probe.__file__)]
MARK = "SELFCHECK"  # a variable of the submitter, different in each batch
OVERRIDE = "SELFCHECK_OWN"  # a variable of the task
ODD = "a 'quoted' \"value\",\n two lines, ünïcödé"
LIMIT_S = 1.0  # enough to start on a busy machine
ARRAY = 50  # elements
ARRAY_SHARE = 5  # every fifth task is an element
# What a submitter may have: umask, and soft limits that differ from those of the worker.
SUBMIT_CONTEXTS: tuple[tuple[int, dict[int, int]], ...] = (
    (0o022, {}),
    (0o077, {resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0}),
    (0o002, {resource.RLIMIT_STACK: 4 << 20, resource.RLIMIT_AS: 4 << 30}),
    (0o027, {resource.RLIMIT_NOFILE: 200, resource.RLIMIT_CPU: 3600, resource.RLIMIT_FSIZE: 1 << 30}),
)


class Expected(msgspec.Struct, kw_only=True):
    """What one task, or one element of an array, must observe. ``id`` is known once it is submitted."""

    name: str  # of the task and of its ledger
    id: str = ""
    index: int | None = None  # of an element
    nodes: int = 1
    cores: tuple[int, int] | None = (1, 1)  # on its first node; None: all of it
    cwd: str
    umask: int
    limits: dict[int, int]
    env: dict[str, str]  # what the submitter and the task set; nothing else may be there except what pilotq sets
    stdin: str = ""
    stdout: str = ""  # a file; empty: captured
    stderr: str = ""
    size: int = 0  # bytes written to each of the two
    shell: bool = False
    executions: int = 1
    ends: bool = True  # it reaches its second line
    exit_codes: tuple[int | None, ...] = (0,)  # of each execution; None: a signal
    signal: int | None = None
    reason: str = ""

    @property
    def status(self) -> str:
        return "failed" if self.reason else "finished"


class Batch(NamedTuple):
    """One submission: ``expected`` has a list for each task, with an entry for each of its elements."""

    shared: SubmitContext
    tasks: list[Task]
    expected: list[list[Expected]]


class Place(NamedTuple):
    """Where tasks may write: both directories exist."""

    ledgers: str
    work: str


def batches(count: int, nodes: Mapping[str, int], place: Place, base: SubmitContext) -> list[Batch]:
    """``count`` tasks, where an element counts as one, for nodes of so many cores each, in contexts like ``base``."""
    arrays = count // ARRAY_SHARE // ARRAY
    single = count - arrays * ARRAY
    found = []
    for number, (umask, limits) in enumerate(SUBMIT_CONTEXTS):
        cwd = os.path.join(place.work, f"batch {number}")
        os.makedirs(os.path.join(cwd, "below"), exist_ok=True)
        env = {**base.env, MARK.encode(): f"{number} {ODD}".encode()}
        shared = SubmitContext(env, os.fsencode(cwd), umask, {**base.limits, **limits})
        batch = Batch(shared, [], [])
        for n in range(number, single, len(SUBMIT_CONTEXTS)):
            _add(batch, _single(n, nodes, place, shared))
        for n in range(number, arrays, len(SUBMIT_CONTEXTS)):
            _add(batch, _array(n, place, shared))
        found.append(batch)
    return found


def _texts(env: Mapping[bytes, bytes]) -> dict[str, str]:
    return {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}


def _add(batch: Batch, made: tuple[Task, list[Expected]]) -> None:
    batch.tasks.append(made[0])
    batch.expected.append(made[1])


def _single(n: int, nodes: Mapping[str, int], place: Place, shared: SubmitContext) -> tuple[Task, list[Expected]]:
    name = f"t{n}"
    cwd, env = os.fsdecode(shared.cwd), _texts(shared.env)
    expected = Expected(name=name, cwd=cwd, umask=shared.umask, limits=shared.limits, env=env)
    task = Task(name=name)
    _resources(n % 41, task, expected, nodes)
    how = _ending(n % 101, task, expected)
    _files(n % 11, task, expected, place)
    _directory(n % 5, task, expected, place)
    if n % 3 == 0:
        task.env[OVERRIDE] = ODD
    if n % 17 == 0:
        task.env["OMP_NUM_THREADS"] = "7"
    if n % 29 == 0:
        task.env[MARK] = "the task's"
    expected.env.update(task.env)
    expected.size = {0: 100, 1: 6000, 2: 1}.get(n % 13, 0) if n % 211 else 1_500_000
    arguments = [*PROBE, os.path.join(place.ledgers, name), f"{n % 23 / 2000}", how, str(expected.size)]
    expected.shell = n % 7 in (0, 3)
    if n % 7 == 0:
        words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in arguments)
        task.script = f'exec {words} "$(cat /proc/self/status)"'
    elif expected.shell:
        task.command = ["sh", "-c", 'exec "$@" "$(cat /proc/self/status)"', "sh", *arguments]
    else:
        task.command = arguments
    return task, [expected]


def _resources(kind: int, task: Task, expected: Expected, nodes: Mapping[str, int]) -> None:
    """Mostly one core."""
    most = max(nodes.values())
    if kind in (3, 7, 13, 23, 31) and most > 1:
        task.request, expected.cores = Request(cores=(2, 2)), (2, 2)
    elif kind in (11, 29):
        task.request, expected.cores = Request(cores=(1, most)), (1, most)
    elif kind == 17:
        task.request, expected.cores = Request(nodes=(1, 1), whole=True), None
    elif kind == 5 and len(nodes) > 1:
        task.request, expected.nodes = Request(nodes=(2, 2)), 2
    elif kind == 37 and len(nodes) > 1:
        task.request, expected.nodes, expected.cores = Request(nodes=(2, 2), whole=True), 2, None


def _ending(kind: int, task: Task, expected: Expected) -> str:
    """How the probe ends; mostly with 0."""
    if kind % 20 == 1:
        expected.exit_codes, expected.reason = (kind,), "exit"
        return str(kind)
    if kind % 20 == 2:
        expected.exit_codes, expected.signal, expected.reason = (None,), 9, "signal"
        return "-9"
    if kind % 20 == 3:
        task.retries, expected.executions, expected.exit_codes = 2, 2, (probe.RETRIED, 0)
        return "retry"
    if kind == 50:
        task.time_limit, expected.ends = LIMIT_S, False
        expected.exit_codes, expected.signal, expected.reason = (None,), 15, "time limit"
        return "hang"
    return "0"


def _files(kind: int, task: Task, expected: Expected, place: Place) -> None:
    """Mostly none is named: nothing to read, and output is captured."""
    path = os.path.join(place.work, expected.name)
    if kind in (0, 1, 2):
        task.stdout = expected.stdout = f"{path}.out"
    if kind in (0, 1):
        task.stderr = expected.stderr = f"{path}.err" if kind == 0 else expected.stdout
    if kind in (2, 3):
        task.stdin, expected.stdin = f"{path}.in", f"input of {expected.name}\n{ODD}"
        with open(task.stdin, "w", encoding="utf-8") as file:
            file.write(expected.stdin)


def _directory(kind: int, task: Task, expected: Expected, place: Place) -> None:
    """Mostly the submitter's."""
    if kind == 0:
        task.cwd, expected.cwd = "below", os.path.join(expected.cwd, "below")
    elif kind == 1:
        task.cwd = expected.cwd = place.work


def _array(n: int, place: Place, shared: SubmitContext) -> tuple[Task, list[Expected]]:
    """By range, or by values; each element has its own ledger."""
    name = f"a{n}"
    values = [f"{name}.{number} {ODD}" for number in range(ARRAY)]
    indices = ArrayRange(3 * n, 3 * n + 3 * (ARRAY - 1), 3)
    task = Task(name=name, env={OVERRIDE: "{index}:{value}"})
    if n % 2:
        task.values, numbers = values, range(ARRAY)
    else:
        task.array, numbers = indices, range(indices.start, indices.stop + 1, indices.step)
    task.command = [*PROBE, os.path.join(place.ledgers, name + ".{index}"), "0.002", "0", "20"]
    expected = []
    for position, index in enumerate(numbers):
        value = values[position] if n % 2 else str(index)
        expected.append(
            Expected(
                name=f"{name}.{index}", index=index, cwd=os.fsdecode(shared.cwd), umask=shared.umask,
                limits=shared.limits, size=20,
                env={**_texts(shared.env), OVERRIDE: f"{index}:{value}", "PILOTQ_VALUE": value},
            )
        )  # fmt: skip
    return task, expected
