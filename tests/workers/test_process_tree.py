"""How processes are found by their marks."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid

import pytest

from pilotq.workers.process_tree import kill_marked


def test_where_no_thread_can_be_started_processes_are_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit of processes reached a worker goes on: it scans for what a dead launcher or a sweep has left."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    mark = {"PILOTQ_TASK_ID": uuid.uuid4().hex}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=mark) as process:
        monkeypatch.setattr(threading.Thread, "start", start)
        try:
            assert kill_marked(mark) == []
            assert process.wait(10) == -9
        finally:
            process.kill()
