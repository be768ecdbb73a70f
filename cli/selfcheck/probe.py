"""The program of every task of the selfcheck: writes down the state of its own process.

It needs no installed package, and imports little: most of its time is the start of Python.

    python -I -S probe.py LEDGER SECONDS END BYTES [STATUS]

LEDGER gets a line when the task begins and one when it ends. In between it waits for SECONDS and writes BYTES bytes
to each of stdout and stderr. END is an exit code, -N (signal N kills it), "retry" (exit code 7 the first time, then
0) or "hang". STATUS is the /proc/self/status of a shell before it became this: Python ignores two signals by itself,
so that only a program before it can see whether they were ignored already.
"""

import os
import resource
import sys
import time

LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
RETRIED = 7
LONG_S = 60.0


def output(name: str, execution: int, stream: str, size: int) -> bytes:
    """What an execution writes: no two the same, and none of it UTF-8 from end to end."""
    piece = f"{name}.{execution} {stream}\xff ".encode("latin-1")
    return (piece * (size // len(piece) + 1))[:size]


def descriptors() -> dict[int, str]:
    """Number -> what it leads to, of all that is open but the listing itself."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the descriptor of the listing
    return found


def signal_masks(status: str) -> tuple[int, int]:
    """(blocked, ignored) as bits, signal 1 is the lowest."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields["SigBlk"], 16), int(fields["SigIgn"], 16)


def read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def observe(before: str) -> dict[str, object]:
    """The state of this process. Descriptors come first: the rest opens files."""
    opened = descriptors()
    umask = os.umask(0)
    os.umask(umask)
    return {
        "descriptors": opened,
        "mask": sorted(os.sched_getaffinity(0)),
        "cwd": os.getcwd(),
        "umask": umask,
        "limits": {number: resource.getrlimit(number) for number in LIMITS},
        "signals": signal_masks(before or read("/proc/self/status")),
        "by_shell": bool(before),
        "leads": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "stdin": read("/proc/self/fd/0") if opened.get(0, "/dev/null") != "/dev/null" else "",
        "env": dict(os.environ),
        "clock": read("/proc/sys/kernel/random/boot_id").strip(),
    }


def write(ledger: str, line: dict[str, object]) -> None:
    """One write, at the end of the file: lines of two executions cannot mix."""
    file = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(file, ascii(line).encode() + b"\n")
    os.close(file)


def end(how: str, first: bool) -> int:
    """The exit code, unless ``how`` says that there is to be none."""
    if how == "retry":
        return RETRIED if first else 0
    code = int(how)
    if code < 0:
        os.kill(os.getpid(), -code)
        time.sleep(LONG_S)  # until it arrives
    return code


def main(argv: list[str]) -> int:
    begun, at = time.monotonic(), time.time()
    ledger, seconds, how, size = argv[:4]
    first = not os.path.exists(ledger)
    found = observe("".join(argv[4:]))
    execution = int(os.environ["PILOTQ_EXECUTION"])
    same: dict[str, object] = {"execution": execution, "pid": os.getpid()}
    write(ledger, {**same, "begun": begun, "at": at, **found})
    for number, stream in ((1, "stdout"), (2, "stderr")):
        data = memoryview(output(os.path.basename(ledger), execution, stream, int(size)))
        while data:
            data = data[os.write(number, data) :]
    while how == "hang":
        time.sleep(LONG_S)
    time.sleep(float(seconds))
    write(ledger, {**same, "ended": time.monotonic(), "at": time.time()})
    return end(how, first)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
