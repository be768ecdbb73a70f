"""`pilotq dashboard`: its password, what it prints, and how it ends."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from rq import Queue

from pilotq.broker import Broker, Task
from pilotq.broker.pilot.directory import Pilot
from tests.support.command_line import Cli, environment, in_background
from tests.support.dashboard import needs_dashboard, served
from tests.support.waiting import wait_until


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with in_background(tmp_path, "--nodes", "n1:1") as found:
        yield found


def home(folder: Path) -> Path:
    return (folder / ".pilotq" / "current").resolve()


@needs_dashboard
def test_it_lets_in_whoever_knows_the_password_and_nobody_else(cli: Cli, tmp_path: Path) -> None:
    directory = home(tmp_path)
    kept = directory / "dashboard-password"
    with served(tmp_path, directory) as page:
        assert page.url.startswith("http://127.0.0.1:")
        port = page.url.rpartition(":")[2].strip("/")
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in page.stderr
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert page.password not in page.stderr and len(page.password) >= 20
        assert str(kept) in page.stderr, "stderr is no terminal here"
        assert [page.ask(password=word)[0] for word in ("", "wrong", page.password)] == [401, 401, 200]
        assert page.ask("rq/0/data/workers.json", password="")[0] == 401
        assert [worker["name"] for worker in page.data("workers")["workers"]] == ["n1"]
        # No secret where others can read it: not in the command line, not on the pages, not in the environment.
        secret = Pilot(str(directory)).connection().address.password
        process = Path(f"/proc/{page.process.pid}")
        for place in (process / "cmdline", process / "environ"):
            assert secret.encode() not in place.read_bytes() and page.password.encode() not in place.read_bytes()
        assert secret not in page.ask()[1]
    with served(tmp_path, directory) as again:
        assert again.password == page.password
        assert page.password not in again.stderr and str(kept) in again.stderr


@needs_dashboard
def test_another_site_cannot_press_its_buttons(cli: Cli, tmp_path: Path) -> None:
    task = cli("enqueue", "--", "false").stdout.strip()
    assert cli("wait", task, "--timeout", "60s").returncode == 1
    with served(tmp_path, home(tmp_path)) as page:
        host = page.url.removeprefix("http://").strip("/")
        port = host.rpartition(":")[2]
        foreign: list[dict[str, str]] = [
            {}, {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"},  # an old browser, http beyond loopback
            *({"Origin": origin} for origin in (
                "null", "http://evil.example", f"http://evil.example:{port}", "http://127.0.0.1", "http://127.0.0.1:1",
                f"http://{host}.evil.example", f"http://{host}@evil.example", f"http://localhost:{port}",
                f"http://{host}, http://evil.example", f"http://{host}/", host, f"file://{host}", "http://", "", "://",
            )),
        ]  # fmt: skip
        buttons = [
            (f"rq/job/{task}/delete", "POST"), (f"rq/job/{task}/requeue", "POST"), ("rq/requeue/default", "POST"),
            ("rq/requeue/default", "GET"), ("rq/requeue/default", "HEAD"), ("rq/queue/default/failed/empty", "POST"),
            ("rq/queue/default/compact", "POST"), ("no/such/page", "POST"),
            *((f"api/{name}", "POST") for name in ("cancel", "retry", "drain", "resume", "pause", "stop")),
        ]  # fmt: skip
        answers = {
            (path, method, str(headers)): page.ask(path, method=method, **headers)[0]
            for path, method in buttons for headers in foreign
        }  # fmt: skip
        assert answers == dict.fromkeys(answers, 403)
        assert page.ask("rq/requeue/default", Origin=page.url.strip("/"), Host="other:1")[0] == 403
        # Looking is not refused. It is redirected first, which urllib follows only from Python 3.11 on.
        assert page.ask("rq/0/view/queues", Origin="http://evil.example")[0] in (200, 308)
        assert [job["id"] for job in page.data("jobs/default/failed/8/asc/1")["jobs"]] == [task]
        assert page.ask(f"rq/job/{task}/delete", method="POST", Origin=f"HTTP://{host}")[0] == 200
        assert page.data("jobs/default/failed/8/asc/1")["jobs"] == []
        # A tunnel or a proxy has another name, and perhaps another scheme.
        tunnel = {"Host": "login.example", "Origin": "https://login.example"}
        assert page.ask("rq/requeue/default", method="POST", **tunnel)[0] == 200
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(page.request()) as answer:
            assert answer.headers["X-Frame-Options"] == "DENY"
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self';")


@needs_dashboard
@pytest.mark.parametrize("order", ["asc", "dsc"])
def test_a_page_far_down_shows_and_fetches_that_page_alone(cli: Cli, tmp_path: Path, order: str) -> None:
    with Broker.connect(str(home(tmp_path))) as broker, served(tmp_path, home(tmp_path)) as page:
        held = broker.enqueue(Task(command=["sleep", "1000"]))
        wait_until(lambda: broker.task(held).status == "started", seconds=60)
        ended = broker.enqueue_many([Task(command=["true"], priority=1) for _ in range(50)])
        broker.cancel(ended)
        waiting = broker.enqueue_many([Task(command=["true"]) for _ in range(50)])
        for name, some in (("default.p0.1c/queued", waiting), ("default/canceled", ended)):
            listed, *pages = (
                [job["id"] for job in page.data(f"jobs/{name}/{per_page}/{order}/{number}")["jobs"]]
                for per_page, number in ((200, 1), *((8, n) for n in range(1, 15)))
            )
            assert sorted(listed) == sorted(some)
            assert name.endswith("canceled") or listed == (some if order == "asc" else some[::-1])
            assert pages == [listed[first : first + 8] for first in range(0, 14 * 8, 8)]


@needs_dashboard
def test_the_page_of_a_job_that_waits_for_others(cli: Cli, tmp_path: Path) -> None:
    with Broker.connect(str(home(tmp_path))) as broker, served(tmp_path, home(tmp_path)) as page:
        held = broker.enqueue(Task(command=["sleep", "1000"]))
        wait_until(lambda: broker.task(held).status == "started", seconds=60)
        queue = Queue("default", connection=broker.redis)
        first = queue.enqueue("time.sleep", 0)
        second = queue.enqueue("time.sleep", 0, depends_on=first)
        assert page.data(f"job/{second.id}")["depends_on"] == [first.id]
        broker.cancel([held])


@needs_dashboard
def test_a_password_of_ones_own(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("open sesame\n")
    with served(tmp_path, home(tmp_path), "--password-file", "word") as page:
        assert page.ask(password="open sesame")[0] == 200
        assert "sesame" not in page.stderr
        assert not (home(tmp_path) / "dashboard-password").exists()
    (tmp_path / "empty").write_text("\n")
    refused = cli("dashboard", "--password-file", "empty")
    assert refused.returncode == 2 and "empty is empty" in refused.stderr
    for content in (b"caf\xe9\n", b"one\ntwo\n", b"a\x00b"):
        (tmp_path / "odd").write_bytes(content)
        refused = cli("dashboard", "--password-file", "odd")
        assert refused.returncode == 2 and "odd: the password is to be one line of printable" in refused.stderr


@needs_dashboard
def test_it_ends_with_its_pilot(cli: Cli, tmp_path: Path) -> None:
    with served(tmp_path, home(tmp_path)) as page:
        assert cli("stop", "--now").returncode == 0
        wait_until(lambda: page.process.poll() is not None, seconds=60)
    assert "the pilot has ended" in (tmp_path / "dashboard.err").read_text()


@needs_dashboard
def test_a_port_that_is_taken(cli: Cli, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = cli("dashboard", "--port", str(port))
    assert refused.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@needs_dashboard
def test_without_rqs_pages_there_are_still_ours(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['rq_dashboard'] = None\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        with served(tmp_path, home(tmp_path)) as page:
            assert page.ask()[0] == 200
            assert page.ask("rq/") == (
                404, "RQ's pages need rq_dashboard, not installed here: `pip install 'pilotq[dashboard]'`\n"
            )  # fmt: skip


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['flask'] = None\nfrom pilotq.cli.main import main; main(['dashboard'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "needs flask" in done.stderr and "pip install 'pilotq[dashboard]'" in done.stderr


@needs_dashboard
def test_rqs_pages_run_nothing_that_a_job_says(cli: Cli, tmp_path: Path) -> None:
    task = cli("enqueue", "--", "true", "<script>").stdout.strip()
    with served(tmp_path, home(tmp_path)) as page:
        for path in (f"job/{task}", "workers", "queues", "jobs/default/queued/8/asc/1"):
            status, text = page.ask(f"rq/0/view/{path}")
            assert status == 200 and "<%- " in text
            shown = [part.partition("%>")[0] for part in text.split("<%=")[1:]]
            assert all(".text(" in part and part.strip().endswith(".html()") for part in shown), shown


@needs_dashboard
def test_a_connection_that_asks_nothing_ends(cli: Cli, tmp_path: Path) -> None:
    with served(tmp_path, home(tmp_path)) as page:
        port = int(page.url.rpartition(":")[2].strip("/"))
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.settimeout(40)
            assert silent.recv(1) == b"", "the dashboard closes it"
        headers = {"Origin": page.url.strip("/"), "Content-Type": "application/json"}
        request = page.request("api/cancel", method="POST", **headers)
        request.data = b"[" + b" " * (1 << 20) + b"]"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)
        refused.value.close()
        assert refused.value.code == 413
