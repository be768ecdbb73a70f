"""The topics of `pilotq help`, each generated from the tables and docstrings of the code."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from pilotq.cli import exit_codes

WIDEST = 100
RESOURCES = ("cores", "nodes", "gpus", "memory", "use", "numa", "priority", "time_limit", "time_request")


class Topic(NamedTuple):
    summary: str
    text: Callable[[], str]


def states() -> str:
    from pilotq.broker.tasks.states import ACTIVE, ENDED, REASONS, STATUSES, WAITING

    kinds = {"waits": WAITING, "is under way": ACTIVE, "has ended": ENDED}
    rows = {s: next(k for k, members in kinds.items() if s in members) for s in sorted(STATUSES)}
    return "\n".join([
        "A task has one status; its reason says more.", "", *_rows(rows), "", "Reasons:", "",
        *_rows({reason: text for reason, text in REASONS.items() if reason}),
    ])  # fmt: skip


def codes() -> str:
    return "\n".join(_rows({str(code): text for code, text in exit_codes.MEANINGS.items()}))


def files() -> str:
    from pilotq.broker.taskfiles import reader, schema

    table = (reader.__doc__ or "").partition("\n\n")[2].replace("``", "").splitlines()
    formats = [line.partition("broker/")[0].rstrip() for line in table if "broker/" in line]
    return "\n".join([
        "A file is accepted whole or not at all. Its format is recognised, or given:", "",
        *(f"  {line}" for line in formats), "", "Keys of a task in TOML ([[tasks]]) and JSON ({\"tasks\": [...]}):", "",
        *_rows({key: f"{kind}: {text}" for key, (kind, text) in schema.KEYS.items()}),
        "", "`pilotq help schema` prints the JSON schema.",
    ])  # fmt: skip


def resources() -> str:
    from pilotq.broker.scheduling import placement
    from pilotq.broker.taskfiles import schema

    keys = schema.keys()
    rules = (placement.__doc__ or "").partition("\n\n")[2].strip()
    return "\n".join([
        "What a task can request: options of `pilotq enqueue`, keys in files.", "",
        *_rows({key: f"{keys[key][0]}: {keys[key][1]}" for key in RESOURCES}), "", *_wrapped(rules),
        "", "`pilotq explain ID` shows what a task waits for.",
    ])  # fmt: skip


def environment() -> str:
    from pilotq.broker import env_vars

    return "\n".join([
        "Variables that a task finds:", "", *_rows(env_vars.OF_TASKS), "", "Variables that commands read:", "",
        *_rows(env_vars.OF_COMMANDS),
    ])  # fmt: skip


def dependencies() -> str:
    from pilotq.broker.taskfiles import schema
    from pilotq.broker.tasks.dependencies import ALL_FIELDS
    from pilotq.broker.tasks.states import REASONS

    keys = schema.keys()
    return "\n".join([
        "Keys in files; `pilotq enqueue` has options for all but after_each:", "",
        *_rows({key: f"{keys[key][0]}: {keys[key][1]}" for key in (*ALL_FIELDS, "join")}), "",
        *_wrapped("A task that waits for others is deferred. When one of them ends otherwise, the waiting task is "
                  f"canceled, with the reason \"dependency\" ({REASONS['dependency']}), and so is what waits for it. "
                  "`pilotq explain ID` names the cause. To run both again name both, or `pilotq retry --all`."),
        "",
        *_wrapped("A task that joins is deferred, too, with the reason \"joining\", when its process has ended and its "
                  "children have not. If its process finished and one of these did not, it has failed with the reason "
                  "\"children\". To cancel it cancels them."),
    ])  # fmt: skip


def schema_text() -> str:
    from pilotq.broker.taskfiles.schema import schema
    from pilotq.cli.formatting import to_json

    return to_json(schema())


TOPICS: Final[dict[str, Topic]] = {
    "states": Topic("statuses of tasks, and reasons", states),
    "files": Topic("files of tasks: formats, keys", files),
    "resources": Topic("what a task can request, and which task is placed first", resources),
    "dependencies": Topic("tasks that wait for others", dependencies),
    "environment": Topic("variables that tasks find, and that commands read", environment),
    "exit-codes": Topic("the exit codes of commands", codes),
    "schema": Topic("the JSON schema of files of tasks", schema_text),
}


def _rows(table: Mapping[str, str]) -> list[str]:
    """A name and its text, which is wrapped beside it, or below a long name."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    indent = min(max(map(len, table)), 18) + 4
    out = []
    for name, text in table.items():
        lines = textwrap.wrap(text.replace("`", ""), max(width - indent, 20))
        head = f"  {name}"
        if len(head) + 2 > indent:
            out += textwrap.wrap(name, width - 2, initial_indent="  ", subsequent_indent="  ")
            head = ""
        out += [f"{head if not number else '':<{indent}}{line}" for number, line in enumerate(lines)]
    return out


def _wrapped(text: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    return textwrap.wrap(" ".join(text.replace("`", "").split()), width)
