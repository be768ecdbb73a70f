"""Runs a worker under test: its process, with a session that is connected to the test by a socket, not to a server.

`SocketSession` implements the interface of workers/session.py; `Host` is the test's end. All else in the worker's
process, and its launchers, is the real thing.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pilotq.broker import errors
from pilotq.broker.settings import Settings
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.journal_runs import Line
from pilotq.broker.store.messages import (
    EndReport,
    ExecutionEnd,
    Lease,
    Run,
    RunEnd,
    StateReport,
    Stop,
    ToWorker,
    decode_inbox,
)
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.tasks.spec import FLAG_ARRAY, Spec
from pilotq.broker.tasks.submit_context import SubmitContext
from pilotq.workers.session import Apart
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

SIZE = struct.Struct("<I")
HERE = Path(__file__).resolve()


def as_bytes(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a description or message with texts as bytes, as they travel."""

    def encoded(value: Any) -> Any:
        if isinstance(value, dict):
            return {encoded(key): encoded(item) for key, item in value.items()}
        return os.fsencode(value) if isinstance(value, (str, Path)) else value

    strings = ("script", "cwd", "stdin", "stdout", "stderr", "env")
    return {name: encoded(value) if name in strings else value for name, value in fields.items()}


class Channel:
    """Pickled objects over a socket, read without waiting."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""

    def send(self, item: object) -> None:
        data = pickle.dumps(item)
        self.sock.sendall(SIZE.pack(len(data)) + data)

    def receive(self) -> list[Any]:
        while True:
            try:
                data = self.sock.recv(1 << 20, socket.MSG_DONTWAIT)
            except (BlockingIOError, ConnectionResetError):
                break
            if not data:
                break
            self._buffer += data
        found = []
        while len(self._buffer) >= SIZE.size:
            size = SIZE.unpack_from(self._buffer)[0] + SIZE.size
            if len(self._buffer) < size:
                break
            found.append(pickle.loads(self._buffer[SIZE.size : size]))
            self._buffer = self._buffer[size:]
        return found


class SocketSession:
    """The worker's end. Every call is passed on to the test; the test sends messages, records to fetch, and answers."""

    contact_s = 0.0

    @property
    def shared_data(self) -> SocketSession:
        """It serves what launches fetch, too."""
        return self

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._shared: dict[str, SubmitContext] = {}
        self._values: dict[str, list[bytes]] = {}
        self._jobs: dict[str, dict[bytes, bytes]] = {}
        self._away = False
        self._unanswered = 0
        self._verdicts: list[tuple[str, int, str]] = []
        self._sent: list[tuple[str, ToWorker]] = []

    def register(self, info: NodeInfo) -> int:
        self._channel.send(("register", info))
        return 7

    def filenos(self) -> list[int]:
        return [self._channel.sock.fileno()]

    def listen(self) -> None:
        """The test sends without being asked."""

    def pause(self, now: float) -> float:
        return 60.0

    def out_of_touch(self, now: float) -> float:
        return 0.0

    def pump(self, now: float) -> list[ToWorker]:
        messages = []
        for kind, *args in self._channel.receive():
            if kind == "message":
                messages += decode_inbox(b"\x91" + args[0])[0]  # a list of one
            elif kind == "shared":
                self._shared[args[0]] = args[1]
            elif kind == "values":
                self._values[args[0]] = args[1]
            elif kind == "job":
                self._jobs[args[0]] = args[1]
            elif kind == "away":
                self._away = args[0]
            elif kind == "answer":
                self._unanswered -= 1
                self._verdicts += args[0]
            else:
                raise getattr(errors, args[0])("the test wants it")
        return messages

    def post_ends(
        self, reports: list[EndReport], ends: list[ExecutionEnd], runs: Sequence[tuple[RunEnd, Apart]] = ()
    ) -> None:
        reports = [*reports, *(report for _, make in runs for report in make())]
        self._unanswered += 1
        self._channel.send(("ends", reports, ends))

    def verdicts(self) -> list[tuple[str, int, str]]:
        found, self._verdicts = self._verdicts, []
        return found

    def post_starts(self, starts: list[tuple[str, int, str, str, bytes, bytes]]) -> None:
        self._channel.send(("starts", starts))

    def post_returned(self, tasks: list[Run], counts: dict[str, int]) -> None:
        self._channel.send(("back", [(run.id, run.execution) for run in tasks], counts))

    def post_state(self, state: StateReport) -> None:
        self._channel.send(("state", state))

    def send(self, address: str, message: ToWorker) -> None:
        self._channel.send(("send", address, message))
        self._sent.append((address, message))

    def undelivered(self) -> list[tuple[str, ToWorker]]:
        """There is no other node."""
        found, self._sent = self._sent, []
        return found

    def post_draining(self) -> None:
        self._channel.send(("draining",))

    def post_event(self, message: object) -> None:
        self._channel.send(("event", message))

    def fetch_nodes(self, names: tuple[str, ...]) -> dict[str, NodeInfo]:
        return {name: NodeInfo(name, 7, "here", 1, [0, 1]) for name in names}

    def post_heartbeat(self, fields: dict[str, str], running: Sequence[tuple[str, int, float, str]] = ()) -> None:
        self._channel.send(("heartbeat", fields))

    def unsent(self) -> int:
        return self._unanswered

    def fetch_shared(self, key: str) -> SubmitContext:
        if self._away:
            raise errors.ServerUnavailable("the test has taken the server away")
        return self._shared[key]

    def read_jobs(self, ids: Sequence[str]) -> None:
        self._channel.send(("read jobs", list(ids)))

    def forget_jobs(self) -> None:
        pass

    def fetch_job(self, task_id: str) -> dict[bytes, bytes]:
        return self._jobs[task_id]

    def fetch_value(self, array: str, position: int) -> bytes:
        return self._values[array][position]

    def deregister(self) -> None:
        self._channel.send(("deregister",))

    def close(self) -> None:
        self._channel.sock.close()


