"""Builds the launch of an execution of several processes: files, variables, and the command of its model.

The command lines of launchers are in mpi.py; here is what must be looked up for them: nodes, programs, files.
"""

from __future__ import annotations

import mmap
import os
import shlex
import shutil
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from pilotq.broker.os_strings import decode, encode, printable
from pilotq.broker.slurm.step_environment import ENV_SCHEMA, step_options
from pilotq.broker.store.resources import NodeInfo, NodeShare
from pilotq.broker.tasks.model import ONE_PROCESS_MODELS
from pilotq.broker.tasks.spec import FLAG_QCG, Spec
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.launch_builder import NotYetError, Reservation, UnlaunchableError, as_bytes
from pilotq.workers.gpu_variables import gpu_variables
from pilotq.workers.multinode import agent
from pilotq.workers.multinode.mpi import PREFIXES, Host, file_contents, files_in, variables
from pilotq.workers.protocol import Launch
from pilotq.workers.session import Session

HOSTS_FOLDER = "hosts"  # below the pilot's directory: a folder for each execution that needs one
AGENT = "pilotq-agent"
# Names of launchers, the plain one first; and what the plain one must not lead to.
LAUNCHERS = {
    "openmpi": (("mpirun", "mpirun.openmpi"), ("mpich", "hydra")),
    "mpich": (("mpirun", "mpirun.mpich", "mpiexec.hydra"), ("openmpi", "orterun", "prun", "prterun")),
    "intelmpi": (("mpirun",), ("openmpi", "orterun", "prun", "prterun", "mpich")),
    "srunmpi": (("srun",), ()),
}
# What a program is linked with, and the --mpi that srun then needs: under any other MPICH starts n runs of size 1.
LIBRARIES = ((b"libmpi.so.40", "pmix"), (b"libmpich.so", "pmi2"), (b"libmpi.so.12", "pmi2"))
LOOKUP_WAIT_S = 0.2  # so long the loop waits for what is looked for
LOOKUP_S = 30.0  # ... and so long the task
Found = tuple[dict[str, str], str]  # options of a model, path of its launcher
SCAN_BYTES = 16 << 20  # the names of libraries stand near the beginning of a program


class Register(Protocol):
    """Enters an execution that is about to be launched; returns the name of its agents' socket."""

    def __call__(self, e: Execution, nodes: dict[str, str], folder: str) -> str: ...


class _Lookup:
    """What is looked for in file systems that may hang."""

    def __init__(self, give_up_at: float) -> None:
        self.give_up_at = give_up_at  # monotonic
        self.done = threading.Event()
        self.found: Found | None = None
        self.error: Exception | None = None

    def run(self, find: Callable[[], Found]) -> None:
        try:
            self.found = find()
        except OSError as error:
            self.error = UnlaunchableError("launch", str(error))
        except Exception as error:  # noqa: BLE001  # raised again where it is asked for: the boundary of one task
            self.error = error
        finally:
            self.done.set()


