"""Stubs of a pilot's parts that only live, so that the supervisor's tests are about the supervisor.

    python tests/support/stub_parts.py [BEHAVIOUR...] VERB ARGUMENTS

SupervisorOptions.program is all before the verb.

``broken-dispatcher`` ends with exit code 7 at once; ``stubborn-worker`` ignores SIGTERM and messages.
`clean_node` appends the node's name to the file ``swept`` in the pilot's directory.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import msgspec

from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.pilot.start import read_options
from pilotq.broker.pilot.supervisor import run_supervisor
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.resources import NodeInfo

VERBS = ("supervisor", "dispatcher", "worker")


def clean_node(directory: str, node: str) -> None:
    with open(os.path.join(directory, "swept"), "a") as file:
        file.write(f"{node}\n")


def dispatcher(behaviour: list[str]) -> int:
    if "broken-dispatcher" in behaviour:
        print("there is no way", flush=True)
        return 7
    signal.sigwait({signal.SIGTERM})
    return 0


def worker(behaviour: list[str], directory: str, node: str) -> int:
    link = Connection(Pilot(directory).await_connection(20).address)
    incarnation = int(link.call("INCR", keys.NEXT_INCARNATION))
    info = NodeInfo(node, incarnation, "here", os.getpid(), [0])
    link.call("HSET", keys.NODES, node, msgspec.json.encode(info))
    if "stubborn-worker" in behaviour:
        threading.Event().wait()
    signal.sigwait({signal.SIGTERM})
    link.call("HDEL", keys.NODES, node)
    return 0


def main(argv: list[str]) -> int:
    place = next(i for i, word in enumerate(argv) if word in VERBS)
    behaviour, verb, rest = argv[:place], argv[place], argv[place + 1 :]
    if verb == "supervisor":
        return run_supervisor(read_options(rest[rest.index("--options") + 1]), clean_node)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if verb == "dispatcher":
        return dispatcher(behaviour)
    return worker(behaviour, rest[rest.index("--dir") + 1], rest[rest.index("--node") + 1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
