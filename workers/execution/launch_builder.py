"""Builds the record by which a launcher starts a task: command, files, submit context, CPUs."""

from __future__ import annotations

import hashlib
import math
import os
import random
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import NamedTuple, Protocol

import msgspec

from pilotq.broker.errors import PilotqError, ServerUnavailable, StateLost, Superseded
from pilotq.broker.log import log
from pilotq.broker.os_strings import UNREADABLE, decode, encode
from pilotq.broker.slurm.step_environment import ENV_SCHEMA, step_environment
from pilotq.broker.store.messages import Run, StartRemote
from pilotq.broker.store.resources import NodeInfo, NodeShare, class_info, parse_allocation
from pilotq.broker.tasks.model import MODELS, ONE_PROCESS_MODELS, PACK, SPREAD
from pilotq.broker.tasks.retry_policy import parse_retry_on
from pilotq.broker.tasks.script_text import interpreter_of, is_command_line
from pilotq.broker.tasks.spec import (
    FLAG_ARRAY,
    FLAG_FUNCTION,
    FLAG_LOGIN,
    FLAG_QCG,
    FLAG_RQ_JOB,
    FLAG_VALUES,
    Spec,
    is_bundle,
)
from pilotq.broker.tasks.submit_context import GPU_VARIABLES, environment
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.templating import Variables, has_variables, render
from pilotq.workers.gpu_variables import gpu_variables
from pilotq.workers.protocol import (
    Call,
    Launch,
    LaunchBase,
    LaunchSlot,
)
from pilotq.workers.shared_data import SharedData
from pilotq.workers.shortage import is_shortage

Prepared = tuple[LaunchBase, LaunchSlot, Launch | Call]  # a launch, and what it names

# Variables that mean something else on each node of an execution.
NODE_VARIABLES = frozenset(
    {b"PILOTQ_DIR", b"PILOTQ_NODE", b"PILOTQ_CPUS", b"PILOTQ_AGENT", *GPU_VARIABLES, b"CUDA_DEVICE_ORDER"}
)


# Only for those who say how their cores lie: where a task has several processes, binding threads would put the first
# threads of all of them onto one core.
PROC_BIND = {PACK: "close", SPREAD: "spread"}


_MEMBER = msgspec.msgpack.Decoder(tuple[msgspec.Raw, str])  # spec.Member


class PackedMember(NamedTuple):
    """One task of a bundle."""

    spec: msgspec.Raw  # packed
    name: str


