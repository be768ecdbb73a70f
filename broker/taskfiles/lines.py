"""Reader of plain files: each line is one command, split into words as a POSIX shell splits them; no shell runs it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.batch import Batch
from pilotq.broker.tasks.model import Task
from pilotq.broker.tasks.validation import validate

FILE_BYTES = 1 << 30
LINE_BYTES = 1 << 20  # more than the kernel takes as one argument list of one command

# Most lines have these characters only; they are split at spaces.
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./~^*?\[\]{}!()\t -]*")
_ASSIGNS = re.compile(r"[A-Za-z_]\w*=")
_PIECE = re.compile(
    r"""(?P<space>[ \t\r\n]+) | '(?P<single>[^']*)' | "(?P<double>[^"\\]*(?:\\.[^"\\]*)*)" | \\(?P<escaped>.)
    | (?P<shell>[|<>&;`]|\$\() | (?P<open>['"\\]) | (?P<text>[^ \t\r\n'"\\|<>&;`$]+|\$)""",
    re.VERBOSE | re.DOTALL,
)
_DISBATCH = re.compile(r"[ \t]*#DISBATCH[ \t]+(\w+)(?: (.*))?")
_INSTEAD = {
    "BARRIER": ": write the tasks in TOML, where `after` says what they wait for, or two files",
    "REPEAT": ": an array does that, `pilotq run --array 0-9 -- CMD`",
    "PERENGINE": "",
}
_OF_SCRIPTS = re.compile(r"#SBATCH\b|#HQ\b|#!(?!.*pilotq)")
_EXPANDS = re.compile(r"(?:[^\\`$]|\\.|\$(?!\())*(`|\$\()", re.DOTALL)
_IN_DOUBLE = re.compile(r'\\([$`"\\])')


def read_lines(head: bytes, stream: BinaryIO, file: str, *, base: Task, shell: bool) -> Batch:
    """The tasks of a file whose first bytes are ``head``. ``base`` holds all that a line does not say.

    Empty lines and lines that start with ``#`` are skipped, but for the directives of disBatch. With ``shell`` each
    line is a script for bash.
    """
    tasks = []
    around = Around(file)
    for number, line in enumerate(_lines(head, stream, file), start=1):
        where = f"{file}: line {number}"
        try:
            text = line.decode("utf-8-sig").strip(" \t\r")
        except UnicodeDecodeError:
            raise InvalidInput(f"{where}: the text is not UTF-8: convert the file") from None
        if not text or text.startswith("#"):
            if text.startswith("#"):
                around.read(line.decode("utf-8-sig").rstrip("\r"), where, first=number == 1)
            continue
        text = around.join(text)
        if shell:
            task = msgspec.structs.replace(base, command=None, script=text)
        else:
            task = msgspec.structs.replace(base, command=split_words(text, where), script=None)
            if _ASSIGNS.match(text):
                raise InvalidInput(
                    f"{where}: {text.split()[0]!r} sets a variable, which needs a shell: write `env` in front of it, "
                    "or use --shell to run every line with bash"
                )
        validate(task, where)
        tasks.append(task)
    return Batch(tasks, notes=around.notes)


class Around:
    """What directives put before and behind the lines that follow; and what is to be said of other directives."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._prefix = self._suffix = ""
        self.notes: list[str] = []

    def read(self, line: str, where: str, *, first: bool) -> None:
        """A line that begins with ``#``. Raises InvalidInput for a directive that would change what runs."""
        if match := _DISBATCH.match(line):
            what, text = match[1].upper(), match[2] or ""
            if what not in ("PREFIX", "SUFFIX"):
                raise InvalidInput(f"{where}: #DISBATCH {match[1]} is not known here{_INSTEAD.get(what, '')}")
            if what == "PREFIX":
                self._prefix = text
            else:
                self._suffix = text
            self._say("#DISBATCH: obeyed: PREFIX and SUFFIX")
        elif (word := _OF_SCRIPTS.match(line)) and (first or word[0] != "#!"):
            self._say(f"each line is a task here, and {word[0]} has no meaning: a script is --script {self._file}")

    def join(self, text: str) -> str:
        return self._prefix + text + self._suffix

    def _say(self, what: str) -> None:
        if (note := f"{self._file}: {what}") not in self.notes:
            self.notes.append(note)


def _lines(head: bytes, stream: BinaryIO, file: str) -> Iterator[bytes]:
    """Lines without their ends. Only one block of the file is in memory at a time."""
    rest, block, size, number = b"", head, len(head), 0
    while block:
        *lines, rest = (rest + block).split(b"\n")
        for line in [*lines, rest]:
            number += 1
            if len(line) > LINE_BYTES:
                raise InvalidInput(f"{file}: line {number} is longer than {LINE_BYTES >> 20} MiB")
        number -= 1
        yield from lines
        block = stream.read(1 << 18)
        size += len(block)
        if size > FILE_BYTES:
            raise InvalidInput(
                f"{file}: the file is larger than {FILE_BYTES >> 30} GiB: use an array, or several files"
            )
    if rest:
        yield rest


def split_words(text: str, where: str) -> list[str]:
    """The words of one command. Raises InvalidInput for what only a shell can do, and for open quotes."""
    if _PLAIN.fullmatch(text):
        return text.split()
    words: list[str] = []
    word: list[str] = []  # the pieces of the word that is being read; an empty quote is a piece too
    position = 0
    while position < len(text):
        if text[position] == "#" and not word:
            position = text.find("\n", position) % (len(text) + 1)  # a comment, as in a shell
            continue
        piece = _PIECE.match(text, position)
        assert piece is not None and piece.lastgroup is not None  # the alternatives cover every character
        kind, found = piece.lastgroup, piece[piece.lastgroup]
        if kind == "shell":
            raise _needs_shell(found, where, position)
        if kind == "open":
            what = "nothing follows the backslash" if found == "\\" else f"the quote {found} is not closed"
            raise InvalidInput(f"{where}, column {position + 1}: {what}")
        if kind == "double":
            if expands := _EXPANDS.match(found):
                raise _needs_shell(expands[1], where, position + 1 + expands.start(1))
            found = _IN_DOUBLE.sub(r"\1", found)
        if kind != "space":
            word.append(found)
        elif word:
            words.append("".join(word))
            word = []
        position = piece.end()
    return [*words, "".join(word)] if word else words


def _needs_shell(what: str, where: str, position: int) -> InvalidInput:
    return InvalidInput(
        f"{where}, column {position + 1}: {what!r} needs a shell: quote it if it is meant as text, "
        "or use --shell to run every line with bash"
    )
