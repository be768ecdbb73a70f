"""The server's log onto the disk each second, from outside the server.

Not by the server's own ``appendfsync everysec``: while that fsync is slow the server puts off its writes for up to 2 s,
but answers all the same, and whoever kills it then costs what it has acknowledged (`flushAppendOnlyFile`,
https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/). With ``appendfsync no`` each write is made
before its answer, so it outlives the server; and any process may ask the kernel to put the file onto the disk.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from pilotq.broker.processes import log

EVERY_S = 1.0
SLOW_S = 2.0  # a disk that takes longer is worth a word: so much more may a power loss cost
END_S = 5.0  # a disk that hangs does not keep the pilot from ending


class Flusher:
    """``folder`` is where the server writes its log; it need not exist yet."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flusher", daemon=True)
        self._done: dict[str, tuple[int, int]] = {}  # name -> inode and size that are on the disk
        self._said = ""

    def start(self) -> None:
        """Flush from now on; said again, it does nothing."""
        if not self._thread.ident:
            self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread.ident:
            self._thread.join(END_S)

    def flush(self) -> None:
        """Put what has come since the last call onto the disk, and say when that is slow or fails."""
        began, word = time.monotonic(), ""
        try:
            self._flush()
            if (took := time.monotonic() - began) > SLOW_S:
                word = f"takes {took:.0f} s"
        except OSError as error:
            word = f"fails: {error.strerror}"
        if word and not self._said:
            log(f"writing the server's log to the disk {word}; until that is better a power loss costs more than 2 s")
        elif self._said and not word:
            log("the server's log is on the disk again within 2 s")
        self._said = word

    def _run(self) -> None:
        # A signal that this thread took would not wake the main one, which waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._over.wait(EVERY_S):
            self.flush()

    def _flush(self) -> None:
        try:
            with os.scandir(self._folder) as entries:
                found = {entry.name: (entry.inode(), entry.stat().st_size) for entry in entries}
        except FileNotFoundError:
            return  # not yet, or a file was put in another's place just now: the next round sees it
        for name, seen in found.items():
            if self._done.get(name) != seen:
                _sync(os.path.join(self._folder, name))
        if self._done.keys() != found.keys():
            _sync(self._folder)  # the names
        self._done = found


def _sync(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # the server has written its log anew, and removed this part
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
