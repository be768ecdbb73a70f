"""Launches of runs of elements: each is as if its launch had been built by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from pilotq.broker.errors import PilotFailed, ServerUnavailable
from pilotq.broker.store.journal_runs import Line, RunLines
from pilotq.broker.store.messages import EndReport, Lease
from pilotq.broker.store.resources import NodeInfo
from pilotq.broker.tasks.model import ArrayRange, Task
from pilotq.broker.tasks.spec import BUNDLE_SPEC, FLAG_VALUES, MemberPacker, Spec, pack_spec, spec_of
from pilotq.broker.tasks.submit_context import SubmitContext
from pilotq.broker.tasks.validation import is_like, rest_of
from pilotq.workers.execution.execution import Execution
from pilotq.workers.execution.launch_builder import LaunchBuilder
from pilotq.workers.execution.leased_ends import plain_runs
from pilotq.workers.execution.leased_runs import HeldLease, LeasedRun, PlainEnds
from pilotq.workers.execution.reporting import Reporter
from pilotq.workers.execution.run_builder import RunBuilder
from pilotq.workers.protocol import Call, CallRun, Launch, LaunchRun, Ran
from pilotq.workers.shared_data import SharedData

CLASS, CORE = "default.p10.1c", "n1[0]"
VALUES = [b"a", b"b c", b"", b"\xff{index}", b"$HOME;'"]


class Server:
    """What launches read: a context, and the values of one array."""

    def __init__(self, values: list[bytes]) -> None:
        self.values = values
        self.is_away = False

    def fetch_shared(self, _: str) -> SubmitContext:
        return SubmitContext({b"PATH": b"/bin", b"HOME": b"/home"}, b"/work", 0o22, {})

    def fetch_value(self, _: str, position: int) -> bytes:
        if self.is_away:
            raise ServerUnavailable("the server is away")
        if position >= len(self.values):
            raise PilotFailed("it has no value there")
        return self.values[position]


def builders(server: Server, tmp_path: Path) -> tuple[LaunchBuilder, RunBuilder]:
    info = NodeInfo("n1", 1, "here", 1, [0, 1])
    builder = LaunchBuilder(cast(SharedData, server), str(tmp_path), {}, info)
    return builder, RunBuilder(builder)


def lease_of(spec: bytes, number: int = 5, **more: Any) -> Lease:
    fields = {"execution": 1, "name": "", "index": 7, "step": 3, "retries": 0, **more}
    return Lease(
        "arr", fields["execution"], CLASS, fields["name"], 1.0, 2.0, "shared", 0, number, fields["index"],
        fields["step"], 0, "sub", spec, [],
    )  # fmt: skip


def array_of(**fields: Any) -> bytes:
    return pack_spec(spec_of(Task(array=ArrayRange(7, 19, 3), **fields)))


def valued(**fields: Any) -> bytes:
    spec = spec_of(Task(array=ArrayRange(7, 19, 3), **fields))
    return pack_spec(msgspec.structs.replace(spec, flags=spec.flags | FLAG_VALUES))


def members_of(tasks: list[Task]) -> list[bytes]:
    packer, rest = MemberPacker(), rest_of(tasks[0])
    return [packer.pack(task, tasks[0] if is_like(task, rest) else task) for task in tasks]


ARRAYS = {
    "command": array_of(command=["p", "x"]),
    "index": array_of(command=["p-{index}", "{index}{index}"], cwd="run/{index}", env={"A": "{index}"}),
    "script": array_of(script="echo {index}"),
    "stdin": array_of(command=["p"], stdin="in-{index}"),
    "outputs": array_of(command=["p"], stdout="out/{index}", stderr="/abs/{id}.err", cwd="sub"),
    "one output": array_of(command=["p"], stdout="out-{index}", stderr="out-{index}"),
    "long": array_of(command=["p", "x" * 300, "{index}"]),
    "value": valued(command=["p", "<{value}>", "{index}"], env={"V": "{value}"}),
    "value for a shell": valued(command=["sh", "-c", "echo {value} {index}", "{value}"]),
    "script with a value": valued(script="echo {value}"),
    "value unnamed": valued(command=["p"]),
    "value in a path": valued(command=["p"], stdout="out-{value}-{index}"),
    "attempt": array_of(command=["p", "{attempt}"]),
}
BUNDLES = {
    "commands": [Task(command=["p", str(n), "x" * n]) for n in range(5)],
    "names": [Task(command=["p", str(n)], name=f"t{n}" if n else None) for n in range(5)],
    "output": [Task(command=["p", str(n)], stdout="{id}.out", cwd="/sub", time_limit=5.0) for n in range(5)],
    "long command": [Task(command=["p", "y" * 400, str(n)]) for n in range(5)],
    "scripts": [Task(script=f"echo {n}; true", name=f"s{n}") if n else Task(command=["p"]) for n in range(5)],
    "paths": [
        Task(
            command=["p"], cwd=f"sub{n}", stdin="in" if n else None, stdout=f"o{n}", stderr=f"/e{n}" if n < 3 else None
        )
        for n in range(5)
    ],
    "ids in paths": [Task(command=["p"], cwd="{id}", stdout=f"{n}-{{id}}", stderr=f"{n}-{{id}}") for n in range(5)],
    "words of ours": [Task(command=["p", "{index}", "{value}", "\N{SNOWMAN}"], env={"A": "b"}) for n in range(5)],
}
CASES = {
    **{name: lease_of(spec) for name, spec in ARRAYS.items()},
    **{name: lease_of(BUNDLE_SPEC, index=0, step=1) for name in BUNDLES},
}


def same(launch: Launch) -> Launch:
    """Without what differs from one launch to the next of the same."""
    env = {name: value for name, value in launch.env.items() if name != b"QCG_PM_STEP_ID"}
    return msgspec.structs.replace(launch, env=env, key=0, after=0, element=None)


@pytest.mark.parametrize("name", CASES)
def test_a_launch_of_a_run_is_as_if_built_by_itself(tmp_path: Path, name: str) -> None:
    server = Server(members_of(BUNDLES[name]) if name in BUNDLES else VALUES)
    builder, runs = builders(server, tmp_path)
    lease = CASES[name]
    held = runs.hold(lease)
    assert held is not None
    run = LeasedRun(held, 100, 1, 4)  # the first one is somewhere else
    run.allocation = CORE
    base, slot, message = runs.build_run(run, 99)
    # As it arrives.
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=LaunchRun)
    for number in range(4):
        e = Execution(0, lease.run(1 + number))
        e.allocation = CORE
        expected_base, expected_slot, expected = builder.build(e, 0)
        assert isinstance(expected, Launch)
        found = sent.launch_of(number)
        assert (base, slot, same(found)) == (expected_base, expected_slot, same(expected))
        assert len(found.env[b"QCG_PM_STEP_ID"]) == 32
        described = Execution(0, lease.run(1 + number))
        held.describe(described)
        assert (described.stdout, described.stderr, described.limit) == (e.stdout, e.stderr, e.limit)
        assert described.spec is not None and e.spec is not None
        assert described.spec.argv == e.spec.argv and described.run.name == e.run.name
        check_line(held, number, e)


def check_line(held: HeldLease, number: int, e: Execution) -> None:
    """Its line of the journal is that of its own report."""
    run = LeasedRun(held, 100, 1 + number, 1)
    run.allocation = CORE
    row = msgspec.msgpack.encode(
        (held.lease.index + held.lease.step * (1 + number), held.place_of(CORE), 5, 6, 77, 8, 9)
    )
    run.ends = PlainEnds(run)
    run.pass_plain(Ran(100, 0.1, 3.0, row))
    reporter = Reporter("n1", "/pilot")
    ((packed, apart),) = plain_runs([run.ends], "n1", reporter.report)
    (entry,) = msgspec.msgpack.decode(packed.lines, type=RunLines).entries()
    (report,) = apart()
    assert isinstance(report, EndReport)
    line = msgspec.msgpack.decode(report.entry, type=Line).entry()
    line.status, entry.at = "finished", ""
    assert msgspec.structs.asdict(entry) == msgspec.structs.asdict(line)
    assert entry.stdout_at == ([e.stdout] if e.stdout else [])


def test_a_call_of_a_run_is_as_if_built_by_itself(tmp_path: Path) -> None:
    tasks = [Task(function=pow, args=[n, 2], name=f"f{n}", env={"A": "b"}, cwd="sub", stdin="in") for n in range(4)]
    tasks.append(Task(function=len, args=["abc"], env={"A": "b"}, cwd="sub", stdin="in"))
    builder, runs = builders(Server(members_of(tasks)), tmp_path)
    lease = lease_of(BUNDLE_SPEC, index=0, step=1)
    held = runs.hold(lease)
    assert held is not None and held.is_function
    run = LeasedRun(held, 100, 1, 4)
    run.allocation = CORE
    base, slot, message = runs.build_run(run, 99)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=CallRun)
    for number, found in enumerate(sent.calls()):
        e = Execution(0, lease.run(1 + number))
        e.allocation = CORE
        expected_base, expected_slot, expected = builder.build(e, 0)
        key, after = 100 + number, 99 + number
        assert (base, slot) == (expected_base, expected_slot) and isinstance(expected, Call)
        assert found == msgspec.structs.replace(expected, key=key, after=after)
        described = Execution(0, lease.run(1 + number))
        held.describe(described)
        assert (described.function, described.limit, described.run.name) == (True, 0.0, e.run.name)
    assert held.command == "builtins:pow(...)" and held.fields(3, 2)[1] == {"command": "builtins:len(...)"}


UNALIKE = {
    "one has its own variables": members_of([*BUNDLES["commands"][:4], Task(command=["p"], env={"A": "b"})]),
    "one is a script for another shell": members_of([*BUNDLES["commands"][:4], Task(script="#!/usr/bin/perl\nprint")]),
    "functions with files": members_of([Task(function=len, args=["abc"], stdout=f"o{n}") for n in range(5)]),
    "a function and a command": members_of([Task(function=len, args=["abc"]), *BUNDLES["commands"][:4]]),
    "attempts": members_of([Task(command=["p", "{attempt}"])] * 5),
    "one is damaged": [*members_of(BUNDLES["commands"])[:4], b"\x92\x91\x90"],
    "one has no command": [*members_of(BUNDLES["commands"])[:4], b"\x92" + pack_spec(Spec([])) + b"\xa0"],
    "a NUL": [*members_of(BUNDLES["commands"])[:4], *members_of([Task(command=["p", "@"])])],
    "one is missing": members_of(BUNDLES["commands"])[:4],
}
UNALIKE["a NUL"][4] = UNALIKE["a NUL"][4].replace(b"@", b"\0")


@pytest.mark.parametrize("name", UNALIKE)
def test_tasks_of_a_bundle_that_are_not_alike_are_built_by_themselves(tmp_path: Path, name: str) -> None:
    _, runs = builders(Server(UNALIKE[name]), tmp_path)
    assert runs.hold(lease_of(BUNDLE_SPEC, index=0, step=1)) is None


@pytest.mark.parametrize(
    ("spec", "more", "values"),
    [
        (valued(command=["p"], stdout="{value}.out"), {}, VALUES),  # it may be an absolute path
        (valued(command=["p"], cwd="{value}"), {}, VALUES),
        (valued(command=["p"], cwd="x/{value}", stdout="out"), {}, VALUES),
        (array_of(command=["p"], stdout="out-{index}"), {"execution": 2}, VALUES),  # published when it counts
        (array_of(script="#!/usr/bin/perl\nprint 1"), {}, VALUES),  # a file is written first
        (valued(command=["p", "{value}"]), {}, [*VALUES[:4], b"\0v"]),
        (valued(command=["p", "{value}"]), {}, VALUES[:4]),
        (pack_spec(Spec([b"p\0"])), {}, VALUES),
        (b"damaged", {}, VALUES),
        (pack_spec(Spec([b"p"], model="openmpi")), {}, VALUES),
    ],
)
def test_elements_that_are_not_alike_are_built_by_themselves(
    tmp_path: Path, spec: bytes, more: dict[str, Any], values: list[bytes]
) -> None:
    _, runs = builders(Server(values), tmp_path)
    assert runs.hold(lease_of(spec, **more)) is None


def test_without_the_server_elements_with_values_are_built_by_themselves(tmp_path: Path) -> None:
    server = Server(VALUES)
    _, runs = builders(server, tmp_path)
    server.is_away = True
    assert runs.hold(CASES["value"]) is None and runs.hold(CASES["index"]) is not None
