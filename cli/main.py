"""The program `pilotq`: finds the command, and turns errors into one sentence and an exit code.

A command's module is imported when the command is called: a submit must not pay for the imports of the others.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from importlib import import_module
from typing import Any, Final, NoReturn, TextIO

import click
import msgspec

from pilotq.broker.errors import JournalDamaged, PilotqError
from pilotq.cli import exit_codes

# Section of the help -> command -> what it does. The command NAME is `NAME_command` in cli/commands/NAME.py.
SECTIONS: Final[dict[str, dict[str, str]]] = {
    "Run": {
        "run": "Start a pilot, run tasks in it, print a summary, end it.",
        "start": "Start a pilot in the background.",
        "stop": "End a pilot.",
    },
    "Submit": {
        "enqueue": "Submit one task, or one array of tasks.",
        "submit": "Submit the tasks of a file.",
    },
    "Inspect": {
        "list": "List tasks: running, waiting, ended.",
        "show": "Show everything known about tasks.",
        "explain": "Explain why tasks wait, or why they ended as they did.",
        "logs": "Print what a task wrote.",
        "nodes": "List the nodes of the pilot; drain or retire some.",
        "status": "Show the progress of the pilot.",
        "top": "Watch tasks and nodes, live.",
        "report": "Summarise the journal, or draw it.",
    },
    "Control": {
        "wait": "Wait until tasks have ended.",
        "cancel": "Cancel tasks, waiting or running.",
        "retry": "Run tasks that did not finish again.",
    },
    "Use other tools": {
        "dashboard": "Show the pilot in a browser.",
        "metrics": "Serve the metrics of the pilot to Prometheus.",
        "traces": "Send executions to an OpenTelemetry collector, as spans.",
        "url": "Print the URL of the pilot's server.",
        "exec": "Run a command that finds the pilot's server.",
        "qcg": "Let programs of QCG-PilotJob run on pilotq.",
    },
    "Help": {
        "doctor": "Check the machine, the directory, the pilot.",
        "help": "Explain a topic or a command.",
        "completion": "Print the code that completes commands with Tab.",
    },
    "Parts": {
        "server": "Run a server in the foreground.",
        "dispatcher": "Run a dispatcher in the foreground.",
        "worker": "Run the worker of one node in the foreground.",
    },
}
HIDDEN: Final = {"supervisor": "The process that `run` and `start` leave in the background."}
OPTIONS_OF: Final = ("enqueue", "submit", "start", "run", "wait")  # commands that are looked through for an option
_show_others = warnings.showwarning
COMMANDS: Final = frozenset[str]().union(*SECTIONS.values(), HIDDEN)


class LazyGroup(click.Group):
    """A group that knows its commands by name, and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [command for commands in SECTIONS.values() for command in commands]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = import_module(f"pilotq.cli.commands.{name}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl(list(commands.items()), col_max=12)

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
    epilog="pilotq COMMAND --help shows more, with an example.",
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
    open_closed_streams()
    use_utf8()
    warnings.simplefilter("always", JournalDamaged)
    warnings.showwarning = _show_warning
    sys.exit(call(argv))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    if issubclass(category, JournalDamaged):
        _print(str(message))
    else:
        _show_others(message, category, filename, lineno, file, line)


def open_closed_streams() -> None:
    """Open /dev/null for each closed standard stream (`>&-`): the next file opened would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # it gets the lowest free number: this
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def use_utf8() -> None:
    """Be in Python's UTF-8 mode, whatever the locale: files of tasks are UTF-8, and all else goes through as bytes.

    In the usual locales that is nothing to do. Paths that are printed are the bytes that they are, too.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - itself
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")


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
        return _print_error(str(error), error.exit_code)
    except msgspec.MsgspecError as error:
        # The boundary to PILOTQ_SETTINGS, and to files of the pilot that somebody may have edited.
        return _print_error(str(error), exit_codes.INVALID)
    except OSError as error:
        # The boundary to the user's files and disks: full, forbidden, gone.
        if error.errno == errno.ENOENT and not error.filename and _directory_is_gone():
            return _print_error(
                "the current directory does not exist any more: change to one that does", exit_codes.INVALID
            )
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            where = "the disk of the pilot's directory, or of the standard output, is full: "
        return _print_error(f"{where}{error.strerror or error}", exit_codes.PILOT_FAILED)


def _directory_is_gone() -> bool:
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
    text = _of_others(error) or error.format_message()
    if context is not None:
        text = f"{text.rstrip('.')}{'' if text.endswith('?') else '.'} See `{context.command_path} --help`."
    return _print_error(text, exit_codes.INVALID)


def _of_others(error: click.ClickException) -> str:
    """Which command has the option that this one has not; empty when none has, or when that is not the error."""
    context = getattr(error, "ctx", None)
    if not isinstance(error, click.NoSuchOption) or context is None:
        return ""
    option, here = error.option_name, context.info_name
    for name in OPTIONS_OF:
        others = pilotq.get_command(context, name)
        if others is None or not any(option in (*one.opts, *one.secondary_opts) for one in others.params):
            continue
        if (here, name) == ("run", "enqueue"):
            why = (
                "it waits for what its tasks submit"
                if option == "--join"
                else "its pilot is new and has no tasks before"
            )
            return (
                f"`pilotq run` has no {option}, as {why}: start one with "
                f"`pilotq start`, and use `pilotq enqueue {option}`"
            )
        return f"`{context.command_path}` has no {option}: `pilotq {name}` has it"
    return ""


def _print_error(text: str, code: int) -> int:
    _print(text)
    return code


def _print(text: str) -> None:
    """One sentence, perhaps with lines of a log. Names of files and tasks in it may hold anything."""
    from pilotq.cli.formatting import lines

    click.echo("\n".join(lines(f"pilotq: {text}")), err=True)
