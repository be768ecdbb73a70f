"""Connects a worker to the server: its inbox, its reports, its heartbeat. Nothing here blocks but `register`.

Two connections. One has an XREAD of the inbox outstanding at all times: what was read stays there until it is
confirmed, so that nothing is lost with a reply that never arrives. The other carries reports, in order, any number
outstanding. A report stays in `_sent` until its answer has come; after a lost connection all of `_sent` is sent again,
which the scripts know by execution and call numbers.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from pilotq.broker import failpoints
from pilotq.broker.errors import PilotFailed, ServerUnavailable, Superseded
from pilotq.broker.log import log
from pilotq.broker.process_identity import machine_id, start_time
from pilotq.broker.rq.commands import WorkerCommands
from pilotq.broker.settings import Settings
from pilotq.broker.store import keys, library
from pilotq.broker.store.connection import Address, Argument, Connection, ReplyError, ScriptMissing
from pilotq.broker.store.messages import (
    Draining,
    EndReport,
    ExecutionEnd,
    NodeLost,
    NodeReport,
    PartlyReleased,
    Run,
    RunEnd,
    StateReport,
    StateRequest,
    Swept,
    TasksReturned,
    ToWorker,
    decode_inbox,
)
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.store.store import FIRST_REPORT, Store, iso, pack, translate
from pilotq.workers.shared_data import SharedData

__all__ = ["Session", "iso"]
WORKER_TTL_S = 480  # as RQ's own workers
BLOCK_S = 30  # for so long the server waits for a message; then it replies that there is none
# Calls whose message is delivered once for each number, which is their second argument.
NUMBERED = ("complete", "return_unstarted")
OF_RECORDS = frozenset({"complete", "return_unstarted", "report_started", "heartbeat"})  # they read those of tasks
LAST_TRY_S = 0.1  # an attempt to connect takes no less
CONFIRM_ENTRIES = 50  # entries of the inbox that were read before they are removed from it


SPEC_AT = 15  # in a row of a report: the number of the script's argument that has the spec of the next try
QUEUE_ID_ARGUMENTS = 2  # the script counts its arguments from 1, and the first one is the queue id
ROWS = 7  # the place of the reports among the arguments of complete.lua, behind the queue id; then two for each


def _not_kept(_: str) -> str:
    raise OSError("this worker has no file for it")


Apart = Callable[[], list[EndReport]]  # makes a report for each element of a run


class _Call(NamedTuple):
    script: str  # "" for a plain command
    args: tuple[Argument, ...]
    reports: tuple[tuple[str, int], ...] = ()
    apart: Callable[[], None] | None = None  # posts the same in several calls, for one record each
    message: ToWorker | None = None  # of a message to another worker
    at: float = 0.0  # monotonic: when it was sent
    runs: tuple[Apart, ...] = ()  # what makes the reports of the elements of its runs

    def step(self, moment: str) -> str:
        return f"{self.script or 'inbox trim'}:{moment}"


class Session:
    """Receives messages for a worker and sends its reports: call `listen`, wait on `filenos()`, then call `pump`.

    Lost connections are made again by `pump`, with pauses; what had not been confirmed is sent again. `pump` raises
    StateLost when the server came back with another queue id; Superseded when a newer incarnation of this node has
    registered, or this one was given up. ``contact_s`` is how long this worker may be `out_of_touch` (0: for ever).
    """

    def __init__(self, address: Address, queue_id: str, settings: Settings) -> None:
        self.settings = settings
        self.address = address
        self.contact_s = settings.node_timeout_s
        # While the server is away nothing may hold up the worker for long.
        self._inbox_link = Connection(address, timeout=settings.connect_s)
        self._report_link = Connection(address, timeout=settings.connect_s)
        self._commands = WorkerCommands(address, settings.kill_grace_s)
        self._fetch_link = Connection(address)
        self._links = (self._inbox_link, self._report_link, self._fetch_link, self._commands.connection)
        self.shared_data = SharedData(self._fetch_link, self._limit_timeouts)
        self._store = Store(self._report_link, queue_id, settings)
        self._info: NodeInfo | None = None
        self._record = b""  # of this node, as it stands on the server
        self._to_report_state = False
        self._fields: dict[str, str] = {}  # of RQ's worker record
        self._read_to = "0"  # id of the last entry of the inbox that was read
        self._to_ask = False  # the last question for the inbox was answered
        self._unconfirmed = 0  # entries that were read, but are still in the inbox
        self._call_number = 0
        self._sent: deque[_Call] = deque()
        self._verdicts: list[tuple[str, int, str]] = []
        self._undelivered: list[tuple[str, ToWorker]] = []
        self.keep_result: Callable[[str], str] = _not_kept  # of SpilledResults: in a file, for the server has no room
        self._down = False
        self._retry_at = 0.0
        self._asked_at = 0.0  # monotonic: when the inbox was asked for
        self._last_contact = 0.0  # monotonic: when the last call that was answered had been sent

    # -- registration -------------------------------------------------------------------------------------------

    def register(self, info: NodeInfo) -> int:
        """Register this node as a new incarnation (its number is returned and kept), as an RQ worker too."""
        store = Store(self._fetch_link, self._store.queue_id, self.settings)
        self._last_contact = time.monotonic()
        info.incarnation = int(store.write("INCR", keys.NEXT_INCARNATION))
        info.machine, info.start = machine_id(), start_time(info.pid) or 0
        self._info = info
        now = iso(time.time())
        fields = {
            "birth": now, "last_heartbeat": now, "queues": "default", "pid": str(info.pid), "hostname": info.host,
            "ip_address": "", "version": "3", "python_version": platform.python_version(), "state": "idle",
        }  # fmt: skip
        state = pack(StateReport(info.name, info.incarnation, 0, [], {}))
        record = msgspec.json.encode(info)
        self._fields, self._record = fields, record
        counts = {"successful_job_count": "0", "failed_job_count": "0", "total_working_time": "0"}
        flat = [text for pair in {**fields, **counts}.items() for text in pair]
        if not store.run("register", info.name, info.incarnation, record, state, WORKER_TTL_S, *flat):
            raise Superseded(f"a newer worker of node {info.name} has registered")
        contact = self._fetch_link.call("HGET", keys.CONTROL, "contact")
        self.contact_s = self.settings.node_timeout_s if contact is None else float(contact)
        self._connect()
        return info.incarnation

    def deregister(self) -> None:
        """Leave RQ's registry and the list of nodes: after a clean end."""
        info = self._registered()
        message = pack(NodeLost(info.name, info.incarnation, "it has left", clean=True))
        store = Store(self._fetch_link, self._store.queue_id, self.settings)
        store.run("deregister", info.name, info.incarnation, message)

    def _registered(self) -> NodeInfo:
        if self._info is None:
            raise PilotFailed("this worker has not registered")
        return self._info

    # -- waiting and pumping -------------------------------------------------------------------------------------

    def filenos(self) -> list[int]:
        """Descriptors to wait on for reading; they change after a reconnect, so ask before each wait."""
        return [link.fileno() for link in self._links if link is not self._fetch_link and link.connected]

    def pause(self, now: float) -> float:
        """Seconds until `pump` wants to be called though nothing arrives."""
        if self._down:
            return max(self._retry_at - now, 0.0)
        return 60.0 if self._report_link.connected and self._inbox_link.connected else 0.0

    def out_of_touch(self, now: float) -> float:
        """Seconds for which it has not been known that the server receives from this worker; ``now`` is monotonic.

        Counted from when a call was sent that was answered: the dispatcher counts from its receipt, never earlier.
        """
        return now - self._last_contact

    def pump(self, now: float) -> list[ToWorker]:
        """Read what has arrived; returns the inbox messages. ``now`` is monotonic. Never waits for a reply."""
        messages: list[ToWorker] = []
        try:
            if self._down:
                if now < self._retry_at:
                    return messages
                self._connect()
            messages = self._read_inbox()  # these count, whatever happens below
            messages += self._commands.read()
            self._read_answers()
            if self._to_report_state:  # the dispatcher may have forgotten this node meanwhile
                self._to_report_state = False
                messages.append(StateRequest(0))
            self._check_replies(now)
        except ServerUnavailable:
            self._disconnect(now)
        return messages

    def _connect(self) -> None:
        """Open both connections, ask for the inbox, send again what has no answer."""
        for link in (self._inbox_link, self._report_link):
            link.close()
            self._limit_timeouts()
            link.connect()
        self._commands.listen(self._registered().name)
        self._limit_timeouts()
        self._load_scripts()
        self._down = False
        self.shared_data.end_pause()
        self._limit_timeouts()
        self._ask_inbox()
        again, self._sent = self._sent, deque()
        for call in again:
            self._post(call)

    def _limit_timeouts(self) -> None:
        """No attempt to find the server again goes on when tasks must be ended, since others get them soon after."""
        left = self._last_contact + self.contact_s - time.monotonic() if self._down and self.contact_s else math.inf
        for link in self._links:
            link.timeout = min(self.settings.connect_s, max(left, LAST_TRY_S))

    def _disconnect(self, now: float) -> None:
        for link in (self._inbox_link, self._report_link, self._commands.connection):
            link.close()
        self._down = True
        # An attempt takes time while nobody answers: at most half of the worker's time goes into it.
        self._retry_at = now + max(0.1, time.monotonic() - now)

    def _check_replies(self, now: float) -> None:
        """Raise when an answer is overdue: a cut network reports no error, and what was under way may be lost."""
        late = self.settings.reply_s
        if (self._sent and now - self._sent[0].at > late) or now - self._asked_at > BLOCK_S + late:
            raise ServerUnavailable(f"the server at {self._report_link.address} has not answered for {late:g} s")

    def listen(self) -> None:
        """Ask for the next messages, after `pump`: when those it has returned were dealt with, which is more urgent."""
        if self._to_ask and not self._down:
            try:
                self._ask_inbox()
            except ServerUnavailable:
                self._inbox_link.close()  # the next pump finds out

    def _ask_inbox(self) -> None:
        self._to_ask = False
        info = self._registered()
        # The bound only serves connections that died without an error; a reply comes as soon as there is one.
        inbox = keys.inbox(info.name, info.incarnation)
        self._asked_at = time.monotonic()
        self._inbox_link.post("XREAD", "COUNT", 100, "BLOCK", BLOCK_S * 1000, "STREAMS", inbox, self._read_to)

    def _read_inbox(self) -> list[ToWorker]:
        found: list[ToWorker] = []
        for reply in self._inbox_link.replies():
            failpoints.hit("inbox read")
            if isinstance(reply, Exception):
                raise reply if not isinstance(reply, ReplyError) else translate(reply)
            for entry, (_, packed) in reply[0][1] if reply is not None else ():
                messages, damaged = decode_inbox(packed)
                found += messages
                for sentence in damaged:
                    log(f"what the dispatcher has sent is damaged: {sentence}", level="error")
                self._read_to = entry.decode()
                self._unconfirmed += 1
            self._to_ask = True
        if self._unconfirmed >= CONFIRM_ENTRIES:
            self._confirm_inbox()
        return found

    def _confirm_inbox(self) -> None:
        """Remove what was read, but for the last entry."""
        info = self._registered()
        self._unconfirmed = 0
        self._post(_Call("", ("XTRIM", keys.inbox(info.name, info.incarnation), "MINID", self._read_to)))

    def _read_answers(self) -> None:
        for reply in self._report_link.replies():
            failpoints.hit(self._sent[0].step("after"))
            call = self._sent.popleft()
            if isinstance(reply, ScriptMissing):
                # It did not run, and later calls may have: it goes again as the newest.
                try:
                    self._load_scripts()
                except ServerUnavailable:
                    self._sent.appendleft(call)
                    raise
                if call.script in NUMBERED:
                    self._call_number += 1
                    call = call._replace(args=(call.args[0], self._call_number, *call.args[2:]))
                self._post(call)
                continue
            if isinstance(reply, ServerUnavailable):
                self._sent.appendleft(call)  # it is out of memory or disk: nothing was written, all is sent again
                raise reply
            if isinstance(reply, ReplyError):
                self._script_failed(call, reply)
            elif call.script == "complete":
                self._read_verdicts(call, reply)
            elif call.script == "send" and reply == 0 and call.message is not None:
                self._undelivered.append((f"{call.args[0]!s}:{call.args[1]!s}", call.message))
            elif call.script == "heartbeat" and reply != 1:
                self._heartbeat_refused(reply)
            self._last_contact = max(self._last_contact, call.at)

    def _read_verdicts(self, call: _Call, reply: list[bytes]) -> None:
        number = len(call.reports)
        for (task_id, execution), verdict in zip(call.reports, reply[:number], strict=True):
            if verdict != b"full":
                self._verdicts.append((task_id, execution, verdict.decode()))
        for make, verdict in zip(call.runs, reply[number:], strict=True):
            if verdict == b"apart":
                self.post_ends(make(), [])
        if b"full" in reply:
            self._post_spilled(call, [place for place, verdict in enumerate(reply) if verdict == b"full"])

    def _heartbeat_refused(self, reply: int) -> None:
        name = self._registered().name
        if reply == 0:
            raise Superseded(f"the worker of node {name} was given up, or there is a newer one")
        log("the record of this node on the server is damaged or gone: it is written again", level="warning")
        self._post(_Call("guarded_write", ("HSET", keys.NODES, name, self._record)))
        self._to_report_state = True

    def _script_failed(self, call: _Call, reply: ReplyError) -> None:
        """A record that a script cannot work with must not take with it what was reported in the same call.

        Raises where it is not about a record: then this worker has no place in the queue any more.
        """
        error = translate(reply)
        if error is not reply or call.script not in OF_RECORDS:
            raise error
        if call.apart is not None:
            call.apart()
            return
        log(
            f"the server cannot take what {call.script} says of {call.reports}: the record is damaged: {reply}",
            level="error",
        )
        self._verdicts += [(task_id, execution, "stale") for task_id, execution in call.reports]

    def _load_scripts(self) -> None:
        """The server may have none of the scripts. Not on the report link: its order must stand."""
        library.load(self._fetch_link)

    def _post(self, call: _Call) -> None:
        self._sent.append(call._replace(at=time.monotonic()))
        if not self._down and self._report_link.connected:
            try:
                command = self._store.command(call.script, *call.args) if call.script else call.args
                failpoints.hit(call.step("before"))
                self._report_link.post(*command)
                failpoints.hit(call.step("sent"))
            except ServerUnavailable:
                self._report_link.close()  # the next pump finds out, and sends it again

    # -- reports ------------------------------------------------------------------------------------------------

    def post_ends(
        self, reports: list[EndReport], ends: list[ExecutionEnd], runs: Sequence[tuple[RunEnd, Apart]] = ()
    ) -> None:
        """Report ended executions, and what became of their slots, in one script call.

        Each of ``runs`` comes with what makes the reports of its elements, for the case that they are needed.
        """
        info = self._registered()
        self._call_number += 1
        message = pack(NodeReport(info.name, info.incarnation, ends))
        args = self._store.complete_arguments(
            self._address(), self._call_number, message, reports, [run for run, _ in runs]
        )
        apart_of_runs = tuple(make for _, make in runs)

        def apart() -> None:
            for report in (*reports, *(report for make in apart_of_runs for report in make())):
                self.post_ends([report], [])
            self.post_ends([], ends)

        ids = tuple((r.id, r.execution) for r in reports)
        several = runs or (reports and (ends or len(reports) > 1))
        self._post(_Call("complete", tuple(args), ids, apart if several else None, runs=apart_of_runs))

    def _post_spilled(self, call: _Call, places: list[int]) -> None:
        """Report some ends of a call again, with their results in a file: the server has no room for them."""
        info = self._registered()
        packed = call.args[ROWS]
        assert isinstance(packed, bytes)
        rows = msgspec.msgpack.decode(packed)
        again: list[Argument] = []
        for place in places:
            entry, text = call.args[ROWS + 1 + 2 * place : ROWS + 3 + 2 * place]
            assert isinstance(text, str)
            try:
                text = self.keep_result(text)
            except OSError as error:
                log(
                    f"the result of task {rows[place][0]} is lost: the server's memory is full, and {error}",
                    level="error",
                    task=rows[place][0],
                )
                rows[place][2:4], text = ("failed", "result"), ""
            again += (entry, text)
        specs: list[Argument] = []
        behind = FIRST_REPORT + 2 * len(places) + 1  # the place of the specs among the arguments of the script
        for place in places:
            if len(rows[place]) > SPEC_AT and rows[place][SPEC_AT]:
                specs.append(call.args[rows[place][SPEC_AT] - QUEUE_ID_ARGUMENTS])
                rows[place][SPEC_AT] = behind + len(specs) - 1
        self._call_number += 1
        message = pack(NodeReport(info.name, info.incarnation, []))  # what became of the slots was told
        head = (call.args[0], self._call_number, message, *call.args[3:ROWS], pack([rows[place] for place in places]))
        args = (*head, *again, pack([]), *specs)
        self._post(_Call("complete", args, tuple(call.reports[place] for place in places)))

    def verdicts(self) -> list[tuple[str, int, str]]:
        """(id, execution, verdict) of ends the server has answered since the last call.

        ``ok`` counted; ``retry`` counted, and the task is queued again; ``stale`` a newer execution stands, or the
        record is gone: discard the outcome.
        """
        found, self._verdicts = self._verdicts, []
        return found

    def post_starts(self, starts: list[tuple[str, int, str, str, bytes, bytes]]) -> None:
        """Launches that live longer than a moment: (id, execution, allocation, ISO start, stdout path, stderr path)."""

        def apart() -> None:
            for start in starts:
                self.post_starts([start])

        args: tuple[Argument, ...] = tuple(value for start in starts for value in start)
        ids = tuple((start[0], start[1]) for start in starts)
        self._post(_Call("report_started", args, ids, apart if len(starts) > 1 else None))

    def post_returned(self, tasks: list[Run], counts: dict[str, int]) -> None:
        """Tasks that were not started go back to the head of their lists (oldest first); counts by class."""
        info = self._registered()
        self._call_number += 1
        message = pack(TasksReturned(info.name, info.incarnation, counts))
        now = time.time()
        late = (f"{now:.6f}", iso(now), self.settings.failed_ttl_s)

        def apart() -> None:
            for task in tasks:
                self.post_returned([task], {})
            self.post_returned([], counts)

        packed = pack([(run.id, run.execution, run.class_name, run.array, run.position) for run in tasks])
        args: tuple[Argument, ...] = (self._address(), self._call_number, message, packed, *late)
        ids = tuple((run.id, run.execution) for run in tasks)
        self._post(_Call("return_unstarted", args, ids, apart if tasks and (counts or len(tasks) > 1) else None))

    def post_state(self, state: StateReport) -> None:
        """Answer to StateRequest: all slots and prefetched tasks."""
        self._post(_Call("guarded_write", ("RPUSH", keys.EVENTS, pack(state))))

    def post_event(self, message: PartlyReleased | Swept | Draining) -> None:
        """A message to the dispatcher; sent again after a lost connection."""
        self._post(_Call("guarded_write", ("RPUSH", keys.EVENTS, pack(message))))

    def post_draining(self) -> None:
        """Report that this node takes no more tasks, and deregisters when all has ended."""
        info = self._registered()
        self.post_event(Draining(info.name, info.incarnation))

    def send(self, address: str, message: ToWorker) -> None:
        """A message to the worker ``address`` (name:incarnation); sent again after a lost connection."""
        node, _, incarnation = address.rpartition(":")
        self._post(_Call("send", (node, incarnation, pack([message])), message=message))

    def undelivered(self) -> list[tuple[str, ToWorker]]:
        """Messages to workers that are gone, since the last call: address, message."""
        found, self._undelivered = self._undelivered, []
        return found

    def post_heartbeat(self, fields: dict[str, str], running: Sequence[tuple[str, int, float, str]] = ()) -> None:
        """Refresh the worker's record in RQ's registry; its tools show these executions: id, number, start, class."""
        info = self._registered()
        if self._unconfirmed:
            self._confirm_inbox()
        flat = tuple(text for pair in {**self._fields, **fields}.items() for text in pair)
        digest = hashlib.sha1(self._record, usedforsecurity=False).hexdigest()
        args: tuple[Argument, ...] = (info.name, info.incarnation, WORKER_TTL_S, pack(running), digest, *flat)
        apart = (lambda: self.post_heartbeat(fields)) if running else None  # it only helps people
        self._post(_Call("heartbeat", args, apart=apart))

    def unsent(self) -> int:
        """Reports that the server has not confirmed yet."""
        return len(self._sent)

    def _address(self) -> str:
        info = self._registered()
        return f"{info.name}:{info.incarnation}"

    def close(self) -> None:
        for link in self._links:
            link.close()
