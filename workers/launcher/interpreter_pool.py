"""The interpreters of one launcher: which one serves a reservation, the calls they are given, and their ends.

An interpreter is given several calls at once, so that it need not wait for us between them. What it has not read can be
taken back (`workers/launcher/message_socket.py`): exactly the calls that it has not begun.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count

import msgspec

from pilotq.workers.launcher import message_socket
from pilotq.workers.launcher.capture import Capture, reopen
from pilotq.workers.launcher.chain import Line, Running
from pilotq.workers.launcher.interpreter_process import Interpreter, Options
from pilotq.workers.launcher.report_pipe import Uplink
from pilotq.workers.launcher.spawn import Refusal, Spawner, Surroundings
from pilotq.workers.process_tree import Family
from pilotq.workers.protocol import NOTHING, Begun, Call, Exited, Interrupt, Ready, Refused, Returned, Signal

FEED_MAX = 16  # calls that an interpreter has at most, with the one that runs
IDLE_S = 60.0  # an interpreter that has no call for so long ends
EPILOGUE_S = 25.0  # a stopped job's callback is not killed before; see rq_jobs.EPILOGUE_S
LOOK_S = 0.02  # between two looks at what an interpreter without a call has left
LOAD_S = 5.0  # an interpreter that is not ready after this is said to have started all the same
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Returned | Ready).decode
_decode_call = msgspec.msgpack.Decoder(Call | Interrupt).decode


class Interpreters:
    """``leave(key, line)`` is called when nothing of a call is left, ``go(line)`` when its first one may start."""

    def __init__(
        self, options: Options, spawner: Spawner, capture: Capture, family: Family, uplink: Uplink, poll: select.epoll,
        leave: Callable[[int, Line], None], go: Callable[[Line], None],
    ) -> None:  # fmt: skip
        self._options = options
        self._spawner = spawner
        self._capture = capture
        self._family = family
        self._uplink = uplink
        self._poll = poll
        self._leave = leave
        self._go = go
        self._numbers = count(1)
        self.living: dict[int, Interpreter] = {}  # by number, with those that are ending
        self._by_fd: dict[int, Interpreter] = {}
        self._idle: dict[str, Interpreter] = {}  # by place, longest idle first
        self._orphaned: list[int] = []  # interpreters that have ended without a call, and left something
        self._loading: dict[int, Interpreter] = {}  # not ready, and their call not said to have started
        self.young: dict[int, Running] = {}  # the launcher's: not said to have started, oldest first

    # -- giving calls ----------------------------------------------------------------------------------------------

    def feed(self, line: Line) -> bool:
        """Give the calls at the head of a line to its interpreter; False when the pipe up must take more first."""
        interpreter = line.serving
        if interpreter is not None and interpreter.alone:
            return True
        if interpreter is None:
            call, around = line[0]
            assert isinstance(call, Call)
            interpreter = self._find(call, around)
            if interpreter is None:
                line.popleft()
                self._leave(call.key, line)
                return True
        room = min(FEED_MAX, self._options.calls - interpreter.done) - len(interpreter.calls)
        batch: list[Call] = []
        while line and len(batch) < room:
            call, around = line[0]
            if not isinstance(call, Call) or (call.base, call.place) != interpreter.kind:
                break
            batch.append(call)
            line.popleft()
            self._uplink.report(Begun(call.key))
        if batch:
            self._uplink.flush()
            if self._uplink.waiting:
                # Not before who reads the pipe after our death can know of them.
                line.extendleft((call, around) for call in reversed(batch))
                if line.serving is None:
                    self._rest(interpreter, line)
                return False
            self._give(interpreter, batch, around, line)
        return True

    def _give(self, interpreter: Interpreter, batch: list[Call], around: Surroundings | None, line: Line) -> None:
        was_empty = not interpreter.calls
        for number, call in enumerate(batch):
            try:
                message_socket.send(interpreter.sock, _encode(call))
            except OSError:
                # It is full of large calls: the rest comes after them. Or it has ended, and is reaped in a moment.
                line.extendleft((call, around) for call in reversed(batch[number:]))
                break
            out, err = interpreter.files
            files = None if call.stdout else out, None if call.stderr else err
            running = Running(call, interpreter.number, interpreter.pid, files, line)
            interpreter.calls.append((running, call, around))
        line.serving, interpreter.line = interpreter, line
        if was_empty and interpreter.calls and interpreter.ready:
            self._begin(interpreter)

    def _begin(self, interpreter: Interpreter) -> None:
        """Its first call runs."""
        running = interpreter.calls[0][0]
        running.began = time.monotonic()
        running.started = time.time()
        self.young[running.key] = running

    def _find(self, call: Call, around: Surroundings | None) -> Interpreter | None:
        """The interpreter that is there for this place, else one that is started; None when the call was refused."""
        found = self._idle.pop(call.place, None)
        if found is not None and found.kind == (call.base, call.place) and found.done < self._options.calls:
            return found
        if found is not None:
            self._retire(found)
        try:
            if around is None:
                raise Refusal("launch", f"Surroundings {call.base!r} or place {call.place!r} were not sent.")
            began = time.monotonic()
            interpreter = Interpreter(-next(self._numbers), call, around, self._spawner, self._options)
        except (Refusal, OSError) as error:
            reason = error.reason if isinstance(error, Refusal) else "launch"
            self._uplink.report(Refused(call.key, reason, f"Its Python interpreter could not be started: {error}"))
            self._uplink.urge()
            return None
        self._family.born(interpreter.number, interpreter.pid, {}, began)  # no marks: each call has its own
        self.living[interpreter.number] = interpreter
        self._by_fd[interpreter.sock.fileno()] = interpreter
        self._loading[interpreter.number] = interpreter
        self._poll.register(interpreter.sock.fileno(), select.EPOLLIN)
        return interpreter

    def _retire(self, interpreter: Interpreter) -> None:
        """It has no call and gets none: it ends when it sees that nobody writes to it."""
        self._poll.unregister(interpreter.sock.fileno())
        del self._by_fd[interpreter.sock.fileno()]
        interpreter.close()

    # -- what they say ---------------------------------------------------------------------------------------------

    def hear(self, fd: int) -> None:
        """Something has come from an interpreter."""
        interpreter = self._by_fd.get(fd)
        if interpreter is None:
            return
        for record in self._heard(interpreter):
            if isinstance(record, Ready):
                interpreter.ready = True
                if self._loading.pop(interpreter.number, None) is not None and interpreter.calls:
                    self._begin(interpreter)
            else:
                self._returned(interpreter, record)

    def _heard(self, interpreter: Interpreter) -> Iterator[Returned | Ready]:
        while True:
            try:
                data = message_socket.receive(interpreter.sock)
            except (BlockingIOError, ConnectionResetError):
                return
            if not data:
                return
            yield _decode(data)

    def _returned(self, interpreter: Interpreter, record: Returned) -> None:
        running = interpreter.calls[0][0]
        interpreter.done += 1
        interpreter.cpu += record.cpu
        if record.left:
            self._take_back(interpreter)
            interpreter.calls.popleft()
            interpreter.last = (running, record)  # it ends, and then it is seen what lives
            interpreter.alone = True
            return
        interpreter.calls.popleft()
        self.young.pop(running.key, None)
        line = running.line
        if interpreter.calls:
            self._begin(interpreter)
        else:
            self._rest(interpreter, line)
        self._leave(running.key, line)
        self._uplink.report(record)

    def _rest(self, interpreter: Interpreter, line: Line) -> None:
        interpreter.alone = False
        line.serving = None
        place = interpreter.kind[1]
        other = self._idle.pop(place, None)
        if other is not None:
            self._retire(other)
        interpreter.idle_since = time.monotonic()
        self._idle[place] = interpreter

    # -- taking back, ending ---------------------------------------------------------------------------------------

    def _take_back(self, interpreter: Interpreter) -> None:
        """What it has not begun goes back to the head of its line."""
        unread = set()
        while True:
            try:
                data = message_socket.receive(interpreter.theirs, socket.MSG_DONTWAIT)
            except (BlockingIOError, OSError):
                break
            if not data:
                break
            record = _decode_call(data)
            if isinstance(record, Call):
                unread.add(record.key)
        back = [item for item in interpreter.calls if item[1].key in unread]
        if back:
            line = back[0][0].line
            interpreter.calls = deque(item for item in interpreter.calls if item[1].key not in unread)
            line.extendleft((call, around) for _, call, around in reversed(back))
            for running, _, _ in back:
                self.young.pop(running.key, None)
            if not interpreter.calls:
                self._rest(interpreter, line)
                self._go(line)

    def take_back(self, key: int, line: Line) -> None:
        """If a call of a line was given to its interpreter, and has not begun: put it into the line again."""
        if line.serving is not None and any(item[1].key == key for item in line.serving.calls):
            self._take_back(line.serving)

    def signal(self, record: Signal, line: Line) -> None:
        """Interrupt the function of a call, or kill its interpreter."""
        interpreter, key = line.serving, record.key
        if interpreter is None or not interpreter.calls or interpreter.calls[0][0].key != key:
            return
        running, call, _ = interpreter.calls[0]
        if call.epilogue and time.monotonic() < running.began + EPILOGUE_S:
            return
        # Nothing may begin behind it that would be hit in its place.
        self._take_back(interpreter)
        if not interpreter.calls:
            line.popleft()  # it had not begun
            self._uplink.report(Refused(key, "launch", "It was ended before its interpreter was ready."))
            self._leave(key, line)
            return
        interpreter.alone = True
        self.hear(interpreter.sock.fileno())
        if not interpreter.calls or interpreter.calls[0][0].key != key:
            return
        if record.signal != signal.SIGKILL:
            try:
                message_socket.send(interpreter.sock, _encode(Interrupt(key, record.reason)))
                os.kill(interpreter.pid, signal.SIGTERM)
            except OSError:
                pass  # it is ending
        else:
            running.killed = True
            interpreter.stopped = record.reason == "stopped"
            self._family.send(interpreter.number, signal.SIGKILL)

    def died(self, number: int, status: int, cpu: float, max_rss: int) -> tuple[Running, Exited | Returned] | None:
        """An interpreter has been reaped: the call that ended with it, with what is to be reported of that."""
        interpreter = self.living.pop(number)
        if self._by_fd.get(interpreter.sock.fileno()) is interpreter:
            self.hear(interpreter.sock.fileno())
            self._take_back(interpreter)
            self._retire(interpreter)
        loaded = self._loading.pop(number, None) is None
        place = interpreter.kind[1]
        if self._idle.get(place) is interpreter:
            del self._idle[place]
        for file in interpreter.files:
            reopen(file)
        ended: tuple[Running, Exited | Returned] | None = interpreter.last
        if ended is None and not self._go_on_after(interpreter):
            running = self._victim(interpreter, loaded)
            if running is not None:
                now = time.monotonic()
                record = Exited(
                    running.key, interpreter.pid, status, running.started, time.time(), now - running.began,
                    max(cpu - interpreter.cpu, 0.0), max_rss, 0, NOTHING, NOTHING,
                )  # fmt: skip
                ended = (running, record)
        kept = (ended[0].stdout, ended[0].stderr) if ended is not None else ()
        for file in interpreter.files:
            if file not in kept:
                self._capture.collect(file, f"interpreter.{interpreter.pid}")
        line = interpreter.line
        if line is not None and line.serving is interpreter:
            line.serving = None
            if ended is None and line:
                self._go(line)
        if ended is not None:
            task, _, execution = ended[0].name.rpartition(".")
            marks = {b"PILOTQ_TASK_ID": task.encode(), b"PILOTQ_EXECUTION": execution.encode()}
            self._family.mark(number, {**marks, b"PILOTQ_DIR": interpreter.env[b"PILOTQ_DIR"]})
        elif self._family.lives(number):
            self._family.send(number, signal.SIGKILL)
            self._orphaned.append(number)
        return ended

    def _go_on_after(self, interpreter: Interpreter) -> bool:
        """The callback of a stopped job that had to be killed is run, in another interpreter, before the job ends."""
        if not interpreter.stopped or not interpreter.calls:
            return False
        running, call, around = interpreter.calls[0]
        if call.epilogue or not call.fields.get(b"stopped_callback_name"):
            return False
        self.young.pop(running.key, None)
        running.line.appendleft((msgspec.structs.replace(call, epilogue=True), around))
        return True

    def _victim(self, interpreter: Interpreter, loaded: bool) -> Running | None:
        """The call that its end is charged to: what it had begun, or the first one if it could not even load."""
        if interpreter.calls:
            return interpreter.calls[0][0]
        line = interpreter.line
        if loaded or line is None or not line:
            return None
        call, _ = line.popleft()
        return Running(call, interpreter.number, interpreter.pid, interpreter.files, line)

    # -- time ------------------------------------------------------------------------------------------------------

    def next(self) -> float | None:
        """Monotonic time at which `tick` wants to be called."""
        if not self.living and not self._orphaned:
            return None
        moments = [interpreter.began + LOAD_S for interpreter in self._loading.values()]
        if self._idle:
            moments.append(next(iter(self._idle.values())).idle_since + IDLE_S)
        if self._orphaned:
            moments.append(time.monotonic() + LOOK_S)
        return min(moments, default=None)

    def tick(self, now: float) -> None:
        if not self.living and not self._orphaned:
            return
        for interpreter in [i for i in self._loading.values() if now >= i.began + LOAD_S]:
            del self._loading[interpreter.number]
            if interpreter.calls:
                self._begin(interpreter)
        while self._idle:
            place, interpreter = next(iter(self._idle.items()))
            if now < interpreter.idle_since + IDLE_S:
                break
            del self._idle[place]
            self._retire(interpreter)
        for number in list(self._orphaned):
            if self._family.lives(number):
                self._family.send(number, signal.SIGKILL)
            else:
                self._orphaned.remove(number)
