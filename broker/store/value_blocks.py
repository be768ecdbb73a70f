"""The values of an array, and the tasks of a bundle, as compressed blocks of 1,000: `pilotq:values:<array>`.

>>> blocks = dict(packed_blocks([b"a", b"b"]))
>>> read_block("1f", blocks[0])
[b'a', b'b']
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import msgspec

from pilotq.broker.errors import PilotFailed
from pilotq.broker.os_strings import UNREADABLE

BLOCK = 1000  # values in one
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[bytes]).decode


def packed_blocks(values: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each block."""
    for first in range(0, len(values), BLOCK):
        yield first // BLOCK, zlib.compress(_pack(values[first : first + BLOCK]), 1)


def read_block(array: str, data: bytes | None) -> list[bytes]:
    """The values in a block; raises PilotFailed where it is gone or damaged."""
    if data is None:
        raise PilotFailed(f"the values of array {array} are gone")
    try:
        return _unpack(zlib.decompress(data))
    except (zlib.error, *UNREADABLE) as error:
        raise PilotFailed(f"the values of array {array} are damaged: {error}") from None
