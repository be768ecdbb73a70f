"""`Live`: reads the pilot for all open pages together, and gives each what has changed since the page was opened.

What pages are sent is a *state*: sections, each either one record or rows by a key. A page gets the whole state once,
and then changes of at most CHANGE_BYTES: what did not fit follows with the next.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.client.overview import FailureGroup, NodeOverview, Overview
from pilotq.broker.errors import PilotqError
from pilotq.broker.log import log
from pilotq.cli import formatting

EVERY_S, IDLE_S = 1.0, 5.0  # between two readings, with and without an open page
BEHIND_S = 0.1  # while much of the journal is to be read
SHARE = 10  # reading takes at most this part of the time
SILENCE_S = 10.0  # after which a page is sent something though nothing has changed
CHANGE_BYTES = 18_000  # of JSON in one change; the frame around it is a few bytes more
ROW_BYTES = 40  # no row is smaller
PAGES_MAX = 64
TEXT_MAX, WHY_MAX = 300, 10  # characters of a reason or message, and reasons why something waits
CORES_IN_DETAIL = 4096  # of more the page shows nodes only, and no single executions
JOURNAL_S = 0.05  # of reading the journal at one update
ROWS = ("nodes", "executions", "progress", "queue", "failures", "history")  # sections with rows
State = dict[str, dict[str, Any]]
_encode = msgspec.json.Encoder().encode


class Live:
    """Reads in a thread of its own, from `start` on; `events` is for as many threads as there are pages."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.overview: Overview | None = None
        self.state: State = {}
        self._changed = threading.Condition()
        self._number = 0  # of the last change
        self._changes: list[tuple[int, bytes]] = []  # the last ones
        self._pages = 0
        self._ended = False

    def start(self) -> None:
        """Read from now on."""
        threading.Thread(target=self._read, name="overview", daemon=True).start()

    def failure(self, key: str) -> FailureGroup | None:
        """The group of failures with this key in the state."""
        overview = self.overview
        groups = overview.failures if overview is not None else []
        return next((group for group in groups if failure_key(group) == key), None)

    def node(self, name: str) -> dict[str, Any] | None:
        """A node with all that is known to run there, which the state of a large pilot leaves out."""
        overview = self.overview
        node = next((node for node in overview.nodes if node.name == name), None) if overview is not None else None
        if overview is None or node is None:
            return None
        there = [one for one in overview.executions if one.node == name or f"{name}[" in one.cores]
        return {"name": name, **_of_node(node), "executions": [{"id": one.id, **_of_execution(one)} for one in there]}

    def events(self) -> Iterator[bytes]:
        """Server-sent events for one page, without end: the whole state, then changes."""
        with self._changed:
            full = self._pages >= PAGES_MAX
            self._pages += not full
            self._changed.notify_all()  # the reader may rest
        if full:  # sent without the lock: a page that reads nothing would stop all others
            yield _event("full", {"pages": PAGES_MAX})
            return
        try:
            with self._changed:
                self._changed.wait_for(lambda: bool(self.state), timeout=SILENCE_S)
                number, state = self._number, _encode(self.state)
            yield b"event: state\ndata: " + state + b"\n\n"
            while True:
                number, data = self._after(number)
                yield data
        finally:
            with self._changed:
                self._pages -= 1

    def _after(self, number: int) -> tuple[int, bytes]:
        """Wait for what comes after this change; returns the number of the last one, and the events."""
        with self._changed:
            self._changed.wait_for(lambda: self._number != number, timeout=SILENCE_S)
            # The page was opened before the first reading, or was asleep for long.
            if (not number and self.state) or (self._changes and self._changes[0][0] > number + 1):
                return self._number, b"event: state\ndata: " + _encode(self.state) + b"\n\n"
            news = [b"event: change\ndata: " + data + b"\n\n" for at, data in self._changes if at > number]
            return self._number, b"".join(news) or b": still there\n\n"

    def _read(self) -> None:
        broker: Broker | None = None
        while True:
            began = time.monotonic()
            try:
                if broker is None:
                    broker = Broker.connect(self.directory)
                overview = broker.overview(seconds=JOURNAL_S)
                self._publish(overview)
                pause = BEHIND_S if overview.behind > 1 << 16 else EVERY_S if self._pages else IDLE_S
            except PilotqError as error:  # it is being started again, or it ends, and so does this process
                self._trouble(str(error))
                if broker is not None:
                    broker.close()
                broker, pause = None, EVERY_S
            except Exception as error:  # noqa: BLE001 - a page that stands still would not say why
                self._trouble(f"this page cannot read the pilot: {error!r}")
                log(traceback.format_exc())
                pause = IDLE_S
            self._rest(max(pause, (time.monotonic() - began) * SHARE))

    def _rest(self, seconds: float) -> None:
        """Wait so long, or until a page is opened while there was none."""
        with self._changed:
            none = not self._pages
            self._changed.wait_for(lambda: none and self._pages > 0, timeout=seconds)

    def _publish(self, overview: Overview) -> None:
        state = state_of(overview)
        with self._changed:
            self.overview = overview
            if not self.state:
                self.state = state
                self._number += 1
            else:
                self._add_change(change_between(self.state, state))
            self._changed.notify_all()

    def _trouble(self, text: str) -> None:
        with self._changed:
            if self.state and self.state["pilot"].get("trouble") != text:
                pilot = {**self.state["pilot"], "trouble": text}
                self._add_change({"pilot": {"": pilot}})
                self._changed.notify_all()

    def _add_change(self, change: dict[str, dict[str, Any]]) -> None:
        apply(self.state, change)
        self._number += 1
        self._changes.append((self._number, _encode(change)))
        del self._changes[:-20]


