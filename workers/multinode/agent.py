"""Starts a command on another node for `mpirun`, which uses this launch agent instead of ssh. It imports little.

    pilotq-agent [OPTIONS OF SSH] NODE COMMAND...

It asks the worker of the task's first node to have COMMAND (for a shell, as with ssh) started on NODE as a part of the
same execution: on its cores there, marked, ended with it. It waits for its end, writes what it wrote, and exits with
its code; 255 when nothing was started.

The socket is abstract (no file is left behind, whatever dies), so both ends check whose process the other is. Over it
goes one request and one reply, each four bytes of length (little endian), then JSON.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from typing import NoReturn

LENGTH = struct.Struct("<I")
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid, as SO_PEERCRED gives them
SSH_OPTIONS_WITH_VALUE = frozenset("BbcDEeFIiJLlmOopQRSWw")  # of ssh's options
NOT_STARTED = 255


def main() -> NoReturn:
    try:
        node, command = _arguments(sys.argv[1:])
        reply = _request(node, command)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"pilotq-agent: {error}\n")
        sys.exit(NOT_STARTED)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        stream.buffer.write(str(reply.get(name, "")).encode("utf-8", "surrogateescape"))
        stream.buffer.flush()
    sys.exit(int(str(reply["status"])))


def _arguments(words: list[str]) -> tuple[str, str]:
    """The node and the line for the shell; options of ssh are skipped."""
    words = list(words)
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if len(option) == 2 and option[1] in SSH_OPTIONS_WITH_VALUE and words:
            words.pop(0)
    if len(words) < 2:
        raise ValueError("give a node and a command: pilotq-agent NODE COMMAND...")
    node, *command = words
    return node.rpartition("@")[2], " ".join(command)


def _request(node: str, command: str) -> dict[str, object]:
    name = os.environ.get("PILOTQ_AGENT", "")
    if not name:
        raise ValueError("it works on the first node of a task that has several nodes, and this is none")
    request = {
        "id": os.environ.get("PILOTQ_TASK_ID", ""),
        "execution": int(os.environ.get("PILOTQ_EXECUTION", "0")),
        "node": node,
        "command": _utf8(os.fsencode(command)),
        "cwd": _utf8(os.getcwdb()),
        "env": {_utf8(name): _utf8(value) for name, value in os.environb.items()},
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect("\0" + name)
        except OSError as error:
            raise OSError(f"the worker of this node cannot be reached: {error.strerror}") from None
        peer = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        if peer[1] != os.getuid():
            raise OSError("a process of another user listens in the place of this node's worker")
        data = json.dumps(request).encode()
        connection.sendall(LENGTH.pack(len(data)) + data)
        size = LENGTH.unpack(_read(connection, LENGTH.size))[0]
        reply: dict[str, object] = json.loads(_read(connection, size))
        return reply


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise OSError("the worker of this node has ended the connection")
        data += chunk
    return data


def _utf8(data: bytes) -> str:
    """As broker/os_strings.py has it: JSON shows a byte that is not UTF-8 as an escape."""
    return data.decode("utf-8", "surrogateescape")


if __name__ == "__main__":
    main()
