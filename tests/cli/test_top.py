"""`pilotq top` on a terminal: its screens from overviews, its keys on a real pilot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pilotq.broker.client.overview import (
    ExecutionView,
    FailureGroup,
    NodeOverview,
    Overview,
    Progress,
    QueueOverview,
)
from pilotq.broker.client.views import Counts
from pilotq.cli import formatting
from pilotq.cli.top_loop import split_keys
from pilotq.cli.top_screen import VIEWS, Choice, screen
from tests.support.command_line import command, environment, in_background
from tests.support.terminal import terminal
from tests.support.waiting import wait_until

SIZES = [(80, 24), (200, 60)]
EVIL = "\x1b]0;owned\x07a\x1b[2Jb\n" + "w" * 300


def text(found: Overview, choice: Choice, columns: int = 80, lines: int = 24) -> list[str]:
    """The screen without styles; that it fits is checked here."""
    shown = ["".join(piece for piece, _ in line) for line in screen(found, choice, [EVIL] * 9, columns, lines)]
    assert len(shown) == lines and all(formatting.width(line) <= columns for line in shown)
    assert all(line.isprintable() for line in shown)
    return shown


def overview(nodes: int = 2, cores: int = 4) -> Overview:
    return Overview(
        at=100.0, counts=Counts(total=1000, finished=70, failed=20, canceled=10), running=3, waiting=897, cores=8,
        used=3,
        nodes=[NodeOverview(name=f"n{i}", state="up", cores=list(range(cores)), used=3) for i in range(nodes)],
        executions=[ExecutionView(id="1f", execution=1, name=EVIL, node="n0", cores="n0[1:2]", started=58.0),
                    ExecutionView(id="1g", execution=1, name="soon", node="n1")],
        progress=[Progress(name="fold", array="1a", total=100, finished=50, failed=10, canceled=5, handed=5,
                           waiting=30),
                  Progress(name=None, total=5, waiting=5)],
        queue=[QueueOverview(name="d", queue="default", priority=0, shape="1 core", waiting=897, first="1h",
                             why=[f"no core is free {EVIL}"])],
        failures=[FailureGroup(reason="exit", exit_code=3, name=EVIL, node="n0", number=20, example="1b",
                               message=EVIL)],
    )  # fmt: skip


@pytest.mark.parametrize(("columns", "lines"), SIZES)
def test_screens_fit_whatever_tasks_are_called(columns: int, lines: int) -> None:
    found = overview()
    for view in VIEWS:
        shown = text(found, Choice(view=view), columns, lines)
        assert shown[0].startswith("100 of 1,000 ended") and "owned" not in "".join(shown)
        assert any(line.startswith("> ") for line in shown), view
        assert text(Overview(at=0.0, counts=Counts(total=0, finished=0, failed=0, canceled=0)), Choice(view=view))
    assert "ab www" in text(found, Choice(task="1f"), columns, lines)[3]
    progress = "\n".join(text(found, Choice(view="progress"), columns, lines))
    assert " 65%" in progress and "#!" in progress and "!x" in progress and "x." in progress and "others" in progress
    for behind, said in ((100, False), (10 << 20, True)):
        found.behind = behind
        shown = text(found, Choice(view="progress"), columns, lines)
        assert any("still being read" in line for line in shown) is said
    assert "no core is free" in "\n".join(text(found, Choice(view="queue"), columns, lines))
    assert "exit           3" in "\n".join(text(found, Choice(view="failures"), columns, lines))


def test_cores_are_told_apart_without_colour() -> None:
    shown = text(overview(), Choice())
    assert shown[3].endswith("+##.") and shown[4].endswith("+++.")
    assert any("1f" in line and "42s" in line for line in shown) and any(
        "1g" in line and "next" in line for line in shown
    )


def test_more_cores_and_nodes_than_cells() -> None:
    found = overview(2, 360)
    found.nodes[0].used = 25
    shown = text(found, Choice())
    assert shown[3].endswith("#" * 2 + "5" + "." * 33) and "a sign is 10 cores" in shown[5]
    found = overview(1000, 128)
    found.nodes[1].state, found.nodes[1].why = "drained", f"disk {EVIL}"
    found.nodes[2].used = 128
    for columns, lines in SIZES:
        shown = text(found, Choice(), columns, lines)
        assert "D" in shown[3][:100] or "a sign is" in "".join(shown)
        assert any("n1" in line and "drained disk" in line for line in shown)
    assert text(found, Choice(), 200, 60)[3].startswith("1D#1")
    found.nodes[1].state = "lost"
    assert text(found, Choice(), 200, 60)[3].startswith("1L#1")


def test_a_long_list_scrolls_to_the_chosen_row() -> None:
    found = overview()
    found.executions = [ExecutionView(id=f"t{i}", execution=1, started=float(i)) for i in range(100)]
    for row in (0, 50, 99):
        chosen = [line for line in text(found, Choice(view="running", row=row)) if line.startswith("> ")]
        assert len(chosen) == 1 and f"t{row} " in chosen[0]


def test_keys_are_split() -> None:
    assert split_keys("q\x1b[Aj\x1b[5~\x1b") == ["q", "\x1b[A", "j", "\x1b[5~", "\x1b"]
    assert split_keys("\x1b[15~c") == ["c"]


def test_keys(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "2") as cli:
        code = "echo first words; while :; do sleep 0.05; done"
        first = cli("enqueue", "--name", "alpha", "--", "sh", "-c", code).stdout.strip()
        second = cli("enqueue", "--name", "beta", "--", "sleep", "1000").stdout.strip()
        wait_until(lambda: json.loads(cli("top", "--json").stdout)["running"] == 2)
        env = environment(NO_COLOR="1")
        with terminal(command("top", "--every", "0.2"), tmp_path, env) as top:
            top.read_until(f"> {first} ")
            top.press("j")
            top.read_until(f"> {second} ")
            top.press("\x1b[A")
            top.read_until(f"> {first} ")
            top.press("\r")
            top.read_until("first words")
            top.press("\x1b")
            top.read_until("[1 nodes]")
            top.press("3")
            top.read_until("[3 progress]")
            top.press("\t")
            top.read_until("nothing waits")
            top.press("2")
            top.read_until(f"> {first} ")
            top.press("c")
            top.read_until("y/n")
            top.press("n")
            top.read_until("not canceled")
            assert json.loads(cli("show", "--json", first).stdout)[0]["status"] == "started"
            top.press("cy")
            top.read_until(f"{first}: is running, and is being ended")
            top.read_until(f"> {second} ")
            top.press("q")
            assert top.read_to_end() == 0
        assert json.loads(cli("show", "--json", first).stdout)[0]["status"] in ("canceled", "stopped")
        assert b"\x1b[32m" not in top.shown and b"\x1b[36m" not in top.shown, "NO_COLOR"
        assert top.shown.count(b"\x1b[?1049h") == top.shown.count(b"\x1b[?1049l") == 1, "the screen is as before"


def test_it_ends_with_the_pilot(tmp_path: Path) -> None:
    with in_background(tmp_path, "--nodes", "1") as cli:
        with terminal(command("top", "--every", "0.2"), tmp_path, environment()) as top:
            top.read_until("[1 nodes]")
            top.process.terminate()
            assert top.read_to_end() == 0
        assert b"\x1b[?1049l" in top.shown, "the screen of before is there again"
        with terminal(command("top", "--every", "0.2"), tmp_path, environment()) as top:
            top.read_until("[1 nodes]")
            cli("stop", "--now")
            assert top.read_to_end() == 0
        assert b"the pilot has ended" in top.shown