def state_of(overview: Overview) -> State:
    """What pages show of an overview."""
    detailed = overview.cores <= CORES_IN_DETAIL
    counts = overview.counts
    return {
        "pilot": {
            "at": overview.at, **formatting.counts_json(counts), "running": overview.running,
            "prefetched": overview.prefetched, "waiting": overview.waiting, "deferred": overview.deferred,
            "cores": overview.cores, "used": overview.used, "rate": round(overview.rate, 2),
            "left_s": _short(overview.left_s),
            "paused": overview.paused, "notes": overview.notes, "behind": overview.behind, "detailed": detailed,
            "unnamed": overview.unnamed, "more_classes": overview.more_classes, "more_failures": overview.more_failures,
            "seconds": overview.seconds,
        },
        "nodes": {node.name: _of_node(node) for node in overview.nodes},
        "executions": {
            f"{one.id}:{one.execution}": _of_execution(one) for one in overview.executions if one.cores
        } if detailed else {},
        "progress": {
            f"{one.array}/{one.name}": [
                one.name, one.array, one.total, one.finished, one.failed, one.canceled, one.handed, one.waiting,
                round(one.rate, 2), _short(one.left_s),
            ] for one in overview.progress
        },
        "queue": {
            one.name: [
                one.priority, one.queue, one.shape, one.waiting, one.first, [_cut(why) for why in one.why[:WHY_MAX]],
                _short(one.until),
            ] for one in overview.queue
        },
        "failures": {
            failure_key(one): [
                one.reason, one.exit_code, one.name, one.node, one.number, one.example, _cut(one.message),
                _short(one.at),
            ] for one in overview.failures
        },
        "history": {str(int(one.at)): [one.ended, one.used, one.cores] for one in overview.history},
    }  # fmt: skip


def change_between(old: State, new: State, limit: int = CHANGE_BYTES) -> dict[str, dict[str, Any]]:
    """Section -> key -> the new row, or None where it is gone; a section without rows has the key ''. As much as fits
    into ``limit`` bytes: of each section some, by chance, so that none waits for ever. A larger row never comes.
    """
    change: dict[str, dict[str, Any]] = {"pilot": {"": new["pilot"]}}
    left = limit - len(_encode(change))
    changed: dict[str, dict[str, Any]] = {}
    for section in ROWS:
        before, after = old[section], new[section]
        changed[section] = {key: None for key in before if key not in after}
        changed[section] |= {key: row for key, row in after.items() if before.get(key) != row}
    sections = sorted((section for section in ROWS if changed[section]), key=lambda name: len(changed[name]))
    for number, section in enumerate(sections):
        left -= len(section) + 6
        rest = left - left // (len(sections) - number)  # for the other sections
        fitting = change[section] = {}
        keys = list(changed[section])
        random.shuffle(keys)
        for key in keys:
            row = changed[section][key]
            size = len(_encode({key: row}))
            if size > left:
                continue
            fitting[key] = row
            left -= size
            if left <= rest + ROW_BYTES:
                break
    return {section: rows for section, rows in change.items() if rows}


def apply(state: State, change: dict[str, dict[str, Any]]) -> None:
    """Make a state of the one before, as pages do."""
    for section, rows in change.items():
        if section == "pilot":
            state[section] = rows[""]
            continue
        for key, row in rows.items():
            if row is None:
                state[section].pop(key, None)
            else:
                state[section][key] = row


def failure_key(group: FailureGroup) -> str:
    """What names a group of failures to a page."""
    return "\t".join((group.reason, str(group.exit_code), group.name, group.node))


def _of_node(node: NodeOverview) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "state": node.state, "why": _cut(node.why), "host": node.host, "cores": node.cores, "used": node.used,
        "running": node.running, "gpus": [[gpu.name, gpu.model] for gpu in node.gpus], "memory": node.memory,
        "memory_used": node.memory_used, "elements": node.elements, "threads": node.threads,
        "shared": node.shared_cores,
    }  # fmt: skip
    facts["cores"] = formatting.number_ranges([str(core) for core in node.cores])
    return {name: value for name, value in facts.items() if value not in ("", [], {}, 0, False, None) or name == "used"}


def _of_execution(one: Any) -> dict[str, Any]:
    return {
        "name": _cut(one.name),
        "array": one.array,
        "cores": one.cores,
        "started": _short(one.started),
        "node": one.node,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 3] + "..."


def _event(name: str, value: Any) -> bytes:
    return f"event: {name}\ndata: ".encode() + _encode(value) + b"\n\n"
