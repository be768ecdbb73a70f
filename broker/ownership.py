"""Who may change a file: the boundary of a pilot is the Unix user, so what others may change is not to be trusted."""

from __future__ import annotations

import os
import stat


def foreign(path: str) -> str:
    """Why this is not the user's own, for a sentence that begins with the path; empty when it is.

    Of a link both the link and what it leads to must be the user's. Raises OSError where there is nothing.
    """
    for status in (os.lstat(path), os.stat(path)):
        if status.st_uid != os.geteuid():
            return f"belongs to another user (uid {status.st_uid})"
    return ""


def writable_by_others(path: str) -> str:
    """As `foreign`, when others may write there; an access list of its own shows in the mode's bits of the group."""
    mode = os.stat(path).st_mode & 0o7777
    return f"can be written by others (mode {mode:04o})" if mode & 0o022 else ""


def private_folder(path: str) -> str:
    """A directory of this user alone, made if need be: ``path``, or another beside it where a stranger took that name.

    For places where everybody may write, and a name that everybody can know.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode) or foreign(path) or writable_by_others(path):
            import tempfile

            return tempfile.mkdtemp(prefix=f"{os.path.basename(path)}-", dir=os.path.dirname(path))
    return path
