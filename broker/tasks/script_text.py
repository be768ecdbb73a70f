"""What the text of a script says about how it is run. Pure.

A script is a file that the worker writes and gives to the program that its first line names. A single line without
``#!`` is a command line for bash, which needs no file: so lines of a file of tasks cost no more than ``bash -c``.
"""

from __future__ import annotations

import mmap

ARGUMENT_BYTES = 32 * mmap.PAGESIZE - 1  # no argument and no variable may be longer: the kernel's MAX_ARG_STRLEN
LINE_CHARACTERS = 1 << 15  # a longer line is written to a file: in UTF-8 it may be too long for an argument


def is_command_line(script: str) -> bool:
    """Whether it is one line for ``bash -c``.

    >>> is_command_line("ls | wc -l"), is_command_line("#!/bin/sh"), is_command_line("cd /tmp\\nls")
    (True, False, False)
    """
    return len(script) < LINE_CHARACTERS and not script.startswith("#!") and "\n" not in script.rstrip("\n")


def interpreter_of(script: str) -> list[str]:
    """The program that runs it and its argument, if any, as the kernel reads them from the first line; else bash.

    >>> interpreter_of("#! /usr/bin/env -S python3 -u\\nprint(1)"), interpreter_of("ls")
    (['/usr/bin/env', '-S python3 -u'], ['bash'])
    """
    if not script.startswith("#!"):
        return ["bash"]
    words = script[2:].partition("\n")[0].strip(" \t").split(None, 1)
    return words or ["bash"]


def problem_of(script: str) -> str:
    """Why it can never run as it is meant; empty when nothing is wrong with it."""
    if not script.strip():
        return "script is empty"
    first = script.partition("\n")[0]
    if first.startswith("#!") and first.endswith("\r"):
        return "the first line of script ends with a carriage return, as on Windows: convert the file"
    if not first.startswith("#!") and script.lstrip("\ufeff \t\r\n").startswith("#!"):
        return "script does not begin with its `#!`, which has no effect then: nothing may stand before it"
    return ""
