"""The launcher process over its pipes: what a task inherits, what is refused, and that no process of a task is left."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pilotq.workers.process_tree import kill_marked, read_process
from pilotq.workers.protocol import Exited, GroupSwept, Quit, Refused, Started
from tests.support.launcher_driver import CPUS, Driver
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("each_launcher")
# The same launcher on a kernel that does not list the children of a process.
WITHOUT_LIST = """
import os, sys
real = os.open
def refuse(path, *arguments, **more):
    if str(path).endswith("/children"):
        raise FileNotFoundError(path)
    return real(path, *arguments, **more)
os.open = refuse
from pilotq.workers.launcher.launcher import main
main(sys.argv[1:])
"""
SHOW_CONTEXT = """
import json, os, resource, signal
mask = os.umask(0)
print(json.dumps({
    "cpus": sorted(os.sched_getaffinity(0)), "cwd": os.getcwd(), "umask": mask, "leader": os.getsid(0) == os.getpid(),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    "env": dict(os.environ), "pid": os.getpid(),
}))
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path)
    yield driver
    driver.close()


@pytest.fixture(params=["list", "no list"])
def each_driver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver = Driver(tmp_path) if request.param == "list" else Driver(tmp_path, program=("-c", WITHOUT_LIST))
    yield driver
    driver.close()


def has_ended(pid: int) -> bool:
    process = read_process(pid)
    return process is None or not process.alive


def pid_in(path: Path) -> int:
    """The process number that a task writes into a file, complete with its newline."""
    return int(wait_until(lambda: path.exists() and path.read_text().endswith("\n") and path.read_text()))


# -- what a task finds ------------------------------------------------------------------------------------------------