class Ending(msgspec.Struct):
    """One reported end: the report, the journal entry in it, and what was reported of the slot (None: nothing)."""

    report: EndReport
    entry: JournalEntry
    end: ExecutionEnd | None


class Host:
    """The test's end: starts the worker, plays dispatcher and server. Use as a context manager."""

    def __init__(self, directory: Path, *, cores: str = "0,1", **settings: Any) -> None:
        self.directory = directory
        self.calls: list[tuple[Any, ...]] = []
        self.endings: dict[str, Ending] = {}
        self.answering = True
        self.verdict = "ok"
        self.log = directory / "worker.log"
        ours, theirs = socket.socketpair()
        with theirs, open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.worker_host", str(theirs.fileno()), str(directory), cores,
                 msgspec.json.encode(settings).decode()],
                pass_fds=[theirs.fileno()], stderr=log, start_new_session=True, cwd=ROOT,
            )  # fmt: skip
        self._channel = Channel(ours)
        self.shared("base")

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        launchers = []
        if self.process.poll() is None:
            launchers = self.launchers()
            self.process.kill()
        self.process.wait()
        self._channel.sock.close()
        # Without the worker process they kill what they have, and end.
        wait_until(lambda: not any(map(alive, launchers)), what="end of the launchers")

    # -- messages to the worker -------------------------------------------------------------------------------------

    def send(self, message: ToWorker) -> None:
        self._channel.send(("message", msgspec.msgpack.encode(message)))

    def to_session(self, kind: str, *args: object) -> None:
        """Set up the `SocketSession` itself: values, away, raise, answer."""
        self._channel.send((kind, *args))

    def shared(self, key: str, **env: str) -> None:
        path = os.environ["PATH"]
        self._channel.send(
            (
                "shared",
                key,
                SubmitContext(
                    {name.encode(): value.encode() for name, value in {"PATH": path, **env}.items()},
                    os.fsencode(self.directory),
                    0o022,
                    {},
                ),
            )
        )

    def run(
        self, task_id: str, *argv: str, slot: int = 0, allocation: str = "n1[0]", execution: int = 1,
        shared: str = "base", class_name: str = "c", array: str = "", index: int = -1, position: int = 0,
        crashes: int = 0, **spec: Any,
    ) -> None:  # fmt: skip
        packed = msgspec.msgpack.encode(Spec([a.encode() for a in argv], **as_bytes(spec)))
        allocation = allocation if slot else ""
        self.send(
            Run(
                task_id, execution, slot, allocation, class_name, "", 1.0, 2.0, shared, array, index, position, 0, "",
                packed, crashes,
            )
        )  # fmt: skip

    def lease(
        self, array: str, number: int, *argv: str, slot: int = 1, allocation: str = "n1[0]", class_name: str = "c",
        first: int = 0, index: int = 0, step: int = 1, flags: int = FLAG_ARRAY, **spec: Any,
    ) -> None:  # fmt: skip
        """Elements of an array, the first one with a slot, if it is not 0. With FLAG_VALUES or FLAG_BUNDLE the session
        has their values."""
        packed = msgspec.msgpack.encode(Spec([a.encode() for a in argv], flags=flags, **as_bytes(spec)))
        self.send(
            Lease(
                array, 1, class_name, "", 1.0, 2.0, "base", first, number, index, step, 0, "", packed,
                [(slot, allocation)] if slot else [],
            )
        )  # fmt: skip

    def stop(self, task_id: str, reason: str = "canceled", execution: int = 0) -> None:
        self.send(Stop(task_id, execution, reason))

    # -- calls of the worker -----------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Read the calls that have arrived; ends are answered unless ``answering`` was switched off."""
        for call in self._channel.receive():
            self.calls.append(call)
            if call[0] != "ends":
                continue
            _, reports, ends = call
            ends = [end._replace(number=1) for end in ends for _ in range(end.number)]
            end_by_id = dict(zip([r.id for r in reports], ends, strict=True)) if len(ends) == len(reports) else {}
            for report in reports:
                fields = msgspec.msgpack.decode(report.entry)
                line = Line(*fields).entry() if isinstance(fields, list) else JournalEntry(**fields)
                self.endings[report.id] = Ending(report, line, end_by_id.get(report.id))
            if self.answering:
                self.answer(reports)

    def answer(self, reports: list[EndReport]) -> None:
        self.to_session("answer", [(r.id, r.execution, self.verdict) for r in reports])

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        def seen() -> Any:
            self.listen()
            return condition()

        try:
            return wait_until(seen, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}\nthe worker's log:\n{self.log.read_text()}\ncalls: {self.calls}") from None

    def end_of(self, task_id: str) -> Ending:
        return self.until(lambda: self.endings.get(task_id), f"end of {task_id}")

    def reported(self, kind: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == kind]

    def wait(self) -> int:
        """The exit code of the worker; its calls until then are read."""
        self.until(lambda: self.process.poll() is not None, "end of the worker")
        self.listen()
        return self.process.returncode

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def launchers(self) -> list[int]:
        """Pids of the worker's children that are launchers."""
        return [pid for pid in children(self.process.pid) if b"pilotq.workers.launcher.launcher" in command(pid)]


def children(parent: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(name))
    return found


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def alive(pid: int) -> bool:
    """False for zombies, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def main(argv: list[str]) -> int:
    from pilotq.workers import worker

    fd, directory, cores, settings = argv
    session = SocketSession(socket.socket(fileno=int(fd)))
    info = NodeInfo("n1", 0, "here", os.getpid(), [int(c) for c in cores.split(",")])
    return worker.serve(session, directory, info, {}, msgspec.json.decode(settings, type=Settings))  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
