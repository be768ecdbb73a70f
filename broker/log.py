"""The log of a process: one line with the time for each message, written to stderr.

Every process of a pilot has its stderr in a file of its own (``logs/<part>.log``). There are no levels: a message is
written when it helps to find the cause of something. It is not the standard library's
`logging`, whose import would slow the start of every process.
"""

from __future__ import annotations

import os
import time


def log(text: str) -> None:
    """Write one line: ``2031-05-04 12:00:00 the server is ready``."""
    try:
        os.write(2, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass  # the disk is full, or nobody reads: what the process does goes on
