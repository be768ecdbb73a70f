"""Does with files what may hang, in threads beside the loop of the worker process.

A file system that does not answer (a dead mount) stops the thread that touches it, for minutes or for ever. The loop
must go on: heartbeats and time limits of all tasks of the node depend on it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from pilotq.broker.log import log
from pilotq.broker.os_strings import printable

THREADS_MAX = 8  # so many operations may hang at a time; then all others wait
FINISH_S = 5.0  # how long the end of the worker waits for what was asked for


class FileThreads:
    """Runs actions in threads that are started when they are needed, and that the end of the process does not wait for.

    threads.run(lambda: os.replace(fresh, path))
    threads.sync(b"/pilot/output/n1.7.pack")    # within ``sync_s`` seconds it is on disk
    """

    def __init__(self, sync_s: float) -> None:
        self._sync_s = sync_s
        self._actions: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._changed = threading.Condition()
        self._left = 0  # actions that have not ended
        self._threads = 0
        self._hurry = threading.Event()  # the process is about to end
        self._unsynced: set[bytes] = set()
        self._syncing = False

    def run(self, action: Callable[[], None]) -> None:
        """Run it soon; an error of it is logged."""
        with self._changed:
            self._left += 1
        self._actions.put(action)
        self._add_thread()

    def sync(self, path: bytes) -> None:
        """Have the content of a file, and its name, written to disk; many calls of the same moment cost one."""
        with self._changed:
            self._unsynced.add(path)
            if self._syncing:
                return
            self._syncing = True
        self.run(self._sync)

    def finish(self, seconds: float = FINISH_S) -> bool:
        """Wait until all has been done, at most for so long; whether it has."""
        self._hurry.set()
        self._add_thread()  # there is none if none could be started yet
        with self._changed:
            return self._changed.wait_for(lambda: not self._left, seconds)

    def _add_thread(self) -> None:
        """Start one where it is needed. If none can be started now, the others go on, or the next call tries again."""
        with self._changed:
            if self._left <= self._threads or self._threads >= THREADS_MAX:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._serve, daemon=True).start()
        except RuntimeError as error:  # so Python says that the limit of processes is reached
            with self._changed:
                self._threads -= 1
            log(f"a thread for files cannot be started: {error}", level="warning")

    def _serve(self) -> None:
        # Signals are the loop's: it is woken by them.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            action = self._actions.get()
            try:
                action()
            except OSError as error:
                log(f"{printable(error.filename or 'a file')}: {error.strerror}", level="warning")
            except Exception as error:  # noqa: BLE001  # of one task: a thread that ended would be missing for the others
                log(f"something with files of a task has failed: {type(error).__name__}: {error}", level="error")
            finally:
                with self._changed:
                    self._left -= 1
                    self._changed.notify_all()

    def _sync(self) -> None:
        self._hurry.wait(self._sync_s)
        with self._changed:
            paths, self._unsynced = self._unsynced, set()
            self._syncing = False
        for path in [*sorted(paths), *sorted({os.path.dirname(path) for path in paths})]:
            began = time.monotonic()
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except FileNotFoundError:
                continue  # somebody has removed it
            except OSError as error:  # only that of this file: the others are still to be written
                log(
                    f"output in {printable(path)} may be lost: it cannot be written to disk ({error.strerror})",
                    level="warning",
                )
            if (seconds := time.monotonic() - began) > 10:
                log(f"it took {seconds:.0f} s to write {printable(path)} to disk", level="warning")
