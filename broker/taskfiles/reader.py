"""`read_tasks`: recognises the format of a file of tasks, limits its size, and reads it.

======  ===========================================================  =====================
format  what the file looks like                                     read by
======  ===========================================================  =====================
qcg     a JSON list of QCG-PilotJob requests                         broker/taskfiles/qcg.py
json    a JSON table, ``{"tasks": [...]}``                           broker/taskfiles/native.py
toml    a name that ends in .toml, or a line ``[[tasks]]``           broker/taskfiles/native.py
lines   anything else: one command a line                            broker/taskfiles/lines.py
======  ===========================================================  =====================
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.batch import Batch
from pilotq.broker.tasks.model import Task

FORMATS = ("lines", "toml", "json", "qcg")
DOCUMENT_BYTES = 64 << 20  # a JSON or TOML file is decoded as a whole
HEAD_BYTES = 1 << 16  # a file's kind shows within these

_TABLES = re.compile(rb"^[ \t]*\[\[[ \t]*tasks[ \t]*\]\]", re.MULTILINE)
_SCRIPT = re.compile(rb"#!(?!.*pilotq)")
_LIST = re.compile(rb"\[\s*[{\]]")


def read_tasks(
    path: str | Path,
    *,
    format: str | None = None,
    shell: bool = False,
    defaults: Task | None = None,
) -> Batch:
    """Read a file of tasks; ``-`` is the standard input.

    ``format`` is one of FORMATS, None recognises it. With ``shell`` each line (and each ``command`` written as one
    text) is a script for bash. ``defaults`` holds what a task has that the file says nothing about. The requests of a
    QCG-PilotJob file are only read: `pilotq.broker.qcg.service.requests.Requests` handles them.

    Raises InvalidInput with file and place for anything that is wrong: nothing of the file is used then.

        batch = read_tasks("jobs.toml")
        ids = Broker.connect().enqueue_many(batch.tasks)
    """
    if format is not None and format not in FORMATS:
        raise InvalidInput(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    file = "standard input" if str(path) == "-" else str(path)
    if "\0" in file:
        raise InvalidInput(f"{file!r} is no file name: it contains a NUL character")
    base = defaults or Task()
    try:
        with _without_collector(), nullcontext(sys.stdin.buffer) if str(path) == "-" else open(path, "rb") as stream:
            head = stream.read(HEAD_BYTES)
            kind = format or recognise(head, file)
            if kind == "lines":
                from pilotq.broker.taskfiles.lines import read_lines

                return read_lines(head, stream, file, base=base, shell=shell)
            return _read_document(kind, _read_all(head, stream, file), file, base, shell)
    except OSError as error:
        raise InvalidInput(f"{file}: cannot be read: {os.strerror(error.errno or 0)}") from None


def _read_document(kind: str, data: bytes, file: str, base: Task, shell: bool) -> Batch:
    try:
        if kind == "qcg":
            from pilotq.broker.taskfiles.qcg import read_requests

            return Batch([], read_requests(data, file))
        from pilotq.broker.taskfiles import native

        read = native.read_toml if kind == "toml" else native.read_json
        return read(data, file, base=base, shell=shell)
    except RecursionError:
        # The decoders, and the checks of what they return, recurse as deep as the file does.
        raise InvalidInput(f"{file}: lists and tables are nested too deeply") from None


@contextmanager
def _without_collector() -> Iterator[None]:
    """Disable the garbage collector: reading makes 10^6 objects and no cycles, and searching them doubles its time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def recognise(head: bytes, file: str) -> str:
    """The format of a file by its first bytes, and by its name if that ends in ``.toml``; raises InvalidInput for a
    script."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if file.endswith(".toml"):
        return "toml"
    if text.startswith(b"{"):
        return "json"
    if _LIST.match(text):
        return "qcg"
    if _TABLES.search(text):
        return "toml"
    if _SCRIPT.match(text):
        raise InvalidInput(
            f"{file}: it is a script (its first line names the program that runs it), and each line would be a task: "
            f"run it with --script {'-' if file == 'standard input' else file}, or say --format lines"
        )
    return "lines"


def _read_all(head: bytes, stream: BinaryIO, file: str) -> bytes:
    data = head + stream.read(DOCUMENT_BYTES + 1 - len(head))
    if len(data) > DOCUMENT_BYTES:
        raise InvalidInput(
            f"{file}: the file is larger than {DOCUMENT_BYTES >> 20} MiB: use an array, plain lines, or several files"
        )
    return data
