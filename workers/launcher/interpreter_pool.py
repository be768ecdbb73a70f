"""Keeps the interpreters of one launcher: which one serves a slot, the calls they are given, and their ends.

An interpreter is given several calls at once, so that it need not wait for the launcher between them. Those that it has
not read can be retracted (`workers/launcher/message_socket.py`): exactly the calls that it has not begun.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Protocol

import msgspec

from pilotq.broker.os_strings import printable
from pilotq.broker.tasks.functions import RESULT_SUFFIX
from pilotq.workers.launcher import message_socket
from pilotq.workers.launcher.capture import Capture, reopen
from pilotq.workers.launcher.chain import Chain, Running
from pilotq.workers.launcher.interpreter_process import InterpreterProcess, LauncherOptions
from pilotq.workers.launcher.report_pipe import ReportPipe
from pilotq.workers.launcher.spawn import LaunchContext, Refusal, Spawner
from pilotq.workers.process_tree import ProcessTracker
from pilotq.workers.protocol import NO_OUTPUT, Begun, Call, Exited, Interrupt, Ready, Refused, Returned, Signal
from pilotq.workers.shortage import is_shortage

CALLS_MAX = 256  # that an interpreter has at most, with the one that runs
CALLS_BYTES = 1 << 20  # ... and no more of them once they have so many bytes of arguments
REST_S = 0.005  # for so long at most what has returned is not read while an interpreter has other calls
REST_MIN_S = 0.0005  # a shorter rest saves nothing
OVERHEAD_S = 20e-6  # what a call takes beside its function
IDLE_S = 60.0  # an interpreter that has no call for so long ends
CALLBACK_S = 25.0  # a stopped job's callback is not killed before; see STOPPED_CALLBACK_S in broker/rq/jobs.py
POLL_S = 0.02  # how often processes that an interpreter without a call has left are killed, until none lives
LOAD_S = 5.0  # a call of an interpreter that is not ready after this is reported as started all the same
_encode = msgspec.msgpack.Encoder().encode


class Complete(Protocol):
    """No process of a call is left: its chain goes on. See `Launcher`."""

    def __call__(self, key: int, chain: Chain, *, held_back: bool = False) -> None: ...


class InterpreterPool:
    """Starts interpreters, feeds them with the calls of chains, and replaces those that end.

    ``complete(key, chain)`` is called when no process of a call is left, ``set_startable(chain)`` when the first launch
    of a chain may start.
    """

    def __init__(
        self, options: LauncherOptions, spawner: Spawner, capture: Capture, tracker: ProcessTracker,
        reports: ReportPipe, poll: select.epoll, complete: Complete,
        set_startable: Callable[[Chain], None],
    ) -> None:  # fmt: skip
        self._options = options
        self._spawner = spawner
        self._capture = capture
        self._tracker = tracker
        self._reports = reports
        self._poll = poll
        self._complete = complete
        self._set_startable = set_startable
        self._numbers = count(1)
        self.living: dict[int, InterpreterProcess] = {}  # by number, with those that are ending
        self._by_fd: dict[int, InterpreterProcess] = {}
        self._idle: dict[str, InterpreterProcess] = {}  # by slot, longest idle first
        self._unswept: list[int] = []  # interpreters that have ended without a call, and left processes
        self._resting: dict[int, float] = {}  # sockets that are not read before that time, so that reads bring several
        self._loading: dict[int, InterpreterProcess] = {}  # not ready, and their call not reported as started
        self.unannounced: dict[int, Running] = {}  # the launcher's: not reported as started, oldest first

    # -- giving calls ----------------------------------------------------------------------------------------------

    def feed(self, chain: Chain) -> bool:
        """Give the calls at the head of a chain to its interpreter; False when the report pipe must take more first."""
        interpreter = self.living.get(chain.interpreter)
        if interpreter is not None and interpreter.draining:
            return True
        if interpreter is None:
            call, context = chain[0]
            assert isinstance(call, Call)
            try:
                interpreter = self._acquire(call, context)
            except (Refusal, OSError) as error:
                self._refuse(call, chain, error)
                return True
        room = min(CALLS_MAX, self._options.calls - interpreter.calls_done) - len(interpreter.calls)
        size = sum(len(call.payload) for _, call, _ in interpreter.calls)
        batch: list[tuple[Call, LaunchContext | None]] = []
        while chain and len(batch) < room and (size < CALLS_BYTES or not (batch or interpreter.calls)):
            call, context = chain[0]
            if not isinstance(call, Call) or (call.base, call.slot) != interpreter.context_key:
                break
            size += len(call.payload)
            batch.append((call, context))
            chain.popleft()
        if batch:
            self._reports.report(Begun(batch[0][0].key, [call.key for call, _ in batch[1:]]))
            self._reports.flush()
            if self._reports.full:
                # No call may start that the reader of the pipe would not know of after our death.
                chain.extendleft(reversed(batch))
                if not chain.interpreter:
                    self._set_idle(interpreter, chain)
                return False
            self._give(interpreter, batch, chain)
        return True

    def _give(
        self, interpreter: InterpreterProcess, batch: list[tuple[Call, LaunchContext | None]], chain: Chain
    ) -> None:
        was_empty = not interpreter.calls
        for position, (call, context) in enumerate(batch):
            try:
                message_socket.send(interpreter.sock, _encode(call))
            except OSError as error:
                # Full of large calls: the rest follows later. Or the interpreter has ended, and is reaped soon.
                chain.extendleft(reversed(batch[position:]))
                if not interpreter.calls and error.errno not in (errno.EPIPE, errno.ECONNRESET):
                    self._set_idle(interpreter, chain)
                    self._refuse(call, chain, error)
                    return
                break
            out, err = interpreter.files
            files = None if call.stdout else out, None if call.stderr else err
            running = Running(call, interpreter.number, interpreter.pid, files, chain)
            interpreter.calls.append((running, call, context))
        chain.interpreter, interpreter.chain = interpreter.number, chain
        if was_empty and interpreter.calls and interpreter.ready:
            self._begin(interpreter)

    def _begin(self, interpreter: InterpreterProcess) -> None:
        """Its first call runs from now on."""
        running = interpreter.calls[0][0]
        running.began = time.monotonic()
        running.started = time.time()
        self.unannounced[running.key] = running

    def _acquire(self, call: Call, context: LaunchContext | None) -> InterpreterProcess:
        """The idle interpreter of this slot, else one that is started; raises Refusal or OSError."""
        found = self._idle.pop(call.slot, None)
        if found is not None and found.context_key == (call.base, call.slot) and found.calls_done < self._options.calls:
            return found
        if found is not None:
            self._retire(found)
        if context is None:
            raise Refusal("launch", f"Base {call.base!r} or slot {call.slot!r} was not sent or cannot be used.")
        began = time.monotonic()
        interpreter = InterpreterProcess(-next(self._numbers), call, context, self._spawner, self._options)
        # No marks: each call has its own.
        self._tracker.add(interpreter.number, interpreter.pid, {}, began, call.slot, context.cpus)
        self._tracker.set_subreaper(interpreter.number)
        self.living[interpreter.number] = interpreter
        self._by_fd[interpreter.sock.fileno()] = interpreter
        self._loading[interpreter.number] = interpreter
        self._poll.register(interpreter.sock.fileno(), select.EPOLLIN)
        return interpreter

    def _refuse(self, call: Call, chain: Chain, error: Exception) -> None:
        """The first call of a chain has no interpreter."""
        chain.popleft()
        reason, passing = error.reason if isinstance(error, Refusal) else "launch", is_shortage(error)
        text = printable(f"Its Python interpreter could not be started: {error}")
        self._reports.report(Refused(call.key, reason, text, passing))
        self._reports.request_wake()
        self._complete(call.key, chain, held_back=passing)

    def _retire(self, interpreter: InterpreterProcess) -> None:
        """It has no call and gets none: it ends when it sees that its socket is closed."""
        self._resting.pop(interpreter.sock.fileno(), None)
        self._poll.unregister(interpreter.sock.fileno())
        del self._by_fd[interpreter.sock.fileno()]
        interpreter.close()

    # -- messages from interpreters --------------------------------------------------------------------------------

    def receive(self, fd: int) -> None:
        """The socket of an interpreter has become readable, or has rested."""
        interpreter = self._by_fd.get(fd)
        if interpreter is None:
            return
        if self._resting.pop(fd, None) is not None:
            self._poll.modify(fd, select.EPOLLIN)
        number, seconds = 0, 0.0
        for message in interpreter.received():
            if isinstance(message, Ready):
                interpreter.ready = True
                if self._loading.pop(interpreter.number, None) is not None and interpreter.calls:
                    self._begin(interpreter)
            else:
                number, seconds = number + 1, seconds + message.seconds
                self._returned(interpreter, message)
        if number and len(interpreter.calls) > 1 and not interpreter.draining:
            self._rest(interpreter, (seconds / number + OVERHEAD_S) * len(interpreter.calls) / 2)

    def _rest(self, interpreter: InterpreterProcess, seconds: float) -> None:
        """Do not read what returns until half of the calls that it has may be done: it goes on by itself meanwhile."""
        if seconds >= REST_MIN_S:
            self._resting[interpreter.sock.fileno()] = time.monotonic() + min(seconds, REST_S)
            self._poll.modify(interpreter.sock.fileno(), 0)

    def _returned(self, interpreter: InterpreterProcess, returned: Returned) -> None:
        if not interpreter.calls or interpreter.calls[0][0].key != returned.key:
            return  # a function has written to its socket
        running = interpreter.calls[0][0]
        self._drop_unwanted(running)
        interpreter.calls_done += 1
        interpreter.cpu += returned.cpu
        if returned.remaining:
            self._retract_unread(interpreter)
            interpreter.calls.popleft()
            interpreter.last_return = (running, returned)  # it exits: then its remaining processes are counted
            interpreter.draining = True
            return
        interpreter.calls.popleft()
        self.unannounced.pop(running.key, None)
        chain = running.chain
        if interpreter.calls:
            self._begin(interpreter)
        else:
            self._set_idle(interpreter, chain)
        self._complete(running.key, chain)
        self._reports.report(returned)

    def _drop_unwanted(self, running: Running) -> None:
        """Remove the file of a large result that nobody is told of."""
        if running.unwanted:
            with suppress(OSError):
                os.unlink(os.path.join(self._options.directory, running.name + RESULT_SUFFIX))

    def _set_idle(self, interpreter: InterpreterProcess, chain: Chain) -> None:
        interpreter.draining = False
        chain.interpreter = 0
        slot = interpreter.context_key[1]
        other = self._idle.pop(slot, None)
        if other is not None:
            self._retire(other)
        interpreter.idle_since = time.monotonic()
        self._idle[slot] = interpreter

    # -- retracting, ending ----------------------------------------------------------------------------------------

    def retract(self, key: int, chain: Chain) -> None:
        """If a call of a chain was given to its interpreter, and has not begun: put it into the chain again."""
        interpreter = self.living.get(chain.interpreter)
        if interpreter is not None and any(item[1].key == key for item in interpreter.calls):
            self._retract_unread(interpreter)

    def _retract_unread(self, interpreter: InterpreterProcess) -> None:
        """The calls that it has not begun return to the head of its chain."""
        unread = interpreter.take_unread()
        retracted = [item for item in interpreter.calls if item[1].key in unread]
        if retracted:
            chain = retracted[0][0].chain
            interpreter.calls = deque(item for item in interpreter.calls if item[1].key not in unread)
            chain.extendleft((call, context) for _, call, context in reversed(retracted))
            for running, _, _ in retracted:
                self.unannounced.pop(running.key, None)
            if not interpreter.calls:
                self._set_idle(interpreter, chain)
                self._set_startable(chain)

    def signal(self, message: Signal, chain: Chain) -> None:
        """Interrupt the function of a call, or kill its interpreter."""
        interpreter, key = self.living.get(chain.interpreter), message.key
        if interpreter is not None:
            self.receive(interpreter.sock.fileno())  # it may have come to its end
        if interpreter is None or not interpreter.calls or interpreter.calls[0][0].key != key:
            return
        running, call, _ = interpreter.calls[0]
        if call.callback_only and time.monotonic() < running.began + CALLBACK_S:
            return
        # No other call may begin behind it: the signal would hit that one.
        self._retract_unread(interpreter)
        if not interpreter.calls:
            chain.popleft()  # it had not begun
            self._reports.report(Refused(key, "launch", "It was ended before its interpreter was ready."))
            self._complete(key, chain)
            return
        interpreter.draining = True
        self.receive(interpreter.sock.fileno())
        if not interpreter.calls or interpreter.calls[0][0].key != key:
            return
        running.unwanted = True
        if message.signal != signal.SIGKILL:
            try:
                message_socket.send(interpreter.sock, _encode(Interrupt(key, message.reason)))
                os.kill(interpreter.pid, signal.SIGTERM)
            except OSError:
                pass  # it is ending
        else:
            running.killed = True
            interpreter.job_stopped = message.reason == "stopped"
            self._tracker.send_signal(interpreter.number, signal.SIGKILL)

    def reaped(self, number: int, status: int, cpu: float, max_rss: int) -> tuple[Running, Exited | Returned] | None:
        """An interpreter has ended and was waited for: the call that ended with it, and the report of that."""
        interpreter = self.living.pop(number)
        if self._by_fd.get(interpreter.sock.fileno()) is interpreter:
            self.receive(interpreter.sock.fileno())
            self._retract_unread(interpreter)
            self._retire(interpreter)
        loaded = self._loading.pop(number, None) is None
        slot = interpreter.context_key[1]
        if self._idle.get(slot) is interpreter:
            del self._idle[slot]
        for file in interpreter.files:
            reopen(file)
        ended: tuple[Running, Exited | Returned] | None = interpreter.last_return
        if ended is None and not self._requeue_callback(interpreter):
            running = self._failed_call(interpreter, loaded)
            if running is not None:
                self._drop_unwanted(running)
                now = time.monotonic()
                exited = Exited(
                    running.key, interpreter.pid, status, running.started, time.time(), now - running.began,
                    max(cpu - interpreter.cpu, 0.0), max_rss, 0, NO_OUTPUT, NO_OUTPUT,
                )  # fmt: skip
                ended = (running, exited)
        kept = (ended[0].stdout, ended[0].stderr) if ended is not None else ()
        for file in interpreter.files:
            if file not in kept:
                self._capture.collect(file, f"interpreter.{interpreter.pid}")
        chain = interpreter.chain
        if chain is not None and chain.interpreter == number:
            chain.interpreter = 0
            if ended is None and chain:
                self._set_startable(chain)
        if ended is not None:
            task, _, attempt = ended[0].name.rpartition(".")
            marks = {b"PILOTQ_TASK_ID": task.encode(), b"PILOTQ_EXECUTION": attempt.encode()}
            self._tracker.set_marks(number, {**marks, b"PILOTQ_DIR": interpreter.env[b"PILOTQ_DIR"]})
        elif self._tracker.has_living(number):
            self._tracker.send_signal(number, signal.SIGKILL)
            self._unswept.append(number)
        return ended

    def _requeue_callback(self, interpreter: InterpreterProcess) -> bool:
        """The callback of a stopped job that had to be killed is run, in another interpreter, before the job ends."""
        if not interpreter.job_stopped or not interpreter.calls:
            return False
        running, call, context = interpreter.calls[0]
        if call.callback_only or not call.rq_fields.get(b"stopped_callback_name"):
            return False
        self.unannounced.pop(running.key, None)
        running.chain.appendleft((msgspec.structs.replace(call, callback_only=True), context))
        return True

    def _failed_call(self, interpreter: InterpreterProcess, loaded: bool) -> Running | None:
        """The call that its end is charged to: what it had begun, or the first one if it could not even load."""
        if interpreter.calls:
            return interpreter.calls[0][0]
        chain = interpreter.chain
        if loaded or chain is None or not chain:
            return None
        call, _ = chain.popleft()
        return Running(call, interpreter.number, interpreter.pid, interpreter.files, chain)

    # -- time ------------------------------------------------------------------------------------------------------

    def next_tick(self) -> float | None:
        """Monotonic time at which `tick` is to be called; None when nothing waits for it."""
        if not self.living and not self._unswept:
            return None
        moments = [interpreter.began + LOAD_S for interpreter in self._loading.values()]
        moments += self._resting.values()
        if self._idle:
            moments.append(next(iter(self._idle.values())).idle_since + IDLE_S)
        if self._unswept:
            moments.append(time.monotonic() + POLL_S)
        return min(moments, default=None)

    def tick(self, now: float) -> None:
        if not self.living and not self._unswept:
            return
        for fd in [fd for fd, at in self._resting.items() if now >= at]:
            self.receive(fd)
        for interpreter in [i for i in self._loading.values() if now >= i.began + LOAD_S]:
            del self._loading[interpreter.number]
            if interpreter.calls:
                self._begin(interpreter)
        while self._idle:
            slot, interpreter = next(iter(self._idle.items()))
            if now < interpreter.idle_since + IDLE_S:
                break
            del self._idle[slot]
            self._retire(interpreter)
        for number in list(self._unswept):
            if self._tracker.has_living(number):
                self._tracker.send_signal(number, signal.SIGKILL)
            else:
                self._unswept.remove(number)
