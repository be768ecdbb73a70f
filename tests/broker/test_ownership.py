"""Directories in places where everybody may write."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pilotq.broker.ownership import private_folder


def test_a_folder_of_this_user_is_made_and_used_again(tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    assert private_folder(path) == path
    assert private_folder(path) == path
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


@pytest.mark.parametrize("what", ["writable", "foreign", "link", "file"])
def test_a_folder_that_others_have_put_there_is_not_used(tmp_path: Path, what: str) -> None:
    path = tmp_path / "f"
    if what == "file":
        path.write_text("")
    elif what == "link":
        (tmp_path / "target").mkdir(0o700)
        path.symlink_to(tmp_path / "target")
    else:
        path.mkdir(0o700)
        path.chmod(0o777 if what == "writable" else 0o700)
        if what == "foreign":
            if os.geteuid() != 0:
                pytest.skip("only root can give a file away")
            os.chown(path, 12345, -1)
    found = private_folder(str(path))
    assert found != str(path) and os.path.dirname(found) == str(tmp_path)
    status = os.lstat(found)
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.geteuid())
