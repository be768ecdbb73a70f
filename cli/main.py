"""`pilotq`: finds the command, and turns what goes wrong into one sentence and an exit code.

A command's module is imported when the command is called: a submit must not pay for the imports of the others.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import Any, Final, NoReturn

import click
import msgspec

from pilotq.broker.errors import PilotqError
from pilotq.cli import exit_codes

# section of the help -> verb -> (module of cli/commands, what it does)
SECTIONS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Run": {
        "run": ("run", "Start a pilot, run tasks in it, wait, sum up, end."),
        "start": ("start_stop", "Start a pilot in the background."),
        "stop": ("start_stop", "End a pilot."),
    },
    "Submit": {
        "enqueue": ("enqueue", "Submit one task, or one array of tasks."),
        "submit": ("enqueue", "Submit the tasks of a file."),
    },
    "Look": {
        "list": ("inspect", "List tasks: running, waiting, ended."),
        "show": ("inspect", "Show all that is known of tasks."),
        "explain": ("explain", "Say why tasks wait, or why they ended so."),
        "logs": ("inspect", "Print what a task wrote."),
        "nodes": ("nodes", "List the nodes of the pilot; drain or retire some."),
        "status": ("inspect", "Show how far the pilot is."),
        "top": ("top", "Watch tasks and nodes, live."),
        "report": ("report", "Sum up the journal, or draw it."),
    },
    "Control": {
        "wait": ("wait_cancel", "Wait until tasks have ended."),
        "cancel": ("wait_cancel", "Cancel tasks, waiting or running."),
        "retry": ("retry", "Run tasks again that did not finish."),
    },
    "Use other tools": {
        "dashboard": ("dashboard", "Show the pilot in a browser."),
        "url": ("connect", "Print the URL of the pilot's server."),
        "exec": ("connect", "Run a command that finds the pilot's server."),
    },
    "Help": {
        "doctor": ("doctor", "Check the machine, the directory, the pilot."),
        "help": ("help", "Explain a topic, or a command."),
        "completion": ("help", "Print the lines that complete commands."),
    },
    "Parts": {
        "server": ("parts", "Run a server in the foreground."),
        "dispatcher": ("parts", "Run a dispatcher in the foreground."),
        "worker": ("parts", "Run the worker of one node in the foreground."),
    },
}
HIDDEN: Final = {"supervisor": ("parts", "The process that `run` and `start` leave.")}
VERBS: Final = {verb: entry for verbs in [*SECTIONS.values(), HIDDEN] for verb, entry in verbs.items()}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports them by need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb in VERBS if verb not in HIDDEN]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module = import_module(f"pilotq.cli.commands.{VERBS[name][0]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, verbs in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(verb, text) for verb, (_, text) in verbs.items()], col_max=12)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our output (head, less) has seen enough. What is still buffered must not fail at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
            return exit_codes.ALL_FINISHED


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="pilotq COMMAND --help tells more, with an example.",
)
@click.version_option(package_name=None, version=import_module("pilotq").__version__, prog_name="pilotq")
def pilotq() -> None:
    """Run many small tasks inside one allocation or on one machine, pinned to cores.

    \b
    Example:
      pilotq run tasks.txt            one command a line
      pilotq run -- ./simulate 1.5    one command
    """


def main(argv: list[str] | None = None) -> NoReturn:
    stand_in()
    sys.exit(call(argv))


def stand_in() -> None:
    """Where standard input or output is closed (`>&-`) /dev/null stands in: what we open next would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # it gets the lowest free number: this
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def call(argv: list[str] | None = None, command: click.Command = pilotq, name: str = "pilotq") -> int:
    """Run the command line; returns the exit code. Expected errors are printed to stderr, as one sentence."""
    try:
        code = command.main(args=argv, prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else exit_codes.ALL_FINISHED
    except click.ClickException as error:
        return _usage(error)
    except (click.Abort, KeyboardInterrupt):
        return exit_codes.INTERRUPTED
    except PilotqError as error:
        return _complain(str(error), error.exit_code)
    except msgspec.MsgspecError as error:
        # The boundary to PILOTQ_SETTINGS, and to files of the pilot that somebody may have edited.
        return _complain(str(error), exit_codes.INVALID)
    except OSError as error:
        # The boundary to the user's files and disks: full, forbidden, gone.
        if error.errno == errno.ENOENT and not error.filename and _nowhere():
            return _complain(
                "the current directory does not exist any more: change to one that does", exit_codes.INVALID
            )
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            where = "the disk of the pilot's directory, or of the standard output, is full: "
        return _complain(f"{where}{error.strerror or error}", exit_codes.PILOT_FAILED)


def _nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return exit_codes.INVALID
    text = error.format_message()
    if context is not None:
        text = f"{text.rstrip('.')}{'' if text.endswith('?') else '.'} See `{context.command_path} --help`."
    return _complain(text, exit_codes.INVALID)


def _complain(text: str, code: int) -> int:
    """One sentence, perhaps with lines of a log. Names of files and tasks in it may hold anything."""
    from pilotq.cli.formatting import lines

    click.echo("\n".join(lines(f"pilotq: {text}")), err=True)
    return code