def test_a_task_finds_its_context_and_no_trace_of_the_launcher(driver: Driver, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    key = driver.launch(
        sys.executable, "-c", SHOW_CONTEXT, cwd=str(folder), cpus=CPUS[-1:], id="a-c", attempt=3,
        env={"ONE": "1", "TWO": "ä"},
        base=driver.base("own", umask=0o027, limits={resource.RLIMIT_NOFILE: 77}, ONE="base", THREE="3"),
    )  # fmt: skip
    exited = driver.get(Exited, key)
    found = json.loads(exited.stdout.data)
    assert found["cpus"] == CPUS[-1:]
    assert found["cwd"] == str(folder)
    assert found["umask"] == 0o027
    assert found["files"] == 77
    assert found["leader"] and found["pid"] == exited.pid
    expected = {"ONE": "1", "TWO": "ä", "THREE": "3", "PILOTQ_TASK_ID": "a-c", "PILOTQ_EXECUTION": "3",
                "PILOTQ_DIR": str(tmp_path), "PATH": os.environ["PATH"]}  # fmt: skip
    assert {name: value for name, value in found["env"].items() if name != "LC_CTYPE"} == expected


def test_the_next_task_finds_nothing_of_the_one_before(driver: Driver) -> None:
    low = driver.base("low", umask=0o777, limits={resource.RLIMIT_NOFILE: 20, resource.RLIMIT_CORE: 0})
    first = json.loads(driver.run(sys.executable, "-c", SHOW_CONTEXT, base=low, cpus=CPUS[-1:]).stdout.data)
    second = json.loads(driver.run(sys.executable, "-c", SHOW_CONTEXT, cpus=CPUS[:1]).stdout.data)
    assert (first["files"], first["core"]) == (20, 0)
    assert second["files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert second["core"] == resource.getrlimit(resource.RLIMIT_CORE)[0]
    assert second["umask"] == 0o022
    assert second["cpus"] == CPUS[:1]


def test_limits_above_the_hard_limit_are_capped(driver: Driver) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for wanted in (-1, 1 << 40):
        base = driver.base(f"high{wanted}", limits={resource.RLIMIT_NOFILE: wanted})
        assert json.loads(driver.run(sys.executable, "-c", SHOW_CONTEXT, base=base).stdout.data)["files"] == hard


def test_a_limit_of_open_files_may_be_below_what_the_launcher_has_open(driver: Driver) -> None:
    others = [driver.launch("sleep", "1000") for _ in range(20)]
    assert all(driver.get(Started, key) for key in others)
    low = driver.base("low", limits={resource.RLIMIT_NOFILE: 8})
    assert driver.run("echo", "here", base=low).stdout.data == b"here\n"


def test_only_the_three_standard_descriptors_are_open(driver: Driver) -> None:
    # The second command keeps the shell from becoming ls, whose own descriptor would be listed.
    assert driver.run("sh", "-c", "ls /proc/$$/fd; :").stdout.data.split() == [b"0", b"1", b"2"]


def test_all_signals_are_at_their_defaults_and_none_is_blocked(driver: Driver) -> None:
    status = driver.run("cat", "/proc/self/status").stdout.data.decode()
    masks = dict(line.split(":\t", 1) for line in status.splitlines())
    # glibc has two signals of its own, which nobody can send or wait for, and leaves them ignored.
    ours = sum(1 << (number - 1) for number in signal.valid_signals())
    assert [int(masks[name], 16) & ours for name in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -15 $$", -15)])
def test_the_status_says_how_it_ended(driver: Driver, command: str, code: int) -> None:
    assert os.waitstatus_to_exitcode(driver.run("sh", "-c", command).status) == code


def test_the_end_comes_with_times_and_resources(driver: Driver) -> None:
    burn = "import time\nx = bytearray(64 << 20)\nwhile time.process_time() < 0.2: pass"
    key = driver.launch(sys.executable, "-c", burn)
    started, exited = driver.get(Started, key), driver.get(Exited, key)
    assert exited.cpu >= 0.2
    assert 64 << 20 <= exited.max_rss < 1 << 30
    assert 0 < driver.run("true").max_rss < 8 << 20  # not what its launcher has needed
    assert exited.seconds >= 0.1
    assert started.at <= exited.ended <= started.at + exited.seconds + 1


def test_stdin_is_empty_or_the_named_file(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("words")
    assert driver.run("cat").stdout.data == b""
    assert driver.run("cat", stdin=str(tmp_path / "in")).stdout.data == b"words"
    assert driver.run("cat").stdout.data == b""


def test_a_fifo_that_nobody_opens_stops_no_other_task(driver: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = driver.launch("cat", stdin=str(tmp_path / "fifo"))
    others = [driver.launch("true") for _ in range(50)]
    assert all(driver.get(Exited, key).status == 0 for key in others)
    assert driver.get(Exited, reader).status == 0
    assert driver.refused("true", stdout=str(tmp_path / "fifo")).reason == "output"


# -- programs and files -----------------------------------------------------------------------------------------------


def test_programs_are_found_by_the_path_and_directory_of_the_task(driver: Driver, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "tool").write_text(f"#!/bin/sh\necho {folder.name}\n")
        (folder / "tool").chmod(0o755)
    path = {"PATH": f"{one}:{two}:/bin:/usr/bin"}
    assert driver.run("tool", env=path).stdout.data == b"one\n"
    (one / "tool").unlink()
    assert driver.run("tool", env=path).stdout.data == b"two\n"
    assert driver.run("./tool", cwd=str(two)).stdout.data == b"two\n"
    assert driver.run("tool", env={"PATH": ".:/bin"}, cwd=str(two)).stdout.data == b"two\n"
    assert driver.refused("tool", env={"PATH": ".:/bin"}, cwd=str(one)).reason == "not found"


def test_what_cannot_be_started_is_refused_and_says_why(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    refused = driver.refused("/no/such/program")
    assert (refused.reason, refused.message) == ("not found", "No such file or directory: '/no/such/program'.")
    message = driver.refused("no-such-program", env={"PATH": f"{tmp_path}" + ":/no/directory" * 99}).message
    assert message.endswith(f"not in the 100 directories of its PATH, of which '{tmp_path}' is the first.")
    refused = driver.refused(str(tmp_path / "text"))
    assert refused.reason == "not found"
    assert "Permission denied" in refused.message
    refused = driver.refused("text", env={"PATH": str(tmp_path)})
    assert refused.reason == "not found"
    assert "not executable" in refused.message
    (tmp_path / "text").chmod(0o755)
    refused = driver.refused(str(tmp_path / "text"))
    assert refused.reason == "launch"
    assert "neither a binary" in refused.message
    (tmp_path / "script").write_text("#!/no/such/shell\n")
    (tmp_path / "script").chmod(0o755)
    assert "interpreter" in driver.refused(str(tmp_path / "script")).message
    refused = driver.refused("true", cwd="/no/such/folder")
    assert refused.reason == "not found"
    assert "'/no/such/folder', its working directory" in refused.message
    refused = driver.refused("cat", stdin="/no/such/file")
    assert refused.reason == "not found"
    assert "'/no/such/file', its stdin" in refused.message


def test_no_launch_however_wrong_ends_the_launcher(driver: Driver) -> None:
    broken = driver.base("broken", limits={4711: 1})
    keys = [
        driver.launch(),
        driver.launch(""),
        driver.launch("true", b"a\0b"),
        driver.launch("true", b"x" * (1 << 22)),
        driver.launch("true", env={"A=B": "1"}),
        driver.launch("true", env={"A": "nul\0"}),
        driver.launch("true", cpus=[4000]),
        driver.launch("true", cpus=[-1]),
        driver.launch("true", cpus=[1 << 40]),
        driver.launch("true", base="never sent"),
        driver.launch("true", base=broken),
        driver.launch("true", cwd="/\0"),
        driver.launch("true", stdin="/\0"),
        driver.launch(b"/no/\xff/program"),
    ]
    for key in keys[:-1]:
        assert driver.get(Refused, key).reason == "launch", driver.get(Refused, key)
    assert driver.get(Refused, keys[-1]).reason == "not found"
    driver.signal(4711, signal.SIGKILL)
    assert driver.run("true").status == 0


def test_named_output_is_truncated_and_its_folders_are_made(driver: Driver, tmp_path: Path) -> None:
    out, err = tmp_path / "new" / "deep" / "out", tmp_path / "err"
    err.write_text("old and long")
    key = driver.launch("sh", "-c", "echo out; echo err >&2", stdout=str(out), stderr=str(err))
    exited = driver.get(Exited, key)
    assert (out.read_text(), err.read_text()) == ("out\n", "err\n")
    assert (exited.stdout.data, exited.stderr.data) == (b"", b"")


def test_one_path_for_both_streams_is_one_open_file(driver: Driver, tmp_path: Path) -> None:
    both = str(tmp_path / "both")
    driver.run("sh", "-c", "echo 1; echo 2 >&2; echo 3; echo 4 >&2", stdout=both, stderr=both)
    assert Path(both).read_text() == "1\n2\n3\n4\n"


def test_named_output_gets_the_suffix_and_the_umask_but_devices_do_not(driver: Driver, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("first")
    base = driver.base("tight", umask=0o077)
    driver.run("echo", "second", stdout=str(out), stderr="/dev/null", suffix=".2", base=base)
    assert out.read_text() == "first"
    assert (tmp_path / "out.2").read_text() == "second\n"
    assert (tmp_path / "out.2").stat().st_mode & 0o777 == 0o600
    assert not Path("/dev/null.2").exists()


def test_a_terminal_named_as_stdin_does_not_become_the_launchers(driver: Driver) -> None:
    ours, theirs = os.openpty()
    os.write(ours, b"words\n\4")
    assert driver.run("cat", stdin=os.ttyname(theirs)).stdout.data == b"words\n"
    fields = Path(f"/proc/{driver.process.pid}/stat").read_text().rpartition(")")[2].split()
    assert fields[4] == "0"
    os.close(theirs)
    os.close(ours)


def test_output_that_cannot_be_written_is_refused(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (str(tmp_path), str(tmp_path / "file" / "out"), "/proc/no/out", "/a\0b"):
        refused = driver.refused("true", stdout=path)
        assert refused.reason == "output"
        assert "cannot be written" in refused.message
    assert driver.refused("true", stderr=str(tmp_path)).reason == "output"
    assert driver.run("true").status == 0


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_signals_of_terminals_and_job_steps_do_not_end_the_launcher(driver: Driver) -> None:
    driver.run("true")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
        driver.process.send_signal(number)
    assert driver.run("true").status == 0


def test_reports_that_nobody_reads_do_not_stop_the_launcher(driver: Driver) -> None:
    keys = [driver.launch("/no/such/program/of/some/length") for _ in range(2000)]
    assert all(driver.get(Refused, key) for key in keys[-1:] + keys[:1])
    assert sum(isinstance(record, Refused) for record in driver.seen) == 2000


# -- nothing survives -------------------------------------------------------------------------------------------------


def test_a_daemon_is_counted_and_gone_before_swept(each_driver: Driver, tmp_path: Path) -> None:
    daemon = """
import os, sys
if os.fork(): os._exit(0 if os.wait()[1] == 0 else 1)
os.setsid()
if os.fork(): os._exit(0)
with open(sys.argv[1], "w") as file: print(os.getpid(), file=file)
os.execvp("sleep", ["sleep", "1000"])
"""
    key = each_driver.launch(sys.executable, "-c", daemon, str(tmp_path / "pid"))
    exited = each_driver.get(Exited, key)
    assert exited.status == 0
    assert exited.remaining == 1
    pid = pid_in(tmp_path / "pid")
    assert not has_ended(pid)
    assert each_driver.run("true").status == 0
    each_driver.signal(key, signal.SIGTERM)
    each_driver.get(GroupSwept, key)
    assert has_ended(pid)


def test_a_daemon_that_hides_its_origin_belongs_to_the_task_that_just_ended(
    each_driver: Driver, tmp_path: Path
) -> None:
    hidden = "setsid env -i sh -c 'echo $$ >pid; exec sleep 1000' & while [ ! -s pid ]; do sleep 0.01; done"
    older = each_driver.launch("sleep", "1000")
    each_driver.get(Started, older)
    key = each_driver.launch("sh", "-c", hidden)
    assert each_driver.get(Exited, key).remaining == 1
    each_driver.signal(key, signal.SIGKILL)
    each_driver.get(GroupSwept, key)
    assert has_ended(pid_in(tmp_path / "pid"))
    assert each_driver.find(Exited, older) is None


def test_what_runs_behind_another_task_is_left_alone(each_driver: Driver, tmp_path: Path) -> None:
    # The inner shell ends at once, so what it started becomes a child of the launcher while its task still runs.
    behind = "(setsid sh -c 'echo $$ >{0}; exec {1} sleep 1000' &); exec sleep 1000"
    keys = [
        each_driver.launch("sh", "-c", behind.format(name, wrap)) for name, wrap in (("one", ""), ("two", "env -i"))
    ]
    one, two = pid_in(tmp_path / "one"), pid_in(tmp_path / "two")
    wait_until(lambda: all(Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x001000\0" for pid in (one, two)))
    wait_until(lambda: {read_process(pid).parent for pid in (one, two)} == {each_driver.process.pid})
    for _ in range(3):
        assert each_driver.run("true").remaining == 0
    assert not has_ended(one)
    assert not has_ended(two)
    for key, pid in zip(keys, (one, two), strict=True):
        each_driver.signal(key, signal.SIGKILL)
        # The one that hides is assigned to its task only when the main process has ended: it is killed then.
        if each_driver.get(Exited, key).remaining:
            each_driver.get(GroupSwept, key)
        assert has_ended(pid)


# A program that becomes a daemon while its task goes on: two forks, a session and an environment of its own.
DAEMON = "(setsid env -i sh -c 'echo $$ >pid; exec sleep 1000' &); exec sleep 1000"


def daemon_after(driver: Driver, folder: Path, cpus: Sequence[int]) -> tuple[int, int]:
    """A launch on the first CPU that starts a daemon, behind one on ``cpus`` that ends then: its key, the daemon."""
    os.mkfifo(folder / "go")
    before = driver.launch("sh", "-c", "read word <go", cpus=cpus)
    driver.get(Started, before)
    key = driver.launch("sh", "-c", DAEMON, cpus=CPUS[:1])
    pid = pid_in(folder / "pid")
    wait_until(lambda: read_process(pid).parent == driver.process.pid)
    (folder / "go").write_text("now\n")
    assert driver.get(Exited, before).remaining == 0
    return key, pid


def kill(driver: Driver, key: int) -> None:
    """Kill a launch, and wait until nothing of it is left."""
    driver.signal(key, signal.SIGKILL)
    if driver.get(Exited, key).remaining:
        driver.get(GroupSwept, key)


@pytest.mark.skipif(len(CPUS) < 2, reason="it needs two CPUs")
def test_the_end_of_another_task_leaves_a_daemon_alone(each_driver: Driver, tmp_path: Path) -> None:
    """Whatever began first, and however many end: a daemon has the CPUs of its own task."""
    key, pid = daemon_after(each_driver, tmp_path, CPUS[1:2])
    for _ in range(3):
        assert each_driver.run("true", cpus=CPUS[1:2]).remaining == 0
    assert not has_ended(pid)
    kill(each_driver, key)
    assert has_ended(pid)


def test_a_daemon_that_may_be_of_several_tasks_waits_until_only_one_is_left(
    each_driver: Driver, tmp_path: Path
) -> None:
    """Two slots with the same CPUs, as on a node that has more cores than its machine."""
    key, pid = daemon_after(each_driver, tmp_path, CPUS[:1] * 2)
    assert not has_ended(pid)
    kill(each_driver, key)
    assert has_ended(pid)


def test_orphans_of_a_later_task_are_known_by_session_or_mark(each_driver: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    earlier = each_driver.launch("sh", "-c", "read word <go")
    in_session = "(env -i sh -c 'echo $$ >one; exec sleep 1000' &)"
    with_mark = "(setsid sh -c 'echo $$ >two; exec sleep 1000' &)"
    later = each_driver.launch("sh", "-c", f"{in_session}; {with_mark}; exec sleep 1000")
    one, two = pid_in(tmp_path / "one"), pid_in(tmp_path / "two")
    wait_until(lambda: {read_process(pid).parent for pid in (one, two)} == {each_driver.process.pid})
    (tmp_path / "go").write_text("now\n")
    assert each_driver.get(Exited, earlier).remaining == 0
    each_driver.signal(later, signal.SIGKILL)
    if each_driver.get(Exited, later).remaining:
        each_driver.get(GroupSwept, later)
    assert has_ended(one)
    assert has_ended(two)


def test_without_a_subreaper_the_group_is_still_swept(tmp_path: Path) -> None:
    start = """
import sys
from pilotq.workers.launcher import launcher
launcher.become_subreaper = int
launcher.main(sys.argv[1:])
"""
    driver = Driver(tmp_path, program=("-c", start))
    key = driver.launch("sh", "-c", "sleep 1000 & sleep 1000 & exit 0")
    assert driver.get(Exited, key).remaining == 2
    driver.signal(key, signal.SIGTERM)
    driver.get(GroupSwept, key)
    driver.close()


def test_background_processes_of_the_same_group_are_swept(each_driver: Driver) -> None:
    key = each_driver.launch("sh", "-c", "sleep 1000 & sleep 1000 & exit 3")
    exited = each_driver.get(Exited, key)
    assert os.waitstatus_to_exitcode(exited.status) == 3
    assert exited.remaining == 2
    each_driver.signal(key, signal.SIGTERM)
    assert each_driver.get(GroupSwept, key).ended >= exited.ended


def test_leftovers_that_end_by_themselves_are_swept_without_a_signal(each_driver: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    key = each_driver.launch("sh", "-c", "setsid sh -c 'read word <go; echo late' & exit 0")
    assert each_driver.get(Exited, key).remaining >= 1
    (tmp_path / "go").write_text("now\n")
    assert each_driver.get(GroupSwept, key).stdout.data == b"late\n"


def test_what_keeps_forking_into_new_sessions_is_killed(each_driver: Driver, tmp_path: Path) -> None:
    forking = "while :; do setsid sh -c 'echo $$ >>pids; exec sleep 1000' & sleep 0.005; done"
    key = each_driver.launch("sh", "-c", f'setsid sh -c "{forking}" & while [ ! -s pids ]; do sleep 0.01; done')
    assert each_driver.get(Exited, key).remaining >= 2
    each_driver.signal(key, signal.SIGKILL)
    each_driver.get(GroupSwept, key)
    assert all(has_ended(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_task_that_ignores_sigterm_ends_by_sigkill(driver: Driver) -> None:
    key = driver.launch("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1000; done")
    path = Path(os.fsdecode(driver.get(Started, key).stdout_path))
    wait_until(lambda: path.read_text() == "ready\n")
    driver.signal(key, signal.SIGTERM)
    assert driver.run("true").status == 0
    assert driver.find(Exited, key) is None
    driver.signal(key, signal.SIGKILL)
    exited = driver.get(Exited, key)
    assert os.waitstatus_to_exitcode(exited.status) == -signal.SIGKILL
    if exited.remaining:
        exited = driver.get(GroupSwept, key)
    assert exited.stdout.data == b"ready\n"


@pytest.mark.parametrize("how", ["end of the pipe", "quit"])
def test_the_end_of_the_launcher_is_the_end_of_everything(tmp_path: Path, how: str) -> None:
    driver = Driver(tmp_path)
    driver.launch(
        "sh", "-c", "trap '' TERM; echo $$ >main; setsid env -i sh -c 'echo $$ >stray; exec sleep 1000' & wait"
    )
    pids = [pid_in(tmp_path / "main"), pid_in(tmp_path / "stray")]
    if how == "quit":
        driver.send(Quit())
        driver.process.wait(20)
    driver.close()
    assert all(has_ended(pid) for pid in pids)
    assert list(driver.output.iterdir()) == []


def test_after_kill_9_of_the_launcher_its_tasks_are_found_by_their_marks(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    driver.launch("sh", "-c", "echo $$ >one; setsid sh -c 'echo $$ >two; exec sleep 1000' & wait", id="abc")
    driver.launch("sh", "-c", "echo $$ >other; exec sleep 1000", id="abd")
    one, two, other = (pid_in(tmp_path / name) for name in ("one", "two", "other"))
    driver.process.kill()
    driver.process.wait()
    assert kill_marked({"PILOTQ_DIR": str(tmp_path), "PILOTQ_TASK_ID": "abc"}) == []
    assert has_ended(one)
    assert has_ended(two)
    assert not has_ended(other)
    assert kill_marked(lambda env: env.get("PILOTQ_DIR") == str(tmp_path), signal.SIGSTOP, 0.0) == [other]
    assert kill_marked({"PILOTQ_DIR": str(tmp_path)}) == []
    assert has_ended(other)
    for end in (driver.down, driver.up, driver.wake):
        os.close(end)
