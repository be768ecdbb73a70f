"""Serves a pilot over HTTP for one measurement: `pilotq dashboard` or `pilotq metrics`."""

from __future__ import annotations

import base64
import contextlib
import http.client
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Served(NamedTuple):
    """``url`` is what the command printed."""

    url: str
    password: str

    def open(self, path: str = "") -> http.client.HTTPResponse:
        """The answer to a GET, logged in, past any proxy."""
        login = {"Authorization": "Basic " + base64.b64encode(f"pilotq:{self.password}".encode()).decode()}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        answer: http.client.HTTPResponse = opener.open(
            urllib.request.Request(self.url + path, headers=login), timeout=60
        )
        return answer

    def read(self, path: str = "") -> bytes:
        with self.open(path) as answer:
            return answer.read()


@contextlib.contextmanager
def served(command: str, directory: str) -> Iterator[Served]:
    """Run this command for the pilot in ``directory``; it is ended afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pilotq", command, "--dir", directory], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield Served(url, Path(directory, "dashboard-password").read_text().strip())
    finally:
        process.terminate()
        process.wait()
