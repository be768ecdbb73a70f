"""The loop of `pilotq top`: reads the pilot and the keyboard, and draws the lines of `top_screen`."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pilotq.broker.client.archive import Archive
from pilotq.broker.client.broker import Broker, open_pilot
from pilotq.broker.client.overview import Overview
from pilotq.broker.errors import PilotqError, ServerUnavailable
from pilotq.cli import formatting, top_screen
from pilotq.cli.outcomes import cancel_sentence
from pilotq.cli.top_screen import VIEWS, Choice, Row

if TYPE_CHECKING:
    from rich.text import Text

NOTICE_S = 5.0  # how long the answer to a key is shown
TAIL_BYTES = 16 << 10  # of what a running task has written
READ_S, READ_SHARE = 0.5, 20  # reading a task takes at most so long, and this part of the time
ESCAPE_S = 0.05  # an escape character that is alone for so long is the key Esc
NAMED = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "k": "up", "j": "down",
    "\x1b[5~": "page up", "\x1b[6~": "page down", "\x1b[H": "home", "\x1b[F": "end", "g": "home", "G": "end",
    "\x1b[C": "next", "\x1bOC": "next", "\t": "next", "\x1b[D": "back", "\x1bOD": "back", "\x1b[Z": "before",
    "\x1b": "escape", "\x7f": "escape", "\r": "enter", "\n": "enter",
}  # fmt: skip


class Top:
    """What is shown, and what keys do to it; without the terminal."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.found: Overview = broker.overview()
        self.choice = Choice()
        self.page: list[str] = []
        self.asked = ""  # the task whose cancellation waits for y
        self.columns, self.lines = 80, 24
        self._selected = ""  # the task of the chosen row: it stays chosen when rows move
        self._read_page = 0.0  # when to read the open task again (monotonic)
        self._notice_end = 0.0

    def update(self) -> None:
        """Read the pilot; raises ServerUnavailable."""
        self.found = self.broker.overview()
        if self.choice.task and time.monotonic() >= self._read_page:
            self._read_task()
        if self.choice.notice and not self.asked and time.monotonic() > self._notice_end:
            self.choice = self.choice._replace(notice="")
        self._keep()

    def screen(self) -> list[top_screen.Line]:
        return top_screen.screen(self.found, self.choice, self.page, self.columns, self.lines)

    def say(self, text: str) -> None:
        self.choice = self.choice._replace(notice=text)
        self._notice_end = time.monotonic() + NOTICE_S

    def press(self, key: str) -> bool:
        """What a key does; whether top goes on. Raises ServerUnavailable."""
        if self.asked:
            self._answer(key)
        elif key == "q":
            return False
        elif key == "c":
            if task := self.choice.task or self._row().task:
                self.asked = task
                self.choice = self.choice._replace(notice=f"cancel {task}, and all that it stands for? y/n")
            else:
                self.say("there is no task in this line: `pilotq list` has their ids")
        elif self.choice.task:
            self._in_task(NAMED.get(key, key))
        else:
            self._in_view(NAMED.get(key, key))
        return True

    def _rows(self) -> list[Row]:
        return top_screen.rows(self.found, self.choice.view, self.columns)

    def _row(self) -> Row:
        found = self._rows()
        return found[self.choice.row] if self.choice.row < len(found) else Row("", [])

    def _keep(self) -> None:
        """Keep the chosen task chosen, wherever its row is now."""
        ids = [row.task for row in self._rows()]
        if self._selected in ids and self._selected:
            self.choice = self.choice._replace(row=ids.index(self._selected))
        else:
            self._choose(self.choice.row)

    def _choose(self, row: int) -> None:
        found = self._rows()
        row = max(min(row, len(found) - 1), 0)
        self.choice = self.choice._replace(row=row)
        self._selected = found[row].task if found else ""

    def _in_view(self, key: str) -> None:
        steps = {"up": -1, "down": 1, "page up": 6 - self.lines, "page down": self.lines - 6}
        at = VIEWS.index(self.choice.view)
        if key in steps:
            self._choose(self.choice.row + steps[key])
        elif key in ("home", "end"):
            self._choose(0 if key == "home" else len(self._rows()))
        elif key in ("1", "2", "3", "4", "5", "next", "before", "back"):
            at = int(key) - 1 if key.isdigit() else at + (1 if key == "next" else -1)
            self.choice = Choice(view=VIEWS[at % len(VIEWS)])
            self._choose(0)
        elif key == "enter":
            if task := self._row().task:
                self.choice = self.choice._replace(task=task, scroll=0, notice="")
                self._read_task()
            else:
                self.say("there is no task in this line: `pilotq list` has their ids")

    def _in_task(self, key: str) -> None:
        last = max(len(self.page) - (self.lines - 4), 0)
        steps = {
            "up": -1,
            "down": 1,
            "page up": 6 - self.lines,
            "page down": self.lines - 6,
            "home": -last,
            "end": last,
        }
        if key in ("escape", "back"):
            self.choice, self.page = self.choice._replace(task="", scroll=0), []
        elif key in steps:
            scroll = 0 if key == "home" else self.choice.scroll + steps[key]
            self.choice = self.choice._replace(scroll=max(min(scroll, last), 0))

    def _answer(self, key: str) -> None:
        task, self.asked = self.asked, ""
        if key not in ("y", "Y"):
            self.say("not canceled")
            return
        try:
            for task_id, word in self.broker.cancel([task]).items():
                self.say(f"{task_id}: {cancel_sentence(word)}")
        except ServerUnavailable:
            self.say(f"{task}: the server did not answer; look whether it still runs, and try again")
            raise
        except PilotqError as error:
            self.say(str(error))

    def _read_task(self) -> None:
        began = time.monotonic()
        try:
            self.page = _page(self.broker, self.choice.task)
        except ServerUnavailable:
            raise
        except PilotqError as error:
            self.page = formatting.lines(str(error))
        ended = time.monotonic()
        self._read_page = ended + (ended - began) * READ_SHARE


