"""docker-compose.yml for real: its containers are built and started, lose a worker, are stopped, and go on.

The tests run in order, on one set of containers. PILOTQ_TEST_COMPOSE=1 asks for them (`make compose-test`).
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mpi.programs import ranks
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

ASKED = "PILOTQ_TEST_COMPOSE"
USER = 12345  # nobody's in the images: whoever runs the containers needs no name there
BUILD_S, UP_S, CALL_S, SWEEP_S = 900, 300, 120, 600
# A worker that was killed is given up after 10 + 2 + 5 s, and not after 120 + 10 + 5 s.
SETTINGS = {"node_timeout_s": 10, "kill_grace_s": 2}
IMAGE = "pilotq-test"
OWN_MB = 40  # what the image may add to the one that it begins from
pytestmark = pytest.mark.timeout(1800)


def docker(*args: str, seconds: int = CALL_S) -> str:
    done = subprocess.run(
        ["docker", *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"docker {' '.join(args)}: {done.stderr}"
    return done.stdout


class Stack:
    """The containers of docker-compose.yml under a project name of their own."""

    def __init__(self, folder: Path) -> None:
        self.name = f"pilotq-test-{os.getpid()}"
        self.project = folder / "project"
        self.password = "for the dashboard"
        secrets = folder / "secrets"
        secrets.mkdir()
        (secrets / "password").write_text("of the server\n")
        (secrets / "dashboard-password").write_text(self.password)
        shutil.copytree(ROOT / "examples" / "sweep", self.project, ignore=shutil.ignore_patterns("results", ".pilotq"))
        for path in [secrets, self.project, *secrets.iterdir(), *self.project.rglob("*")]:
            os.chown(path, USER, USER)
            path.chmod(0o700 if path.is_dir() else 0o600)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.environment = {
            **os.environ, "PILOTQ_UID": str(USER), "PILOTQ_GID": str(USER), "PILOTQ_PROJECT": str(self.project),
            "PILOTQ_SECRETS": str(secrets), "PILOTQ_DASHBOARD_PORT": str(self.port), "PILOTQ_IMAGE": IMAGE,
            "PILOTQ_EXTRAS": "report", "PILOTQ_BUILD_NETWORK": "host",
            "PILOTQ_SETTINGS": json.dumps(SETTINGS), "COMPOSE_HTTP_TIMEOUT": str(UP_S),
        }  # fmt: skip
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
        self.program = ["docker", "compose"] if plugin else ["docker-compose"]

    def compose(self, *args: str, seconds: int = CALL_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.program, "--project-name", self.name, *args], cwd=ROOT, env=self.environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip

    def done(self, *args: str, seconds: int = CALL_S) -> str:
        result = self.compose(*args, seconds=seconds)
        assert result.returncode == 0, f"{args}: {result.stdout}{result.stderr}{self.compose('logs').stdout}"
        return result.stdout

    def cli(self, *args: str, seconds: int = CALL_S) -> str:
        return self.done("run", "--rm", "-T", "cli", *args, seconds=seconds)

    def containers(self, service: str) -> list[str]:
        return self.done("ps", "--quiet", service).split()

    def nodes(self) -> list[str]:
        return sorted(node["name"] for node in json.loads(self.cli("nodes", "--json")) if node["state"] == "up")

    def journal(self) -> list[dict[str, Any]]:
        text = self.done("run", "--rm", "-T", "--entrypoint", "cat", "cli", "/pilot/run/journal.jsonl")
        return [line for line in map(json.loads, text.splitlines()) if "id" in line]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if os.environ.get(ASKED) != "1":
        pytest.skip(f"{ASKED}=1 is not set: these tests start containers, as root")
    folder = tmp_path_factory.mktemp("compose")
    subprocess.run([Path(__file__).parent / "base-images", str(folder)], check=True, timeout=BUILD_S)
    found = Stack(folder)
    found.done("build", seconds=BUILD_S)
    try:
        found.done("up", "--detach", seconds=UP_S)
        yield found
    finally:
        subprocess.run(
            [*found.program, "--project-name", found.name, "down", "--volumes", "--remove-orphans"], cwd=ROOT,
            env=found.environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=UP_S, check=False,
        )  # fmt: skip


def test_the_image_is_small_and_runs_as_nobody_special(stack: Stack) -> None:
    docker("build", "--network", "host", "--tag", f"{IMAGE}:plain", str(ROOT), seconds=BUILD_S)
    names = (f"{IMAGE}:plain", "python:3.13-slim")
    own, base = (int(docker("image", "inspect", "--format", "{{.Size}}", name)) for name in names)
    print(f"image: {own / 1e6:.1f} MB, {base / 1e6:.1f} MB of them python:3.13-slim (a stand-in where none was pulled)")
    assert own - base < OWN_MB * 1e6
    assert docker("run", "--rm", "--entrypoint", "id", f"{IMAGE}:plain", "-u").strip() == "1000"
    assert "Show the pilot in a browser" in docker("run", "--rm", f"{IMAGE}:plain", "--help")


def test_it_comes_up_with_two_workers_of_four_cores_and_grows(stack: Stack) -> None:
    first = wait_until(lambda: names if len(names := stack.nodes()) == 2 else None, seconds=UP_S)
    assert {node["cores"] for node in json.loads(stack.cli("nodes", "--json"))} == {4}
    assert first == sorted(one[:12] for one in stack.containers("worker"))
    stack.done("up", "--detach", "--scale", "worker=3", seconds=UP_S)
    wait_until(lambda: len(stack.nodes()) == 3, seconds=UP_S)
    stack.done("up", "--detach", "--scale", "worker=2", seconds=UP_S)
    wait_until(lambda: len(stack.nodes()) == 2, seconds=UP_S)


def test_secrets_are_in_no_command_line_and_no_environment(stack: Stack) -> None:
    for service in ("server", "dispatcher", "worker", "dashboard"):
        for container in stack.containers(service):
            described = docker("inspect", container)
            assert "of the server" not in described and stack.password not in described
            assert set(re.findall(r'"HostIp": "(.*?)"', described)) <= {"127.0.0.1"}


def test_the_sweep_is_complete_though_a_worker_is_killed(stack: Stack) -> None:
    one, two, gather = stack.cli("submit", "sweep.toml").split()
    results = stack.project / "results"
    wait_until(lambda: results.is_dir() and len(list(results.glob("fit-*.csv"))) >= 200, seconds=SWEEP_S)
    victim, survivor = stack.containers("worker")
    docker("kill", victim)
    assert len(list(results.glob("fit-*.csv"))) < 900, "it was to be killed in the middle"
    stack.cli("wait", "--timeout", f"{SWEEP_S}s", seconds=SWEEP_S + CALL_S)
    # Complete: each number once, the same as without a pilot, and the plot of all of them.
    assert {path.name for path in results.glob("fit-*")} == {f"fit-{number}.csv" for number in range(1000)}
    check = subprocess.run(
        ["python3", "-B", str(ROOT / "examples/sweep/fit.py"), "990", "20"], cwd=stack.project.parent, check=True
    )
    assert check.returncode == 0
    assert (stack.project.parent / "results/fit-990.csv").read_bytes() == (results / "fit-990.csv").read_bytes()
    assert json.loads((results / "summary.json").read_text())["resamples"] == 12_000
    assert (results / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "12,000 resamples" in (results / "gather.txt").read_text()
    # What was lost with the worker ran again, elsewhere, and each task ended once.
    lines = stack.journal()
    lost = {line["id"] for line in lines if line.get("reason") == "worker lost"}
    assert lost, "nothing ran on the worker that was killed"
    ends = [line for line in lines if line.get("final", True) and line["id"] not in (one, two)]
    assert len(ends) == len({line["id"] for line in ends}) == 1001
    assert {line["status"] for line in ends} == {"finished"}
    assert {line["node"] for line in ends if line["id"] in lost} == {survivor[:12]}
    assert json.loads(stack.cli("status", "--json"))["tasks"]["finished"] == 1001
    assert json.loads(stack.cli("show", gather, "--json"))[0]["status"] == "finished"


def test_a_killed_worker_comes_back(stack: Stack) -> None:
    stack.done("up", "--detach", seconds=UP_S)
    wait_until(lambda: len(stack.nodes()) == 2, seconds=UP_S)
    task = stack.cli("enqueue", "--nodes", "2", "--", "sh", "-c", "echo $PILOTQ_NODELIST").strip()
    stack.cli("wait", task, "--timeout", "60s")
    assert sorted(stack.cli("logs", task).strip().split(",")) == stack.nodes()


def test_a_worker_that_dies_in_its_container_is_started_again(stack: Stack) -> None:
    task = stack.cli("enqueue", "--", "sh", "-c", "test -e died || { hostname > begun; exec sleep 4321; }").strip()
    begun = stack.project / "begun"
    wait_until(lambda: begun.exists() and begun.read_text().strip(), seconds=CALL_S)
    (stack.project / "died").touch()
    os.kill(int(docker("inspect", "--format", "{{.State.Pid}}", begun.read_text().strip())), signal.SIGKILL)
    begun.unlink()
    stack.cli("wait", task, "--timeout", "120s", seconds=2 * CALL_S)
    assert [line["execution"] for line in stack.journal() if line["id"] == task] == [1, 2]
    wait_until(lambda: len(stack.nodes()) == 2, seconds=UP_S)


def test_mpi_programs_run_over_containers_without_ssh(stack: Stack) -> None:
    """Of an image of the user's own, as docs/compose.md shows: launcher and ranks find each other on the network."""
    recipe = """
        FROM {image}
        USER 0
        RUN apt-get update -qq
        RUN apt-get install -qq --no-install-recommends mpich libmpich-dev gcc libc6-dev >/dev/null
        COPY hello.c /tmp/
        RUN mpicc -O2 -o /usr/local/bin/hello /tmp/hello.c
        USER 1000:1000
    """
    (stack.project / "Dockerfile").write_text(recipe.format(image=IMAGE))
    file = str(stack.project / "Dockerfile")
    docker(
        "build", "--network", "host", "--tag", f"{IMAGE}:mpi", "--file", file, str(ROOT / "tests/mpi"), seconds=BUILD_S
    )
    stack.environment["PILOTQ_IMAGE"] = f"{IMAGE}:mpi"
    stack.done("up", "--detach", "--no-build", seconds=UP_S)
    nodes = wait_until(lambda: names if len(names := stack.nodes()) == 2 else None, seconds=UP_S)
    task = stack.cli("enqueue", "--nodes", "2", "--cores", "2", "--model", "mpich", "--", "hello").strip()
    stack.cli("wait", task, "--timeout", "60s")
    found = ranks(stack.cli("logs", task))
    assert [(r.rank, r.size) for r in found] == [(0, 4), (1, 4), (2, 4), (3, 4)], stack.cli("show", task)
    assert [r.host for r in found] == [r.node for r in found]
    assert sorted({r.host for r in found}) == nodes


