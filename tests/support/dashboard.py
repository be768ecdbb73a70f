"""Runs `pilotq dashboard` for tests, and sends requests to it."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.command_line import command, environment
from tests.support.waiting import wait_until

needs_dashboard = pytest.mark.skipif(find_spec("rq_dashboard") is None, reason="rq-dashboard is not installed")


class Served(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    password: str
    stderr: str  # what it printed to stderr

    def request(
        self, path: str = "", *, method: str = "GET", password: str | None = None, **headers: str
    ) -> urllib.request.Request:
        """A request with the right password unless another is given ('' = none at all)."""
        word = self.password if password is None else password
        if word:
            headers["Authorization"] = "Basic " + base64.b64encode(f"pilotq:{word}".encode()).decode()
        return urllib.request.Request(self.url + path, headers=headers, method=method)

    def ask(
        self, path: str = "", *, method: str = "GET", password: str | None = None, **headers: str
    ) -> tuple[int, str]:
        """Status and text of the answer to such a `request`."""
        request = self.request(path, method=method, password=password, **headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def data(self, path: str) -> Any:
        status, text = self.ask(f"rq/0/data/{path}.json")
        assert status == 200, text
        return json.loads(text)


@contextmanager
def served(folder: Path, directory: Path, *args: str, verb: str = "dashboard") -> Iterator[Served]:
    """The dashboard (or what ``verb`` serves) of the pilot in ``directory``, on a free port; ended with Ctrl-C unless
    it has ended by then."""
    with open(folder / "dashboard.out", "wb") as out, open(folder / "dashboard.err", "wb") as err:
        process = subprocess.Popen(
            command(verb, "--dir", str(directory), *args), cwd=folder, env=environment(),
            stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        )  # fmt: skip
    try:
        wait_until(lambda: "Ctrl-C" in (folder / "dashboard.err").read_text() or process.poll() is not None, seconds=60)
        said = (folder / "dashboard.err").read_text()
        assert process.poll() is None, said
        kept = directory / "dashboard-password"
        url = (folder / "dashboard.out").read_text().strip()
        yield Served(process, url, kept.read_text().strip() if kept.exists() else "", said)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, (folder / "dashboard.err").read_text()
