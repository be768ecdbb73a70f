"""Fills in the variables of a task at its launch. Pure.

``{attempt}``; in paths ``{id}``; in arrays ``{index}`` and ``{value}``, in the code of a shell as
broker/tasks/shell_code.py says; in tasks of QCG-PilotJob files ``${it}``, ``${itval}``, ``${ncores}``, ``${nnodes}``,
``${nlist}`` and ``${root_wd}``
(broker/taskfiles/qcg_variables.py has the rules). What was filled in is not filled in again: a value that contains
``{index}`` stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import msgspec

from pilotq.broker.os_strings import decode, encode
from pilotq.broker.taskfiles.qcg_variables import fill
from pilotq.broker.tasks.shell_code import VALUE, code_of, is_for_shell, refer_to_value
from pilotq.broker.tasks.spec import FLAG_ARRAY, FLAG_ATTEMPT, FLAG_FUNCTION, FLAG_ID, FLAG_QCG, Spec

# `${index}` is a variable of the shell, not ours.
_BRACES = re.compile(r"(?<!\$)\{(index|value)\}")
_ATTEMPT = re.compile(r"(?<!\$)\{attempt\}")
_ID = re.compile(rb"(?<!\$)\{id\}")


class Variables(msgspec.Struct):
    """Values of the variables of one execution."""

    task_id: str
    attempt: int = 1
    name: str = ""
    index: int = -1  # as the user counts; -1 when the task is no element of an array
    index_text: str = ""  # what stands for it, if that is not the number
    value: str | None = None  # the element's, as os.fsdecode shows it; None in arrays without values: it is the index
    position: int = 0
    cores: int = 1  # all cores of the reservation
    nodes: tuple[str, ...] = ()
    cores_per_node: tuple[int, ...] = ()
    root: str = ""  # the directory of the submitter


def render(spec: Spec, variables: Variables) -> Spec:
    """``spec`` with the variables of its kind filled in; ``spec`` itself when it has none by its flags.

    They stand in arguments, script, environment values, and the four paths; in a script that no shell runs they are
    its own. The code of a shell refers to a value, and does not contain it. In a task of a QCG-PilotJob file that
    is no element ``${it}`` and ``${itval}`` stay as they are, and ``{index}`` and ``{value}`` always do.
    """
    if spec.flags & FLAG_QCG:
        known = _qcg_variables(variables)
        if any(b"$" in name for name in spec.env):
            # Only in these tasks names in the environment have them, too.
            names = {encode(fill(decode(name), known)): text for name, text in spec.env.items()}
            spec = msgspec.structs.replace(spec, env=names)
        return _render(spec, lambda text: fill(text, known), lambda text: fill(text, known, script=True), b"$")
    if spec.flags & FLAG_ID:
        spec = _render_id(spec, variables.task_id.encode())
    if spec.flags & FLAG_ATTEMPT:
        attempt = str(variables.attempt)

        def numbered(text: str) -> str:
            return _ATTEMPT.sub(attempt, text)

        spec = _render(spec, numbered, lambda text: numbered(text) if is_for_shell(text) else text, b"{")
    if spec.flags & FLAG_ARRAY:
        index = variables.index_text or str(variables.index)
        value = index if variables.value is None else variables.value

        def braces(text: str) -> str:
            return _fill_braces(text, index, value)

        def code(text: str) -> str:
            return braces(text) if variables.value is None else _fill_braces(refer_to_value(text), index, VALUE)

        def script(text: str) -> str:
            return code(text) if is_for_shell(text) else text

        done = _render(spec, braces, script, b"{")
        if variables.value is not None and not spec.flags & FLAG_FUNCTION:
            _render_code(spec.argv, done.argv, code)
        return done
    return spec


def has_variables(spec: Spec) -> bool:
    """Whether `render` may return anything else than an equal ``spec``, whatever the variables are."""
    if not spec.flags & (FLAG_ID | FLAG_ATTEMPT | FLAG_ARRAY):
        return bool(spec.flags & FLAG_QCG)
    argv = () if spec.flags & FLAG_FUNCTION else spec.argv
    paths = spec.cwd, spec.stdin, spec.stdout, spec.stderr
    return bool(spec.flags & FLAG_QCG) or any(b"{" in text for text in (*argv, spec.script, *spec.env.values(), *paths))


def _render_id(spec: Spec, task_id: bytes) -> Spec:
    paths = {name: _ID.sub(task_id, getattr(spec, name)) for name in ("cwd", "stdin", "stdout", "stderr")}
    return msgspec.structs.replace(spec, **paths)


def _render_code(argv: list[bytes], done: list[bytes], code: Callable[[str], str]) -> None:
    """Put the argument that a shell reads as code, if there is one with a value in it, into the rendered ones."""
    if any(VALUE.encode() in argument for argument in argv):
        number = code_of([decode(argument) for argument in argv])
        if number >= 0:
            done[number] = encode(code(decode(argv[number])))


def _qcg_variables(variables: Variables) -> dict[str, str]:
    known = {
        "root_wd": variables.root,
        "ncores": str(variables.cores),
        "nnodes": str(len(variables.nodes)),
        "nlist": ",".join(variables.nodes),
    }
    if variables.index >= 0:
        known["it"] = str(variables.index)
        known["itval"] = known["it"] if variables.value is None else variables.value
    return known


def _render(spec: Spec, text: Callable[[str], str], script: Callable[[str], str], sign: bytes) -> Spec:
    """Apply ``text`` to each part that contains ``sign``, with which variables begin, and ``script`` to the script."""

    def filled(string: bytes) -> bytes:
        return encode(text(decode(string))) if sign in string else string

    return msgspec.structs.replace(
        spec,
        argv=spec.argv if spec.flags & FLAG_FUNCTION else [filled(argument) for argument in spec.argv],
        script=encode(script(decode(spec.script))) if sign in spec.script else spec.script,
        env={name: filled(value) for name, value in spec.env.items()} if spec.env else spec.env,
        cwd=filled(spec.cwd),
        stdin=filled(spec.stdin),
        stdout=filled(spec.stdout),
        stderr=filled(spec.stderr),
    )


def _fill_braces(text: str, index: str, value: str) -> str:
    if "{" not in text:
        return text
    pieces = _split_braces(text)
    return "".join(((index if piece == "index" else value) if n % 2 else piece) for n, piece in enumerate(pieces))


@lru_cache(maxsize=128)
def _split_braces(text: str) -> tuple[str, ...]:
    """Text and names of variables by turns; the elements of an array share it."""
    return tuple(_BRACES.split(text))
