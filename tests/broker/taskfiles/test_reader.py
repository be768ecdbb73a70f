"""Files of tasks: recognition, lines, TOML, JSON, and what is refused with which sentence."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pilotq.broker.errors import InvalidInput
from pilotq.broker.taskfiles.lines import split_words
from pilotq.broker.taskfiles.native import tomllib
from pilotq.broker.taskfiles.reader import read_tasks
from pilotq.broker.tasks.model import ArrayRange, Request, Task
from pilotq.broker.tasks.quantities import parse_duration, parse_size, parse_span, request_of


def write(folder: Path, text: str | bytes, name: str = "jobs") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(path: str | Path, **options: object) -> str:
    with pytest.raises(InvalidInput) as caught:
        read_tasks(path, **options)  # type: ignore[arg-type]
    return str(caught.value).replace(str(Path(path).parent) + "/", "")


def entries(folder: Path, *tasks: dict[str, object], **more: object) -> Path:
    return write(folder, json.dumps({"tasks": tasks, **more}), "jobs.json")


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("512M", 512 << 20), ("2G", 2 << 30), ("1.5k", 1536), ("2GiB", 2 << 30), ("1 MB", 1 << 20)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("90", 90),
        ("1.5", 1.5),
        ("1m30s", 90),
        ("1h30m", 5400),
        ("2d", 172_800),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("2-00:00:00", 172_800),
        ("1-2", 93_600),
        ("1-2:30", 95_400),
        ("3m20", 200),
    ],
)
def test_durations(text: str, value: float) -> None:
    assert parse_duration(text) == value


@pytest.mark.parametrize(
    ("text", "arrays"),
    [
        ("0-20:5", [(0, 20, 5)]), ("7", [(7, 7, 1)]), ("1,3-5,10-20", [(1, 1, 1), (3, 5, 1), (10, 20, 1)]),
        ("1,3,5,7", [(1, 7, 2)]), ("1,2,4", [(1, 2, 1), (4, 4, 1)]),
        ("1-7:3, 2-8:3", [(1, 2, 1), (4, 5, 1), (7, 8, 1)]),
        ("5,1", [(1, 1, 1), (5, 5, 1)]), ("0-9:2,10", [(0, 10, 2)]), ("5-9,0-4", [(0, 9, 1)]),
        ("0,5-20:5", [(0, 20, 5)]), ("0,1-2:2", [(0, 1, 1)]),
        ("0-10:2,1-11:2", [(0, 11, 1)]), ("1,10,11,12", [(1, 1, 1), (10, 12, 1)]), ("0-8:5", [(0, 8, 5)]),
        ("0-8:5,7", [(0, 5, 5), (7, 7, 1)]),
        (",".join(map(str, range(1, 2_000_000, 2))), [(1, 1_999_999, 2)]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)  # fmt: skip
def test_an_array_of_several_ranges(text: str, arrays: list[tuple[int, int, int]]) -> None:
    first, *more = arrays
    assert ArrayRange.parse(text) == ArrayRange(*first, more=tuple(more))


def test_the_limit_of_an_array() -> None:
    assert ArrayRange.parse("0-9:2%4") == ArrayRange(0, 9, 2, limit=4)
    assert ArrayRange.parse(" 1, 3-5 %1 ") == ArrayRange(1, 1, limit=1, more=((3, 5, 1),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,3-5,10-20%0", "at most 0 at a time would run nothing"), ("0-9%", "no number behind %"),
        ("0-9%-1", "no number behind %"), ("0-9%2%3", "no number behind %"), ("%4", "'' in '%4' is no array"),
        ("1,1", "the index 1 is named twice"), ("0-20:5,10-12", "the index 10 is named twice"),
        ("1,", "'' in '1,' is no array"), ("5-1,7", "'5-1' is an array without"),
        ("7,-3", "'-3' is no array: .* negative"),
        ("1,9007199254740992", "at most 9,007,199,254,740,991"), ("0-" + "9" * 5000, "at most 9,007,199,254,740,991"),
        (",".join(str(n * n) for n in range(10_002)), "at most 10,000 ranges of indices, not 10,001"),
        ("0-999999999,1000000-999999999", "at most 1,000,000 indices"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_an_array_of_several_ranges_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        ArrayRange.parse(text)


def test_spans_and_arrays() -> None:
    assert parse_span("4") == (4, 4)
    assert parse_span("2-4") == (2, 4)
    assert ArrayRange.parse("0-99:5") == ArrayRange(0, 99, 5)
    assert len(ArrayRange.parse("0-99:5")) == 20
    assert ArrayRange.parse("7") == ArrayRange(7, 7)


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (parse_size, ["", "x", "-1", "5X", "1e3", "٣", "9" * 5000]),
        (parse_duration, ["", "x", "-1", "s", "1:3", "1m1h", "nan", "9" * 5000]),
        (parse_span, ["", "0", "4-2", "-1", "1-", "a", "1-2-3", "9" * 5000]),
        (ArrayRange.parse, ["", "5-1", "0-9:0", "a", "1,2,", "-3", "9" * 5000]),
    ],
)
def test_quantities_that_are_none(parse: object, texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(InvalidInput, match=r"is (no|an array without)"):
            parse(text)  # type: ignore[operator]


def test_nodes_without_cores_are_whole_nodes() -> None:
    assert request_of(Request(), nodes="2") == Request(nodes=(2, 2), whole=True)
    assert request_of(Request(), nodes=2, cores=4) == Request(nodes=(2, 2), cores=(4, 4))
    assert request_of(Request(cores=(4, 4)), nodes=2) == Request(nodes=(2, 2), cores=(4, 4))


def test_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "# first\n\n  ./sim --seed 1\r\n./sim 'two words' \"a b\" c\\ d  # why\n./last #\n./x#y")
    assert [task.command for task in read_tasks(path).tasks] == [
        ["./sim", "--seed", "1"], ["./sim", "two words", "a b", "c d"], ["./last"], ["./x#y"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "a b  c\td",
        "a 'b c' \"d e\"", "a\\ b c\\\\", "a '' \"\" b''c", "a \"x\\\"y\" \"\\$z\" \"\\a\"", "a 'x\"y'\"'\"z",
        "a #b",
        "a#b", "a ''#b", "a \\# b", "a \\| '|' \"|&;<>\"", "a '$(x)' \\` '`' \\$\\(x\\)", "é 'ü'", "a {b} [c] = !",
    ],
)  # fmt: skip
def test_words_are_those_of_a_shell(tmp_path: Path, line: str) -> None:
    shown = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, cwd=tmp_path)
    assert split_words(line, "here") == shown.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize(
    ("line", "what", "column"),
    [
        ("a | b", "|", 3),
        ("a >out", ">", 3), ("a <in", "<", 3), ("a & b", "&", 3), ("a; b", ";", 2), ("a `b`", "`", 3),
        ("a $(b)", "$(", 3), ('a "x $(b)"', "$(", 6), ('a "`b`"', "`", 4), ("a 'x'|b", "|", 6),
    ],
)  # fmt: skip
def test_a_line_for_a_shell_is_refused(tmp_path: Path, line: str, what: str, column: int) -> None:
    said = refusal(write(tmp_path, f"fine\n{line}\n"))
    assert said.startswith(f"jobs: line 2, column {column}: '{what}' needs a shell")
    assert "--shell" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a 'b", "line 1, column 3: the quote ' is not closed"),
        (b'ok\na "b\\"', 'line 2, column 3: the quote " is not closed'),
        (b"a b\\", "line 1, column 4: nothing follows the backslash"),
        (b"ok\na\0b", "line 2: a command cannot contain a NUL character"),
        (b"ok\n\nl\xff", "line 3: the text is not UTF-8"),
        (b"ok\n" + b"x" * (1 << 20) + b"y", "line 2 is longer than 1 MiB"),
        (b"''", "line 1: command is empty"),
    ],
)
def test_bad_lines(tmp_path: Path, text: bytes, said: str) -> None:
    assert said in refusal(write(tmp_path, text))


def test_shell_lines_are_scripts(tmp_path: Path) -> None:
    tasks = read_tasks(write(tmp_path, "a | b > c\n# no\n"), shell=True).tasks
    assert [(task.command, task.script) for task in tasks] == [(None, "a | b > c")]


def test_lines_larger_than_one_block_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f"./sim --seed {i} --text {'x' * 50}\n" for i in range(20_000)) + "./last")
    tasks = read_tasks(path).tasks
    assert len(tasks) == 20_001
    assert [task.command[2] for task in tasks[:-1]] == [str(i) for i in range(20_000)]  # type: ignore[index]
    path.write_text(path.read_text() + "\n|")
    assert "line 20002, column 1" in refusal(path)


def test_defaults_from_the_caller_hold_for_lines_and_files(tmp_path: Path) -> None:
    base = Task(priority=3, env={"A": "1"}, request=Request(cores=(2, 2)))
    (task,) = read_tasks(write(tmp_path, "x y"), defaults=base).tasks
    assert (task.command, task.priority, task.env, task.request.cores) == (["x", "y"], 3, {"A": "1"}, (2, 2))
    path = entries(
        tmp_path, {"script": "s"}, {"command": "c", "priority": 5, "env": {"B": 2}}, defaults={"priority": 4}
    )
    first, second = read_tasks(path, defaults=base).tasks
    assert (first.script, first.priority, second.priority) == ("s", 4, 5)
    assert second.env == {"A": "1", "B": "2"}


FULL_TOML = """
[defaults]
cores = 2
env = { A = "x" }
command = "./default"

