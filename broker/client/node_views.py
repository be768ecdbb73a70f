"""Views of nodes and their GPUs, by what their workers have registered. Read from Redis."""

from __future__ import annotations

from pilotq.broker.client.views import GpuView, NodeView
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Connection
from pilotq.broker.store.registry import read_nodes, unavailable_nodes
from pilotq.broker.store.resources import GpuFacts, NodeInfo
from pilotq.broker.store.store import from_iso


def read_node_views(link: Connection) -> list[NodeView]:
    """The nodes that have joined, by name."""
    infos = sorted(read_nodes(link), key=lambda info: info.name)
    names = [info.name for info in infos]
    used = link.call("HMGET", keys.USAGE, *names) if names else []
    beats = link.pipeline([("HGET", keys.worker(name), "last_heartbeat") for name in names])
    closed = unavailable_nodes(link)
    return [_node_view(i, beat, use, closed.get(i.name, "")) for i, beat, use in zip(infos, beats, used, strict=True)]


def _node_view(info: NodeInfo, last_heartbeat: bytes | None, in_use: bytes | None, closed: str) -> NodeView:
    beat = (last_heartbeat or b"").decode("utf-8", "replace")
    used, _, running = (in_use or b"").decode("utf-8", "replace").partition(" ")
    state, _, why = closed.partition(" ")
    return NodeView(
        name=info.name,
        state=(state or "up") if beat else "lost",
        why=why,
        host=info.host,
        pid=info.pid,
        cores=len(info.cores),
        used=int(used or 0),
        shared_cores=info.shared_cores,
        running=int(running or 0),
        gpus=[gpu_view(name, info.gpu_facts.get(name)) for name in info.gpus],
        last_beat=from_iso(beat),
        memory=info.memory,
        memory_by=info.memory_by,
    )


def gpu_view(name: str, facts: GpuFacts | None) -> GpuView:
    """The view of a GPU by what its worker knows of it."""
    if facts is None:
        return GpuView(name=name)
    return GpuView(name=name, uuid=facts.uuid, model=facts.model, memory=facts.memory)
