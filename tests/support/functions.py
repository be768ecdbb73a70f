"""Functions that tests run in interpreters. Few imports: each interpreter imports this module, too."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FAR_S = 300.0  # longer than any test


def product(a: int, b: int = 1) -> int:
    return a * b


class Odd(Exception):
    """One that a pickle cannot bring back: its constructor wants another number of arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class Stubborn(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("never")


def throw(error: BaseException) -> None:
    raise error


def throw_odd() -> None:
    raise Odd("a", "b")


def throw_stubborn() -> None:
    raise Stubborn("no pickle")


def throw_long(size: int) -> None:
    raise ValueError("x" * size)


class Trap:
    """One whose pickle raises where it is read."""

    def __init__(self, error: BaseException, size: int) -> None:
        self.parts = (error, size * b" ")

    def __reduce__(self) -> Any:
        return spring, self.parts


class TrapError(Exception):
    def __reduce__(self) -> Any:
        return spring, (self.args[0], b"")


def spring(error: BaseException, _: bytes) -> None:
    raise error


def trap(error: BaseException, size: int) -> Trap:
    return Trap(error, size)


def throw_trap(error: BaseException) -> None:
    raise TrapError(error)


def be_deaf() -> None:
    """Only SIGKILL ends it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGALRM})
    ctypes.CDLL(None).sleep(int(FAR_S))


def kill_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()


def shout(text: str, count: int) -> None:
    print(text * count)
    print(text.upper() * count, file=sys.stderr)
    os.write(1, b"raw\n")
    subprocess.run(["echo", "child"], check=True)


def observe() -> dict[str, Any]:
    return {
        "cpus": os.sched_getaffinity(0),
        "cwd": os.getcwd(),
        "task": os.environ["PILOTQ_TASK_ID"],
        "execution": os.environ["PILOTQ_EXECUTION"],
        "mine": os.environ.get("MINE"),
        "pid": os.getpid(),
        "stdin": sys.stdin.read(),
    }


def wait_for_ever(mark: str, stubborn: bool = False) -> str:
    while True:
        try:
            Path(mark).write_text(str(os.getpid()))
            signal.pause()
        except BaseException as error:
            Path(mark).write_text(type(error).__name__)
            if not stubborn:
                raise


def wait_for(file: str) -> str:
    """Returns the name of the file as soon as there is one; at once if there is no name."""
    from tests.support.waiting import wait_until

    wait_until(lambda: not file or os.path.exists(file), seconds=FAR_S)
    return file


def large_when_ended(mark: str, size: int) -> bytes:
    try:
        wait_for_ever(mark)
    except KeyboardInterrupt:
        pass
    return bytes(size)


def survive(mark: str) -> str:
    try:
        wait_for_ever(mark)
    except TimeoutError:
        return "made the best of it"
    return ""


def leave_a_process(kind: str) -> int:
    if kind == "fork":
        pid = os.fork()
        if not pid:
            signal.pause()
        return pid
    return subprocess.Popen(["sleep", str(FAR_S)], start_new_session=True).pid


def fork_and_wait(folder: str) -> None:
    """Two processes that say who they are: this one, and one that hides behind a fork and a session of its own."""
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        Path(folder, f"forked.{os.getpid()}").touch()
        signal.pause()
    Path(folder, f"main.{os.getpid()}").touch()
    signal.pause()


def fork_and_return() -> str:
    pid = os.fork()
    if not pid:
        return "from the child"
    os.waitpid(pid, 0)
    return "from the parent"


def leave_a_thread() -> int:
    threading.Thread(target=threading.Event().wait, args=(FAR_S,), daemon=True).start()
    return os.getpid()


def use_a_pool(numbers: list[int]) -> list[int]:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, numbers)


def break_files() -> None:
    print("before")
    sys.stdout.flush()
    os.close(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.chdir("/")
    os.environ["MINE"] = "changed"


def open_files() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


async def later(value: int) -> int:
    await asyncio.sleep(0)
    return value


def numbers() -> Iterator[int]:
    yield 1


def crash() -> None:
    ctypes.string_at(0)


def remember(word: str) -> str:
    """What the last call in this interpreter has left."""
    known: str = getattr(sys, "_pilotq_test", "")
    sys._pilotq_test = word  # type: ignore[attr-defined]
    return known


def give_back(value: Any) -> Any:
    return value


def throw_or_give(error: BaseException | None, value: Any) -> Any:
    if error is not None:
        raise error
    return value


def note_and_die(file: str, number: int, victim: int, way: str) -> int:
    """Notes that this call has begun; that of the victim ends its interpreter."""
    with open(file, "a", encoding="ascii") as lines:
        lines.write(f"{number}\n")
    if number == victim:
        os.kill(os.getpid(), signal.SIGKILL) if way == "killed" else os._exit(3)
    return number


# -- callbacks of RQ's jobs --------------------------------------------------------------------------------------------


def on_success(job: Any, _connection: Any, result: Any) -> None:
    Path(job.meta["mark"]).write_text(f"success {result}")


def on_failure(job: Any, _connection: Any, kind: type, value: BaseException, _traceback: Any) -> None:
    Path(job.meta["mark"]).write_text(f"failure {kind.__name__} {value}")


def on_stopped(job: Any, _connection: Any) -> None:
    Path(job.meta["mark"]).write_text("stopped")


def on_nothing(_job: Any, _connection: Any, _result: Any) -> None:
    raise RuntimeError("a callback")


def note(word: str) -> str:
    """Imported here and not above: the first call of an interpreter is to find its job all the same."""
    from rq import get_current_job

    job = get_current_job()
    assert job is not None
    job.meta["word"] = word
    job.save_meta()
    return str(job.id)


def divide(n: int) -> float:
    return 1 / n


def use_memory(megabytes: int, seconds: float) -> int:
    """Uses so much memory, for so long."""
    kept = bytearray(megabytes << 20)
    kept[::4096] = b"1" * (len(kept) // 4096)
    threading.Event().wait(seconds)
    return len(kept) >> 20


def gpus_seen() -> tuple[int, str]:
    """Which process this is, and which GPUs of NVIDIA it may use."""
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def end_at(number: int, last: int) -> int:
    """Ends its interpreter, with success, if it is the one with this number."""
    if number == last:
        os._exit(0)
    return number
