"""Packed lines of the journal: entries travel without the names of their fields, and runs of elements as columns.

>>> rows = [(7, 0, 500, 2000, 4711, 1 << 20, 1500)]
>>> run = RunLines("1f", "sim", "s1", "n1", 1, 100.0, 101.0, "sim", 0, 0.0, ["n1[0]"], 102.0, rows)
>>> entry = next(run.entries())
>>> entry.id, entry.index, entry.started, entry.ended, entry.cpu
('1f_7', 7, 102.0005, 102.0025, 0.0015)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from pilotq.broker.os_strings import to_json
from pilotq.broker.store.journal import JournalEntry, PackedEntry

_pack = msgspec.msgpack.Encoder().encode
TIMES_BELOW = 1e11  # unix seconds
INDEX_PLACE = "\0i"  # in the command of a run: each element has its index there

# index, place of its allocation, microseconds from `base` to its start, microseconds that it ran, pid, bytes of memory,
# microseconds of CPU time
Row = tuple[int, int, int, int, int, int, int]


class RunLines(msgspec.Struct, array_like=True):
    """What the entries of a run have in common, and a row for each element. Times are unix seconds."""

    array: str
    name: str
    submission: str
    node: str
    execution: int
    queued: float
    handed: float
    command: str
    memory: int  # bytes that were asked for
    limit: float  # of their time, in seconds; 0: none
    allocations: list[str]
    base: float
    rows: list[Row]
    more: dict[int, dict[str, Any]] = {}  # number of a row -> other fields of its entry
    bundled: bool = False  # they are tasks of a bundle: their index is no user's

    def entries(self) -> Iterator[PackedEntry]:
        """The entry of each element, in the order of the rows."""
        varies = INDEX_PLACE in self.command
        base = round(self.base * 1e6) if 0 <= self.base < TIMES_BELOW else 0
        for number, (index, place, after, lasted, pid, max_rss, cpu) in enumerate(self.rows):
            began = base + after
            command = self.command.replace(INDEX_PLACE, str(index)) if varies else self.command
            entry = PackedEntry(
                id=f"{self.array}_{index}",
                name=self.name,
                status="finished",
                execution=self.execution,
                node=self.node,
                cpus=self.allocations[place],
                queued=self.queued,
                handed=self.handed,
                started=began / 1e6,
                ended=(began + lasted) / 1e6,
                exit_code=0,
                pid=pid,
                max_rss=max_rss,
                cpu=cpu / 1e6,
                array=self.array,
                index=None if self.bundled else index,
                command=command,
                submission=self.submission,
                memory=self.memory,
                limit=self.limit or None,
            )
            for name, value in self.more.get(number, {}).items():
                setattr(entry, name, value)
            yield entry

    def begun_lines(self) -> list[bytes] | None:
        """The lines of the elements in the file, each without its end: its place in the stream, and a brace.

        They say what `entries` say; most of each line is the same in all of a run. None where `entries` must be
        rendered one by one: some have written something, or a time is none.
        """
        if any(not fields.keys() <= {"command", "name"} for fields in self.more.values()):
            return None
        if not all(0 <= moment < TIMES_BELOW for moment in (self.base, self.queued, self.handed, self.limit)):
            return None
        alike = PackedEntry(
            id="", status="finished", execution=self.execution, node=self.node, queued=self.queued, handed=self.handed,
            exit_code=0, array=self.array, submission=self.submission, memory=self.memory, limit=self.limit or None,
        )  # fmt: skip
        rest = _text(alike).removeprefix('{"id":"",').removesuffix("}")
        name = f',"name":{_text(self.name)}' if self.name else ""
        head = _text(f"{self.array}_").removesuffix('"')
        places = [_text(place) for place in self.allocations]
        command = [_text(part)[1:-1] for part in self.command.split(INDEX_PLACE)]
        lines, base = [], round(self.base * 1e6)
        for number, (index, place, after, lasted, pid, max_rss, cpu) in enumerate(self.rows):
            began = base + after
            own_name, own_command = name, "".join(('"', str(index).join(command), '"'))
            if number in self.more:
                own = self.more[number]
                own_command = _text(own["command"]) if "command" in own else own_command
                own_name = f',"name":{_text(own["name"])}' if own.get("name") else "" if "name" in own else name
            own_index = "" if self.bundled else f',"index":{index}'
            line = (
                f'{{"id":{head}{index}",{rest},"cpus":{places[place]},"started":{_seconds(began)},'
                f'"ended":{_seconds(began + lasted)},"pid":{pid},"max_rss":{max_rss},"cpu":{_seconds(cpu)}'
                f'{own_name}{own_index},"command":{own_command}'
            )
            lines.append(line.encode())
        return lines


def _seconds(micro: int) -> str:
    """Microseconds as seconds."""
    digits = f"{micro:07}"
    return f"{digits[:-6]}.{digits[-6:]}"


def _text(value: object) -> str:
    return to_json(value).decode()


def pack_run(lines: RunLines, rows: Sequence[bytes]) -> bytes:
    """A run, with rows that are packed already."""
    head = b"\xdd" + len(rows).to_bytes(4, "big")
    fields = [getattr(lines, name) for name in RunLines.__struct_fields__]
    fields[RunLines.__struct_fields__.index("rows")] = msgspec.Raw(b"".join((head, *rows)))
    return _pack(fields)


class Line(NamedTuple):
    """The entry of one execution as a worker sends it. What became of it the script adds that ends it.

    Times are microseconds behind ``queued`` (unix seconds).
    """

    id: str
    execution: int
    node: str
    cpus: str
    queued: float
    handed: int
    started: int | None
    ended: int
    pid: int | None
    max_rss: int | None
    cpu: int | None  # microseconds
    command: str
    submission: str
    more: dict[str, Any] | None = None  # other fields of the entry

    def entry(self) -> PackedEntry:
        def moment(after: int | None) -> float | None:
            return None if after is None else round(self.queued + after / 1e6, 6)

        cpu = None if self.cpu is None else self.cpu / 1e6
        entry = PackedEntry(
            id=self.id, execution=self.execution, node=self.node, cpus=self.cpus, queued=self.queued,
            handed=moment(self.handed), started=moment(self.started), ended=moment(self.ended), exit_code=0,
            pid=self.pid, max_rss=self.max_rss, cpu=cpu, command=self.command, submission=self.submission,
        )  # fmt: skip
        for name, value in (self.more or {}).items():
            setattr(entry, name, value)
        return entry


# Those of a `Line`, and what the script decides.
_IN_LINE = {*Line._fields, "status", "reason", "final", "at"}
_USUAL = JournalEntry("", exit_code=0)
_MORE = [(name, getattr(_USUAL, name)) for name in JournalEntry.__struct_fields__ if name not in _IN_LINE]


def pack_entry(entry: JournalEntry) -> bytes:
    """The entry of an execution as a `Line`; as a map where a time in it is none, as those of a damaged message are."""
    queued, cpu = entry.queued, entry.cpu

    def after(moment: float | None) -> int | None:
        return None if moment is None else round((moment - (queued or 0.0)) * 1e6)

    times = (queued, entry.handed, entry.ended)
    if not all(moment is not None and 0 <= moment < TIMES_BELOW for moment in times):
        return _pack(entry)
    more = {name: value for name, default in _MORE if (value := getattr(entry, name)) != default}
    return _pack(
        (
            entry.id, entry.execution, entry.node, entry.cpus, queued, after(entry.handed), after(entry.started),
            after(entry.ended), entry.pid, entry.max_rss, None if cpu is None else round(cpu * 1e6), entry.command,
            entry.submission, *((more,) if more else ()),
        )
    )  # fmt: skip
