"""The JSON schema of files of tasks: what the documents show is valid, and what it refuses the reader refuses, too."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pilotq.broker.client.submit import check
from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.native import Entry
from pilotq.broker.taskfiles.reader import read_tasks
from pilotq.broker.taskfiles.schema import keys, schema
from pilotq.cli.options import file_of_tasks
from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOOKS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
FENCE = re.compile(r"^```(?:toml|json) (tasks\S*|\S+\.toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = [(path.name, name, text) for path in BOOKS for name, text in FENCE.findall(path.read_text(encoding="utf-8"))]
SHOWN += [("examples", path.name, path.read_text()) for path in sorted((ROOT / "examples").rglob("*.toml"))]


def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(schema())
    return Draft202012Validator(schema())


def test_there_are_examples() -> None:
    assert len(SHOWN) >= 4


@pytest.mark.parametrize(("book", "name", "text"), SHOWN, ids=[f"{b}:{n}" for b, n, _ in SHOWN])
def test_what_is_shown_is_valid(book: str, name: str, text: str) -> None:
    validator().validate(tomllib.loads(text) if name.endswith(".toml") else json.loads(text))


def test_every_key_is_told() -> None:
    assert set(keys()) == set(Entry.__struct_fields__)
    properties = schema()["$defs"]["Entry"]["properties"]
    assert set(properties) == set(keys()) and all(p["description"] for p in properties.values())


TRUE = {"command": ["true"]}
REFUSED: list[Any] = [
    {},
    {"tasks": []},
    {"tasks": {}},
    {"tasks": [TRUE], "task": []},
    {"tasks": [{**TRUE, "coers": 2}]},
    {"tasks": [{"command": 7}]},
    {"tasks": [{"command": [["nested"]]}]},
    {"tasks": [{**TRUE, "script": "x"}]},
    {"tasks": [{"script": "x", "function": "m:f"}]},
    {"tasks": [{**TRUE, "array": "0-1", "values": [1]}]},
    {"tasks": [{**TRUE, "name": "a", "array": "0-1"}, {**TRUE, "after": "a", "after_each": "a", "array": "0-1"}]},
    {"tasks": [{**TRUE, "array": 5}]},
    {"tasks": [{**TRUE, "cores": -1}]},
    {"tasks": [{**TRUE, "cores": 1.5}]},
    {"tasks": [{**TRUE, "gpus": [1]}]},
    {"tasks": [{**TRUE, "use": {"licence": -1}}]},
    {"tasks": [{**TRUE, "use": ["licence"]}]},
    {"tasks": [{**TRUE, "priority": 1001}]},
    {"tasks": [{**TRUE, "priority": "high"}]},
    {"tasks": [{**TRUE, "retries": -1}]},
    {"tasks": [{**TRUE, "env": {"A": ["list"]}}]},
    {"tasks": [{**TRUE, "env": "A=1"}]},
    {"tasks": [{**TRUE, "after": 3}]},
    {"tasks": [{**TRUE, "model": "mpi"}]},
    {"tasks": [{**TRUE, "cwd": True}]},
    {"tasks": [TRUE], "defaults": {"nmae": "x"}},
    {"tasks": [TRUE], "defaults": []},
]


@pytest.mark.parametrize("content", REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_the_schema_refuses_the_reader_refuses(content: Any, tmp_path: Path) -> None:
    assert not validator().is_valid(content)
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidInput):
        submitted(path)


def submitted(path: Path) -> None:
    """What the command line does with a file before anything is sent."""
    check(file_of_tasks(str(path), None, shell=False, replies=None).tasks, [])


@pytest.mark.parametrize(
    "task",
    [
        {"script": None, **TRUE},
        {"command": "one text", "cores": "2-4", "memory": "2G", "time_limit": 1.5, "time_request": "1h"},
        {"command": ["seq", 3], "values": [1, "two"], "env": {"A": 1}, "use": {"licence": 1}, "model": "threads"},
    ],
)
def test_what_the_schema_takes_the_reader_takes(task: dict[str, Any], tmp_path: Path) -> None:
    validator().validate({"tasks": [task]})
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps({"tasks": [task]}))
    assert len(read_tasks(path).tasks) == 1