def _page(broker: Broker, task_id: str) -> list[str]:
    """What `pilotq show` and `pilotq explain` say, and the end of the output of one that runs."""
    task = broker.task(task_id)
    why = broker.explain(task_id)
    out = [*formatting.explanation_text(why).splitlines(), "", *formatting.details_text(task).splitlines()]
    for stream in ("stdout", "stderr") if task.status == "started" and not task.array_size else ():
        tail = b""
        until = time.monotonic() + READ_S
        for piece in broker.follow(task_id, stream):
            tail = (tail + piece)[-TAIL_BYTES:]
            if not piece:
                break
            if time.monotonic() > until:
                tail = f"too much to show here: pilotq logs {task_id}".encode()
                break
        if tail.strip():
            out += ["", f"{stream} so far, the end:"]
            out += [f"  {line}" for line in formatting.lines(tail.decode("utf-8", "replace"))]
    return out


def watch(directory: str | None, every: float) -> None:
    """Show the pilot until `q`, Ctrl-C or its end; raises as `open_pilot`."""
    pilot = open_pilot(directory)
    if isinstance(pilot, Archive):
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the terminal is left as it was
    with suppress(KeyboardInterrupt), _keyboard() as keyboard:
        _watch(Top(pilot), directory, every, keyboard)


def _watch(top: Top, directory: str | None, every: float, keyboard: int | None) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        due = 0.0
        while True:
            top.columns, top.lines = console.size
            try:
                if time.monotonic() >= due:
                    due = time.monotonic() + every
                    top.update()
                live.update(_drawn(top.screen()), refresh=True)
                for key in _keys(keyboard, max(due - time.monotonic(), 0.0)):
                    if not top.press(key):
                        return
            except ServerUnavailable:  # it is being started again, or the pilot ends
                top.broker.close()
                try:
                    pilot = open_pilot(directory)
                except ServerUnavailable:
                    time.sleep(every)
                    continue
                if isinstance(pilot, Archive):
                    return
                top.broker = pilot


def _drawn(lines: list[top_screen.Line]) -> Text:
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop", end="")
    for number, line in enumerate(lines):
        text.append("\n" if number else "")
        for piece, style in line:
            text.append(piece, style or None)
    return text


@contextmanager
def _keyboard() -> Iterator[int | None]:
    """stdin, of which each key is read at once and not echoed; None where it is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _keys(fd: int | None, seconds: float) -> list[str]:
    """The keys that are pressed; waits for the first one so long. A terminal that is gone presses `q`."""
    if fd is None:
        time.sleep(seconds)
        return []
    if not select.select([fd], [], [], seconds)[0]:
        return []
    data = os.read(fd, 1024)
    if not data:
        return ["q"]
    if data.endswith(b"\x1b") and select.select([fd], [], [], ESCAPE_S)[0]:
        data += os.read(fd, 1024)
    return split_keys(data.decode("utf-8", "replace"))


def split_keys(text: str) -> list[str]:
    """Single characters, and the sequences of arrows and their like as one key each."""
    found = []
    while text:
        size = max((len(key) for key in NAMED if text.startswith(key)), default=1)
        if size == 1 and (match := formatting.ESCAPE.match(text)) and len(match[0]) > 1:
            text = text[match.end() :]  # a key that has no meaning here
            continue
        found.append(text[:size])
        text = text[size:]
    return found
