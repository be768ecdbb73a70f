"""Says whether an error is a passing shortage: of processes, memory or descriptors, or a program that is being written.

What fails because of one is held back and tried again, for at most ``shortage_s`` of the settings.
"""

from __future__ import annotations

import errno

PASSING = frozenset(
    {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETXTBSY, errno.EINTR, errno.ETOOMANYREFS}
)
RETRY_S = 0.5  # between two attempts


def is_shortage(error: BaseException | None) -> bool:
    """Whether it is one, or was raised because of one.

    >>> is_shortage(BlockingIOError(errno.EAGAIN, "")), is_shortage(FileNotFoundError(errno.ENOENT, ""))
    (True, False)
    """
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in PASSING):
            return True
        error = error.__context__
    return False
