"""Shortage: the sentence that explains why a request can never fit on these nodes, or does not fit now. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pilotq.broker.scheduling.node_gpus import wanted
from pilotq.broker.tasks.model import GPU_PARTS, Request


class Room(NamedTuple):
    """What one node has, or has free. ``memory`` in bytes, None where it is not counted; ``idle``: nothing is used."""

    name: str
    cores: int
    gpus: Callable[[Request], int]  # as `NodeGpus.room`
    memory: int | None
    counters: dict[str, int]
    idle: bool


class Want(NamedTuple):
    """One kind of thing that a request wants of each of its nodes."""

    least: int
    has: Callable[[Room], int]
    text: Callable[[int], str]


def shortage(request: Request, rooms: Sequence[Room], *, now: bool) -> str | None:
    """Why these nodes together do not hold the request; None if they do. With ``now`` it speaks of free resources."""
    extras = _extras(request)
    if request.whole:
        return _short_of_whole(request, extras, rooms, now)
    cores = Want(request.cores[0], lambda room: room.cores, lambda n: _plural(n, "core"))
    if request.spread:
        return _short_of_spread(cores, extras, rooms, now)
    return _short_of_nodes((request.nodes or (1, 1))[0], [cores, *extras], rooms, now)


def _extras(request: Request) -> list[Want]:
    wants = []
    if request.gpus:
        wants.append(Want(wanted(request), lambda room: room.gpus(request), lambda n: _gpus(n, request)))
    if request.memory:
        wants.append(Want(request.memory, lambda r: request.memory if r.memory is None else r.memory, _memory))
    for name, count in request.use:
        wants.append(_counter(name, count))
    return wants


def _counter(name: str, count: int) -> Want:
    return Want(count, lambda room: room.counters.get(name, 0), lambda n: f"{n} of {name}")


def _holds(room: Room, wants: Sequence[Want]) -> bool:
    return all(want.has(room) >= want.least for want in wants)


def _short_of_nodes(nodes: int, wants: Sequence[Want], rooms: Sequence[Room], now: bool) -> str | None:
    if sum(_holds(room, wants) for room in rooms) >= nodes:
        return None
    free = " free" if now else ""
    where = "on one node" if nodes == 1 else f"on each of {nodes} nodes"
    for want in wants:
        enough = sum(want.has(room) >= want.least for room in rooms)
        if enough >= nodes:
            continue
        needs = f"needs {want.text(want.least)}{free} {where}; "
        if not rooms:
            return needs + ("no node is open" if now else "there is no node")
        if nodes > 1:
            return needs + _so_many(enough, "that much", free)
        most = max(rooms, key=want.has)
        if not want.has(most):
            return needs + f"no node has any{free}"
        found = want.text(want.has(most))
        if now:
            return needs + f"the most free is {found}, on {most.name}"
        return needs + f"the largest, {most.name}, has {found}"
    together = ", ".join(want.text(want.least) for want in wants)
    both = sum(_holds(room, wants) for room in rooms)
    return f"needs {together}{free} {where}; " + _so_many(both, "all of it", free)


def _short_of_whole(request: Request, extras: Sequence[Want], rooms: Sequence[Room], now: bool) -> str | None:
    nodes = (request.nodes or (1, 1))[0]
    idle = [room for room in rooms if room.idle]
    if len(idle) >= nodes:
        return _short_of_nodes(nodes, extras, idle, now)
    kind = "unused" if now else "whole"
    return f"needs {_plural(nodes, f'{kind} node')}; " + (f"there are {len(idle)}" if len(idle) != 1 else "there is 1")


def _short_of_spread(cores: Want, extras: Sequence[Want], rooms: Sequence[Room], now: bool) -> str | None:
    # Every node that gives cores gives its share of the rest, too.
    found = sum(room.cores for room in rooms if _holds(room, extras))
    if found >= cores.least:
        return None
    free = " free" if now else ""
    beside = f" on nodes with {', '.join(want.text(want.least) for want in extras)}" if extras else ""
    which = "such nodes" if extras else "nodes"
    return f"needs {cores.text(cores.least)}{free}{beside}; all {which} together have {cores.text(found)}{free}"


def _so_many(nodes: int, what: str, free: str) -> str:
    if not nodes:
        return f"no node has {what}{free}"
    return f"only {_plural(nodes, 'node')} {'has' if nodes == 1 else 'have'} {what}{free}"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _gpus(count: int, request: Request) -> str:
    text = f"{count / GPU_PARTS:g} of a GPU" if request.gpu_share else _plural(count, "GPU")
    return f"{text} of kind {request.gpu_kind.replace('_', '-')}" if request.gpu_kind else text


def _memory(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            number = f"{count / unit:.3g}" if count < 1000 * unit else f"{count // unit:,}"
            return f"{number} {name} of memory"
    return f"{count} bytes of memory"
