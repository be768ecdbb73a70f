"""The variables ``${it}``, ``${ncores}``... of QCG-PilotJob files: which there are, and how they are filled in. Pure.

Texts are filled in twice, as in QCG-PilotJob: when the request is read, and when an execution starts. Each time only
the variables that are known then are replaced; what was filled in is not searched again in the same pass, quotes in a
value stay quotes, and every other ``$name`` stays as it is. Two rules, by what the text is:

* in arguments, environment variables, paths, values and names both ``${name}`` and ``$name`` are replaced, and ``$$``
  becomes ``$``: ``$${it}`` is ``${it}`` after the first pass, and a number after the second;
* in a script only ``${name}`` is, and not where the script sets a variable of that name itself (``date=...``,
  ``for it in``, ``read it``, ``local``...). ``it=${it}`` does not count as setting it: it asks for ours. ``$$`` stays:
  it is the process of the shell.

For example, ``fill("part.${it}", {"it": "7"})`` is ``part.7``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

# Known when a request is read, and when an execution starts.
REQUEST_VARIABLES = frozenset({"rcnt", "uniq", "sname", "date", "time", "dateTime", "jname"})
LAUNCH_VARIABLES = frozenset({"root_wd", "ncores", "nnodes", "nlist", "it", "itval"})

_VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_COMMANDS = re.compile(r"[\n;&|()`]")
_ARITHMETIC = re.compile(r"\$\(\(|\)\)")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\[[^\]]*\])?\+?=(.*)", re.DOTALL)
_LEADING = frozenset({"then", "do", "else", "if", "elif", "while", "until", "!", "{"})
_LOCAL = frozenset({"local", "declare", "typeset"})
_DECLARING = _LOCAL | {"export", "readonly", "let"}
_READING = frozenset({"read", "mapfile", "readarray", "getopts"})


def fill(text: str, variables: Mapping[str, str], *, script: bool = False) -> str:
    """``text`` with the variables that are keys of ``variables`` replaced, by the rule for scripts or the other one."""
    if "$" not in text:
        return text
    pieces = split(text, frozenset(variables), script)
    return "".join(variables[piece] if number % 2 else piece for number, piece in enumerate(pieces))


@lru_cache(maxsize=128)
def split(text: str, variables: frozenset[str], script: bool) -> tuple[str, ...]:
    """Text and variables by turns: text first and last, every second piece the name of a variable."""
    if script:
        variables = variables - names_set_by(text)
    pieces = []
    before = ""
    end = 0
    for match in _VARIABLE.finditer(text):
        name = match[1] or ("" if script else match[2])
        if name in variables:
            pieces += [before + text[end : match.start()], name]
            before = ""
        elif match[0] == "$$" and not script:
            before += text[end : match.start()] + "$"
        else:
            continue
        end = match.end()
    return (*pieces, before + text[end:])


def fill_early(text: str, variables: Mapping[str, str]) -> str:
    """``text`` with some variables of the second pass replaced before it: the pass gives what it gave without this."""
    known = variables.keys()

    def replaced(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        return escape(variables[name]) if name in known else match[0]

    return _VARIABLE.sub(replaced, text)


def escape_script(script: str) -> str:
    """A script as a text in which the second pass fills in what it would fill in in the script."""
    pieces = split(script, LAUNCH_VARIABLES, True)
    return "".join(f"${{{piece}}}" if number % 2 else escape(piece) for number, piece in enumerate(pieces))


def escape(text: str) -> str:
    """A text that one pass turns into ``text``."""
    return text.replace("$", "$$")


def names_set_by(script: str) -> frozenset[str]:
    """Names of the variables that a script sets itself, as far as its text shows."""
    names: set[str] = set()
    for command in _COMMANDS.split(_ARITHMETIC.sub("", script)):
        tokens = command.split()
        while tokens and tokens[0] in _LEADING:
            del tokens[0]
        while tokens and (match := _ASSIGNMENT.match(tokens[0])):
            names.update(_set_by(match))
            del tokens[0]
        if not tokens:
            continue
        first, *rest = tokens
        if first in ("for", "select"):
            names.update(rest[:1])
        elif first in _READING or (first == "printf" and rest[:1] == ["-v"]):
            names.update(rest)
        elif first in _DECLARING:
            for token in rest:
                match = _ASSIGNMENT.match(token.strip("'\""))
                names.update(_set_by(match) if match else [token] if first in _LOCAL else [])
    return frozenset(names)


def _set_by(assignment: re.Match[str]) -> list[str]:
    """The name that is set; none where its new value asks for the variable of that name."""
    return [] if f"${{{assignment[1]}}}" in assignment[2] else [assignment[1]]