class ParallelLaunchModel:
    """Makes launches by the models of MPI, and over several nodes.

    ``real`` maps core numbers to CPU numbers where they differ. ``register`` is called for each execution, with the
    addresses of its nodes' workers and the folder of its files. ``beside`` runs what may hang in a thread.
    """

    def __init__(
        self, session: Session, directory: str, info: NodeInfo, real: Mapping[int, int], register: Register,
        beside: Callable[[Callable[[], None]], None],
    ) -> None:  # fmt: skip
        self._session = session
        self._info = info
        self._node = info.name
        self._address = info.address
        self._real = real
        self._register = register
        self._beside = beside
        self._lookups: dict[int, _Lookup] = {}  # by the key of the execution
        self._folder = os.path.join(directory, HOSTS_FOLDER, self._node)
        shutil.rmtree(self._folder, ignore_errors=True)  # what a killed worker of this node has left

    def apply(
        self, e: Execution, spec: Spec, reservation: Reservation, env: dict[bytes, bytes], launch: Launch
    ) -> Launch:
        multinode = len(reservation.nodes) > 1
        ranked = spec.model not in ONE_PROCESS_MODELS and sum(reservation.cores) > 1
        if spec.flags & FLAG_QCG and not multinode and "SLURM_JOB_ID" not in os.environ:
            ranked = False  # on one machine QCG-PilotJob starts one process, whatever the model
        if not multinode and not ranked:
            return launch  # one core: the program itself, as with QCG-PilotJob
        addresses, hosts = self._hosts(reservation, "localhost" if spec.model != "srunmpi" else self._node)
        folder = os.path.join(self._folder, f"{e.run.id}.{e.run.execution}")
        files = files_in(folder)
        added = variables(files, _agent_path(self._folder) if multinode else "")
        if os.environ.get(ENV_SCHEMA) == "slurm":
            added["SLURM_HOSTFILE"] = files.hosts
        argv = launch.argv
        if ranked:
            opts, program = self._look_up(e.key, lambda: _find(spec, argv[0], launch.cwd, env))
            if spec.model == "srunmpi" and not opts.get("mpi") and "--mpi" not in opts.get("srun_args", ""):
                e.message = "Its kind of MPI cannot be seen, so srun's default of --mpi was used: give the option mpi."
            if spec.model == "srunmpi":
                added |= _step_variables(env)
            prefix = PREFIXES[spec.model](program, opts, hosts, files)
            added |= prefix.env
            argv = [*argv[: spec.launch_at], *map(encode, prefix.argv), *argv[spec.launch_at :]]
            if spec.model == "srunmpi":
                argv = [*_without_step_options({**env, **launch.env}), *argv]
        contents = {encode(path): text.encode() for path, text in file_contents(files, hosts).items()}
        socket = self._register(e, addresses, folder)
        if multinode:
            added["PILOTQ_AGENT"] = socket
        return msgspec.structs.replace(
            launch, argv=argv, env={**as_bytes(added), **launch.env}, files={**launch.files, **contents}
        )  # fmt: skip

    def _look_up(self, key: int, find: Callable[[], Found]) -> Found:
        """What ``find`` returns or raises, in a thread beside the loop; raises NotYetError until it has come."""
        lookup = self._lookups.get(key)
        now = time.monotonic()
        if lookup is None:
            # What is asked for again finds its own: else it would begin anew, and never be given up.
            self._lookups = {k: one for k, one in self._lookups.items() if now < one.give_up_at + LOOKUP_S}
            lookup = self._lookups[key] = _Lookup(now + LOOKUP_S)
            self._beside(lambda: lookup.run(find))
            lookup.done.wait(LOOKUP_WAIT_S)
        if not lookup.done.is_set():
            if now < lookup.give_up_at:
                raise NotYetError
            raise UnlaunchableError("launch", f"a directory of its PATH has not answered for {LOOKUP_S:.0f} s")
        del self._lookups[key]
        if lookup.error is not None:
            raise lookup.error
        assert lookup.found is not None
        return lookup.found

    def _hosts(self, reservation: Reservation, alone: str) -> tuple[dict[str, str], tuple[Host, ...]]:
        """The workers of its nodes by name, and its nodes as launchers see them; a single one is called ``alone``."""
        if len(reservation.nodes) == 1:
            cpus = _rank_cpus(reservation.parts[0], self._real, self._info.threads)
            return {self._node: self._address}, (Host(alone, cpus),)
        infos = self._session.shared_data.fetch_nodes(reservation.nodes)
        hosts = []
        for part in reservation.parts:
            info = infos.get(part.node)
            if info is None:
                raise UnlaunchableError("worker lost", f"node {part.node} of its reservation is gone")
            cpus = _rank_cpus(part, dict(zip(info.cores, info.cpus, strict=False)), info.threads)
            hosts.append(Host(part.node, cpus, tuple(gpu_variables(info, part.gpus, os.environ).items())))
        return {name: info.address for name, info in infos.items()}, tuple(hosts)


