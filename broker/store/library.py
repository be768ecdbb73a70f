"""The Lua scripts of broker/store/scripts, as one library of functions that the server keeps.

The server runs the top of a library once, when it is loaded, so that what scripts share costs a call nothing. A script
that is sent by itself (EVAL) would make all of it anew in each call. The name of the library has the hash of its text:
programs of several versions of pilotq each find their own on one server.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from typing import NamedTuple

from pilotq.broker.errors import ServerRefused
from pilotq.broker.store.connection import Connection, ReplyError

# What scripts share, in this order: each may use what is before it.
SHARED = ("lib", "lib_leases", "lib_rq", "lib_joins", "lib_commit")
# Out of memory only a submit is refused, and before it has written anything: ends make room.
REFUSED_WITHOUT_MEMORY = ("commit",)
_FOLDER = os.path.join(os.path.dirname(__file__), "scripts")  # importlib.resources costs an `enqueue` 10 ms


class Library(NamedTuple):
    name: str
    text: str

    def function(self, script: str) -> str:
        """The name of the function that a script is, for FCALL."""
        return f"{self.name}_{script}"


def source(name: str) -> str:
    """The text of one file."""
    with open(os.path.join(_FOLDER, f"{name}.lua"), encoding="utf-8") as file:
        return file.read()


def scripts() -> list[str]:
    """The names of all scripts."""
    names = (os.path.splitext(name) for name in os.listdir(_FOLDER))
    return sorted(name for name, end in names if end == ".lua" and name not in SHARED)


@cache
def library() -> Library:
    """The library of all scripts."""
    unnamed = "pilotq_" + 12 * "0"
    parts = [f"#!lua name={unnamed}\n", *map(source, SHARED)]
    for script in scripts():
        flags = "" if script in REFUSED_WITHOUT_MEMORY else "'allow-oom'"
        parts.append(f"define('{unnamed}_{script}', {{{flags}}}, function()\n{source(script)}\nend)\n")
    text = "".join(parts)
    name = "pilotq_" + hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]
    return Library(name, text.replace(unnamed, name))


def load(link: Connection) -> None:
    """Have the library on a server; one that has it keeps it. Raises ServerRefused where this user may not load it."""
    name, text = library()
    if link.call("FUNCTION", "LIST", "LIBRARYNAME", name):
        return
    try:
        link.call("FUNCTION", "LOAD", text)
    except ReplyError as error:
        if error.code == "NOPERM":
            raise ServerRefused(
                f"the server at {link.address} has no scripts of this version of pilotq, and its user may not load "
                "them: allow FUNCTION LOAD there, or use the version of pilotq that the pilot was started with"
            ) from None
        if "already exists" not in str(error):  # somebody else was faster
            raise


def install(admin: Connection) -> None:
    """Have this library, and none of another version, on a private server, even if its memory is full: without
    scripts nothing could make room."""
    limit = admin.call("CONFIG", "GET", "maxmemory")[1]
    admin.call("CONFIG", "SET", "maxmemory", 0)
    try:
        load(admin)
    finally:
        admin.call("CONFIG", "SET", "maxmemory", limit)
    for fields in admin.call("FUNCTION", "LIST", "LIBRARYNAME", "pilotq_*"):
        other = dict(zip(fields[::2], fields[1::2], strict=True))[b"library_name"].decode()
        if other != library().name:
            admin.call("FUNCTION", "DELETE", other)
