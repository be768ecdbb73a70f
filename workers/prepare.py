"""From a handed task to the record a launcher starts it by: command, files, surroundings, CPUs."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import msgspec

from pilotq.broker.errors import PilotqError, ServerUnavailable, StateLost, Superseded
from pilotq.broker.node_link import NodeLink
from pilotq.broker.records import Handed, parse_allocation
from pilotq.broker.surroundings import environment
from pilotq.broker.task import FLAG_ARRAY, FLAG_LOGIN, FLAG_QCG, FLAG_SLURM, FLAG_VALUES, Spec
from pilotq.workers.ladder import Execution
from pilotq.workers.render import Words, render
from pilotq.workers.slurm_step import step_environment
from pilotq.workers.wire import Base, Launch, Place

# Values are fetched only for specs that could name one: they are the only words whose content is not at hand.
VALUE_WORDS = (b"{value}", b"itval")


class UnlaunchableError(Exception):
    """This task can never be launched as it is described; ``reason`` is of states.REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Reservation(NamedTuple):
    """What an allocation means for a task that is launched here."""

    place: Place
    nodes: tuple[str, ...]
    cores: tuple[int, ...]  # how many on each node


class Surroundings(NamedTuple):
    base: Base
    cwd: str


class Preparer:
    """Makes launch records. ``directory`` is the pilot's, ``real`` maps core to CPU numbers where they differ."""

    def __init__(self, link: NodeLink, directory: str, real: Mapping[int, int]) -> None:
        self._link = link
        self._directory = directory
        self._real = real
        self._spec = msgspec.msgpack.Decoder(Spec)
        self._surroundings = lru_cache(256)(self._fetch_surroundings)
        self._reservation = lru_cache(4096)(self._find_reservation)

    def prepare(self, e: Execution, after: int) -> tuple[Base, Place, Launch]:
        """The launch of an execution that has an allocation, and what it names; sets its limit and its files.

        ``after`` is the key of the one it is lined up behind, or 0. Raises UnlaunchableError, and ServerUnavailable
        when something must be fetched and the server is away.
        """
        handed = e.handed
        try:
            around = self._surroundings(handed.shared)
            here = self._reservation(e.allocation)
            spec = self._spec.decode(handed.spec)
            if spec.flags & (FLAG_ARRAY | FLAG_QCG):
                spec = render(spec, self._words(handed, spec, here, around.cwd))
        except (ServerUnavailable, StateLost, Superseded):
            raise
        except (PilotqError, msgspec.MsgspecError) as error:
            raise UnlaunchableError("launch", f"its description cannot be used: {error}") from None
        cwd = os.path.join(around.cwd, spec.cwd) if spec.cwd else around.cwd
        if spec.flags & FLAG_QCG:
            _make_directory(cwd, around.base.umask)
        e.limit = spec.time_limit
        e.stdout, e.stderr = _below(cwd, spec.stdout), _below(cwd, spec.stderr)
        if handed.execution > 1 and (e.stdout or e.stderr):
            e.suffix = f".{handed.execution}"
        env = _environment(handed, spec, here)
        launch = Launch(
            e.key, handed.id, handed.execution, handed.shared, e.allocation, _argv(spec), env, cwd,
            _below(cwd, spec.stdin), e.stdout, e.stderr, e.suffix, after,
        )  # fmt: skip
        return around.base, here.place, launch

    def _fetch_surroundings(self, key: str) -> Surroundings:
        shared = self._link.fetch_shared(key)
        env = shared.env or environment(os.environ)  # none stands for the worker's own: --env-policy worker
        return Surroundings(Base(key, env, shared.umask, shared.limits), shared.cwd)

    def _find_reservation(self, allocation: str) -> Reservation:
        parts = parse_allocation(allocation)
        here = parts[0]
        nodes = tuple(p.node for p in parts)
        cores = tuple(len(p.cores) for p in parts)
        env = {
            "PILOTQ_DIR": self._directory,
            "PILOTQ_CORES": str(sum(cores)),
            "PILOTQ_NODES": str(len(nodes)),
            "PILOTQ_NODELIST": ",".join(nodes),
            "PILOTQ_CPUS": ",".join(map(str, here.cores)),
            "QCG_PM_NNODES": str(len(nodes)),
            "QCG_PM_NODELIST": ",".join(nodes),
            "QCG_PM_NPROCS": str(sum(cores)),
            "QCG_PM_NTASKS": str(sum(cores)),
            "QCG_PM_TASKS_PER_NODE": ",".join(map(str, cores)),
        }
        if here.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(here.gpus)
        cpus = [self._real.get(core, core) for core in here.cores]
        place = Place(allocation, env, {"OMP_NUM_THREADS": str(len(here.cores))}, cpus)
        return Reservation(place, nodes, cores)

    def _words(self, handed: Handed, spec: Spec, here: Reservation, root: str) -> Words:
        value = None
        if spec.flags & FLAG_VALUES and any(word in bytes(handed.spec) for word in VALUE_WORDS):
            value = self._link.fetch_value(handed.array, handed.position)
        return Words(
            task_id=handed.id,
            name=handed.name,
            index=handed.index,
            value=value,
            position=handed.position,
            cores=sum(here.cores),
            nodes=here.nodes,
            cores_per_node=here.cores,
            root=root,
        )


# The bits that make a random number a UUID of version 4 (RFC 9562): `uuid4` costs a system call each.
STEP_CLEAR = (0xF << 76) | (0x3 << 62)
STEP_SET = (0x4 << 76) | (0x2 << 62)


def _environment(handed: Handed, spec: Spec, here: Reservation) -> dict[str, str]:
    """What is this task's alone; the launcher adds its id and execution."""
    env = {"QCG_PM_STEP_ID": f"{random.getrandbits(128) & ~STEP_CLEAR | STEP_SET:032x}"}
    if handed.array:
        env["PILOTQ_ARRAY_ID"] = handed.array
        env["PILOTQ_INDEX"] = str(handed.index)
    if spec.flags & FLAG_SLURM:
        env.update(step_environment(here.nodes, here.cores))
    if spec.env:
        env.update(spec.env)
    return env


def _argv(spec: Spec) -> list[bytes]:
    if not spec.script:
        return spec.argv
    return [b"bash", *([b"-l"] if spec.flags & FLAG_LOGIN else []), b"-c", spec.script.encode()]


def _below(cwd: str, path: str) -> str:
    return path if not path or path[0] == "/" else os.path.join(cwd, path)


def _make_directory(path: str, umask: int) -> None:
    """QCG-PilotJob makes a job's working directory, parents too."""
    try:
        os.makedirs(path, mode=0o777 & ~umask, exist_ok=True)
    except OSError as error:
        raise UnlaunchableError("not found", f"its directory {path} cannot be made: {error.strerror}") from None
