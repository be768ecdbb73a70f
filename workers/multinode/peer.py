"""What a node does for executions of other nodes: starts processes for them, and ends whatever is left of them.

The worker of an execution's first node is its *host*. It asks for processes (``Guest``, by way of its launch agent),
and for the sweep at the end, which is by marks too: a program may have come here by other ways (srun, ssh).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from signal import SIGKILL, SIGTERM

from pilotq.broker.errors import ServerUnavailable, StateLost, Superseded
from pilotq.broker.processes import log
from pilotq.broker.settings import Settings
from pilotq.broker.store.messages import Guest, GuestEnded, GuestStop, Sweep, Swept, ToWorker
from pilotq.workers import process_tree
from pilotq.workers.execution.launch_builder import Preparer, UnlaunchableError
from pilotq.workers.execution.launcher_pool import Launchers
from pilotq.workers.protocol import Captured, Exited, Refused, Signal, Started, Up, tail
from pilotq.workers.protocol import Swept as LeftoversSwept

FIRST_KEY = 1 << 48  # of guests, for their launchers: they never meet those of this node's own executions
LOOK_S = 0.02  # between two looks at what was killed
CLEAN_LOOKS = 2  # a process in the middle of exec has no environment for a moment: one clean look is no proof
TELL_BYTES = 4096  # of what a process wrote, in the word of its end
NOT_STARTED = 255  # the status that a shell's remote commands have when there was no connection
Tell = Callable[[str, ToWorker], None]  # to a host by its address; "" is the dispatcher


class _Process:
    """One process that was asked for. ``key`` names it for its launcher."""

    __slots__ = (
        "allocation", "execution", "exited", "host", "id", "key", "kill_at", "launcher", "live", "number", "told",
    )  # fmt: skip

    def __init__(self, key: int, guest: Guest) -> None:
        self.key = key
        self.host = guest.host
        self.number = guest.number
        self.id = guest.id
        self.execution = guest.execution
        self.allocation = guest.allocation
        self.launcher = 0
        self.exited: Exited | None = None
        self.live = ("", "")  # where its outputs can be read while something of it lives
        self.kill_at: float | None = None  # monotonic: it was told to end
        self.told = False  # the host knows of its end


class _Sweeping:
    """A sweep that was asked for and is not confirmed. Equal requests replace each other."""

    __slots__ = ("asked", "clean", "give_up_at", "kill_at", "look_at", "termed")

    def __init__(self, asked: Sweep, now: float, patience: float) -> None:
        self.asked = asked
        self.kill_at = now + asked.grace
        self.give_up_at = self.kill_at + patience
        self.look_at = now
        self.clean = 0
        self.termed = False


class Guests:
    """``address`` is this worker's, ``tell`` sends a word to a host; ``directory`` is the pilot's.

    A ``virtual`` node shares its machine with others of the pilot.
    """

    def __init__(
        self, address: str, directory: str, launchers: Launchers, preparer: Preparer, tell: Tell, settings: Settings,
        *, virtual: bool,
    ) -> None:  # fmt: skip
        self._address = address
        self._directory = directory
        self._launchers = launchers
        self._preparer = preparer
        self._tell = tell
        self._settings = settings
        self._keys = FIRST_KEY
        self._processes: dict[int, _Process] = {}
        self._newest: dict[str, int] = {}  # by host: what is said again after a lost connection is known by its number
        self._sweeps: dict[tuple[str, str, int], _Sweeping] = {}
        self._scratch = _scratch_of(directory, address.rpartition(":")[0]) if virtual else ""
        self.close()  # what a killed worker of this node has left

    def __len__(self) -> int:
        return len(self._processes) + len(self._sweeps)

    def held(self) -> list[tuple[str, str]]:
        """Host and allocation of each execution that something was started for."""
        return sorted({(p.host, p.allocation) for p in self._processes.values()})

    # -- what hosts say --------------------------------------------------------------------------------------------

    def start(self, guest: Guest) -> None:
        if guest.number <= self._newest.get(guest.host, 0):
            return  # said twice
        self._newest[guest.host] = guest.number
        self._keys += 1
        process = _Process(self._keys, guest)
        try:
            base, place, launch = self._preparer.prepare_guest(guest, process.key)
        except UnlaunchableError as error:
            self._answer(process, GuestEnded(guest.number, NOT_STARTED, b"", f"{error}\n".encode()))
            return
        except (ServerUnavailable, StateLost, Superseded) as error:
            self._answer(process, GuestEnded(guest.number, NOT_STARTED, b"", f"{error}\n".encode(), lost=True))
            return
        if self._scratch:
            # Open MPI names its files in shared memory by host and rank on it: two nodes of one machine would meet.
            os.makedirs(self._scratch, mode=0o700, exist_ok=True)
            launch.env["OMPI_MCA_orte_tmpdir_base"] = self._scratch
            launch.env["OMPI_MCA_btl_vader_backing_directory"] = self._scratch
        launcher = self._launchers.serving(-1)
        process.launcher = launcher.number
        self._processes[process.key] = process
        launcher.launch(base, place, launch)

    def stop(self, message: GuestStop, now: float) -> None:
        for process in self._processes.values():
            if (process.host, process.number) == (message.host, message.number):
                process.told = True  # nobody waits for its end
                self._end(process, self._settings.kill_grace_s, now)

    def sweep(self, asked: Sweep, now: float) -> None:
        key = (asked.host, asked.id, asked.execution)
        self._sweeps[key] = _Sweeping(asked, now, self._settings.confirm_s)
        for process in self._processes.values():
            if self._concerns(asked, process):
                self._end(process, asked.grace, now)

    def _concerns(self, asked: Sweep, process: _Process) -> bool:
        same = (process.id, process.execution) == (asked.id, asked.execution)
        return process.host == asked.host and (same or not asked.id)

    # -- what launchers say ----------------------------------------------------------------------------------------

    def heard(self, record: Up) -> None:
        process = self._processes.get(record.key)
        if process is None:
            return  # it was taken from that launcher
        if isinstance(record, Refused):
            del self._processes[record.key]
            self._answer(process, GuestEnded(process.number, NOT_STARTED, b"", f"{record.message}\n".encode()))
        elif isinstance(record, Started):
            process.live = (record.stdout_path, record.stderr_path)
        elif isinstance(record, Exited):
            process.exited = record
            if not record.left:
                self._ended(process, record.stdout, record.stderr)
            else:
                # It went into the background. Whoever asked for it goes on; it stays until the execution is swept.
                out, err = (tail(Captured(path=path, length=_size(path)), TELL_BYTES) for path in process.live)
                self._answer(process, GuestEnded(process.number, _status(record.status), out, err))
        elif isinstance(record, LeftoversSwept):
            self._ended(process, record.stdout, record.stderr)

    def _ended(self, process: _Process, stdout: Captured, stderr: Captured) -> None:
        del self._processes[process.key]
        if not self._processes:
            self.close()
        status = _status(process.exited.status) if process.exited is not None else NOT_STARTED
        self._answer(process, GuestEnded(process.number, status, tail(stdout, TELL_BYTES), tail(stderr, TELL_BYTES)))

    def launcher_ended(self, number: int) -> None:
        """What it had started comes home to the control process, which kills all that comes home."""
        for process in [p for p in self._processes.values() if p.launcher == number]:
            del self._processes[process.key]
            words = b"Its launcher has died.\n"
            self._answer(process, GuestEnded(process.number, NOT_STARTED, b"", words, lost=True))

    def leave(self, grace: float, now: float) -> None:
        """Their hosts, which mostly leave with us, end them; what is left at the end of the grace is killed."""
        for process in self._processes.values():
            process.kill_at = min(now + grace, process.kill_at or now + grace)

    def close(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _answer(self, process: _Process, message: GuestEnded) -> None:
        if not process.told:
            process.told = True
            self._tell(process.host, message)

    # -- time ------------------------------------------------------------------------------------------------------

    def next(self) -> float | None:
        moments = [p.kill_at for p in self._processes.values() if p.kill_at is not None]
        moments += [s.look_at for s in self._sweeps.values()]
        return min(moments, default=None)

    def tick(self, now: float) -> None:
        for process in self._processes.values():
            if process.kill_at is not None and now >= process.kill_at:
                process.kill_at = now + 1.0  # a process that was forking while it was killed is found by the next one
                self._signal(process, SIGKILL)
        for key, sweeping in list(self._sweeps.items()):
            if now >= sweeping.look_at and self._look(sweeping, now):
                del self._sweeps[key]
                node, _, incarnation = self._address.rpartition(":")
                asked = sweeping.asked
                self._tell(asked.host if asked.id else "", Swept(node, int(incarnation), asked.host, asked.round))

    def _look(self, sweeping: _Sweeping, now: float) -> bool:
        """Signal what is there; True when nothing is left for sure."""
        asked = sweeping.asked
        ours = [p for p in self._processes.values() if self._concerns(asked, p)]
        if now < sweeping.kill_at:
            left = self._marked(asked, SIGTERM, tell=not sweeping.termed)
            sweeping.termed = True
        else:
            left = self._marked(asked, SIGKILL, tell=True)
        sweeping.clean = 0 if left or ours else sweeping.clean + 1
        sweeping.look_at = now + (LOOK_S if now < sweeping.give_up_at else 1.0)
        if not sweeping.clean and sweeping.give_up_at <= now < sweeping.give_up_at + 1.0:
            log(f"of task {asked.id or asked.host} processes {left} cannot be killed: its cores here stay taken")
        return sweeping.clean >= CLEAN_LOOKS

    def _marked(self, asked: Sweep, number: int, *, tell: bool) -> list[int]:
        """Processes of it, by their marks. Those that launchers have are told by them."""

        def belongs(env: Mapping[str, str]) -> bool:
            if env.get("PILOTQ_DIR") != self._directory or env.get("PILOTQ_HOST") != asked.host:
                return False
            name = (env.get("PILOTQ_TASK_ID", ""), env.get("PILOTQ_EXECUTION", ""))
            return not asked.id or name == (asked.id, str(asked.execution))

        return process_tree.kill_marked(belongs, number if tell else 0, seconds=0)

    def _end(self, process: _Process, grace: float, now: float) -> None:
        if process.kill_at is None:
            self._signal(process, SIGTERM)
        process.kill_at = min(now + grace, process.kill_at or now + grace)

    def _signal(self, process: _Process, number: int) -> None:
        launcher = self._launchers.living.get(process.launcher)
        if launcher is not None:
            launcher.tell(Signal(process.key, number))


def _scratch_of(directory: str, node: str) -> str:
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()  # noqa: S108 - a name of its own
    name = hashlib.sha256(f"{directory} {node}".encode()).hexdigest()[:16]
    return os.path.join(shared, f"pilotq-{os.getuid()}-{name}")


def _status(status: int) -> int:
    """The exit code of a shell that waited for it; ``status`` is as of waitpid."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _size(path: str) -> int:
    try:
        return os.path.getsize(path) if path else 0
    except OSError:
        return 0  # a moment ago it was there: it only helps to understand
