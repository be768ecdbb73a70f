"""Generates the pages that repeat what the code says (PAGES), and such parts of hand-written pages (PARTS).

    python docs/generate.py

tests/project/test_docs.py fails when a page is not what this program would write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from pilotq.broker import env_vars, errors, log
from pilotq.broker.rq.job_requests import REFUSED
from pilotq.broker.store.library import source
from pilotq.broker.taskfiles import schema
from pilotq.broker.tasks.states import ACTIVE, ENDED, EVENT_SCRIPTS, REASONS, STATUSES, TABLE, WAITING
from pilotq.cli import exit_codes as exit_codes_of_commands
from pilotq.cli.formatting import to_json
from pilotq.cli.main import SECTIONS, pilotq
from pilotq.cli.metrics import FAMILIES
from pilotq.cli.traces import ATTRIBUTES

if __name__ == "__main__":
    from pictures import Arrow, Box, draw, layers
else:
    from docs.pictures import Arrow, Box, draw, layers

HERE = Path(__file__).parent
WIDTH = 100
GENERATED = "<!-- Written by docs/generate.py: change the code, then run `python docs/generate.py`. -->\n"

COMMANDS_HEAD = """\
# Commands

Every command takes `--help`. ID is the id that `enqueue` and `submit` print, or the name of one task. Commands find the
pilot by `--dir`, else by the variable `PILOTQ_DIR`, else by `.pilotq/current` here or in a directory above. `list`,
`show`, `explain`, `logs`, `status`, `wait`, `report`, `traces` and `top` also answer for a pilot that has ended, from
its journal. `pilotq qcg` and `pilotq-qcg-report` are for [QCG-PilotJob's files](from-qcg-pilotjob.md).

`pilotq run -- CMD` also takes the options of `pilotq enqueue` that describe a task, except `--nodes`, `--after`,
`--after-any`, `--after-notok` and `--join`.

## Exit codes

| code | means |
|---|---|
"""

STATES_HEAD = """\
# States

A task has one status. The statuses are those of RQ, so that its tools can show the tasks of a pilot; the reason says
more.

## Statuses

| status | kind | is left by |
|---|---|---|
"""
KINDS = {"waits": WAITING, "is under way": ACTIVE, "has ended": ENDED}


def commands() -> str:
    """The text of docs/commands.md."""
    out = [GENERATED, COMMANDS_HEAD, *exit_codes()]
    with click.Context(pilotq, info_name="pilotq") as top:
        for section, verbs in SECTIONS.items():
            out.append(f"\n## {section}\n")
            for verb in verbs:
                command = pilotq.get_command(top, verb)
                assert command is not None
                with click.Context(
                    command, top, info_name=verb, terminal_width=WIDTH, help_option_names=["-h", "--help"]
                ) as context:
                    out.append(f"\n### pilotq {verb}\n\n```text\n{command.get_help(context)}\n```\n")
                    for name, below in command.commands.items() if isinstance(command, click.Group) else ():
                        with click.Context(below, context, info_name=name, terminal_width=WIDTH) as inner:
                            text = below.get_help(inner)
                        out.append(f"\n#### pilotq {verb} {name}\n\n```text\n{text}\n```\n")
    return "".join(out)


def exit_codes() -> list[str]:
    """The rows, with the errors of the tree that end so."""
    names: dict[int, list[str]] = {}
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.PilotqError) and kind is not errors.PilotqError:
            names.setdefault(kind.exit_code, []).append(name)
    rows = []
    for code, text in exit_codes_of_commands.MEANINGS.items():
        words = f" ({', '.join(f'`{n}`' for n in names[code])})" if code in names else ""
        rows.append(f"| {code} | {text}{words} |\n")
    end = "\nThe names in brackets are the exceptions of `pilotq.broker.errors` in Python.\n"
    return [*rows, end]


def states() -> str:
    """The text of docs/states.md."""
    out = [GENERATED, STATES_HEAD]
    for kind, statuses in KINDS.items():
        for status in sorted(statuses):
            events = [f"`{event}`" for before, event in TABLE if before == status]
            out.append(f"| `{status}` | {kind} | {', '.join(events)} |\n")
    assert set().union(*KINDS.values()) == STATUSES
    out.append(
        "\n`created` is what a submit has staged and not committed yet. `scheduled`, `rate_limited` and\n"
        "`ready_to_enqueue` are entered by RQ's own producers only.\n"
        "\n## Events\n\n| event | from | to |\n|---|---|---|\n"
    )
    out += [f"| `{event}` | `{before}` | `{after}` |\n" for (before, event), after in TABLE.items()]
    out.append(
        "\nEach event is the work of one script in `broker/store/scripts/`:\n\n"
        "| script | events | does |\n|---|---|---|\n"
    )
    for name in dict.fromkeys(EVENT_SCRIPTS.values()):
        events = ", ".join(f"`{event}`" for event, by in EVENT_SCRIPTS.items() if by == name)
        out.append(f"| `{name}.lua` | {events} | {purpose(name)} |\n")
    out.append(
        "\nThe same as a picture (blue waits, yellow is under way, green has ended; dashed arrows lead back):\n\n"
        "![The statuses of a task](pictures/states.svg)\n"
        "\n## Reasons\n\nThe list is closed. The reason of a task that finished is empty.\n\n"
        "| reason | the task |\n|---|---|\n"
    )
    out += [f"| {reason} | {sentence} |\n" for reason, sentence in REASONS.items() if reason]
    return "".join(out)


def purpose(name: str) -> str:
    """What the head of a script says that it does."""
    mark = f"-- {name}: "
    (line,) = (line for line in source(name).splitlines() if line.startswith(mark))
    text = line.removeprefix(mark)
    return text[: text.index(".")] if "." in text else text


MATRIX_HEAD = """\
# RQ's buttons

What the buttons and calls of RQ's own tools do to a task of a pilot, whoever submitted it. Within five seconds
everything that depends on the task has ended or waits for something that can still happen, `pilotq wait` returns,
no core stays reserved and no process is left. A test presses every button in every state.

*Handed* is a task that a node has received and not launched. *With dependents* is a task that waits, or has failed, and
that others wait for. *Array* is the record of an array of which some elements run.

"""


def matrix() -> str:
    """The text of docs/rq-matrix.md."""
    columns = {
        "queued": "waiting",
        "handed": "handed",
        "running": "running",
        "parent": "with dependents",
        "array": "array",
    }
    table = tomllib.loads((HERE / "rq_matrix.toml").read_text(encoding="utf-8"))
    out = [GENERATED, MATRIX_HEAD, f"| | {' | '.join(columns.values())} |\n", "|---" * (len(columns) + 1), "|\n"]
    out += [f"| {row['button']} | {' | '.join(row[state][1] for state in columns)} |\n" for row in table.values()]
    out.append("\nRQ's `cancel` and `delete` notify nobody: they are found at the next poll, once a second.\n")
    return "".join(out)


def file_keys() -> str:
    """The table of keys in docs/files.md."""
    rows = [f"| {code(names)} | {kind} | {text} |\n" for names, (kind, text) in schema.KEYS.items()]
    return "| key | type | is |\n|---|---|---|\n" + "".join(rows)


def task_variables() -> str:
    """The table of the variables that a task finds, in docs/concepts.md."""
    rows = [f"| {code(names)} | {text} |\n" for names, text in env_vars.OF_TASKS.items()]
    return "| variable | is |\n|---|---|\n" + "".join(rows)


def command_variables() -> str:
    """The table of the variables that commands read, in docs/concepts.md."""
    rows = [f"| {code(names)} | {text} |\n" for names, text in env_vars.OF_COMMANDS.items()]
    return "| variable | is |\n|---|---|\n" + "".join(rows)


def log_keys() -> str:
    """The table of the keys of a line of a log in JSON, in docs/metrics.md."""
    return "| key | is |\n|---|---|\n" + "".join(f"| `{key}` | {text} |\n" for key, text in log.LINE.items())


def metrics() -> str:
    """The table of the metrics, in docs/metrics.md."""
    rows = [
        f"| `{name}` | {family.kind} | {', '.join(f'`{label}`' for label in family.labels)} | {family.text} |\n"
        for name, family in FAMILIES.items()
    ]
    return "| metric | type | labels | is |\n|---|---|---|---|\n" + "".join(rows)


def span_attributes() -> str:
    """The table of the attributes of an execution's span, in docs/metrics.md."""
    rows = [f"| `{name}` | `{field}` |\n" for name, field in ATTRIBUTES.items()]
    return "| attribute | key of the [journal](concepts.md#the-pilots-directory) |\n|---|---|\n" + "".join(rows)


def code(names: str) -> str:
    """Each of some names in backquotes."""
    return ", ".join(name if name == "..." else f"`{name}`" for name in names.split(", "))


def with_parts(page: str) -> str:
    """A hand-written page with its generated parts."""
    text = (HERE / page).read_text(encoding="utf-8")
    for name, part in PARTS[page].items():
        begin, end = f"<!-- {name}: written by docs/generate.py -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, mark, after = rest.partition(end)
        assert mark, f"{page} has no part {name}"
        text = f"{before}{begin}{part()}{end}{after}"
    return text


def json_schema() -> str:
    """The text of docs/tasks.schema.json."""
    return to_json(schema.schema()) + "\n"


def refused_jobs() -> str:
    """The jobs of RQ that fail when they are enqueued."""
    return "| what |\n|---|\n" + "".join(f"| {what} |\n" for what in REFUSED)


def faults() -> str:
    """Every fault that tests inject, and the result of these tests when `make faults` was last run."""
    rows = tomllib.loads((HERE / "faults.toml").read_text(encoding="utf-8"))["fault"]
    results = json.loads((HERE / "faults.json").read_text(encoding="utf-8"))
    out = ["| fault | what happens | tests | result |\n|---|---|---|---|\n"]
    for row in rows:
        found = results.get(row["what"], {})
        result = ", ".join(f"{number} {word}" for word, number in found.items()) or "not run"
        (file,) = (HERE.parent / "tests").rglob(row["tests"].partition("::")[0])
        out.append(f"| {row['what']} | {row['then']} | `{file.relative_to(HERE.parent)}` | {result} |\n")
    return "".join(out)


def packages_of_code() -> dict[str, tuple[str, list[str]]]:
    """The table of packages: name -> what it holds, and what it may import; bottom up."""
    rows = tomllib.loads((HERE / "design" / "packages.toml").read_text(encoding="utf-8"))["package"]
    return {row["name"].removeprefix("pilotq."): (row["says"], row["imports"]) for row in rows}


def package_table() -> str:
    """Every package, what it holds and what it may import."""
    out = ["| package | holds | may import |\n|---|---|---|\n"]
    for package, (says, imports) in packages_of_code().items():
        out.append(f"| `{package}` | {says} | {', '.join(f'`{name}`' for name in imports)} |\n")
    return "".join(out)


def package_arrows() -> list[tuple[str, str]]:
    """Who imports whom, without what follows from others, and without `broker`, which all import."""
    table = {name: imports for name, (_, imports) in packages_of_code().items() if name not in NOT_DRAWN}
    above: dict[str, set[str]] = {}  # package -> all that it imports, also through others
    arrows = []
    for package, imports in table.items():
        drawn = [name for name in imports if name in table]
        through = set().union(*(above[name] for name in drawn))
        above[package] = through | set(drawn)
        arrows += [(package, name) for name in drawn if name not in through]
    return arrows


def package_picture() -> str:
    """The packages as a picture: each below all that it imports, one frame for each folder."""
    table = packages_of_code()
    arrows, names = package_arrows(), [name for name in table if name not in NOT_DRAWN]
    rows = layers(arrows, names)
    taken: dict[tuple[str, int], int] = {}
    first = {"broker": 0, "workers": 2, "cli": 5}  # columns
    boxes = []
    for name in sorted(names, key=lambda name: name in ASIDE):
        folder = name.partition(".")[0]
        column = taken.setdefault((folder, rows[name]), 0)
        taken[folder, rows[name]] += 1
        boxes.append(Box(name, name, first[folder] + column, rows[name], group=f"{folder}/"))
    return draw(boxes, [Arrow(*arrow) for arrow in arrows], gap_x=16, gap_y=44, title="Who imports whom", up=True)


# What is drawn beside the others of its row: many arrows lead there, past those.
ASIDE = ("broker.taskfiles",)


def state_picture() -> str:
    """The statuses as a picture; the arrow between two names its events where a pointer rests on it."""
    ways: dict[tuple[str, str], list[str]] = {}
    for (before, event), after in TABLE.items():
        ways.setdefault((before, after), []).append(event)
    kinds = dict.fromkeys(WAITING, "box") | dict.fromkeys(ACTIVE, "store") | dict.fromkeys(ENDED, "end")
    boxes = [Box(name, name, *PLACES[name], kinds.get(name, "other")) for name in sorted(STATUSES)]
    arrows = [Arrow(*pair, title=f"{pair[0]} to {pair[1]}: {', '.join(events)}") for pair, events in ways.items()]
    return draw(boxes, arrows, gap_x=64, title="The statuses of a task")


# Column and row of each status.
PLACES = {
    "created": (0, 2), "deferred": (1, 1), "scheduled": (1, 3), "ready_to_enqueue": (1, 4), "rate_limited": (2, 3),
    "queued": (3, 2), "started": (4, 2), "finished": (5, 0.5), "failed": (5, 1.5), "stopped": (5, 2.5),
    "canceled": (5, 3.5),
}  # fmt: skip


def process_picture() -> str:
    """The processes of a pilot, and who starts whom."""
    boxes = [
        Box("run", "pilotq run, start", 0, 1.5, "other"),
        Box("supervisor", "supervisor\nwrites the journal", 1, 1.5),
        Box("server", "server\nRedis or Valkey", 2, 0, "store"),
        Box("dispatcher", "dispatcher\nwho gets which cores", 2, 1),
        Box("worker1", "worker\none for each node", 2, 2),
        Box("worker2", "worker\nof the next node", 2, 3),
        Box("launcher", "launcher\none for each 8 cores", 3, 2),
        Box("task1", "task, pinned\na session of its own", 4, 1.5, "end"),
        Box("task2", "task, pinned\na session of its own", 4, 2.5, "end"),
    ]
    arrows = [("run", "supervisor"), *(("supervisor", name) for name in ("server", "dispatcher", "worker1", "worker2"))]
    arrows += [("worker1", "launcher"), ("launcher", "task1"), ("launcher", "task2")]
    return draw(boxes, [Arrow(*arrow) for arrow in arrows], gap_x=48, title="The processes of a pilot: who starts whom")


def way_picture() -> str:
    """The way of a task through the processes."""
    boxes = [
        Box("user", "command,\nBroker, Executor", 0, 0.4, "other"),
        Box("rq", "producer\nof RQ", 0, 2.2, "other"),
        Box("server", "server: classes,\ntasks, inboxes", 1, 1.3, "store"),
        Box("dispatcher", "dispatcher", 1, 0),
        Box("worker", "worker", 2, 0.7),
        Box("launcher", "launcher", 3, 0.7),
        Box("supervisor", "supervisor", 2, 2.2),
        Box("journal", "journal.jsonl", 3, 2.2, "store"),
    ]
    arrows = [
        Arrow("user", "server", "commit.lua"), Arrow("rq", "server"), Arrow("server", "dispatcher", "heads, events"),
        Arrow("dispatcher", "server", "claim.lua"), Arrow("server", "worker", "inbox of a node"),
        Arrow("worker", "server", "report_started.lua,\ncomplete.lua"), Arrow("worker", "launcher", "run"),
        Arrow("launcher", "worker", "started, ended"), Arrow("server", "supervisor", "journal stream"),
        Arrow("supervisor", "journal"),
    ]  # fmt: skip
    return draw(boxes, arrows, gap_x=120, gap_y=50, title="The way of a task")


# The foundation, and faces of one line that only re-export or call.
NOT_DRAWN = ("pilotq", "broker", "broker.__init__", "__main__", "selfcheck")
PAGES = {
    "commands.md": commands, "states.md": states, "rq-matrix.md": matrix, "tasks.schema.json": json_schema,
    "pictures/packages.svg": package_picture, "pictures/states.svg": state_picture,
    "pictures/processes.svg": process_picture, "pictures/way-of-a-task.svg": way_picture,
}  # fmt: skip
PARTS = {
    "design/0001-overview.md": {"packages": package_table},
    "guarantees.md": {"faults": faults},
    "rq.md": {"refused": refused_jobs},
    "files.md": {"keys": file_keys},
    "metrics.md": {"metrics": metrics, "keys of a log": log_keys, "attributes": span_attributes},
    "concepts.md": {"variables of tasks": task_variables, "variables of commands": command_variables},
}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (HERE / page).write_text(text(), encoding="utf-8")
    for page in PARTS:
        (HERE / page).write_text(with_parts(page), encoding="utf-8")