class UnlaunchableError(Exception):
    """This task can never be launched as it is described; ``reason`` is of states.REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotYetError(Exception):
    """What its launch needs of file systems is still being looked for; it is to be asked for again."""


def refusal(error: Exception) -> Exception:
    """What an error on one task's way to its launch means. Whatever it is, also what nobody thought of, it refuses this
    task alone; what says that nothing can be launched now, or by this worker, stays as it is."""
    if isinstance(error, (NotYetError, ServerUnavailable, StateLost, Superseded, UnlaunchableError)):
        return error
    if isinstance(error, PilotqError):
        return UnlaunchableError("launch", f"its description cannot be used: {error}")
    if is_shortage(error):
        return UnlaunchableError("launch", f"its launch cannot be prepared: {error}")
    log(f"a task cannot be launched:\n{traceback.format_exc()}", level="error")
    return UnlaunchableError("launch", f"its description cannot be used: {type(error).__name__}: {error}")


class Reservation(NamedTuple):
    """What an allocation means for a task that is launched here."""

    slot: LaunchSlot
    parts: tuple[NodeShare, ...]
    nodes: tuple[str, ...]
    cores: tuple[int, ...]  # how many on each node


class LaunchModel(Protocol):
    """Makes the launch of an execution that is more than one process on one node; see launch_models.py."""

    def apply(
        self, e: Execution, spec: Spec, reservation: Reservation, env: dict[bytes, bytes], launch: Launch
    ) -> Launch:
        """``env`` is what the task will find. Raises UnlaunchableError, NotYetError,
        ServerUnavailable."""


class ContextView(NamedTuple):
    """A submit context as launches use it."""

    base: LaunchBase
    cwd: bytes


class LaunchBuilder:
    """Builds launch records. ``directory`` is the pilot's, ``real`` maps core to CPU numbers where they differ.

    ``info`` is this worker's node. ``launch_model`` makes launches of several processes.
    """

    def __init__(self, shared_data: SharedData, directory: str, real: Mapping[int, int], info: NodeInfo) -> None:
        self._shared_data = shared_data
        self._directory = directory
        self._real = real
        self._info = info
        self._address = info.address
        self._node = info.name
        self.launch_model: LaunchModel | None = None
        self._spec = msgspec.msgpack.Decoder(Spec)
        # The last one that was decoded, and whether it has variables: all elements of a lease have the same one.
        self._decoded: tuple[bytes | None, Spec, bool] = None, Spec([]), False
        self.context = lru_cache(256)(self._fetch_context)
        self.reservation = lru_cache(4096)(self._find_reservation)

    def build(self, e: Execution, after: int) -> Prepared:
        """The launch or call of an execution that has an allocation, and what it names; sets its limit and its files.

        ``after`` is the key of the one it is chained behind, or 0. Raises UnlaunchableError, ServerUnavailable
        when something must be fetched and the server is away, and NotYetError.
        """
        try:
            return self._build(e, after)
        except Exception as error:  # noqa: BLE001  # the boundary of one task
            raise refusal(error) from None

    def _build(self, e: Execution, after: int) -> Prepared:
        run = e.run
        context = self.context(run.shared)
        known = class_info(run.class_name)
        reservation = self.reservation(e.allocation, known.request.numa if known is not None else "")
        member = is_bundle(run.spec)
        spec = self.spec_of(self._member(run) if member else run.spec)
        varies = self._decoded[2]
        if member and (varies or not spec.flags & FLAG_FUNCTION):
            run = msgspec.structs.replace(run, array="", index=-1, position=0)  # as if it had been submitted by itself
        value = self._shared_data.fetch_value(run.array, run.position) if spec.flags & FLAG_VALUES else None
        if varies:
            spec = render(spec, _variables(run, value, reservation, context.cwd))
        cwd = directory_of(spec, context.cwd)
        e.limit = spec.time_limit
        e.spec = spec
        e.stdout, e.stderr = below(cwd, spec.stdout), below(cwd, spec.stderr)
        if run.execution > 1 and (e.stdout or e.stderr):
            e.suffix = f".{run.execution}"
        if spec.flags & (FLAG_FUNCTION | FLAG_RQ_JOB):
            e.function = True
            return context.base, reservation.slot, self._call(e, spec, value, cwd, after, reservation.slot.name)
        env = task_environment(run, spec, reservation.slot.env, value)
        argv, script = command_line(spec)
        launch = Launch(
            e.key, run.id, run.execution, run.shared, reservation.slot.name, argv, env, cwd,
            below(cwd, spec.stdin), e.stdout, e.stderr, e.suffix, after, script,
            make_cwd=bool(spec.flags & FLAG_QCG),
        )  # fmt: skip
        if self.launch_model is not None and (len(reservation.nodes) > 1 or spec.model not in ONE_PROCESS_MODELS):
            full = {**reservation.slot.defaults, **context.base.env, **reservation.slot.env, **env}
            launch = self.launch_model.apply(e, spec, reservation, full, launch)
        return context.base, reservation.slot, launch

    @contextmanager
    def reading_ahead(self, runs: Iterable[Run]) -> Iterator[None]:
        """Within it all of these can be built with one read of the server, where each would need one of its own."""
        jobs = [run.id for run in runs if not run.submission]  # of RQ's producers
        if len(jobs) > 1:
            with suppress(ServerUnavailable):  # building them says so
                self._shared_data.read_jobs(jobs)
        try:
            yield
        finally:
            self._shared_data.forget_jobs()

    def member_of(self, array: str, position: int) -> PackedMember:
        """One of a bundle, its specification still packed. Raises UnlaunchableError, PilotFailed, ServerUnavailable."""
        try:
            return PackedMember(*_MEMBER.decode(self._shared_data.fetch_value(array, position)))
        except (*UNREADABLE, ValueError) as error:
            raise UnlaunchableError(
                "launch", f"its description in the server is damaged ({error}): submit it again"
            ) from None

    def value_of(self, array: str, position: int) -> bytes:
        """The value of an array's element. Raises PilotFailed, ServerUnavailable."""
        return self._shared_data.fetch_value(array, position)

    def build_remote(self, start: StartRemote, key: int) -> tuple[LaunchBase, LaunchSlot, Launch]:
        """The launch of a process for another node's execution; raises as `build`."""
        try:
            context = self.context(start.shared)
            reservation = self.reservation(start.allocation, "")
        except Exception as error:  # noqa: BLE001  # the boundary of one process
            raise refusal(error) from None
        env = {name: value for name, value in start.env.items() if name not in NODE_VARIABLES}
        env[b"PILOTQ_HOST"] = start.host.encode()
        launch = Launch(
            key, start.id, start.execution, start.shared, start.allocation, start.argv, env, start.cwd
        )  # fmt: skip
        return context.base, reservation.slot, launch

    def describe(self, e: Execution) -> None:
        """Name and description of one of a bundle that ends without a launch, for its report, where they can be had."""
        if is_bundle(e.run.spec):
            with suppress(PilotqError, UnlaunchableError):
                e.spec = self._decode(self._member(e.run))

    def _member(self, run: Run) -> bytes:
        """The packed specification of one of a bundle; its `Run` gets its name."""
        member = self.member_of(run.array, run.position)
        run.name = member.name
        return bytes(member.spec)

    def spec_of(self, packed: bytes) -> Spec:
        """The specification in a record, checked. Raises UnlaunchableError."""
        if packed is not self._decoded[0]:
            decoded = self._decode(packed)
            self._decoded = packed, decoded, has_variables(decoded)
        return self._decoded[1]

    def _decode(self, packed: bytes) -> Spec:
        """The specification of a task. What was checked at submit is checked again: its record may be damaged."""
        try:
            spec = self._spec.decode(packed)
        except UNREADABLE as error:
            raise UnlaunchableError(
                "launch", f"its record in the server is damaged ({error}): submit it again"
            ) from None
        wrong = ""
        if not (
            spec.script or spec.flags & FLAG_RQ_JOB or (spec.argv and (spec.argv[0] or spec.flags & FLAG_FUNCTION))
        ):
            wrong = "it has no command"
        elif spec.model not in MODELS:
            wrong = f"model {spec.model!r} is unknown"
        elif not (0 <= spec.time_limit < math.inf and 0 <= spec.backoff < math.inf):
            wrong = "a time in it is no number of seconds"
        elif not 0 <= spec.launch_at <= len(spec.argv):
            wrong = "its launcher has no place in its command"
        elif spec.retry_on:
            try:
                parse_retry_on(spec.retry_on)
            except ValueError as error:
                wrong = f"retry_on: {error}"
        if wrong:
            raise UnlaunchableError("launch", f"its record in the server is damaged ({wrong}): submit it again")
        return spec

    def _call(self, e: Execution, spec: Spec, value: bytes | None, cwd: bytes, after: int, slot: str) -> Call:
        run = e.run
        env = _array_environment(run) if spec.flags & FLAG_ARRAY else {}
        if spec.env:
            env.update(spec.env)
        call = Call(
            e.key, run.id, run.execution, run.shared, slot, env, cwd, below(cwd, spec.stdin),
            e.stdout, e.stderr, e.suffix, after,
        )  # fmt: skip
        call.submission = run.submission
        if spec.flags & FLAG_RQ_JOB:
            call.rq_fields = self._shared_data.fetch_job(run.id)
        else:
            call.payload = spec.argv[0]
        if spec.flags & FLAG_ARRAY:
            call.element = run.index if value is None else value
        return call

    def _fetch_context(self, key: str) -> ContextView:
        shared = self._shared_data.fetch_shared(key)
        env = shared.env or environment(os.environb)  # none stands for the worker's own: --env-policy worker
        path = b"%s:%s" % (shared.cwd, shared.path) if shared.path else shared.cwd
        return ContextView(LaunchBase(key, env, shared.umask, shared.limits, path), shared.cwd)

    def _find_reservation(self, allocation: str, numa: str) -> Reservation:
        parts = parse_allocation(allocation)
        share = next((part for part in parts if part.node == self._node), parts[0])
        nodes = tuple(p.node for p in parts)
        cores = tuple(len(p.cores) for p in parts)
        if not all(cores):
            raise UnlaunchableError("launch", f"its reservation {allocation!r} is damaged: it has a node without cores")
        env = {
            "PILOTQ_DIR": self._directory,
            "PILOTQ_CORES": str(sum(cores)),
            "PILOTQ_NODES": str(len(nodes)),
            "PILOTQ_NODELIST": ",".join(nodes),
            "PILOTQ_NODE": share.node,
            "PILOTQ_CPUS": ",".join(map(str, share.cores)),
            "QCG_PM_NNODES": str(len(nodes)),
            "QCG_PM_NODELIST": ",".join(nodes),
            "QCG_PM_NPROCS": str(sum(cores)),
            "QCG_PM_NTASKS": str(sum(cores)),
            "QCG_PM_TASKS_PER_NODE": ",".join(map(str, cores)),
        }
        files: dict[bytes, bytes] = {}
        if os.environ.get(ENV_SCHEMA) == "slurm":
            env |= step_environment(nodes, cores)
            env["QCG_PM_CPU_SET"] = ",".join(str(core) for part in parts for core in part.cores)
            env["SLURM_HOSTFILE"] = self._host_file(allocation)
            lines = "".join(f"{node}\n" * number for node, number in zip(nodes, cores, strict=True))
            files[encode(env["SLURM_HOSTFILE"])] = lines.encode()
        if len(parts) > 1:
            env["PILOTQ_HOST"] = self._address
        env |= gpu_variables(self._info, share.gpus, os.environ)
        threads = self._info.threads
        cpus = [self._real.get(core, core) for core in share.cores]
        cpus += [cpu for core in share.cores for cpu in threads.get(core, ())]
        # Open MPI's own launcher would bind ranks from the machine's first core up, whatever mask it has been given.
        defaults = {"OMP_NUM_THREADS": str(len(share.cores)), "OMPI_MCA_hwloc_base_binding_policy": "none"}
        if numa:
            defaults |= {"OMP_PLACES": "cores" if threads else "threads", "OMP_PROC_BIND": PROC_BIND[numa]}
        name = f"{allocation} {numa}" if numa else allocation
        slot = LaunchSlot(name, as_bytes(env), as_bytes(defaults), cpus, files)
        return Reservation(slot, parts, nodes, cores)

    def _host_file(self, allocation: str) -> str:
        """A file with the name of its node for each core; all tasks that get these cores have the same."""
        name = hashlib.sha256(allocation.encode()).hexdigest()[:16]
        return os.path.join(self._directory, "hostfiles", self._node, name)


