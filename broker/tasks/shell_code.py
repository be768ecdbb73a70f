"""How a value gets into the code of a shell: by reference to a variable, never as text. Pure.

Text that is pasted into a script is code: a file name with ``$(...)`` runs. So ``{value}`` in a script, or in the
argument of ``sh -c``, becomes a reference to PILOTQ_VALUE, quoted for the place where it stands, and is one word there
whatever the value is. Should the place be misread, then the word may be split, but nothing of the value runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.script_text import interpreter_of

VALUE = "{value}"
REFERENCE = "${PILOTQ_VALUE}"
SHELLS = frozenset({"sh", "bash", "dash", "ash", "ksh", "mksh", "zsh"})
# Programs that start the command in their arguments.
WRAPPERS = frozenset({"env", "ionice", "nice", "nohup", "setsid", "stdbuf", "taskset", "time", "timeout"})

_SIGN = re.compile(r"\\.|\$\(\(|\(\(|\$\(|\(|\$\{|\$'|<<<|<<|\{value\}|[)}'\"`#\n]", re.DOTALL)
_VALUE = re.compile(r"(?<!\$)\{value\}")
_ANSI = re.compile(r"(?:[^'\\]|\\.)*", re.DOTALL)
# What stands before text that another shell reads as code.
_SHELL = re.compile(
    rf"(?:(?:^|[\s;&|(`/])(?:{'|'.join(sorted(SHELLS))})(?:[ \t]+[-+]\S+)*?[ \t]+-\w*c|(?:^|[\s;&|(`])eval)[ \t]+$"
)
_DOUBLE = re.compile(r'((?:[^"\\`]|\\.)*)"', re.DOTALL)
_ESCAPED = re.compile(r'\\(["\\`$])')
_DOLLAR = "\ue000"  # one that is escaped
_DELIMITER = re.compile(r"(-?)[ \t]*((?:'[^']*'|\"[^\"]*\"|\\.|[^\s'\"\\;&|<>()`])+)", re.DOTALL)


def is_for_shell(script: str) -> bool:
    """Whether a shell with the syntax of sh runs it.

    >>> is_for_shell("ls"), is_for_shell("#!/usr/bin/env -S bash -e"), is_for_shell("#!/usr/bin/python3")
    (True, True, False)
    """
    words = " ".join(interpreter_of(script)).split()
    if _name(words[0]) == "env":
        words = [word for word in words[1:] if word[0] != "-" and "=" not in word] or words
    return _name(words[0]) in SHELLS


def code_of(command: Sequence[str]) -> int:
    """Which argument of a command a shell reads as code; -1 when there is none.

    >>> code_of(["bash", "-o", "pipefail", "-ec", "ls | wc"]), code_of(["timeout", "9", "sh", "-c", "ls"])
    (4, 4)
    >>> code_of(["grep", "-c", "sh", "file"])
    -1
    """
    first = 0
    if _name(command[0]) in WRAPPERS:
        first = next((n for n, word in enumerate(command) if _name(word) in SHELLS), 0)
    if _name(command[first]) not in SHELLS:
        return -1
    number = first + 1
    while number < len(command) and command[number][:1] in ("-", "+"):
        option = command[number]
        number += 1
        if option[:2] in ("--", "-", "+"):
            continue
        if option[0] == "-" and "c" in option:
            return number if number < len(command) else -1
        number += option[-1] in "oO"  # its argument
    return -1


@lru_cache(maxsize=128)
def refer_to_value(code: str) -> str:
    """The code of a shell with references in place of ``{value}``; in comments it stays.

    Raises InvalidInput where it stands in a here-document without variables.

    >>> print(refer_to_value("cat {value} \\"{value}\\" '{value}'"))
    cat "${PILOTQ_VALUE}" "${PILOTQ_VALUE}" ''"${PILOTQ_VALUE}"''
    """
    return code if VALUE not in code else _Reader(code).read()


def _name(path: str) -> str:
    return path.rpartition("/")[2]


class _Reader:
    """Reads code from the front, and knows in which brackets and quotes it is.

    ``self.open`` has what closes them: ``"`` and a backquote, ``)`` of commands, ``))`` of arithmetic and ``()`` within
    it, ``}`` of a parameter.
    """

    def __init__(self, code: str) -> None:
        self.code = code
        self.at = 0
        self.pieces: list[str] = []
        self.copied = 0  # up to there the code is in ``pieces``
        self.open: list[str] = []
        self.documents: list[tuple[str, bool, bool]] = []  # that begin in the next line: end, quoted, with tabs

    def read(self) -> str:
        while found := _SIGN.search(self.code, self.at):
            self.at = found.end()
            sign = found[0]
            if sign == VALUE:
                # The `$` of ${value} has been read with its bracket.
                self.put(found.start(), found.end(), REFERENCE if self.quoted() else f'"{REFERENCE}"')
            elif sign in ("'", '"') and not self.quoted() and self.read_inner(sign, found.start()):
                continue
            elif sign in ('"', "`"):
                self.toggle(sign)
            elif sign[0] == "$" and sign != "$'":
                self.open.append({"$((": "))", "$(": ")", "${": "}"}[sign])
            elif sign in (")", "}"):
                self.close(sign)
            elif self.open and self.open[-1] in ("))", "()") and sign[0] == "(":
                self.open += ["()"] * len(sign)
            elif not self.quoted():
                self.read_unquoted(sign, found.start())
        return "".join([*self.pieces, self.code[self.copied :]])

    def quoted(self) -> bool:
        """Whether words are not split here: within double quotes or arithmetic."""
        kind = next((kind for kind in reversed(self.open) if kind != "}"), "")
        return kind in ('"', "))", "()")

    def toggle(self, quote: str) -> None:
        if self.open and self.open[-1] == quote:
            self.open.pop()
        else:
            self.open.append(quote)

    def close(self, sign: str) -> None:
        last = self.open[-1] if self.open else ""
        if last == "))" and self.code.startswith("))", self.at - 1):
            self.at += 1
            self.open.pop()
        elif last == sign or (last == "()" and sign == ")"):
            self.open.pop()

    def read_unquoted(self, sign: str, start: int) -> None:
        if sign == "'":
            self.read_text(self.code.find("'", self.at), "'")
        elif sign == "$'":
            match = _ANSI.match(self.code, self.at)
            self.read_text(match.end() if match else -1, "$'")
        elif sign == "((":
            self.open.append("))")
        elif sign == "(":
            self.open.append(")")
        elif sign == "#" and self.begins_word(start):
            self.at = self.code.find("\n", start) % (len(self.code) + 1)
        elif sign == "<<" and (match := _DELIMITER.match(self.code, self.at)):
            word = match[2]
            delimiter = re.sub(r"[\\'\"]", "", word)
            self.documents.append((delimiter, word != delimiter, bool(match[1])))
            self.at = match.end()
        elif sign == "\n":
            for document in self.documents:
                self.read_document(*document)
            self.documents.clear()

    def begins_word(self, start: int) -> bool:
        return not (self.open and self.open[-1] == "}") and (start == 0 or self.code[start - 1] in " \t\n;&|()`")

    def read_inner(self, quote: str, start: int) -> bool:
        """Code of a shell within this one, such as ``sh -c '...'``: that shell, not this one, fills in the value."""
        if not _SHELL.search(self.code, max(0, start - 200), start):
            return False
        if quote == "'":
            code, found, _ = self.code[self.at :].partition("'")
        else:
            match = _DOUBLE.match(self.code, self.at)
            code, found = (match[1], '"') if match and "$(" not in match[1] else ("", "")
        if not found or VALUE not in code:
            return False
        end = self.at + len(code)
        if quote == '"':
            code = _ESCAPED.sub(lambda match: _DOLLAR if match[1] == "$" else match[1], code)
            done = _Reader(code).read().replace(REFERENCE, _DOLLAR + REFERENCE[1:])
            done = re.sub(r'(["\\`])', r"\\\1", done).replace(_DOLLAR, "\\$")
        else:
            done = _Reader(code).read()
        self.put(self.at, end, done)
        self.at = end + 1
        return True

    def read_text(self, end: int, quote: str) -> None:
        """Single quotes, in which nothing is filled in: they are closed for the reference."""
        end = end if end >= 0 else len(self.code)
        for found in _VALUE.finditer(self.code, self.at, end):
            self.put(found.start(), found.end(), f'\'"{REFERENCE}"{quote}')
        self.at = end + 1

    def read_document(self, delimiter: str, quoted: bool, tabs: bool) -> None:
        pattern = ("^\t*" if tabs else "^") + re.escape(delimiter) + "$"
        last = re.compile(pattern, re.MULTILINE).search(self.code, self.at)
        end = last.start() if last else len(self.code)
        for found in _VALUE.finditer(self.code, self.at, end):
            if quoted:
                line = self.code.count("\n", 0, found.start()) + 1
                raise InvalidInput(
                    f"script, line {line}: no shell fills in a value in a here-document whose end is quoted: "
                    f"write <<{delimiter} without quotes, or use the variable PILOTQ_VALUE in the program that reads it"
                )
            self.put(found.start(), found.end(), REFERENCE)
        self.at = last.end() if last else end

    def put(self, start: int, end: int, text: str) -> None:
        self.pieces += [self.code[self.copied : start], text]
        self.copied = end
