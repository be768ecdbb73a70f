"""fsync of the server's append-only file each second, done by the supervisor instead of the server.

The server's own ``appendfsync everysec`` is not used: while its fsync is slow the server postpones its writes for up to
2 s, but answers all the same, and when it is killed then, acknowledged writes are lost (`flushAppendOnlyFile`,
https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/). With ``appendfsync no`` each write is made
before its answer, so it outlives the server; and any process may ask the kernel to put the file onto the disk.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from pilotq.broker.log import log

INTERVAL_S = 1.0
SLOW_S = 2.0  # a slower disk is reported: a power loss costs so much more
STOP_S = 5.0  # a disk that hangs does not keep the pilot from ending


class AofSync:
    """A thread that syncs the files of ``folder``, where the server writes its log; it need not exist yet."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aof-sync", daemon=True)
        self._synced: dict[str, tuple[int, int]] = {}  # name -> inode and size that are on the disk
        self._problem = ""  # reported last; empty: none

    def start(self) -> None:
        """Sync from now on; a second call does nothing."""
        if not self._thread.ident:
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident:
            self._thread.join(STOP_S)

    def sync(self) -> None:
        """Put what was written since the last call onto the disk, and report when that is slow or fails."""
        began, problem = time.monotonic(), ""
        try:
            self._sync_files()
            if (took := time.monotonic() - began) > SLOW_S:
                problem = f"takes {took:.0f} s"
        except OSError as error:
            problem = f"fails: {error.strerror}"
        if problem and not self._problem:
            log(
                f"writing the server's log to the disk {problem}; "
                "until that is better a power loss costs more than 2 s",
                level="warning",
            )
        elif self._problem and not problem:
            log("the server's log is on the disk again within 2 s")
        self._problem = problem

    def _run(self) -> None:
        # A signal delivered to this thread would not wake the main one, which waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._stopping.wait(INTERVAL_S):
            self.sync()

    def _sync_files(self) -> None:
        try:
            with os.scandir(self._folder) as entries:
                found = {entry.name: (entry.inode(), entry.stat().st_size) for entry in entries}
        except FileNotFoundError:
            return  # not yet, or a file was put in another's place just now: the next round sees it
        for name, seen in found.items():
            if self._synced.get(name) != seen:
                _sync(os.path.join(self._folder, name))
        if self._synced.keys() != found.keys():
            _sync(self._folder)  # the names
        self._synced = found


def _sync(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # the server has written its log anew, and removed this part
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