def _variables(run: Run, value: bytes | None, reservation: Reservation, root: bytes) -> Variables:
    return Variables(
        task_id=run.id,
        attempt=run.execution,
        name=run.name,
        index=run.index,
        value=None if value is None else decode(value),
        position=run.position,
        cores=sum(reservation.cores),
        nodes=reservation.nodes,
        cores_per_node=reservation.cores,
        root=decode(root),
    )


# The bits that make a random number a UUID of version 4 (RFC 9562): `uuid4` costs a system call each.
STEP_CLEAR = (0xF << 76) | (0x3 << 62)
STEP_SET = (0x4 << 76) | (0x2 << 62)


def as_bytes(env: Mapping[str, str]) -> dict[bytes, bytes]:
    """Variables that we set, as the system has them."""
    return {encode(name): encode(value) for name, value in env.items()}


def task_environment(run: Run, spec: Spec, slot_env: Mapping[bytes, bytes], value: bytes | None) -> dict[bytes, bytes]:
    """The variables of this task alone; the launcher adds its id and execution."""
    step = {b"QCG_PM_STEP_ID": b"%032x" % (random.getrandbits(128) & ~STEP_CLEAR | STEP_SET)}
    env = {**step, **_array_environment(run)}
    if run.array:
        env[b"PILOTQ_VALUE"] = env[b"PILOTQ_INDEX"] if value is None else value
    if spec.env and spec.flags & FLAG_QCG:
        # In QCG-PilotJob the manager's variables for a job's place override the job's own.
        managed = {name for name in slot_env if name.startswith((b"QCG_PM_", b"SLURM_"))} | step.keys()
        env.update((name, value) for name, value in spec.env.items() if name not in managed)
    elif spec.env:
        env.update(spec.env)
    return env


def _array_environment(run: Run) -> dict[bytes, bytes]:
    return {b"PILOTQ_ARRAY_ID": run.array.encode(), b"PILOTQ_INDEX": b"%d" % run.index} if run.array else {}


def command_line(spec: Spec) -> tuple[list[bytes], bytes]:
    """The arguments, and the script that the launcher writes to a file and names behind them; empty without one."""
    if not spec.script:
        return spec.argv, b""
    if spec.flags & (FLAG_QCG | FLAG_LOGIN):  # as QCG-PilotJob starts them, whatever their first line says
        return [b"bash", *([b"-l"] if spec.flags & FLAG_LOGIN else []), b"-c", spec.script], b""
    text = decode(spec.script)
    if is_command_line(text):
        return [b"bash", b"-c", spec.script], b""
    return [encode(word) for word in interpreter_of(text)], spec.script


def directory_of(spec: Spec, root: bytes) -> bytes:
    """The directory in which a task runs; ``root`` is its submitter's."""
    return below(root, spec.cwd) or root


def below(cwd: bytes, path: bytes) -> bytes:
    """A path as it is from that directory; empty if it is."""
    return path if not path or path.startswith(b"/") else os.path.join(cwd, path)