def test_the_dashboard_is_for_those_with_the_password(stack: Stack) -> None:
    def ask(path: str, password: str) -> tuple[int, str]:
        login = base64.b64encode(f"pilotq:{password}".encode()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{stack.port}/{path}", headers={"Authorization": f"Basic {login}"}
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""

    assert ask("", "of the server")[0] == 401
    status, text = ask("rq/0/data/workers.json", stack.password)
    assert status == 200
    assert [worker["name"] for worker in json.loads(text)["workers"]] == stack.nodes()


def test_a_stop_is_clean_and_the_next_start_goes_on(stack: Stack) -> None:
    task = stack.cli("enqueue", "--", "sh", "-c", "test -e again || { : > begun; exec sleep 4321; }").strip()
    wait_until((stack.project / "begun").exists, seconds=CALL_S)
    parts = [one for service in ("server", "dispatcher", "worker", "dashboard") for one in stack.containers(service)]
    assert len(parts) == 5
    stack.done("stop", seconds=UP_S)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", *parts).split() == ["0"] * 5
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"sleep\x004321" in _content(path)], (
        "a task outlived its container"
    )
    (stack.project / "again").touch()
    stack.done("up", "--detach", seconds=UP_S)
    stack.cli("wait", task, "--timeout", "120s", seconds=2 * CALL_S)
    # The worker that is stopped last may have begun what the other gave back: one execution each, charged to nothing.
    *given_back, last = [line for line in stack.journal() if line["id"] == task]
    assert {line["reason"] for line in given_back} == {"pilot ended"}
    assert len(given_back) == len({line["node"] for line in given_back}) <= 2
    assert (last["execution"], last["status"]) == (len(given_back) + 1, "finished")


def test_down_leaves_nothing(stack: Stack) -> None:
    stack.done("down", "--volumes", seconds=UP_S)
    mine = f"label=com.docker.compose.project={stack.name}"
    assert docker("ps", "--all", "--quiet", "--filter", mine) == ""
    assert docker("volume", "ls", "--quiet", "--filter", mine) == ""
    assert docker("network", "ls", "--quiet", "--filter", mine) == ""


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has ended
