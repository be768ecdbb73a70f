"""Writes the pages that say what the code says: docs/commands.md and docs/states.md.

    python docs/generate.py

tests/test_docs.py fails when a page is not what this program would write.
"""

from __future__ import annotations

from pathlib import Path

import click

from pilotq.broker import errors
from pilotq.broker.states import ACTIVE, ENDED, EVENT_SCRIPTS, REASONS, STATUSES, TABLE, WAITING
from pilotq.broker.store import script
from pilotq.cli.main import SECTIONS, pilotq

HERE = Path(__file__).parent
WIDTH = 100
GENERATED = "<!-- Written by docs/generate.py: change the code, then run `python docs/generate.py`. -->\n"

COMMANDS_HEAD = """\
# Commands

Every command takes `--help`. ID is the id that `enqueue` and `submit` print, or the name of one task. Commands find the
pilot by `--dir`, else by the variable `PILOTQ_DIR`, else by `.pilotq/current` here or in a directory above. `list`,
`show`, `logs`, `status` and `wait` also answer for a pilot that has ended, from its journal.

`pilotq run -- CMD` takes the options of `pilotq enqueue` that describe a task, too, but for `--nodes` and `--after`.

## Exit codes

| code | means |
|---|---|
| 0 | all tasks finished (`run`, `wait`); the command did what it was asked for (the others) |
| 1 | some task failed, was canceled or omitted, or never ran |
"""

STATES_HEAD = """\
# States

A task has one status. The words are those of RQ, so that its tools can show our tasks. The reason says more.

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
    return "".join(out)


def exit_codes() -> list[str]:
    """The rows that follow from the tree of errors, and the one of Ctrl-C."""
    names: dict[int, list[str]] = {}
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.PilotqError) and kind is not errors.PilotqError:
            names.setdefault(kind.exit_code, []).append(name)
    texts = {
        2: "wrong usage, a description that cannot be, or no such pilot or task: nothing was submitted",
        3: "the pilot or its server failed",
        4: "the time to wait was over",
    }
    rows = [f"| {code} | {texts[code]} ({', '.join(f'`{n}`' for n in names[code])}) |\n" for code in sorted(names)]
    end = "\nThe words in brackets are the exceptions of `pilotq.broker.errors` in Python.\n"
    return [*rows, "| 130 | interrupted |\n", end]


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
        "\nEach event is the work of one script in `broker/scripts/`:\n\n| script | events | does |\n|---|---|---|\n"
    )
    for name in dict.fromkeys(EVENT_SCRIPTS.values()):
        events = ", ".join(f"`{event}`" for event, by in EVENT_SCRIPTS.items() if by == name)
        out.append(f"| `{name}.lua` | {events} | {purpose(name)} |\n")
    out.append("\nThe same as a picture:\n\n```mermaid\nstateDiagram-v2\n")
    ways: dict[tuple[str, str], list[str]] = {}
    for (before, event), after in TABLE.items():
        ways.setdefault((before, after), []).append(event)
    out += [f"    {before} --> {after}: {', '.join(events)}\n" for (before, after), events in ways.items()]
    out.append(
        "```\n\n## Reasons\n\nThe list is closed. The reason of a task that finished is empty.\n\n"
        "| reason | the task |\n|---|---|\n"
    )
    out += [f"| {reason} | {sentence} |\n" for reason, sentence in REASONS.items() if reason]
    return "".join(out)


def purpose(name: str) -> str:
    """What the head of a script says that it does."""
    mark = f"-- {name}: "
    (line,) = (line for line in script(name).text.splitlines() if line.startswith(mark))
    text = line.removeprefix(mark)
    return text[: text.index(".")] if "." in text else text


PAGES = {"commands.md": commands, "states.md": states}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (HERE / page).write_text(text(), encoding="utf-8")
