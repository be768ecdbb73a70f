"""Starts processes for executions of other nodes on request, and sweeps them at the end.

The worker of an execution's first node, its *primary* node, asks for them (`StartRemote`, on behalf of a launch agent),
and for the sweep at the end. The sweep finds processes by their marks too, as a program may have come here by other
ways (srun, ssh).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from signal import SIGKILL, SIGTERM

from pilotq.broker.errors import ServerUnavailable, StateLost, Superseded
from pilotq.broker.log import log
from pilotq.broker.ownership import private_folder
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import RemoteEnded, StartRemote, StopRemote, Sweep, Swept, ToWorker
from pilotq.workers import process_tree
from pilotq.workers.execution.hooks import NodeActions
from pilotq.workers.execution.launch_builder import LaunchBuilder, refusal
from pilotq.workers.execution.launcher_pool import LauncherPool
from pilotq.workers.execution.memory_limit import watched
from pilotq.workers.memory_watch import WatchedTask
from pilotq.workers.protocol import (
    Captured,
    Exited,
    FromLauncher,
    GroupSwept,
    Launch,
    LaunchBase,
    LaunchSlot,
    Refused,
    Signal,
    Started,
    tail,
)
from pilotq.workers.shortage import RETRY_S

# Of remote processes, for their launchers: they never meet the keys of this node's own executions.
FIRST_KEY = 1 << 48
SCAN_S = 0.02  # between two scans for what was killed
OUTPUT_BYTES = 4096  # of what a process wrote, in the message of its end
NOT_STARTED = 255  # the status that a shell's remote commands have when there was no connection
_Execution = tuple[str, str, int]  # address of its primary worker, id, number
Send = Callable[[str, ToWorker], None]  # to a worker by its address; "" is the dispatcher


class _RemoteProcess:
    """One process of another node's execution. ``key`` names it for its launcher."""

    __slots__ = (
        "allocation", "began", "execution", "exited", "id", "key", "kill_at", "launch_at", "launcher", "number",
        "memory", "output_paths", "peak", "prepared", "primary", "reported", "too_much",
    )  # fmt: skip

    def __init__(self, key: int, request: StartRemote) -> None:
        self.key = key
        self.primary = request.host  # its worker's address
        self.number = request.number
        self.id = request.id
        self.execution = request.execution
        self.allocation = request.allocation
        self.memory = request.memory
        self.peak = 0
        self.too_much = ""  # why it was killed, when that was because of memory
        self.launcher = 0
        self.exited: Exited | None = None
        self.output_paths = (b"", b"")  # where its outputs can be read while something of it lives
        self.kill_at: float | None = None  # monotonic: it has got SIGTERM
        self.reported = False  # its primary node knows of its end
        self.prepared: tuple[LaunchBase, LaunchSlot, Launch] | None = None  # what its launcher gets
        self.began = time.monotonic()
        self.launch_at: float | None = None  # monotonic: a shortage prevented its launch, which is tried again then

    @property
    def of(self) -> _Execution:
        return self.primary, self.id, self.execution


class _PendingSweep:
    """A sweep that is not confirmed yet. A request replaces an earlier one for the same execution."""

    __slots__ = ("clean_scans", "give_up_at", "kill_at", "request", "scan_at", "terminated")

    def __init__(self, request: Sweep, now: float, patience: float) -> None:
        self.request = request
        self.kill_at = now + request.grace
        self.give_up_at = self.kill_at + patience
        self.scan_at = now
        self.clean_scans = 0
        self.terminated = False


