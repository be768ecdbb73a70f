"""Requests that a script makes by comments in its head, as Slurm's (``#SBATCH``) and HyperQueue's (``#HQ``).

They are defaults: what the command line, or the task in a file, says itself is stronger. What has no meaning here is
named for people; what would change a result if it were passed over is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles import hq_directives, slurm_directives
from pilotq.broker.taskfiles.directive_options import Option, Requested, words_of
from pilotq.broker.tasks.dependencies import ALL_FIELDS
from pilotq.broker.tasks.model import Request, Task

OTHERS = frozenset({"#BSUB", "#COBALT", "#FLUX:", "#MSUB", "#OAR", "#PBS", "#PJM"})  # of other systems
KINDS = {module.SYNTAX.word: module for module in (slurm_directives, hq_directives)}


class Directives:
    """The directives of one script; ``where`` is its name for people."""

    def __init__(self, where: str, kinds: list[Requested], others: list[str]) -> None:
        self._where = where
        self._kinds = kinds
        self._others = others

    def request(self, base: Request) -> Request:
        """``base`` with the resources that they ask for."""
        for asked in self._kinds:
            if asked.request:
                whole = asked.request.get("whole", base.whole and "cores" not in asked.request)
                base = msgspec.structs.replace(base, **{**asked.request, "whole": whole})
        return base

    def pass_over(self, field: str) -> None:
        """A field that has no meaning where this script stands."""
        for asked in self._kinds:
            asked.fields.pop(field, None)
            for option in [option for option, what in asked.obeyed.items() if what == field]:
                del asked.obeyed[option]
                asked.ignored.append(option)

    def complete(self, task: Task, given: Collection[str]) -> list[str]:
        """Set what they ask for and is not ``given`` (fields of Task); returns sentences for people.

        ``given`` also has the parts of the request, which is left to the caller. Raises InvalidInput for what cannot be
        passed over.
        """
        notes = []
        own = frozenset(given)
        for together in (frozenset({"array", "values"}), frozenset(ALL_FIELDS)):
            own |= together if own & together else frozenset()
        for asked in self._kinds:
            for name, why in asked.needed.items():
                if name not in own:
                    raise InvalidInput(f"{self._where}: {asked.word} {why}")
            for name, value in asked.fields.items():
                # An output that goes where stdout goes does so because nothing else is said.
                follows = name == "stderr" and value == asked.fields.get("stdout") and "stdout" in own
                if name not in own and not follows:
                    setattr(task, name, value)
        for asked in self._kinds:
            task.env = {**KINDS[asked.word].variables(task, asked), **task.env}
            notes.append(f"{self._where}: {asked.word}: {'; '.join(asked.sentences(own))}")
        return notes + [f"{self._where}: {word} is not obeyed: {' and '.join(KINDS)} are" for word in self._others]


def read_directives(script: str, where: str) -> Directives | None:
    """The directives of a script; None when it has none. They end with the first line that is no comment.

    Raises InvalidInput, whose text starts with ``where`` and the line.
    """
    if not any(word in script for word in (*KINDS, *OTHERS)):
        return None
    found: dict[str, list[Option]] = {}
    try:
        for word, options in _lines(script):
            found.setdefault(word, []).extend(options)
        kinds = [_read(word, options) for word, options in found.items() if word in KINDS]
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None
    return Directives(where, kinds, sorted(found.keys() - KINDS.keys())) if found else None


def _lines(script: str) -> Iterator[tuple[str, list[Option]]]:
    """The lines in the head of a script that are directives: word and options."""
    for number, line in enumerate(script.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            break
        word, *rest = line.split(None, 1) or [""]
        if not line.startswith(word) or not rest:
            continue
        if word in KINDS:
            words = words_of(rest[0], f"line {number}")
            yield word, list(KINDS[word].SYNTAX.options(words, number))
        elif word in OTHERS:
            yield word, []


def _read(word: str, options: list[Option]) -> Requested:
    module, asked = KINDS[word], Requested(word)
    repeated = getattr(module, "REPEATED", ())
    by_name = {o.name if o.name not in repeated else f"{o.name} {o.value}": o for o in options}
    module.read(by_name, asked)
    return asked
