"""Writes the executions of a journal for other programs: CSV, Parquet, and trace events for Perfetto."""

from __future__ import annotations

import csv
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from pilotq.broker.errors import InvalidInput
from pilotq.broker.os_strings import printable
from pilotq.broker.store.journal import JournalEntry
from pilotq.broker.store.resources import parse_allocation

BATCH = 65_536  # rows of a Parquet file that are held at a time
COLUMNS: dict[str, type] = {
    "id": str, "name": str, "array": str, "index": int, "execution": int, "status": str, "reason": str, "final": bool,
    "node": str, "cpus": str, "cores": int, "queued": float, "released": float, "handed": float,
    "started": float, "ended": float, "exit_code": int, "signal": int, "cpu": float, "max_rss": int,
    "memory": int, "limit": float, "command": str,
}  # fmt: skip


@contextmanager
def written_whole(file: str) -> Iterator[str]:
    """The path of a file to write, which becomes ``file`` when that has gone well; raises InvalidInput.

    A file that is there is replaced and its mode kept, at the end of a link, too; a pipe or device gets a copy.
    """
    try:
        mode = os.stat(file).st_mode if os.path.exists(file) else None
        with _copied(file) if mode is not None and not stat.S_ISREG(mode) else _replaced(file, mode) as draft:
            yield draft
    except OSError as error:
        raise InvalidInput(f"{printable(file)}: it cannot be written ({error.strerror or error})") from None


@contextmanager
def _copied(file: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        draft = os.path.join(folder, "draft")
        yield draft
        with open(draft, "rb") as whole, open(file, "wb") as out:
            shutil.copyfileobj(whole, out)


@contextmanager
def _replaced(file: str, mode: int | None) -> Iterator[str]:
    target = os.path.realpath(file)
    draft = f"{target}.{os.urandom(4).hex()}"
    try:
        if mode is not None:  # whoever may not read the old file never reads the new one
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield draft
        if mode is not None:
            os.chmod(draft, stat.S_IMODE(mode))
        os.replace(draft, target)
    finally:
        if os.path.lexists(draft):
            os.unlink(draft)


def write_csv(entries: Iterable[JournalEntry], file: str) -> int:
    """A row for each execution that ended, with the columns COLUMNS; returns their number."""
    number = 0
    with written_whole(file) as draft, open(draft, "w", newline="", encoding="utf-8", errors="replace") as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        for row in _rows(entries):
            writer.writerow(row)
            number += 1
    return number


def write_parquet(entries: Iterable[JournalEntry], file: str) -> int:
    """The same as a Parquet file; returns the number of rows. Needs pyarrow."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InvalidInput("report parquet needs pyarrow: `pip install 'pilotq[parquet]'`") from None
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    rows = _rows(entries)
    number = 0
    with written_whole(file) as draft, parquet.ParquetWriter(draft, schema) as out:
        while batch := list(islice(rows, BATCH)):
            columns = [
                pa.array([_text(value) for value in column] if kind is str else column, types[kind])
                for column, kind in zip(zip(*batch, strict=True), COLUMNS.values(), strict=True)
            ]
            out.write_table(pa.table(columns, schema=schema))
            number += len(batch)
    return number


def _text(word: Any) -> str:
    return str(word).encode("utf-8", "replace").decode()


def _rows(entries: Iterable[JournalEntry]) -> Iterator[list[Any]]:
    for entry in entries:
        if entry.execution and not entry.elements:
            cores = _cores(entry)
            yield [cores if name == "cores" else getattr(entry, name) for name in COLUMNS]


def _cores(entry: JournalEntry) -> int:
    return sum(len(part.cores) for part in parse_allocation(entry.cpus)) if entry.cpus else 0


def write_trace(entries: Iterable[JournalEntry], file: str) -> int:
    """Trace events as Chrome and Perfetto read them: a process for each node, a thread for each core.

    An execution is a slice on the first core of each node that it held. Returns the number of executions.
    """
    number, before = 0, ""
    with written_whole(file) as draft, open(draft, "w", encoding="utf-8") as out:
        out.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for events in _events(entries):
            number += 1
            out.write(before + ",\n".join(json.dumps(event, separators=(",", ":")) for event in events))
            before = ",\n"
        out.write("\n]}\n")
    return number


def _events(entries: Iterable[JournalEntry]) -> Iterator[list[dict[str, Any]]]:
    """The events of each execution."""
    nodes: dict[str, int] = {}
    threads: set[tuple[str, int]] = set()
    for entry in entries:
        if entry.elements or not entry.execution or entry.started is None or entry.ended is None or not entry.cpus:
            continue
        events: list[dict[str, Any]] = []
        for part in parse_allocation(entry.cpus):
            core = part.cores[0] if part.cores else 0
            if part.node not in nodes:
                nodes[part.node] = len(nodes) + 1
                name = {"name": part.node}
                events.append({"ph": "M", "name": "process_name", "pid": nodes[part.node], "args": name})
            place = {"pid": nodes[part.node], "tid": core + 1}
            if (part.node, core) not in threads:
                threads.add((part.node, core))
                events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": f"core {core}"}})
            events.append({
                "ph": "X", "name": entry.name or entry.id, "cat": entry.status, **place,
                "ts": round(entry.started * 1e6), "dur": max(round((entry.ended - entry.started) * 1e6), 1),
                "args": {"id": entry.id, "execution": entry.execution, "status": entry.status,
                         "reason": entry.reason, "cores": entry.cpus, "exit_code": entry.exit_code},
            })  # fmt: skip
        yield events