class RemoteProcesses:
    """Keeps the processes of a node for executions of other nodes, and the sweeps that were asked of it.

    ``address`` is this worker's, ``send`` sends a message to another one; ``directory`` is the pilot's. A ``virtual``
    node shares its machine with others of the pilot.
    """

    def __init__(
        self, address: str, directory: str, launchers: LauncherPool, builder: LaunchBuilder, send: Send,
        settings: Settings, node: NodeActions, *, virtual: bool,
    ) -> None:  # fmt: skip
        self._address = address
        self._directory = directory
        self._launchers = launchers
        self._builder = builder
        self._send = send
        self._settings = settings
        self._node = node
        self._memory: dict[_Execution, WatchedTask] = {}
        self._keys = FIRST_KEY
        self._processes: dict[int, _RemoteProcess] = {}
        # By primary node: a request that is repeated after a lost connection is known by its number.
        self._newest: dict[str, int] = {}
        self._sweeps: dict[tuple[str, str, int], _PendingSweep] = {}
        self._scratch = _scratch_of(directory, address.rpartition(":")[0]) if virtual else ""
        self.close()  # what a killed worker of this node has left

    def __len__(self) -> int:
        return len(self._processes) + len(self._sweeps)

    def executions(self) -> list[tuple[str, str]]:
        """Address of the primary worker, and allocation, of each execution that has a process here."""
        return sorted({(p.primary, p.allocation) for p in self._processes.values()})

    # -- requests of primary nodes ---------------------------------------------------------------------------------

    def start(self, request: StartRemote) -> None:
        if request.number <= self._newest.get(request.host, 0):
            return  # sent twice
        self._newest[request.host] = request.number
        self._keys += 1
        process = _RemoteProcess(self._keys, request)
        try:
            base, place, launch = self._builder.build_remote(request, process.key)
            if self._scratch:
                # Open MPI names its files in shared memory by host and rank on it: two nodes of one machine would meet.
                self._scratch = private_folder(self._scratch)
                launch.env[b"OMPI_MCA_orte_tmpdir_base"] = os.fsencode(self._scratch)
                launch.env[b"OMPI_MCA_btl_vader_backing_directory"] = os.fsencode(self._scratch)
            process.prepared = base, place, launch
            self._launch(process)
        except Exception as error:  # noqa: BLE001  # the boundary of one process of another node's task
            lost = isinstance(error, (ServerUnavailable, StateLost, Superseded))
            text = f"{refusal(error)}\n".encode("utf-8", "backslashreplace")
            self._report(process, RemoteEnded(request.number, NOT_STARTED, b"", text, lost=lost))
            return
        self._processes[process.key] = process

    def _launch(self, process: _RemoteProcess) -> None:
        assert process.prepared is not None
        launcher = self._launchers.serving(-1)
        launcher.launch(*process.prepared)
        process.launcher, process.launch_at = launcher.number, None

    def stop(self, message: StopRemote, now: float) -> None:
        for process in self._processes.values():
            if (process.primary, process.number) == (message.host, message.number):
                process.reported = True  # nobody waits for its end
                self._terminate(process, self._settings.kill_grace_s, now)

    def sweep(self, request: Sweep, now: float) -> None:
        key = (request.host, request.id, request.execution)
        self._sweeps[key] = _PendingSweep(request, now, self._settings.sweep_confirm_s)
        for process in self._processes.values():
            if self._concerns(request, process):
                self._terminate(process, request.grace, now)

    @staticmethod
    def _concerns(request: Sweep, process: _RemoteProcess) -> bool:
        same = (process.id, process.execution) == (request.id, request.execution)
        return process.primary == request.host and (same or not request.id)

    # -- records of launchers --------------------------------------------------------------------------------------

    def receive_record(self, record: FromLauncher) -> bool:
        """True if it is of a process that another node's execution has, or had, here."""
        process = self._processes.get(record.key)
        if process is None:
            return record.key > FIRST_KEY  # its launcher was given up
        now = time.monotonic()
        if isinstance(record, Refused) and record.passing and now - process.began < self._settings.shortage_s:
            process.launch_at = now + RETRY_S
        elif isinstance(record, Refused):
            del self._processes[record.key]
            self._report(process, RemoteEnded(process.number, NOT_STARTED, b"", f"{record.message}\n".encode()))
        elif isinstance(record, Started):
            process.output_paths = (record.stdout_path, record.stderr_path)
            self._watch(process, record.pid)
        elif isinstance(record, Exited):
            process.exited = record
            if not record.remaining:
                self._ended(process, record.stdout, record.stderr)
            else:
                # It went into the background. Its agent returns; it stays until the execution is swept.
                out, err = tail(record.stdout, OUTPUT_BYTES), tail(record.stderr, OUTPUT_BYTES)
                self._report(process, RemoteEnded(process.number, _status(record.status), out, err))
        elif isinstance(record, GroupSwept):
            self._ended(process, record.stdout, record.stderr)
        return True

    def _ended(self, process: _RemoteProcess, stdout: Captured, stderr: Captured) -> None:
        del self._processes[process.key]
        if not self._processes:
            self.close()
        process.peak = task.peak if (task := self._memory.get(process.of)) is not None else 0
        self._ended_of(process)
        status = _status(process.exited.status) if process.exited is not None else NOT_STARTED
        out, err = tail(stdout, OUTPUT_BYTES), tail(stderr, OUTPUT_BYTES)
        self._report(process, RemoteEnded(process.number, status, out, err))

    def _watch(self, process: _RemoteProcess, pid: int) -> None:
        """All processes of an execution here are held to its limit together."""
        task = self._memory.get(process.of)
        if task is None:
            task = self._memory[process.of] = watched(process.of, process.id, process.execution, process.memory)
        self._node.memory_watch.add(task, pid)

    def over_limit(self, task: WatchedTask, why: str, now: float) -> None:
        """Kill what an execution has here: its primary node ends the rest, when it learns of this."""
        for process in self._processes.values():
            if process.of == task.name:
                process.too_much = why
                self._signal(process, SIGKILL)
                process.kill_at = now + 1.0

    def _ended_of(self, process: _RemoteProcess) -> None:
        """It is gone: with the last one of its execution here nothing is left to be measured."""
        others = any(other.of == process.of for other in self._processes.values())
        if not others and (task := self._memory.pop(process.of, None)) is not None:
            self._node.memory_watch.remove(task)

    def launcher_ended(self, number: int) -> None:
        """Its processes become children of this worker, which kills all such orphans."""
        for process in [p for p in self._processes.values() if p.launcher == number]:
            del self._processes[process.key]
            self._ended_of(process)
            text = b"Its launcher has died.\n"
            self._report(process, RemoteEnded(process.number, NOT_STARTED, b"", text, lost=True))

    def leave(self, grace: float, now: float) -> None:
        """Their primary nodes, which mostly leave too, end them; what is left at the end of the grace is killed."""
        for process in self._processes.values():
            process.kill_at = min(now + grace, process.kill_at or now + grace)

    def close(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _report(self, process: _RemoteProcess, message: RemoteEnded) -> None:
        if not process.reported:
            process.reported = True
            message.peak, message.too_much = process.peak, process.too_much
            self._send(process.primary, message)

    # -- time ------------------------------------------------------------------------------------------------------

    def next(self) -> float | None:
        moments = [p.kill_at for p in self._processes.values() if p.kill_at is not None]
        moments += [p.launch_at for p in self._processes.values() if p.launch_at is not None]
        moments += [s.scan_at for s in self._sweeps.values()]
        return min(moments, default=None)

    def tick(self, now: float) -> None:
        for process in list(self._processes.values()):
            if process.launch_at is not None and process.kill_at is not None:
                del self._processes[process.key]  # it is to end before it could begin
                text = b"It was ended before it could be started.\n"
                self._report(process, RemoteEnded(process.number, NOT_STARTED, b"", text))
            elif process.launch_at is not None and now >= process.launch_at:
                self._launch(process)
            elif process.kill_at is not None and now >= process.kill_at:
                process.kill_at = now + 1.0  # a process that was forking while it was killed is found by the next one
                self._signal(process, SIGKILL)
        for key, sweep in list(self._sweeps.items()):
            if now >= sweep.scan_at and self._scan(sweep, now):
                del self._sweeps[key]
                node, _, incarnation = self._address.rpartition(":")
                request = sweep.request
                to = request.host if request.id else ""
                self._send(to, Swept(node, int(incarnation), request.host, request.round))

    def _scan(self, sweep: _PendingSweep, now: float) -> bool:
        """Signal what is there; True when nothing is left for sure."""
        request = sweep.request
        running = any(self._concerns(request, process) for process in self._processes.values())
        if now < sweep.kill_at:
            left = self._signal_marked(request, SIGTERM, send=not sweep.terminated)
            sweep.terminated = True
        else:
            left = self._signal_marked(request, SIGKILL, send=True)
        sweep.clean_scans = 0 if left or running else sweep.clean_scans + 1
        sweep.scan_at = now + (SCAN_S if now < sweep.give_up_at else 1.0)
        if not sweep.clean_scans and sweep.give_up_at <= now < sweep.give_up_at + 1.0:
            log(
                f"of task {request.id or request.host} processes {left} cannot be killed: its cores here stay reserved",
                level="error",
                task=request.id,
            )
        return sweep.clean_scans >= process_tree.CLEAN_SCANS

    def _signal_marked(self, request: Sweep, number: int, *, send: bool) -> list[int]:
        """The processes that bear its marks, signalled with ``send``. Those of launchers are reported by them."""

        def belongs(env: Mapping[str, str]) -> bool:
            if env.get("PILOTQ_DIR") != self._directory or env.get("PILOTQ_HOST") != request.host:
                return False
            name = (env.get("PILOTQ_TASK_ID", ""), env.get("PILOTQ_EXECUTION", ""))
            return not request.id or name == (request.id, str(request.execution))

        return process_tree.kill_marked(belongs, number if send else 0, seconds=0)

    def _terminate(self, process: _RemoteProcess, grace: float, now: float) -> None:
        if process.kill_at is None:
            self._signal(process, SIGTERM)
        process.kill_at = min(now + grace, process.kill_at or now + grace)

    def _signal(self, process: _RemoteProcess, number: int) -> None:
        launcher = self._launchers.living.get(process.launcher)
        if launcher is not None:
            launcher.send(Signal(process.key, number))


def _scratch_of(directory: str, node: str) -> str:
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()  # noqa: S108 - a name of its own
    name = hashlib.sha256(os.fsencode(f"{directory} {node}")).hexdigest()[:16]
    return os.path.join(shared, f"pilotq-{os.getuid()}-{name}")


def _status(status: int) -> int:
    """The exit code of a shell that waited for it; ``status`` is as of waitpid."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
