"""`Api`: what the page asks for and what its buttons do; every button calls what the command of its name calls."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import flask
import msgspec

from pilotq.broker.client.broker import Broker
from pilotq.broker.errors import InvalidInput, PilotqError, ServerUnavailable, UnknownTask
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store.journal import Journal, JournalEntry
from pilotq.cli import formatting
from pilotq.cli.dashboard.live import Live
from pilotq.cli.outcomes import cancel_sentence, retry_sentence

EXECUTIONS_MAX = 100  # of a task, that are shown
RANGES_MAX = 2000  # characters of ranges of elements
FOUND_MAX = 50
TAIL_BYTES = 64 << 10  # of what was written before the page was opened
PAUSE_S = 0.3  # how often the output of a running task is looked at
SILENCE = 30  # looks, after which something is sent: so a closed page is noticed
SENTENCES_MAX = 20

_encode = msgspec.json.Encoder().encode


class Api:
    """The requests of the page. Each request has a connection of its own."""

    def __init__(self, pilot: Pilot, live: Live) -> None:
        self._pilot = pilot
        self._live = live

    def add_to(self, app: flask.Flask) -> None:
        """Add the requests to an application, below /api."""
        looks: dict[str, Callable[..., Any]] = {
            "pilot": self.pilot, "events": self.events, "task/<task_id>": self.task, "node/<name>": self.node,
            "logs/<task_id>/<stream>": self.logs, "search": self.search,
        }  # fmt: skip
        for path, function in looks.items():
            app.add_url_rule(f"/api/{path}", f"api.{path}", _answer(function))
        for button in (self.cancel, self.retry, self.drain, self.resume, self.pause, self.stop):
            name = button.__name__
            app.add_url_rule(f"/api/{name}", f"api.{name}", _answer(button), methods=["POST"])

    # -- looking ----------------------------------------------------------------------------------------------------

    def pilot(self) -> Any:
        return {"directory": self._pilot.directory}

    def events(self) -> Any:
        return _stream(self._live.events())

    def node(self, name: str) -> Any:
        found = self._live.node(name)
        if found is None:
            raise UnknownTask(f"there is no node {name!r} in this pilot")
        return found

    def task(self, task_id: str) -> Any:
        """All of `pilotq show` and `pilotq explain`, and the executions of the journal, the last ones first."""
        with self._connect() as broker:
            view = broker.task(task_id)
            explanation = broker.explain(task_id)
        entries = Journal(self._pilot.journal).find(task_id)
        facts = formatting.details_json(view)
        facts["elements"] = {
            status: formatting.elements_text(view, _short(ranges)) for status, ranges in view.elements.items()
        }
        facts["is_bundle"] = view.is_bundle
        facts |= {"stdout_tail": view.stdout_tail, "stderr_tail": view.stderr_tail, "ran": formatting.ran(view)}
        explained = {"why": explanation.why, "until": explanation.until, "tasks": explanation.tasks[:SENTENCES_MAX]}
        return {
            "task": facts, "explain": explained,
            "executions": [_execution(entry) for entry in entries[:EXECUTIONS_MAX]],
            "more_executions": max(len(entries) - EXECUTIONS_MAX, 0),
        }  # fmt: skip

    def search(self) -> Any:
        """The task with this id, and those with this name."""
        word = flask.request.args.get("q", "").strip()
        if not word:
            raise InvalidInput("give an id or a name to search for")
        with self._connect() as broker:
            found = []
            try:
                found.append(broker.task(word))
            except UnknownTask:
                ids = broker.find(word)
                found = [broker.task(task_id) for task_id in ids[:FOUND_MAX]]
            else:
                ids = [word]
        rows = [[view.id, view.name, view.status, view.reason, view.command[:200]] for view in found]
        return {"found": rows, "more": max(len(ids) - FOUND_MAX, 0)}

    def logs(self, task_id: str, stream: str) -> Any:
        """What the task writes, live, from the last TAIL_BYTES on."""
        if stream not in ("stdout", "stderr"):
            raise InvalidInput(f"a task writes to stdout and stderr, not to {stream!r}")
        with self._connect() as broker:
            view = broker.task(task_id)
            if view.array_size:
                parts = "a bundle, and each of its tasks" if view.is_bundle else "an array, and each of its elements"
                raise InvalidInput(f"{task_id} is {parts} has its own output")
        return _stream(self._follow(task_id, stream))

    def _follow(self, task_id: str, stream: str) -> Iterator[bytes]:
        earlier: deque[bytes] | None = deque()
        size = looks = 0
        try:
            with self._connect() as broker:
                for piece in broker.follow(task_id, stream):
                    if earlier is not None and piece:
                        earlier.append(piece)
                        size += len(piece)
                        while size - len(earlier[0]) >= TAIL_BYTES:
                            size -= len(earlier.popleft())
                        continue
                    if earlier is not None:
                        yield _text_event(b"".join(earlier)[-TAIL_BYTES:])
                        earlier = None
                    if piece:
                        yield _text_event(piece)
                        continue
                    looks += 1
                    if looks % SILENCE == 0:
                        yield b": still there\n\n"
                    time.sleep(PAUSE_S)
            if earlier is not None:
                yield _text_event(b"".join(earlier)[-TAIL_BYTES:])
            yield b"event: end\ndata: {}\n\n"
        except PilotqError as error:
            yield b"event: end\ndata: " + _encode({"error": str(error)}) + b"\n\n"

    # -- buttons ----------------------------------------------------------------------------------------------------

    def cancel(self) -> Any:
        """`pilotq cancel`."""
        ids = _texts("ids")
        with self._connect() as broker:
            outcome = broker.cancel(ids)
            bundles = broker.bundles(ids)
        return _sentences(
            (formatting.tasks_of(task_id, bundles), cancel_sentence(word)) for task_id, word in outcome.items()
        )

    def retry(self) -> Any:
        """`pilotq retry`, of tasks or of a group of failures (the last ones of it, where there are very many)."""
        key = _given("failure", str, "")
        group = self._live.failure(key) if key else None
        if key and group is None:
            raise InvalidInput("these failures are no longer there: they run again, or were retried")
        ids = list(group.ids) if group is not None else _texts("ids")
        with self._connect() as broker:
            before = broker.statuses(ids)
            outcome = broker.retry(ids)
            bundles = broker.bundles(ids)
        return _sentences(
            (formatting.tasks_of(task_id, bundles), retry_sentence(word, before[task_id]))
            for task_id, word in outcome.items()
        )

    def drain(self) -> Any:
        """`pilotq nodes drain`."""
        names, reason = _texts("nodes"), _whole("reason", _given("reason", str, ""))
        with self._connect() as broker:
            known = {node.name for node in broker.nodes()}
            if unknown := [name for name in names if name not in known]:
                raise InvalidInput(f"there is no node {unknown[0]!r} in this pilot")
            broker.close_nodes(names, "drained", reason)
        return _sentences((name, "gets nothing new; what runs there goes on") for name in names)

    def resume(self) -> Any:
        """`pilotq nodes resume`."""
        names = _texts("nodes")
        with self._connect() as broker:
            closed = broker.closed_nodes()
            if open_ones := [name for name in names if name not in closed]:
                raise InvalidInput(f"node {open_ones[0]} is neither drained, retired nor quarantined")
            broker.open_nodes(names)
        return _sentences((name, "is used again") for name in names)

    def pause(self) -> Any:
        """Start nothing more, or start tasks again: `Broker.pause`."""
        paused = _given("paused", bool, None)
        with self._connect() as broker:
            broker.pause(paused)
        return {"said": ["nothing new starts; what runs goes on" if paused else "tasks are started again"]}

    def stop(self) -> Any:
        """`pilotq stop`, without waiting for the end."""
        mode = _given("mode", str, "stop")
        if mode not in ("drain", "stop", "now"):
            raise InvalidInput(f"a pilot cannot be ended in the mode {mode!r}: give drain, stop or now")
        with self._connect() as broker:
            broker.request_stop(mode)
        return {"said": ["the pilot ends, and this page with it"]}

    def _connect(self) -> Broker:
        return Broker.connect(self._pilot.directory)


def _answer(function: Callable[..., Any]) -> Callable[..., Any]:
    """A view of flask that answers with the function's value as JSON, and with an error's sentence."""

    def view(**parts: str) -> Any:
        try:
            found = function(**parts)
        except UnknownTask as error:
            return _json({"error": str(error)}, 404)
        except InvalidInput as error:
            return _json({"error": str(error)}, 400)
        except ServerUnavailable as error:
            return _json({"error": str(error)}, 503)
        except PilotqError as error:
            return _json({"error": str(error)}, 500)
        except OSError as error:
            return _json({"error": f"the pilot's files cannot be read: {error}"}, 503)
        return found if isinstance(found, flask.Response) else _json(found, 200)

    return view


def _json(value: Any, status: int) -> flask.Response:
    return flask.Response(_encode(value), status, mimetype="application/json")


def _stream(events: Iterator[bytes]) -> flask.Response:
    return flask.Response(events, mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})


def _text_event(data: bytes) -> bytes:
    return b"event: text\ndata: " + _encode(data.decode("utf-8", "replace")) + b"\n\n"


def _given(name: str, kind: type, default: Any) -> Any:
    """A field of the JSON that a button sends."""
    sent = flask.request.get_json(silent=True)
    value = sent.get(name, default) if isinstance(sent, dict) else None
    if not isinstance(value, kind):
        raise InvalidInput(f"the request has no {name}, or one that is no {kind.__name__}: send JSON")
    return value


def _texts(name: str) -> list[str]:
    values = _given(name, list, None)
    if not values or not all(isinstance(value, str) and value for value in values):
        raise InvalidInput(f"{name} is no list of names")
    return [_whole(name, value) for value in values]


def _whole(name: str, text: str) -> str:
    """A text that was sent; raises InvalidInput where it has half of a character, which nothing could store."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidInput(f"{name} has half of a character (a lone surrogate): send whole ones")
    return text


def _sentences(said: Any) -> dict[str, list[str]]:
    """One sentence for each; of many with the same end one for all of them."""
    by_end: dict[str, list[str]] = {}
    for name, end in said:
        by_end.setdefault(end, []).append(name)
    return {
        "said": [
            f"{names[0]} {end}" if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more: {end}"
            for end, names in by_end.items()
        ]
    }


def _short(ranges: str) -> str:
    return ranges if len(ranges) <= RANGES_MAX else ranges[:RANGES_MAX].rpartition(",")[0] + ", ..."


def _execution(entry: JournalEntry) -> dict[str, Any]:
    return {
        "execution": entry.execution, "status": entry.status, "reason": entry.reason, "cores": entry.cpus,
        "started": entry.started, "ended": entry.ended, "exit_code": entry.exit_code, "signal": entry.signal,
        "max_rss": entry.max_rss, "cpu": entry.cpu, "message": entry.message, "final": entry.final,
    }  # fmt: skip
