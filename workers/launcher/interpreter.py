"""Runs Python functions one after the other in a process of its own: an interpreter, a child of a launcher.

    python -m pilotq.workers.launcher.interpreter --dir <output directory> --node <name> [--rq now] [--first <fd>]

It is started with the CPUs of a slot and the environment and limits of a submission, as any task is; its standard input
is its socket to the launcher, its output goes to two files of the launcher's pool. It knows nothing of Redis: results
and failures are messages to the launcher. Modules and global names that a call leaves in this process are there for the
next one; processes and threads that it leaves running end the interpreter: it is not used again. When a file of the
user that was imported has changed, the process begins anew in its place (exec) before the first call of another
submission; that call is handed on in the file ``--first``.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import resource
import signal
import socket
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from pilotq.broker.os_strings import printable
from pilotq.broker.processes import become_subreaper, kill_with_parent
from pilotq.broker.rq.jobs import CurrentJob, RqJob, preload, time_is_over
from pilotq.broker.tasks.functions import (
    EXCEPTION_BYTES,
    RESULT_SUFFIX,
    Stored,
    decode_payload,
    dumps,
    failure_text,
    result_text,
    stored_text,
)
from pilotq.workers.launcher import message_socket
from pilotq.workers.launcher.capture import Capture, PoolFile, open_current
from pilotq.workers.launcher.spawn import Refusal, open_input, open_output
from pilotq.workers.launcher.user_modules import UserModules, distrust_old_bytecode
from pilotq.workers.process_tree import CALL_MARK
from pilotq.workers.protocol import INLINE_BYTES, NO_OUTPUT, Call, Captured, Interrupt, Ready, Returned

STARTED = time.time()  # of this process, before any file of the user was imported
FUNCTIONS_MAX = 1000  # so many imported functions are kept
MESSAGE_CHARS = 500  # of an exception, in listings
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Call | Interrupt).decode
# Only for reading: the dictionary below `os.environb`, which is slow.
_VARIABLES: Mapping[bytes, bytes] = getattr(os.environb, "_data", os.environb)
Outcome = tuple[str, str, str, str | bytes]  # outcome, reason, message, and the text or value of Returned


class Interpreter:
    """Runs the calls that arrive on ``sock``; ``out`` and ``err`` are the files of its output."""

    def __init__(
        self, sock: socket.socket, capture: Capture, out: PoolFile, err: PoolFile, begin_anew: Callable[[bytes], None]
    ) -> None:
        self._sock = sock
        self._begin_anew = begin_anew
        self._capture = capture
        self._files = (out, err)
        self._pid = os.getpid()
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._running = 0  # key of the call whose function may be interrupted
        self._signaled = False  # a signal arrived while no function was running
        self._env: dict[bytes, bytes | None] = {}  # variables that the last call has set: name -> value before
        self._functions: dict[str | bytes, Callable[..., Any]] = {}
        self._cpu, _ = _usage()
        self._reason = ""  # why the running function was interrupted
        self._current = CurrentJob()
        self._interrupts = _InterruptHandler(self)
        # A thread that is there from the beginning (of a debugger, of coverage) is not the call's.
        self._threads = _threads()
        self._modules = UserModules(STARTED)
        self._submission = ""  # of the last call

    def serve(self, first: bytes = b"") -> None:
        """Run calls until the launcher closes its end, or a call has left a process or thread running."""
        if not first:
            message_socket.send(self._sock, _encode(Ready()))
        while data := first or message_socket.receive(self._sock):
            message = _decode(data)
            if isinstance(message, Interrupt):
                continue  # that call had come to its end
            if not first and self._may_be_newer(message) and self._modules.changed():
                self._begin_anew(data)
            first, self._submission = b"", message.submission
            began = time.time()
            returned = self._call(message)
            self._modules.note(began)
            message_socket.send(self._sock, _encode(returned))
            if returned.remaining or _threads() > self._threads:
                os._exit(0)

    def _may_be_newer(self, call: Call) -> bool:
        """Was this call submitted, or asked for again, after the one before it: so that it may expect newer code?"""
        return call.submission != self._submission or call.attempt > 1 or not call.submission

    def _call(self, call: Call) -> Returned:
        began, started = time.monotonic(), time.time()
        opened: list[int] = []
        try:
            self._set_files(call, opened)
            self._enter_environment(call)
            outcome = self._perform(call)
            _flush()
        except Refusal as error:
            outcome = ("failed", error.reason, str(error), "")
        finally:
            for fd in opened:
                os.close(fd)
        remaining = _remaining()
        self._interrupts.renew()
        before = self._cpu
        self._cpu, max_rss = _usage()
        out = err = NO_OUTPUT
        if not remaining:
            out, err = self._collect(self._files[0], call, ".out"), self._collect(self._files[1], call, ".err")
        seconds = time.monotonic() - began
        kind, reason, message, text = outcome
        # What an exception says is the user's: a file name in it may hold what no message can.
        value, text = (text, "") if isinstance(text, bytes) else (b"", printable(text))
        return Returned(
            call.key, self._pid, kind, reason, printable(message), text, started, time.time(), seconds,
            self._cpu - before, max_rss, remaining, out, err, value,
        )  # fmt: skip

    # -- files and environment of a call ---------------------------------------------------------------------------

    def _set_files(self, call: Call, opened: list[int]) -> None:
        """Set 0, 1 and 2 for a call, whatever the one before has done to them; ``opened`` gets what is to be closed."""
        stdin, out, err = self._null, self._files[0].fd, self._files[1].fd
        if call.stdin:
            opened.append(stdin := open_input(call.stdin))
        if call.stdout:
            opened.append(out := open_output(call.stdout, call.suffix))
        if call.stderr and call.stderr == call.stdout:
            err = out
        elif call.stderr:
            opened.append(err := open_output(call.stderr, call.suffix))
        os.dup2(stdin, 0)
        os.dup2(out, 1)
        os.dup2(err, 2)

    def _enter_environment(self, call: Call) -> None:
        """Working directory and environment variables of a call; those of the one before are set back."""
        try:
            os.chdir(call.cwd)
        except OSError as error:
            where = printable(call.cwd)
            raise Refusal("not found", f"{error.strerror}: '{where}', its working directory.") from None
        variables = {**call.env, b"PILOTQ_TASK_ID": call.id.encode(), b"PILOTQ_EXECUTION": b"%d" % call.attempt}
        for name in self._env.keys() - variables.keys():
            value = self._env.pop(name)
            if value is None:
                os.environb.pop(name, None)
            else:
                os.environb[name] = value
        for name, value in variables.items():
            if name not in self._env:
                self._env[name] = os.environb.get(name)
            elif _VARIABLES.get(name) == value:
                continue
            os.environb[name] = value

    def _collect(self, file: PoolFile, call: Call, end: str) -> Captured:
        """Take the output of a call from a file of ours, as the launcher does for a process; the file stays ours."""
        try:
            if not os.lseek(file.fd, 0, os.SEEK_END):
                return NO_OUTPUT
        except OSError:
            pass  # its file system fails: `collect` knows what to do
        captured = self._capture.collect(file, f"{call.id}.{call.attempt}{end}")
        if captured.path and not os.path.exists(file.path):
            file.fd = open_current(file)
        return captured

    # -- the function ----------------------------------------------------------------------------------------------

    def _perform(self, call: Call) -> Outcome:
        if call.rq_fields:
            return self._perform_rq(call)
        try:
            try:  # as `_interruptible`, which takes longer than most of the rest
                self._begin_function(call)
                self._current.begin(call.id)
                data = _pickled(self._run(call))
            finally:
                self._end_function()
        except Refusal:
            raise
        except BaseException as error:  # noqa: BLE001  # whatever a function raises is its outcome, SystemExit too
            return self._failure(call, error)
        finally:
            self._running = 0  # it may have been interrupted on its way out
            self._current.end()
        if len(data) <= INLINE_BYTES and not self._current.known:
            return "finished", "", "", data
        return "finished", "", "", self._text_of(call, data, "result", RESULT_SUFFIX)

    def _text_of(self, call: Call, data: bytes, kind: str, suffix: str) -> str:
        """A pickle as it is reported: a large one goes to a file, as output does, and not into the server's memory."""
        if len(data) <= INLINE_BYTES:
            return result_text(data)
        try:
            kept = self._capture.keep(data, f"{call.id}.{call.attempt}{suffix}")
        except OSError as error:
            what = f"Its {kind} of {len(data):,} bytes cannot be written to the pilot's directory"
            raise Refusal("result", f"{what}: {error.strerror}") from None
        return stored_text(Stored(os.fsdecode(os.path.basename(kept.path)), kept.offset, kept.length))

    def _failure(self, call: Call, error: BaseException) -> Outcome:
        """The outcome of a function of ours that raised: our client gets the exception itself, too."""
        try:
            data = dumps(error)
            exception = self._text_of(call, data, "exception", ".exception") if len(data) <= EXCEPTION_BYTES else ""
        except Exception:  # noqa: BLE001  # it holds what cannot be pickled, or the disk is full: the text must do
            exception = ""
        return failure(error, exception)

    def _perform_rq(self, call: Call) -> Outcome:
        """Run an RQ job; its callbacks are not interrupted, they have timeouts of their own."""
        self._reason = ""
        try:
            job = RqJob(call.id, call.rq_fields)
        except Exception as error:  # noqa: BLE001  # its fields are its producer's
            return failure(error)
        if call.callback_only:
            return job.stopped()
        try:
            with self._interruptible(call):
                value = job.perform()
            return job.returned(value)
        except BaseException as error:  # noqa: BLE001  # as above
            self._running = 0
            return job.stopped() if self._reason == "stopped" else job.raised(error)

    @contextmanager
    def _interruptible(self, call: Call) -> Iterator[None]:
        try:
            self._begin_function(call)
            yield
        finally:
            self._end_function()

    def _begin_function(self, call: Call) -> None:
        self._running = call.key
        if self._signaled:
            self.on_interrupt()  # it was meant for this call, and arrived too early

    def _end_function(self) -> None:
        self._running = 0
        if os.getpid() != self._pid:
            _end_child(sys.exc_info()[1])

    def _run(self, call: Call) -> Any:
        payload = decode_payload(call.payload)
        target = payload.name or payload.pickled
        function = self._functions.get(target)
        if function is None:
            if len(self._functions) >= FUNCTIONS_MAX:
                self._functions.clear()
            function = self._functions[target] = find(target)
        args, kwargs = pickle.loads(payload.arguments)
        if call.element is not None:
            element = call.element
            args = (element.decode("utf-8", "surrogatepass") if isinstance(element, bytes) else element, *args)
        value = function(*args, **kwargs)
        if isinstance(value, types.CoroutineType):
            import asyncio

            return asyncio.run(value)
        return value

    def on_interrupt(self) -> None:
        """The signal of an Interrupt has arrived: raise it in the function that it is meant for."""
        self._signaled = not self._running
        try:
            data = message_socket.receive(self._sock, socket.MSG_DONTWAIT | socket.MSG_PEEK)
            message = _decode(data) if data else None
            if not isinstance(message, Interrupt) or message.key != self._running:
                return
            message_socket.receive(self._sock, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self._reason = message.reason
        if message.reason != "time limit":
            raise KeyboardInterrupt(message.reason)
        if "rq.timeouts" in sys.modules:
            raise time_is_over()  # a function that expects this exception has imported it
        raise TimeoutError("the function has run as long as its time limit allows")


# `signal.getsignal` makes a member of an enumeration of it, if it can: that takes longer than most of a call.
_handler_of: Callable[[int], Any] = sys.modules["_signal"].getsignal


class _InterruptHandler:
    """The handler of the signal that follows an Interrupt; a function may have put its own in its place."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._interpreter = interpreter
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, _signal: int, _frame: object) -> None:
        if os.getpid() != self._interpreter._pid:
            # A child that a function has forked: it ends as any process does.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._interpreter.on_interrupt()

    def renew(self) -> None:
        """Install it again if a function has replaced it."""
        if _handler_of(signal.SIGTERM) != self._handle:
            signal.signal(signal.SIGTERM, self._handle)


def find(target: str | bytes) -> Callable[..., Any]:
    """The function of a call's target."""
    if isinstance(target, bytes):
        function: Callable[..., Any] = pickle.loads(target)
        return function
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{target} is no function, but {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _pickled(value: Any) -> bytes:
    try:
        return dumps(value)
    except Exception as error:  # noqa: BLE001  # of the user's own objects
        raise Refusal("result", f"Its result cannot be pickled: {type(error).__name__}: {error}") from None


def failure(error: BaseException, exception: str = "") -> Outcome:
    """The outcome of a function that raised; ``exception`` is the exception's pickle as it is reported."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next  # our own frames do not help the author of the function
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
        message = traceback.format_exception_only(type(error), error)[-1].strip()
    except Exception:  # noqa: BLE001  # its __str__ raises
        text = message = type(error).__name__
    return "failed", "exception", message[:MESSAGE_CHARS], failure_text(text, exception)


def _flush() -> None:
    usual = sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__
    for stream in (sys.stdout, sys.stderr) if usual else (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # it is closed, or no stream, or its disk is full: that much is lost


def _end_child(error: BaseException | None) -> None:
    """End a child that the function has forked, and that has returned from it."""
    _flush()
    if isinstance(error, SystemExit):
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    if error is not None:
        traceback.print_exception(error)
        _flush()
    os._exit(int(error is not None))


def _remaining() -> int:
    """1 when a process that the call has started lives: a subreaper has them all as children. The launcher counts."""
    while True:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                return 1
        except ChildProcessError:
            return 0


def _threads() -> int:
    threading = sys.modules.get("threading")
    return threading.active_count() if threading is not None else 1


def _usage() -> tuple[float, int]:
    """CPU seconds of this process and of the children it has waited for, and its peak memory in bytes."""
    own, waited = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + waited.ru_utime + waited.ru_stime, own.ru_maxrss * 1024


def main(argv: list[str]) -> None:
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    first = _content(int(options.pop("--first", "-1")))
    environment = os.environ.copy()
    kill_with_parent()
    become_subreaper()
    sock = socket.socket(fileno=os.dup(0))
    os.set_inheritable(sock.fileno(), False)
    files = [PoolFile(os.dup(number), os.readlink(b"/proc/self/fd/%d" % number)) for number in (1, 2)]
    for file in files:
        os.set_inheritable(file.fd, False)
    # The directory that this module is started from is no place to import from; that of the user's program is.
    sys.path[:1] = [folder for folder in os.environ.pop(CALL_MARK, "").split(":") if folder]
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["pilotq-interpreter"]
    if "--rq" in options:
        preload()  # it takes long, and would count as a part of the first job
    capture = Capture(options["--dir"], options["--node"])
    distrust_old_bytecode()

    def begin_anew(call: bytes) -> None:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for number in (1, 2):
            os.dup2(null, number)  # what is printed at the end is of no call
        atexit._run_exitfuncs()
        os.chdir(options["--dir"])
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # it waits until there is a handler again
        handed_on = os.memfd_create("call", 0)
        with open(handed_on, "wb", closefd=False) as file:
            file.write(call)
        for number, fd in enumerate((sock.fileno(), files[0].fd, files[1].fd)):
            os.dup2(fd, number)
        words = [word for option in options.items() for word in option]
        argv = [sys.executable, "-m", "pilotq.workers.launcher.interpreter", *words, "--first", str(handed_on)]
        os.execve(sys.executable, argv, environment)  # noqa: S606  # no shell is wanted

    interpreter = Interpreter(sock, capture, files[0], files[1], begin_anew)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    interpreter.serve(first)


def _content(fd: int) -> bytes:
    """What a file in memory holds; nothing where there is none."""
    if fd < 0:
        return b""
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read()


if __name__ == "__main__":
    main(sys.argv[1:])
