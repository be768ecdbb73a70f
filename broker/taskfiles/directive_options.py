"""How the options of a directive are written, and what they come to. Slurm's and HyperQueue's share this."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pilotq.broker.errors import InvalidInput

T = TypeVar("T")


class Option(NamedTuple):
    """One option: its full name, its value (empty without one), how it is written, and in which line."""

    name: str
    value: str
    text: str
    line: int


class Syntax(NamedTuple):
    """The options of one kind of directive; those in ``optional`` have a value only after ``=``."""

    word: str  # with which its lines begin
    values: frozenset[str]
    flags: frozenset[str]
    optional: frozenset[str]
    short: Mapping[str, str]

    def options(self, words: Sequence[str], line: int) -> Iterator[Option]:
        """The options in the words of a line. What is unknown, or no option, is named by what is written."""
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word.startswith("--"):
                start, equals, value = word[2:].partition("=")
                matches = [name for name in self.values | self.flags | self.optional if name.startswith(start)]
                name = start if start in matches or len(matches) != 1 else matches[0]
            else:
                name, value = self.short.get(word[1:2], word) if word[0] == "-" else word, word[2:]
                equals = value
            text = word
            if name in self.values and not equals:
                if not rest:
                    raise InvalidInput(f"line {line}: {self.word} {word} has no value")
                value = rest.pop(0)
                text = f"{word} {value}"
            yield Option(name, value, text, line)


class Requested:
    """What the directives of one kind ask for.

    ``fields`` are of Task, and in ``request`` are arguments of Request. ``obeyed`` has, for each option, what of a task
    it stands for, as the command line calls it; ``needed`` what must be given there, and why.
    """

    def __init__(self, word: str) -> None:
        self.word = word
        self.fields: dict[str, Any] = {}
        self.request: dict[str, Any] = {}
        self.env: dict[str, str] = {}
        self.obeyed: dict[Option, str] = {}
        self.ignored: list[Option] = []
        self.needed: dict[str, str] = {}

    def parsed(self, option: Option, parse: Callable[[str], T]) -> T:
        """Its value; what the parser refuses is said with the place."""
        try:
            return parse(option.value)
        except InvalidInput as error:
            raise InvalidInput(f"line {option.line}: {self.word} {option.text}: {error}") from None

    def sentences(self, given: frozenset[str]) -> Iterator[str]:
        """What became of the options, where ``given`` has been said elsewhere."""
        obeyed = [option.text for option, what in self.obeyed.items() if what not in given]
        beaten = [option.text for option, what in self.obeyed.items() if what in given]
        ignored = [option.text for option in self.ignored]
        for texts, what in ((obeyed, "obeyed"), (beaten, "replaced"), (ignored, "not obeyed, it has no meaning here")):
            if texts:
                yield f"{what}: {' '.join(texts)}"


def words_of(text: str, place: str) -> list[str]:
    """The words of a line, with quotes as in a shell; a comment may follow them."""
    try:
        words = shlex.split(text)
    except ValueError:
        try:
            words = shlex.split(text, comments=True)
        except ValueError as error:
            raise InvalidInput(f"{place}: {str(error).lower()}") from None
    end = next((n for n, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:end]


def number_of(value: str, least: int = 1) -> int:
    """A whole number; raises InvalidInput."""
    if not value.isdecimal() or len(value) > 9 or int(value) < least:
        raise InvalidInput(f"{value!r} is no whole number from {least} on")
    return int(value)
