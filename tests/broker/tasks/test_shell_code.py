"""Values in the code of shells: whatever they are, they are one word, and nothing of them runs."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.tasks.shell_code import code_of, is_for_shell, refer_to_value

EVIL = "a  '\"$(touch pwned)\"' `touch pwned`; touch pwned #\n* \\ &&|)}]{value}{index}$HOME"
SHOWN = f"<{EVIL}>\n"
# Code, and what it prints where it prints the value: each argument of `p` in < >.
PLACES = [
    ("p {value}", SHOWN),
    ('p "{value}"', SHOWN),
    ("p '{value}'", SHOWN),
    ("p $'{value}'", SHOWN),
    ("p x{value}y\"z{value}\"'{value}'", f"<x{EVIL}yz{EVIL}{EVIL}>\n"),
    ("p 'it'\\''s' \"it's\" {value} # it's {value}\np '{value}'", f"<it's>\n<it's>\n{SHOWN}{SHOWN}"),
    ('x={value}; y=\'{value}\'; p "$x" "$y"', SHOWN * 2),
    ("p $(p {value} | wc -c)", f"<{len(SHOWN)}>\n"),
    ('p "$(p \'{value}\')" "$(p "{value}")"', f"<<{EVIL}>>\n" * 2),
    ('p "`p {value}`"', f"<<{EVIL}>>\n"),
    ("p \"${nothing:-{value}}\" ${nothing:-'{value}'} ${#nothing} {value}", f"{SHOWN}{SHOWN}<0>\n{SHOWN}"),
    ("cat <<EOF\n<{value}>\nit's \"\nEOF\np {value}", f"{SHOWN}it's \"\n{SHOWN}"),
    ("cat <<-'A' <<B\n\tit's\n\tA\n<{value}>\nB\np '{value}' $((1<<2))", f"{SHOWN}{SHOWN}<4>\n"),
    ("cat <<< {value}", f"{EVIL}\n"),
    ("bash -ec 'printf \"<%s>\\n\" {value}'; p {value}", SHOWN * 2),
    ("/bin/sh -e -c \"printf '<%s>\\n' {value} '{value}'\"; p '{value}'", SHOWN * 3),
    ('v=1; sh -c "printf \'<%s>\' \\"{value}\\" \\\\\\$v $v; echo"', f"<{EVIL}><$v><1>\n"),
    ("v=1; sh -c \"printf '<%s>' {value} '\\\\$v'; echo\"", f"<{EVIL}><\\1>\n"),
    ("v=1; eval 'p {value} $v'; eval \"p {value} $v\"", f"{SHOWN}<1>\n" * 2),
    ("echo no sh -c; p 'sh -c {value}'", f"no sh -c\n<sh -c {EVIL}>\n"),
    ("case {value} in a*) p {value} ;; (b) p ;; esac", SHOWN),
    ("if [[ {value} == '{value}' ]]; then (p {value}); fi", SHOWN),
    ('f() { p "$1"; }; f {value} # \'', SHOWN),
    ("for v in {value} 'b'; do p \"$v\"; done", f"{SHOWN}<b>\n"),
    ('a=(1 {value} 2); p "${a[1]}" $(( ${#a[@]} + (1) )) {value}', f"{SHOWN}<4>\n{SHOWN}"),
    ("((x = 1 << 2)); (( (x+1) > 2 )) && p {value} $x", f"{SHOWN}<4>\n"),
    ("p ${value} '${value}' \\{value}", "<${value}>\n<{value}>\n"),
]


@pytest.mark.parametrize(("code", "printed"), PLACES)
def test_a_value_is_one_word(tmp_path: Path, code: str, printed: str) -> None:
    script = "p() { printf '<%s>\\n' \"$@\"; }\n" + refer_to_value(code)
    ran = subprocess.run(
        ["bash", "-c", script], env={"PATH": "/usr/bin:/bin", "PILOTQ_VALUE": EVIL}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.stdout, ran.stderr) == (printed, ""), script
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_value_gets_into_any_code() -> None:
    pieces = ["{value}", *"'\"`\\)}# \n", "$(", "((", "))", "${", "<<E", "E", "$'", "$(("]

    def plain(text: str) -> str:
        return text.translate(dict.fromkeys(map(ord, "'\"$")))

    choose = random.Random(7)
    for _ in range(3000):
        code = "".join(choose.choices(pieces, k=choose.randrange(20)))
        try:
            done = refer_to_value(code)
        except InvalidInput:
            continue
        assert plain(done).replace("{PILOTQ_VALUE}", "{value}") == plain(code)


def test_where_no_shell_fills_in_it_is_refused() -> None:
    for end in ("'EOF'", '"EOF"', "\\EOF", "-'EOF'"):
        with pytest.raises(InvalidInput, match="script, line 3: no shell .*<<EOF without quotes.* PILOTQ_VALUE"):
            refer_to_value(f"python3 - <<{end}\n\nprint('{{value}}')\nEOF\n")
        assert refer_to_value(f"cat <<{end}\nx\nEOF\np {{value}}").endswith('\np "${PILOTQ_VALUE}"')


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["sh", "-c", "x"], 2),
        (["/bin/bash", "-l", "-e", "-c", "x", "arg"], 4),
        (["bash", "--norc", "-xec", "x"], 3),
        (["bash", "-o", "pipefail", "-c", "x"], 4),
        (["bash", "+e", "-O", "extglob", "-c", "x"], 5),
        (["env", "A=1", "sh", "-c", "x"], 4),
        (["timeout", "-k", "1", "5", "bash", "-c", "x"], 6),
        (["bash", "file", "-c", "x"], -1),
        (["bash", "-c"], -1),
        (["bash"], -1),
        (["env"], -1),
        (["python3", "-c", "x"], -1),
        (["grep", "-c", "bash", "-c"], -1),
    ],
)
def test_which_argument_is_code(command: list[str], number: int) -> None:
    assert code_of(command) == number


@pytest.mark.parametrize(
    ("first", "shell"),
    [
        ("ls", True), ("#!/bin/sh -e", True), ("#!/usr/bin/env bash", True), ("#!/usr/bin/env -S A=1 zsh -e", True),
        ("#!", True), ("#!/usr/bin/python3", False), ("#!/usr/bin/env python3", False), ("#!/bin/tcsh", False),
        ("#!/usr/bin/env", False),
    ],
)  # fmt: skip
def test_which_scripts_are_for_shells(first: str, shell: bool) -> None:
    assert is_for_shell(f"{first}\nx\n") is shell