[[tasks]]
name = "prep"
command = ["./prep", "--level", 3]
memory = "2G"
gpus = 1
use = { net = 1, disk = 2 }
time_limit = "1h30m"
time_request = 60
retries = 2

[[tasks]]
name = "grid"
script = "echo {index}"
cores = "2-4"
nodes = 2
array = "0-9:3"
after = "prep"
env = { N = 3 }
cwd = "runs"
stdin = "in"
stdout = "out.{index}"
stderr = "err"
model = "threads"
queue = "long"
priority = -5

[[tasks]]
values = ["a b", 2, 0.5]
use = {}

[[tasks]]
name = "each"
array = "10-40:10"
after_each = ["grid"]
after = ["prep", "grid:3", "7f_2"]
after_any = "prep"
after_notok = ["grid"]
"""


def test_every_key_of_toml_and_json_means_the_same(tmp_path: Path) -> None:
    tasks = read_tasks(write(tmp_path, FULL_TOML)).tasks
    assert tasks == read_tasks(write(tmp_path, json.dumps(tomllib.loads(FULL_TOML)), "jobs.json")).tasks
    common = {"env": {"A": "x"}}
    two = Request(cores=(2, 2))
    assert tasks == [
        Task(
            command=["./prep", "--level", "3"], name="prep", time_limit=5400.0, time_request=60.0, retries=2, **common,
            request=Request(cores=(2, 2), gpus=1, memory=2 << 30, use=(("disk", 2), ("net", 1))),
        ),
        Task(
            script="echo {index}", name="grid", request=Request(cores=(2, 4), nodes=(2, 2)), array=ArrayRange(0, 9, 3),
            after=["prep"], env={"A": "x", "N": "3"}, cwd="runs", stdin="in", stdout="out.{index}", stderr="err",
            model="threads", queue="long", priority=-5,
        ),
        Task(command=["./default"], values=["a b", "2", "0.5"], request=two, **common),
        Task(
            command=["./default"], name="each", array=ArrayRange(10, 40, 10), after_each=["grid"],
            after=["prep", "grid:3", "7f_2"], after_any=["prep"], after_notok=["grid"], request=two, **common,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"core": 1}, "jobs.json: tasks[1].core: unknown key; did you mean cores?"),
        ({"zzz": 1}, "jobs.json: tasks[1].zzz: unknown key"),
        ({"cores": []}, "jobs.json: tasks[1].cores: expected a whole number or text, got a list"),
        ({"cores": 0}, "jobs.json: tasks[1].cores: '0' is no number or range"),
        ({"cores": "4-2"}, "jobs.json: tasks[1].cores: '4-2' is no number or range"),
        ({"cores": True}, "jobs.json: tasks[1].cores: expected a whole number or text, got true or false"),
        ({"retries": -1}, "jobs.json: tasks[1].retries: expected a whole number >= 0"),
        ({"retries": 10**400}, "jobs.json: tasks[1].retries: expected a whole number <= 10"),
        ({"command": [1, None]}, "jobs.json: tasks[1].command[1]: expected a whole number or a number or text"),
        ({"command": "a | b"}, "jobs.json: tasks[1].command, column 3: '|' needs a shell"),
        ({"command": "a", "script": "b"}, "jobs.json: tasks[1]: give exactly one of command, script and function"),
        ({"name": "x"}, "jobs.json: tasks[1]: give exactly one of command, script and function"),
        ({"function": "m.f"}, "jobs.json: tasks[1]: function 'm.f' must be written as module:name"),
        ({"command": "a", "function": "m:f"}, "jobs.json: tasks[1]: give exactly one of command, script and function"),
        ({"command": "a", "args": [1]}, "jobs.json: tasks[1]: args and kwargs are for a function"),
        ({"function": "m:f", "args": {}}, "jobs.json: tasks[1].args: expected a list"),
        ({"command": "a", "memory": 500}, "jobs.json: tasks[1].memory: 500 without a unit would be 500 bytes"),
        ({"command": "a", "memory": "2X"}, "jobs.json: tasks[1].memory: '2X' is no size"),
        ({"command": "a", "use": {"a b": 1}}, "jobs.json: tasks[1].use: 'a b' is no name of a counter"),
        ({"command": "a", "array": "9-1"}, "jobs.json: tasks[1].array: '9-1' is an array without elements"),
        ({"command": "a", "array": "1-2", "values": ["x"]}, "jobs.json: tasks[1]: array names the index 2, but"),
        ({"command": "a", "time_limit": "soon"}, "jobs.json: tasks[1].time_limit: 'soon' is no duration"),
        ({"command": "a", "time_limit": 0}, "jobs.json: tasks[1]: time_limit must be a positive number"),
        ({"command": "a", "name": "first"}, "jobs.json: tasks[1].name: 'first' is the name of tasks[0] already"),
        ({"command": "a", "after": "No-one"}, "jobs.json: tasks[1].after: 'No-one' is neither the name of a task here"),
        ({"command": "a", "after_any": "No-one"}, "jobs.json: tasks[1].after_any: 'No-one' is neither the name of a"),
        ({"command": "a", "after_ok": "first"}, "jobs.json: tasks[1].after_ok: unknown key; did you mean after"),
        ({"command": "a", "after": "first:0"}, "jobs.json: tasks[1].after: 'first:0' is neither"),
        ({"command": "a", "array": "0-3", "after_each": "first"}, "jobs.json: tasks[1].after_each: 'first' is not an"),
        ({"command": "a", "after_each": "7f"}, "jobs.json: tasks[1]: after_each is for arrays"),
        ({"command": "a", "name": "b", "after": "b"}, "jobs.json: tasks[1].after: tasks wait for each other: b -> b"),
        ({"command": "a", "cwd": "x\0y"}, "jobs.json: tasks[1].cwd: the text contains a NUL character"),
        ({"command": "a", "env": {"A": []}}, "jobs.json: tasks[1].env[...]: expected"),
    ],
)  # fmt: skip
def test_bad_tasks(tmp_path: Path, task: dict[str, object], said: str) -> None:
    assert refusal(entries(tmp_path, {"command": "true", "name": "first"}, task)).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"tasks": [\n {"command": }]}', "jobs: line 2, column 14: this is not JSON"),
        (b'{"tasks": [', "jobs: line 1, column 12: this is not JSON"),
        (b"{}", "jobs: the key tasks is missing"),
        (b'{"task": []}', "jobs: task: unknown key; did you mean tasks?"),
        (b'{"tasks": 3}', "jobs: tasks: expected a list, got a whole number"),
        (b'{"tasks": [{"command":\n"\\ud800"}]}', "jobs: line 2: \\ud800 is half of a character"),
        (b'{"tasks": [{"priority": NaN}]}', "jobs: this is not JSON: NaN"),
        (b'{"tasks":\n [{"command": "\xff"}]}', "jobs: line 2: the text is not UTF-8"),
        (b'{"tasks": [{"args": ' + b"[" * 100_000, "jobs: lists and tables are nested too deeply"),
        (b"[[tasks]]\ncommand = \n", "jobs: line 2, column 11: this is not TOML"),
        (b"[[tasks]]\ncommand = 'a\xff'\n", "jobs: line 2: the text is not UTF-8"),
        (b"[[tasks]]\ncores = " + b"[" * 100_000, "jobs: lists and tables are nested too deeply"),
        (b"[[tasks]]\ncores = " + b"9" * 5000, "jobs: "),
        (b"[[tasks]]\ncores = 1" + b"0" * 400, "jobs: tasks[0].cores: "),
        (b"[[tasks]]\ntime_limit = 1" + b"0" * 400, "jobs: tasks[0].time_limit: "),
        (b"[[tasks]]\ntime_limit = nan\ncommand = 'a'", "jobs: tasks[0]: time_limit must be a positive number"),
        (b"[[tasks]]\ncommand = 'a'\nstdout = \"x\\u0000\"", "jobs: tasks[0].stdout: the text contains a NUL"),
    ],
)  # fmt: skip
def test_bad_documents(tmp_path: Path, text: bytes, said: str) -> None:
    assert refusal(write(tmp_path, text)).startswith(said)


def test_a_cycle_is_named_and_a_long_chain_is_none(tmp_path: Path) -> None:
    def chain(count: int, first: list[str]) -> Path:
        tasks = [{"name": f"t{i}", "command": "true", "after": [f"t{i - 1}"] if i else first} for i in range(count)]
        return entries(tmp_path, *tasks)

    assert "tasks wait for each other: t0 -> t2 -> t1 -> t0" in refusal(chain(3, ["t2"]))
    assert len(read_tasks(chain(20_000, [])).tasks) == 20_000


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a", "[[tasks]]\ncommand = 'x'\n", "toml"),
        ("a", "# words\n[defaults]\ncores = 1\n\n[[tasks]]\ncommand = 'x'\n", "toml"),
        ("a.toml", "tasks = [{command = 'x'}]\n", "toml"),
        ("a", "\ufeff \n{\"tasks\": [{\"command\": [\"x\"]}]}", "json"),
        ("a", "\n[ {\"request\": \"submit\", \"jobs\": [{\"name\": \"x\", \"execution\": {\"exec\": \"x\"}}]}]", "qcg"),
        ("a", "[ -e x\n", "lines"),
        ("a.json", "\ufeffx\n", "lines"),
    ],
)  # fmt: skip
def test_the_kind_is_recognised(tmp_path: Path, name: str, text: str, kind: str) -> None:
    path = write(tmp_path, text, name)
    batch = read_tasks(path)
    assert batch == read_tasks(path, format=kind)
    if kind == "qcg":
        assert batch.tasks == [] and [request["request"] for request in batch.requests or ()] == ["submit"]
    else:
        assert batch.requests is None and batch.tasks[0].command in (["x"], ["[", "-e", "x"])


def test_a_forced_format_is_not_recognised(tmp_path: Path) -> None:
    path = write(tmp_path, "{x} y")
    assert read_tasks(path, format="lines").tasks[0].command == ["{x}", "y"]
    assert "this is not JSON" in refusal(path)
    assert "format 'yaml' is unknown" in refusal(path, format="yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == "none: cannot be read: No such file or directory"
    assert "Is a directory" in refusal(tmp_path)
    assert "NUL" in refusal(tmp_path / "a\0b")


def test_documents_are_bounded(tmp_path: Path) -> None:
    path = write(tmp_path, "{", "jobs.json")
    with path.open("r+b") as file:
        file.truncate((64 << 20) + 1)
    for kind in ("json", "toml", "qcg"):
        assert "jobs.json: the file is larger than 64 MiB" in refusal(path, format=kind)


def test_standard_input_and_the_collector(tmp_path: Path) -> None:
    code = "from pilotq.broker.taskfiles.reader import read_tasks; print([t.command for t in read_tasks('-').tasks])"
    shown = subprocess.run([sys.executable, "-c", code], input=b"a 'b c'\n", capture_output=True, check=True)
    assert shown.stdout == b"[['a', 'b c']]\n"
    refusal(tmp_path / "none")
    assert gc.isenabled()
