"""The task of the fault tests: writes a ledger of its events, and takes locks that detect a core used twice.

    python -I -S fault_probe.py FOLDER SECONDS [EXIT_CODE]

Each write is one line at the end of FOLDER/ledger: id, execution, event, monotonic seconds, and more. Events: begin;
end (with the exit code); core (one of its cores has another owner); again (another execution of it runs). The kernel
takes a lock back when its owner dies, however that happens: so "twice" is exact, also for executions that never write
"end".
EXIT_CODE is that of execution 1; later ones end with 0. As a function, `main` does the same.
"""

import fcntl
import os
import sys
import time


def main(folder: str, seconds: str, code: str = "0") -> int:
    me, execution = os.environ["PILOTQ_TASK_ID"], os.environ["PILOTQ_EXECUTION"]
    ledger = os.open(os.path.join(folder, "ledger"), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(*fields: object) -> None:
        text = " ".join(map(str, (me, execution, fields[0], f"{time.monotonic():.4f}", *fields[1:])))
        os.write(ledger, f"{text}\n".encode())

    node = os.environ["PILOTQ_NODELIST"].split(",")[0]
    write("begin", os.getpid(), node, os.environ["PILOTQ_CPUS"])
    locks = [("core", f"{node}.{core}") for core in os.environ["PILOTQ_CPUS"].split(",")] + [("again", me)]
    opened = [ledger]
    try:
        for event, name in locks:
            file = os.open(os.path.join(folder, "locks", name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            opened.append(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                write(event, name, os.pread(file, 100, 0).decode().strip())
            else:
                os.pwrite(file, f"{me}.{execution} ".encode().ljust(60), 0)
        time.sleep(float(seconds))  # noqa: TID251 - this is how long the task takes
        status = int(code) if execution == "1" else 0
        write("end", status)
    finally:
        for file in opened:
            os.close(file)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
