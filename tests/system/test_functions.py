"""Python functions as tasks, on a real pilot: what they return, raise, print, leave behind, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rq.job import Job

from pilotq.broker import ArrayRange, Request, Task
from pilotq.broker.errors import FunctionCanceled, FunctionFailed, InvalidInput
from pilotq.broker.settings import Settings
from pilotq.broker.tasks.submit_context import capture_context
from pilotq.workers.process_tree import processes
from tests.support import functions
from tests.support.live_pilot import LivePilot, live_pilot
from tests.support.waiting import wait_until
from tests.support.worker_host import alive, command


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePilot]:
    with live_pilot(tmp_path_factory.mktemp("functions"), "n1:2") as live:
        live.broker.redis.ping()  # its connection is not one test's
        yield live


def call(pilot: LivePilot, function: Any, *args: Any, **fields: Any) -> Any:
    """The result of a function, when it has come."""
    return pilot.broker.result(pilot.broker.enqueue(Task(function=function, args=args, **fields)), timeout=60)


# -- results and failures --------------------------------------------------------------------------------------------


def test_a_function_returns_its_value_here_and_to_rq(pilot: LivePilot) -> None:
    task = pilot.broker.enqueue(Task(function=functions.product, args=(6,), kwargs={"b": 7}))
    assert pilot.broker.result(task, timeout=60) == 42
    view = pilot.ended(task)
    assert (view.status, view.reason, view.command) == ("finished", "", "tests.support.functions:product(6, b=7)")
    job = Job.fetch(task, connection=pilot.broker.redis)
    result = job.latest_result()
    assert job.return_value() == 42
    assert result is not None and result.type == result.Type.SUCCESSFUL
    assert call(pilot, "math:gcd", 12, 18) == 6
    assert call(pilot, functions.product, 2) == 2
    assert call(pilot, print) is None


def test_what_has_no_name_elsewhere_goes_by_value(pilot: LivePilot) -> None:
    factor = 5
    assert call(pilot, lambda x: x * factor, 8) == 40
    assert call(pilot, "hello".replace, "l", "L") == "heLLo"


def test_coroutines_are_run(pilot: LivePilot) -> None:
    assert call(pilot, functions.later, 3) == 3


def test_an_exception_comes_back_with_its_traceback(pilot: LivePilot) -> None:
    with pytest.raises(ValueError, match="bad") as caught:
        call(pilot, functions.throw, ValueError("bad"))
    assert "in throw" in str(caught.value.__cause__)
    assert "interpreter.py" not in str(caught.value.__cause__)
    task = pilot.broker.enqueue(Task(function=functions.throw, args=(ValueError("bad"),)))
    view = pilot.ended(task)
    assert (view.status, view.reason, view.message) == ("failed", "exception", "ValueError: bad")
    result = Job.fetch(task, connection=pilot.broker.redis).latest_result()
    assert result is not None and result.exc_string is not None
    assert result.exc_string.startswith("Traceback") and result.exc_string.endswith("ValueError: bad\n")


@pytest.mark.parametrize(("function", "text"), [(functions.throw_odd, "ab"), (functions.throw_stubborn, "no pickle")])
def test_an_exception_that_cannot_travel_is_told_by_its_text(pilot: LivePilot, function: Any, text: str) -> None:
    with pytest.raises(FunctionFailed, match=text) as caught:
        call(pilot, function)
    assert "Traceback" in str(caught.value.__cause__)


def test_a_system_exit_is_a_failure_and_the_interpreter_goes_on(pilot: LivePilot) -> None:
    whole = Request(cores=(2, 2))  # so that there is one slot
    pid = call(pilot, os.getpid, request=whole)
    with pytest.raises(SystemExit):
        call(pilot, sys.exit, 0, request=whole)
    assert call(pilot, os.getpid, request=whole) == pid


def test_who_ends_its_interpreter_has_failed_also_beside_others_of_one_record(pilot: LivePilot) -> None:
    tasks = [Task(function=functions.end_at, args=(n, 3)) for n in range(Settings().bundle_above + 1)]
    ids = pilot.broker.enqueue_many(tasks)
    assert ids[3].endswith("_3"), "they share a record"
    array = pilot.broker.enqueue(Task(function=functions.end_at, args=(1,), array=ArrayRange(0, 3)))
    for task in (ids[3], f"{array}_1"):
        view = pilot.ended(task)
        assert (view.status, view.reason, view.exit_code) == ("failed", "interpreter", 0)
    counts = pilot.broker.wait([*ids, array], timeout=60)
    assert (counts.finished, counts.failed) == (len(ids) - 1, 2), counts


@pytest.mark.parametrize(("function", "args", "text"), [
    (functions.numbers, (), "cannot pickle 'generator' object"),
])  # fmt: skip
def test_a_result_that_cannot_be_kept_is_a_failure(pilot: LivePilot, function: Any, args: Any, text: str) -> None:
    task = pilot.broker.enqueue(Task(function=function, args=args))
    with pytest.raises(FunctionFailed, match=text):
        pilot.broker.result(task, timeout=60)
    assert pilot.ended(task).reason == "result"


def test_large_arguments_and_results_travel_whole(pilot: LivePilot) -> None:
    data = os.urandom(900_000)
    tasks = [pilot.broker.enqueue(Task(function=bytes.__add__, args=(data, bytes([n])))) for n in range(5)]
    assert [pilot.broker.result(task, timeout=60) for task in tasks] == [data + bytes([n]) for n in range(5)]
    # More than fits into one report.
    many = pilot.broker.enqueue_many([Task(function=bytes, args=(6 << 20,)) for _ in range(12)])
    assert [len(pilot.broker.result(task, timeout=60)) for task in many] == [6 << 20] * 12


def test_what_cannot_be_called_is_refused_before_anything_is_submitted(pilot: LivePilot) -> None:
    before = pilot.broker.counts().total
    for task, text in (
        (Task(function=3), "must be a callable"),
        (Task(function="os.getpid"), "module:name"),
        (Task(function=print, command=["true"]), "exactly one"),
        (Task(command=["true"], args=[1]), "args and kwargs are for a function"),
        (Task(function=print, args=(threading.Lock(),)), "cannot be pickled"),
        (Task(function=print, args=(bytes(2 << 20),)), "write them to a file"),
    ):
        with pytest.raises(InvalidInput, match=text):
            pilot.broker.enqueue_many([Task(command=["true"]), task])
    assert pilot.broker.counts().total == before
    with pytest.raises(AttributeError, match="getpi"):
        call(pilot, "os:getpi")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        call(pilot, "nowhere:f")


def test_a_function_finds_its_job_and_notes_something_there(pilot: LivePilot) -> None:
    for word in ("first", "second"):
        task = pilot.broker.enqueue(Task(function=functions.note, args=(word,), request=Request(cores=(2, 2))))
        assert pilot.broker.result(task, timeout=60) == task
        assert Job.fetch(task, connection=pilot.broker.redis).get_meta() == {"word": word}


# -- submit context --------------------------------------------------------------------------------------------------


def test_a_function_runs_pinned_in_the_surroundings_of_its_task(pilot: LivePilot, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("input")
    task = Task(function=functions.observe, cwd=str(tmp_path), env={"MINE": "yes"}, stdin="in")
    number = pilot.broker.enqueue(task)
    found = pilot.broker.result(number, timeout=60)
    view = pilot.ended(number)
    assert len(found["cpus"]) == 1 and view.cores == f"n1[{view.cores[3:-1]}]"
    assert found == {**found, "cwd": str(tmp_path), "task": number, "execution": "1", "mine": "yes", "stdin": "input"}
    [line] = pilot.lines(number)
    assert line.pid == found["pid"] and line.cpu is not None and line.max_rss and line.started and line.ended
    assert call(pilot, functions.observe, request=Request(cores=(2, 2)))["mine"] is None


def test_modules_are_found_in_the_directory_of_the_submitter(tmp_path: Path, pilot: LivePilot) -> None:
    (tmp_path / "program").mkdir()
    (tmp_path / "beside.py").write_text("def f(): return 'cwd'")
    (tmp_path / "program" / "tool.py").write_text("def g(): return 'program'")
    main = tmp_path / "program" / "main.py"
    main.write_text(
        "import tool\nfrom pilotq.broker import Broker, Task\n"
        "class Own(Exception): pass\n"
        "def mine(): return Own('x')\n"
        "b = Broker.connect()\n"
        "ids = b.enqueue_many([Task(function=f) for f in ('beside:f', tool.g, mine)])\n"
        "print(*[b.result(i, timeout=60) for i in ids[:2]], type(b.result(ids[2], timeout=60)) is Own)\n"
    )
    env = {**os.environ, "PILOTQ_DIR": pilot.pilot.directory}
    command = [sys.executable, str(main)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=90)
    assert done.stdout == "cwd program True\n", done.stderr


def test_output_of_one_call_never_mixes_with_anothers(pilot: LivePilot) -> None:
    words = [f"w{n}" for n in range(12)]
    counts = [1 if n % 3 else 40_000 for n in range(12)]
    counts[6] = 2_000_000
    tasks = [
        pilot.broker.enqueue(Task(function=functions.shout, args=(word, count)))
        for word, count in zip(words, counts, strict=True)
    ]
    for task, word, count in zip(tasks, words, counts, strict=True):
        assert pilot.ended(task).status == "finished"
        text = (word * count).encode()
        output = pilot.output(task)
        assert sorted(output.split()) == sorted([text, b"raw", b"child"])
        assert pilot.output(task, "stderr") == text.upper() + b"\n"


def test_named_files_take_the_output_of_a_call(pilot: LivePilot, tmp_path: Path) -> None:
    task = Task(function=functions.shout, args=("x", 3), cwd=str(tmp_path), stdout="deep/out", stderr="deep/out")
    assert pilot.ended(pilot.broker.enqueue(task)).status == "finished"
    assert sorted((tmp_path / "deep" / "out").read_text().split()) == ["XXX", "child", "raw", "xxx"]
    missing = pilot.ended(pilot.broker.enqueue(Task(function=functions.product, args=(1,), cwd=str(tmp_path / "no"))))
    assert (missing.status, missing.reason) == ("failed", "not found")


def test_what_a_call_does_to_its_files_and_surroundings_does_not_reach_the_next(pilot: LivePilot) -> None:
    whole = Request(cores=(2, 2))
    first = pilot.broker.enqueue(Task(function=functions.break_files, request=whole, env={"MINE": "1"}))
    assert pilot.broker.result(first, timeout=60) is None
    assert pilot.output(first) == b"before\n"
    second = pilot.broker.enqueue(Task(function=functions.shout, args=("x", 1), request=whole))
    pilot.broker.result(second, timeout=60)
    assert b"x\n" in pilot.output(second) and pilot.output(second, "stderr") == b"X\n"
    assert call(pilot, functions.observe, request=whole)["mine"] is None


# -- interpreters ----------------------------------------------------------------------------------------------------


def test_calls_of_a_lane_share_an_interpreter_until_the_surroundings_change(
    pilot: LivePilot, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Request(cores=(2, 2))
    assert call(pilot, functions.remember, "a", request=whole) == ""
    assert call(pilot, functions.remember, "b", request=whole) == "a"
    pid = call(pilot, os.getpid, request=whole)
    monkeypatch.setenv("CHANGED", "1")
    assert call(pilot, os.getenv, "CHANGED", request=whole) == "1"
    assert call(pilot, functions.remember, "c", request=whole) == ""
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), what="end of the interpreter that was replaced")


def test_an_interpreter_is_replaced_after_a_number_of_calls(tmp_path: Path) -> None:
    with live_pilot(tmp_path, "n1:1", interpreter_calls=10) as pilot:
        tasks = pilot.broker.enqueue_many([Task(function=os.getpid) for _ in range(200)])
        pids = [pilot.broker.result(task, timeout=60) for task in tasks]
        used = [pids.count(pid) for pid in dict.fromkeys(pids)]
        assert max(used) <= 10


@pytest.mark.parametrize(("function", "args", "reason", "number"), [
    (os._exit, (7,), "interpreter", None), (os._exit, (0,), "interpreter", None),
    (os.abort, (), "signal", signal.SIGABRT), (functions.crash, (), "signal", signal.SIGSEGV),
])  # fmt: skip
def test_a_crash_fails_one_call_and_the_interpreter_is_replaced(
    pilot: LivePilot, function: Any, args: Any, reason: str, number: int | None
) -> None:
    before = [Task(function=functions.product, args=(n,)) for n in range(20)]
    tasks = pilot.broker.enqueue_many([*before, Task(function=function, args=args), *before])
    assert [pilot.broker.result(t, timeout=60) for t in tasks[:20] + tasks[21:]] == [*range(20), *range(20)]
    view = pilot.ended(tasks[20])
    assert (view.status, view.reason, view.signal) == ("failed", reason, number)
    with pytest.raises(FunctionFailed):
        pilot.broker.result(tasks[20], timeout=60)


def test_a_killed_interpreter_fails_its_call_alone(pilot: LivePilot, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    task = pilot.broker.enqueue(Task(function=functions.wait_for_ever, args=(str(mark),)))
    wait_until(lambda: mark.exists() and mark.read_text(), what="start of the function")
    os.kill(int(mark.read_text()), signal.SIGKILL)
    view = pilot.ended(task)
    assert (view.reason, view.signal) == ("signal", signal.SIGKILL)
    pilot.assert_calm()


@pytest.mark.parametrize("kind", ["fork", "session"])
def test_what_a_function_leaves_running_is_swept(pilot: LivePilot, kind: str) -> None:
    task = pilot.broker.enqueue(Task(function=functions.leave_a_process, args=(kind,)))
    pid = pilot.broker.result(task, timeout=60)
    assert not Path(f"/proc/{pid}").exists()
    assert pilot.ended(task).status == "finished"
    pilot.assert_calm()


def test_a_child_that_comes_back_out_of_the_function_is_not_the_call(pilot: LivePilot) -> None:
    assert call(pilot, functions.fork_and_return) == "from the parent"
    assert call(pilot, functions.use_a_pool, [-1, -2]) == [1, 2]


def test_an_interpreter_with_a_thread_left_in_it_is_not_used_again(pilot: LivePilot) -> None:
    whole = Request(cores=(2, 2))
    pid = call(pilot, functions.leave_a_thread, request=whole)
    assert call(pilot, os.getpid, request=whole) != pid


def test_calls_leak_no_descriptors(pilot: LivePilot) -> None:
    whole = Request(cores=(2, 2))
    first = call(pilot, functions.open_files, request=whole)
    call(pilot, bytes, 200_000, request=whole)
    call(pilot, functions.shout, "x", 1_000_000, request=whole)
    call(pilot, functions.shout, "x", 2_000_000, request=whole)
    later = call(pilot, functions.open_files, request=whole)
    assert len(later) <= len(first) + 1  # the file that large output is packed into


@pytest.mark.parametrize("parts", [("launcher",), ("control", "launcher")])
def test_nothing_of_a_call_outlives_its_launcher_or_its_worker(tmp_path: Path, parts: tuple[str, ...]) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()

    def seen() -> list[int]:
        return [int(path.suffix[1:]) for path in marks.iterdir()]

    with live_pilot(tmp_path / "pilot", "n1:1") as pilot:
        task = pilot.broker.enqueue(Task(function=functions.fork_and_wait, args=(str(marks),)))
        wait_until(lambda: len(seen()) == 2, what="start of the function and of what it forks")
        first = seen()
        home = os.fsencode(pilot.pilot.directory)
        names = {"launcher": b"pilotq.workers.launcher.launcher", "control": b"\0worker\0"}
        found = [pid for pid in processes() for part in parts if names[part] in (line := command(pid)) and home in line]
        assert len(found) == len(parts)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, first)), what="end of what the call had started")
        # It is run again.
        wait_until(lambda: len(seen()) == 4, seconds=60, what="second execution")
        pilot.broker.cancel([task])
        assert pilot.ended(task).status == "canceled"
        pilot.assert_calm()
        assert not any(map(alive, seen()))


# -- ending them -----------------------------------------------------------------------------------------------------


def test_at_the_time_limit_the_function_is_told_and_then_killed(pilot: LivePilot, tmp_path: Path) -> None:
    marks = [tmp_path / name for name in ("told", "stubborn", "survives")]
    told, stubborn, survives = pilot.broker.enqueue_many([
        Task(function=functions.wait_for_ever, args=(str(marks[0]),), time_limit=2),
        Task(function=functions.wait_for_ever, args=(str(marks[1]),), kwargs={"stubborn": True}, time_limit=2),
        Task(function=functions.survive, args=(str(marks[2]),), time_limit=2),
    ])  # fmt: skip
    with pytest.raises(TimeoutError):
        pilot.broker.result(told, timeout=60)
    assert pilot.ended(told).reason == "time limit"
    assert marks[0].read_text() == "TimeoutError"
    assert (pilot.ended(stubborn).reason, pilot.ended(stubborn).status) == ("time limit", "failed")
    assert pilot.broker.result(survives, timeout=60) == "made the best of it"
    assert pilot.ended(survives).status == "finished"
    pilot.assert_calm()


@pytest.mark.parametrize("stubborn", [False, True])
def test_cancel_interrupts_the_function_and_kills_what_does_not_end(
    pilot: LivePilot, tmp_path: Path, stubborn: bool
) -> None:
    mark = tmp_path / "mark"
    task = pilot.broker.enqueue(
        Task(function=functions.wait_for_ever, args=(str(mark),), kwargs={"stubborn": stubborn})
    )
    behind = pilot.broker.enqueue_many([Task(function=functions.product, args=(n,)) for n in range(10)])
    wait_until(lambda: mark.exists() and mark.read_text(), what="start of the function")
    assert pilot.broker.cancel([task]) == {task: "stopping"}
    with pytest.raises(FunctionCanceled):
        pilot.broker.result(task, timeout=60)
    assert pilot.ended(task).status == "canceled"
    assert mark.read_text() in (("KeyboardInterrupt",) if not stubborn else ("KeyboardInterrupt", mark.read_text()))
    assert [pilot.broker.result(t, timeout=60) for t in behind] == list(range(10))
    pilot.assert_calm()


def test_a_call_can_be_canceled_while_its_interpreter_loads(pilot: LivePilot, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, time\nwhile not os.path.exists({str(mark)!r}): time.sleep(0.01)\n"
    )
    # The worker's own parts do not see this: it is the environment of the submission.
    shared = capture_context(functions=True)
    shared.env[b"PYTHONPATH"] = bytes(tmp_path)
    whole = Request(cores=(2, 2))
    [loads] = pilot.broker.enqueue_many([Task(function=functions.product, args=(1,), request=whole)], context=shared)
    wait_until(lambda: pilot.broker.task(loads).status == "started", what="start of the task")
    pilot.broker.cancel([loads])
    view = pilot.ended(loads)
    assert (view.status, view.reason) == ("canceled", "canceled")
    mark.touch()
    [after] = pilot.broker.enqueue_many([Task(function=functions.product, args=(2,), request=whole)], context=shared)
    assert pilot.broker.result(after, timeout=60) == 2


# -- arrays, dependencies, commands ----------------------------------------------------------------------------------


def test_an_array_of_a_function_gets_index_or_value_first(pilot: LivePilot) -> None:
    indices = pilot.broker.enqueue(Task(function=functions.product, args=(10,), array=ArrayRange(2, 8, 2)))
    values = pilot.broker.enqueue(Task(function=str.upper, values=["a", "{index}", "c"]))
    pilot.broker.wait([indices, values], timeout=60)
    assert [pilot.broker.result(f"{indices}_{n}") for n in (2, 4, 6, 8)] == [20, 40, 60, 80]
    assert [pilot.broker.result(f"{values}_{n}") for n in range(3)] == ["A", "{INDEX}", "C"]


def test_functions_and_commands_take_turns_on_a_lane(pilot: LivePilot, tmp_path: Path) -> None:
    tasks = []
    for n in range(60):
        tasks.append(Task(function=functions.product, args=(n,)))
        tasks.append(Task(command=["true"]))
    ids = pilot.broker.enqueue_many(tasks)
    last = pilot.broker.enqueue(Task(function=functions.product, args=(1,), after=ids))
    assert pilot.broker.result(last, timeout=60) == 1
    assert [pilot.broker.result(i) for i in ids[::2]] == list(range(60))
    with pytest.raises(InvalidInput, match="is no function"):
        pilot.broker.result(ids[1])


def test_a_pilot_that_ends_takes_its_interpreters_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with live_pilot(tmp_path / "pilot", "n1:1") as pilot:
        pid = call(pilot, os.getpid)
        pilot.broker.enqueue(Task(function=functions.wait_for_ever, args=(str(mark),)))
        wait_until(mark.exists, what="start of the function")
    assert not Path(f"/proc/{pid}").exists()


def test_a_file_names_functions(pilot: LivePilot, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def area(a, b=1):\n    print('called')\n    return a * b\n")
    (tmp_path / "tasks.toml").write_text(
        '[[tasks]]\nfunction = "mine:area"\nargs = [6]\nkwargs = { b = 7 }\n'
        '[[tasks]]\nfunction = "mine:area"\nvalues = ["x", "y"]\nargs = [2]\n'
    )
    command = [sys.executable, "-m", "pilotq", "submit", "--dir", pilot.pilot.directory, "tasks.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    first, second = done.stdout.split()
    assert pilot.broker.result(first, timeout=60) == 42
    pilot.broker.wait([second], timeout=60)
    assert [pilot.broker.result(f"{second}_{n}") for n in range(2)] == ["xx", "yy"]
    pilot.ended(first)
    assert pilot.output(first) == b"called\n"


def test_what_has_no_value_says_why(pilot: LivePilot) -> None:
    """Where a function did not end by itself there is no exception of its own, but a reason."""
    boom = pilot.broker.enqueue(Task(function=functions.divide, args=(0,)))
    limited, behind, killer, missing, odd, stopped = pilot.broker.enqueue_many([
        Task(function=functions.be_deaf, time_limit=1), Task(function=functions.product, args=(1,), after=[boom]),
        Task(function=functions.kill_the_parent), Task(function="no.such:module"),
        Task(function=functions.throw_stubborn), Task(function=functions.be_deaf),
    ])  # fmt: skip
    found = {}
    for task in (limited, behind, killer, missing, odd):
        with pytest.raises(Exception) as caught:
            pilot.broker.result(task, timeout=60)
        found[task] = f"{type(caught.value).__name__}: {caught.value}"
    pilot.broker.cancel([stopped])
    with pytest.raises(FunctionCanceled) as canceled:
        pilot.broker.result(stopped, timeout=60)
    assert found[limited].startswith(
        f"FunctionFailed: task {limited} failed: it ran longer than its time limit (node n1"
    )
    assert (
        found[behind] == f"FunctionCanceled: task {behind} was canceled: a task it depends on did not end as required"
    )
    assert found[killer] == f"FunctionFailed: task {killer} failed: its worker died under it too often"
    assert found[missing] == "ModuleNotFoundError: No module named 'no'"
    assert found[odd].endswith(f"task {odd}: tests.support.functions.Stubborn: no pickle")
    assert str(canceled.value) == f"task {stopped} was canceled"
