"""The log of a process: one line with the time for each message, written to stderr.

Every process of a pilot has its stderr in a file of its own (``logs/<part>.log``). A message is written when it helps
to find the cause of something. With ``PILOTQ_LOG=json`` each line is a JSON object (`LINE`). It is not the standard
library's `logging`, whose import would slow the start of every process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from pilotq.broker.errors import InvalidInput

if TYPE_CHECKING:
    from types import TracebackType

VARIABLE: Final = "PILOTQ_LOG"
Form = Literal["text", "json"]
Level = Literal["info", "warning", "error"]
# The keys of a line, and what they are; docs/metrics.md shows them from here.
LINE: Final[dict[str, str]] = {
    "time": "when it was written, as ISO 8601 in UTC, with milliseconds",
    "level": "`info`; `warning`: something was lost, refused or is late; `error`: the process cannot go on, or a bug",
    "part": "the process: `supervisor`, `server`, `dispatcher`, `worker`, `node supervisor`, `launcher`",
    "node": "the node that the process, or the message, is about; absent where it is none",
    "task": "the id of the task that the message is about; absent where it is none",
    "message": "the sentence, as in a text line",
}
_of_process = {"part": "", "node": ""}


def log_form(variables: Mapping[str, str] = os.environ) -> Form:
    """How this process writes its log; raises InvalidInput for a wrong ``PILOTQ_LOG``.

    >>> log_form({"PILOTQ_LOG": "json"}), log_form({})
    ('json', 'text')
    """
    wanted = variables.get(VARIABLE) or "text"
    for form in get_args(Form):
        if wanted == form:
            return "json" if form == "json" else "text"
    raise InvalidInput(f"{VARIABLE} is {wanted!r}: it can be {' or '.join(get_args(Form))}, or unset")


def log_as(part: str, node: str = "") -> None:
    """Name the part of the pilot that this process is, for JSON; there an uncaught exception is a line, too."""
    _of_process.update(part=part, node=node)
    if os.environ.get(VARIABLE) == "json":
        sys.excepthook = _uncaught


def log(text: str, *, level: Level = "info", node: str = "", task: str = "") -> None:
    """Write one line: ``2031-05-04 12:00:00 the server is ready``.

    ``node`` and ``task`` are those that the message is about; they, and ``level``, are written in JSON only.
    """
    now = time.time()
    if os.environ.get(VARIABLE) == "json":
        from pilotq.broker.os_strings import printable, to_json  # for those who want it

        moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"
        about = {"node": node or _of_process["node"], "task": task}
        line = {"time": moment, "level": level, "part": _of_process["part"]}
        line |= {name: printable(value) for name, value in about.items() if value}
        data = to_json({**line, "message": printable(text)})
    else:
        data = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))} {text}".encode("utf-8", "backslashreplace")
    try:
        os.write(2, data + b"\n")
    except OSError:
        pass  # the disk is full, or nobody reads: what the process does goes on


def as_text(lines: str) -> str:
    """Lines of a log for people: of one in JSON the time and the message; others as they are."""
    return "\n".join(map(_line_as_text, lines.splitlines()))


def _line_as_text(line: str) -> str:
    if not line.startswith('{"time":'):
        return line
    import msgspec

    try:
        found = msgspec.json.decode(line, type=dict[str, Any])
        return f"{found['time'][:19].replace('T', ' ')} {found['message']}"
    except (msgspec.MsgspecError, LookupError, TypeError):  # cut off, or of another program
        return line


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    import traceback

    log("".join(traceback.format_exception(kind, error, trace)).rstrip(), level="error")
