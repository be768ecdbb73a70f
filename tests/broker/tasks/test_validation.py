"""A Task with fields of wrong types is refused in a sentence, before anything is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pilotq.broker import ArrayRange, Broker, Request, Task
from pilotq.broker.errors import InvalidInput
from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.tasks.script_text import ARGUMENT_BYTES
from pilotq.broker.tasks.validation import validate
from tests.support.live_pilot import live_pilot

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"command": "echo hi"}, "command must be a list of texts, such as shlex.split makes of a line, not str"),
    ({"command": ["echo", 1]}, "not list with int in it"),
    ({"script": ["true"]}, "script must be a text, not list"),
    ({"cwd": Path("/")}, "cwd must be a text, not PosixPath"),
    ({"stdout": 3}, "stdout must be a text, not int"),
    ({"array": range(3)}, r"array must be an ArrayRange\(start, stop\), both ends included, not range"),
    ({"array": ArrayRange(2**53 - 1, 2**53)}, r"array .*: an index may be at most 9,007,199,254,740,991"),
    ({"array": ArrayRange(0, 0, 2**53)}, "an index may be at most"),
    ({"array": ArrayRange("0", "3")}, "start must be a whole number, not str"),  # type: ignore[arg-type]
    ({"values": [1, 2]}, "values must be a list of texts, not list with int in it"),
    ({"request": {"cores": 2}}, "request must be a Request, .* not dict"),
    ({"request": Request(cores=2)}, r"cores must be a tuple \(min, max\), not int"),  # type: ignore[arg-type]
    ({"request": Request(cores=[1, 2])}, r"cores must be a tuple \(min, max\), not list"),  # type: ignore[arg-type]
    ({"request": Request(use={"a": 1})}, r"use must be a tuple of \(name, number\)"),  # type: ignore[arg-type]
    ({"time_limit": "10m"}, "time_limit must be a number of seconds, not str"),
    ({"retries": 10**30}, "retries cannot be negative, and at most 9,007,199,254,740,991"),
    ({"retries": True}, "retries must be a whole number, not bool"),
    ({"priority": "high"}, "priority must be a whole number, not str"),
    ({"env": {"A": 1}}, "env must be a dict of texts, not dict with int in it"),
    ({"env": None}, "env must be a dict of texts, not NoneType"),
    ({"after": "12"}, "after must be a list of ids or names, not str"),
    ({"after": [1]}, "after must be a list of ids or names, not list with int in it"),
    ({"name": 3}, "name must be a text, not int"),
    ({"values": ["a", "b\0"]}, "values cannot contain a NUL character"),
    ({"values": ["x" * ARGUMENT_BYTES]}, r"values\[0\] has [\d,]+ bytes, and the system takes at most"),
    ({"script": "cat <<'E'\n{value}\nE", "values": ["a"]}, "script, line 2: no shell fills in a value"),
    ({"command": ["sh", "-c", "cat <<'E'\n{value}\nE"], "values": ["a"]}, "line 2: no shell fills in a value"),
    (
        {"command": ["a", "ü" * (ARGUMENT_BYTES // 2 + 1)]},
        r"an argument has [\d,]+ bytes, and the system takes at most",
    ),
    ({"env": {"A": "x" * (ARGUMENT_BYTES - 1)}}, r"env: A has [\d,]+ bytes, and the system takes at most"),
    ({"script": "x" * (ARGUMENT_BYTES + 1), "login_shell": True}, "an argument has .* put it into a file"),
]
# What a worker would find out: words that cannot be split, places that do not exist, what no path or argument can hold.
UNUSABLE: list[tuple[dict[str, Any], str]] = [
    ({"model": "openmpi", "model_opts": {"mpirun_args": "--foo 'bar"}}, "mpirun_args .* cannot be split into words"),
    ({"model": "mpich", "model_opts": {"mpirun_args": "\\"}}, "mpirun_args .* cannot be split into words"),
    ({"model": "srunmpi", "model_opts": {"srun_args": '"'}}, "srun_args .* cannot be split into words"),
    ({"model": "openmpi", "model_opts": {"mpirun": "a\0b"}}, "model_opts cannot contain a NUL character"),
    ({"launch_at": 2}, "launch_at 2 is no place in a command of 1 words"),
    ({"launch_at": -1}, "launch_at -1 is no place"),
    ({"cwd": "a\0b"}, "cwd cannot contain a NUL character"),
    ({"stdout": "a\0b"}, "stdout cannot contain a NUL character"),
    ({"values": ["a", "b\0"]}, "values cannot contain a NUL character"),
]


@pytest.mark.parametrize(
    ("fields", "sentence"), WRONG + UNUSABLE, ids=lambda case: " ".join(case) if isinstance(case, dict) else ""
)
def test_a_wrong_type_is_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    usual: dict[str, Any] = {} if "script" in fields else {"command": ["true"]}
    with pytest.raises(InvalidInput, match=f"^task 1: .*{sentence}"):
        validate(Task(**{**usual, **fields}), "task 1")


def test_what_is_right_stays_right() -> None:
    validate(Task(command=["a", "x" * ARGUMENT_BYTES], env={"A": "x" * (ARGUMENT_BYTES - 2)}), "")
    validate(Task(script="x" * (ARGUMENT_BYTES + 1)), "")
    validate(Task(command=("a", "b"), values=("x",), time_limit=3, after=("1",)), "")  # type: ignore[arg-type]
    validate(Task(function=print, args=range(3), kwargs={"sep": ""}, backoff=2, retries=1), "")  # type: ignore[arg-type]


def test_a_broker_refuses_what_it_would_take_for_something_else(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1") as live, Broker.connect(live.pilot.directory) as broker:
        first = broker.enqueue(Task(command=["true"]))
        second = broker.enqueue_many(Task(command=["true"], after=[first]) for _ in range(1))  # type: ignore[arg-type]
        assert broker.wait(second[0], timeout=60).finished == 1, "one text is one id"
        assert broker.cancel(second[0]) == {second[0]: "finished"}
        with pytest.raises(InvalidInput, match=r"made of Task\(...\), not of dict"):
            broker.enqueue({"command": ["true"]})  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="there is no stream 'out': give stdout or stderr"):
            broker.output(first, "out")
        with pytest.raises(InvalidInput, match="there is no status 'done': give one of"):
            broker.tasks(status="done")
        with pytest.raises(InvalidInput, match="in the mode 'soon'"):
            broker.request_stop("soon")
        assert broker.counts().finished == 2 and Pilot(live.pilot.directory).alive()