def _rank_cpus(
    part: NodeShare, numbers: Mapping[int, int], threads: Mapping[int, Sequence[int]]
) -> tuple[int | str, ...]:
    """What the rank on each core is bound to: the number of its CPU, or those of all hardware threads of the core."""
    found: list[int | str] = []
    for core in part.cores:
        first = numbers.get(core, core)
        found.append(",".join(map(str, (first, *threads[core]))) if threads.get(core) else first)
    return tuple(found)


def _find(spec: Spec, program: bytes, cwd: bytes, env: Mapping[bytes, bytes]) -> Found:
    """The options of a model, and the path of its launcher."""
    opts = _options(spec, program, cwd, env)
    return opts, opts.get("mpirun") or _find_launcher(spec.model, env)


def _options(spec: Spec, program: bytes, cwd: bytes, env: Mapping[bytes, bytes]) -> dict[str, str]:
    """The options of its model; the --mpi of srun is found from the program where they do not give it."""
    opts = {name: decode(value) for name, value in spec.model_opts.items()}
    if spec.model == "srunmpi" and "mpi" not in opts:
        name = decode(program)
        path = os.path.join(decode(cwd), name) if "/" in name else shutil.which(name, path=_search_path(env))
        if path and (kind := linked_with(path)):
            opts["mpi"] = kind
    return opts


def _agent_path(folder: str) -> str:
    """The path of the launch agent; where only the package is installed, without its programs, one is made there."""
    for path in (os.path.join(sysconfig.get_path("scripts"), AGENT), os.path.join(folder, AGENT)):
        if os.access(path, os.X_OK):
            return path
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o700), "w") as file:
            file.write(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {shlex.quote(agent.__file__)} "$@"\n')
    except OSError as error:
        raise UnlaunchableError("launch", f"the launch agent {path} cannot be made: {error.strerror}") from None
    return path


def _find_launcher(model: str, env: Mapping[bytes, bytes]) -> str:
    """The path of the launcher on the task's PATH. Several MPIs may be installed side by side."""
    names, other_kinds = LAUNCHERS[model]
    path = _search_path(env)
    for name in names:
        found = shutil.which(name, path=path)
        if found is not None and not any(word in os.path.realpath(found) for word in other_kinds):
            return found
    raise UnlaunchableError(
        "not found",
        f"model {model} needs {' or '.join(names)}, and none that is of this kind is on its PATH "
        f"({printable(path)}): load the module that brings it"
        + ("" if model == "srunmpi" else ", or name it in model_opts as mpirun"),
    )


def _search_path(env: Mapping[bytes, bytes]) -> str:
    return decode(env[b"PATH"]) if b"PATH" in env else os.defpath


def _step_variables(env: Mapping[bytes, bytes]) -> dict[str, str]:
    """Variables that let srun make a step in the allocation of this worker."""
    job = os.environ.get("SLURM_JOB_ID") or decode(env.get(b"SLURM_JOB_ID", b""))
    if not job:
        raise UnlaunchableError("launch", "model srunmpi needs an allocation of Slurm, and this worker is in none")
    return {"SLURM_JOB_ID": job, "SLURM_JOBID": job}


def _without_step_options(env: Mapping[bytes, bytes]) -> list[bytes]:
    """The beginning of a command line that keeps from srun what its user has set for steps of their own."""
    unwanted = step_options(map(decode, env))
    return [encode(word) for word in ("env", *(f"--unset={name}" for name in sorted(unwanted)))] if unwanted else []


def linked_with(path: str) -> str:
    """What ``srun --mpi`` must be for this program; empty when its libraries do not show it."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"\x7fELF":
                return ""
            return next((kind for name, kind in LIBRARIES if data.find(name, 0, SCAN_BYTES) >= 0), "")
    except (OSError, ValueError):
        return ""
