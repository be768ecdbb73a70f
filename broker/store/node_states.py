"""Which nodes get nothing new, and why, as it stands in Redis: for all who look."""

from __future__ import annotations

from pilotq.broker.store import keys
from pilotq.broker.store.connection import Link

DRAINED, RETIRED, ASIDE = "drained", "retired", "aside"


def closed_nodes(link: Link) -> dict[str, str]:
    """node -> "state reason"; what the user has said comes first."""
    user, dispatcher = (texts(flat) for flat in link.pipeline([("HGETALL", keys.CLOSED), ("HGETALL", keys.ASIDE)]))
    return {name: f"{ASIDE} {why}" for name, why in dispatcher.items()} | user


def texts(flat: list[bytes]) -> dict[str, str]:
    """A hash, as the server gives it."""
    return {k.decode(): text.decode("utf-8", "replace") for k, text in zip(flat[::2], flat[1::2], strict=True)}
