"""Draws docs/pictures: the dashboard's page of a pilot with work of all kinds, in headless Chromium.

    python -m docs.screenshots      or      make screenshots

It needs the extra `dashboard`, and Chromium. Look at what it has drawn before it is committed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.pretended.pilot import pretended_pilot
from pilotq.broker import ArrayRange, Broker, Request, Task
from tests.support.browser import Browser, browser, find
from tests.support.command_line import in_background
from tests.support.dashboard import served
from tests.support.waiting import wait_until

PICTURES = Path(__file__).parent / "pictures"
BYTES_MAX = 150_000
WAIT_S = 120.0
TALKS = (
    "echo 'read mesh.dat: 48,211 cells'; for i in 1 2 3 4 5 6; do echo step $i, residual 0.00$((9-i)); done; sleep 600"
)
FAILS = "echo 'Traceback (most recent call last):' >&2; echo \"FileNotFoundError: 'input/mesh-17.dat'\" >&2; exit 3"


def submit(broker: Broker) -> dict[str, str]:
    """Work that runs, waits, has ended and has failed; returns the ids of two tasks by what they are for."""

    def shell(text: str, name: str, cores: int = 1, **fields: object) -> Task:
        return Task(command=["sh", "-c", text], name=name, request=Request(cores=(cores, cores)), **fields)  # type: ignore[arg-type]

    broker.enqueue(Task(command=["true"], name="prepare", array=ArrayRange(0, 799)))
    failed = broker.enqueue_many([
        *(shell(FAILS, f"mesh-{n}") for n in range(12)), *(shell("kill -SEGV $$", f"solve-{n}") for n in range(3)),
    ])  # fmt: skip
    broker.wait(timeout=WAIT_S)
    talks = broker.enqueue_many([shell(TALKS, f"solve-{n}", 4, priority=5) for n in range(8, 14)])
    broker.enqueue_many([shell("sleep 600", f"mesh-{n}", priority=4) for n in range(20, 27)])
    broker.enqueue_many(
        [
            Task(command=["sleep", "600"], name=f"train-{n}", priority=6, request=Request(cores=(2, 2), gpus=1))
            for n in range(3)
        ]
    )
    wait_until(lambda: broker.overview().running >= 14, seconds=WAIT_S, what="the tasks run")
    broker.close_nodes(["n4"], "drained", "its disk is slow")
    broker.enqueue(Task(command=["sh", "-c", "sleep 0.5"], name="sweep", array=ArrayRange(0, 24_999)))
    large = broker.enqueue(shell("true", "assemble", 16, priority=9))
    broker.enqueue(shell("true", "plot", after=[large]))
    return {"talks": talks[0], "failed": failed[0], "large": large}


def ready(found: Browser, url: str, place: str, selector: str, text: str) -> None:
    found.open("about:blank")
    found.open(f"{url}#/{place}")
    found.await_text(selector, text, WAIT_S)


def draw(found: Browser, name: str) -> None:
    path = PICTURES / f"{name}.png"
    found.screenshot(path)
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes")
    if size > BYTES_MAX:
        raise SystemExit(f"{path} has more than {BYTES_MAX:,} bytes")


def of_a_small_pilot(folder: Path) -> None:
    home = folder / ".pilotq" / "current"
    with (
        in_background(folder, "--nodes", "n1:16,n2:16,n3:12,n4:8", "--gpus", "4"),
        Broker.connect(str(home)) as broker,
        served(folder, home.resolve()) as shown,
        browser(folder, "pilotq", shown.password) as found,
    ):
        ids = submit(broker)
        for name, width, height, scheme in (
            ("overview", 1180, 1180, "light"), ("overview-dark", 1180, 1180, "dark"),
            ("overview-phone", 380, 820, "light"),
        ):  # fmt: skip
            found.look(width, height, scheme)
            ready(found, shown.url, "", "#queue tbody tr", "16 cores free")
            found.await_value("Number(document.getElementById('finished').textContent.replace(',', '')) > 810", WAIT_S)
            draw(found, name)
        found.look(1180, 760)
        ready(found, shown.url, f"task/{ids['talks']}", "#output", "step 6")
        draw(found, "task")
        ready(found, shown.url, "", "#failure-list h3", "exit code 3")
        found.value("document.querySelector('#failure-list .failure button').click()")
        found.await_text("#failure-list pre", "FileNotFoundError")
        found.value("document.getElementById('queue').scrollIntoView()")
        draw(found, "failures")


def of_a_large_pilot(folder: Path) -> None:
    with pretended_pilot(100, 48) as pilot:
        pilot.broker.enqueue(Task(command=["sleep", "600"], name="sweep", array=ArrayRange(0, 104_799)))
        wait_until(lambda: pilot.broker.running() > 4000, seconds=WAIT_S, what="the elements run")
        pilot.broker.close_nodes([node.name for node in pilot.broker.nodes()[7:10]], "drained", "a switch is replaced")
        home = Path(pilot.directory)
        with served(folder, home) as shown, browser(folder, "pilotq", shown.password) as found:
            found.look(1180, 760)
            ready(found, shown.url, "", "#closed", "a switch is replaced")
            draw(found, "large")


def main() -> None:
    if find() is None:
        raise SystemExit("Chromium is not installed: it draws the pictures")
    PICTURES.mkdir(exist_ok=True)
    for draws in (of_a_small_pilot, of_a_large_pilot):
        with tempfile.TemporaryDirectory(prefix="screenshots-") as folder:
            draws(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
