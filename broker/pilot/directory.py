"""The directory of a pilot: made, found, read. Everything about one pilot lies below it.

``connection.json`` is written last, in one step: it exists as long as the pilot may be used.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

import msgspec

from pilotq.broker.errors import InvalidInput, NoPilot, PilotFailed, StateLost
from pilotq.broker.pilot.lock import holder
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Link

HOME = ".pilotq"  # pilots without a directory of their own live in its sub-folders
TOTAL = "submitted"  # file of a pilot that was told to end: how many tasks it had been given
FOLDERS = ("server", "logs", "output")
SCHEMA_VERSION = "1"


class Connection(msgspec.Struct, kw_only=True):
    """How to use a running pilot; the content of connection.json, and as secret as its passwords.

    ``address`` is for everybody, ``admin`` (None on a server of the user's own) for diagnosis.
    ``started`` is in unix seconds.
    """

    address: Address
    admin: Address | None = None
    epoch: str
    pilot: str
    host: str
    pid: int  # of the supervisor
    version: str
    directory: str
    started: float
    job: str = ""  # the Slurm job whose allocation it lives in


class Pilot(msgspec.Struct, frozen=True):
    """A pilot's directory (absolute), whether the pilot runs or has ended."""

    directory: str

    @property
    def id(self) -> str:
        return os.path.basename(self.directory)

    def path(self, *names: str) -> str:
        return os.path.join(self.directory, *names)

    @property
    def journal(self) -> str:
        return self.path("journal.jsonl")

    def log(self, part: str) -> str:
        return self.path("logs", f"{part}.log")

    def connection(self) -> Connection:
        """How to reach it. Raises NoPilot when it does not run, InvalidInput when others may read it."""
        path = self.path("connection.json")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoPilot(
                f"no pilot runs in {self.directory}: it has ended, or is not ready yet; start one with `pilotq start`"
            ) from None
        except OSError as error:
            raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid():
                raise InvalidInput(f"{path} belongs to another user (uid {status.st_uid}): this pilot is not yours")
            if status.st_mode & 0o077:
                raise InvalidInput(
                    f"{path} can be read by others, and its passwords with it: `chmod 600 {path}`, "
                    "and if you do not trust them start the pilot anew"
                )
            return msgspec.json.decode(file.read(), type=Connection)

    def await_connection(self, seconds: float) -> Connection:
        """For the parts of a pilot: wait until it is ready. Raises NoPilot after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.connection()
            except NoPilot:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.005)

    def write_connection(self, connection: Connection) -> None:
        write_private(self.path("connection.json"), msgspec.json.encode(connection))

    def remove_connection(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path("connection.json"))

    def job(self) -> str:
        """The Slurm job it lives in; empty when there is none, or it does not run."""
        try:
            return self.connection().job
        except NoPilot:
            return ""

    def alive(self) -> bool:
        """Whether its supervisor lives (one on another host: has shown so within the last minute)."""
        return holder(self.path("lock")) is not None


def create(directory: str | None = None) -> Pilot:
    """Make a pilot's directory, or take up an old one; only its owner may enter it.

    By default it is ``.pilotq/<id>`` below the current directory. ``.pilotq/current`` is made to point to the one that
    was made or taken up last.
    Raises InvalidInput when the place cannot be used.
    """
    if directory is None:
        path = os.path.abspath(os.path.join(HOME, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"))
    else:
        path = _itself(directory)
        if os.path.exists(path):
            _check_place(path)
    try:
        if directory is None:
            os.makedirs(HOME, mode=0o700, exist_ok=True)  # who may write there could redirect `current`
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for folder in (path, *(os.path.join(path, name) for name in FOLDERS)):
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            os.chmod(folder, 0o700)  # it may have existed, or the umask may have taken too much
        if os.path.basename(os.path.dirname(path)) == HOME:
            _point_current_at(path)
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be the pilot's directory ({error.filename}: {error.strerror}); name another with --dir"
        ) from None
    return Pilot(path)


def _itself(directory: str) -> str:
    """The directory and not a link to it: ``.pilotq/current`` leads elsewhere as soon as another pilot starts."""
    path = os.path.abspath(directory)
    return os.path.realpath(path) if os.path.islink(path) else path


def _check_place(path: str) -> None:
    if not os.path.isdir(path):
        raise InvalidInput(f"{path} cannot be the pilot's directory: it is a file; name another with --dir")
    if os.stat(path).st_uid != os.geteuid():
        raise InvalidInput(
            f"{path} cannot be the pilot's directory: it belongs to another user; name another with --dir"
        )
    content = set(os.listdir(path))
    if content and not content.issuperset(FOLDERS):
        # It would be closed to everybody else: that must not happen to somebody's project.
        raise InvalidInput(f"{path} is neither empty nor a pilot's directory: name another with --dir")


def _point_current_at(path: str) -> None:
    home = os.path.dirname(path)
    fresh = os.path.join(home, f"current.{os.urandom(4).hex()}")
    os.symlink(os.path.basename(path), fresh)
    os.replace(fresh, os.path.join(home, "current"))


def find(directory: str | None = None) -> Pilot:
    """The pilot of ``directory``, else of PILOTQ_DIR, else ``.pilotq/current`` here or in a parent directory.

    Raises NoPilot. The pilot may have ended: `Pilot.connection` tells.
    """
    for named, source in ((directory, "--dir"), (os.environ.get("PILOTQ_DIR"), "PILOTQ_DIR")):
        if named:
            if not os.path.isdir(os.path.join(named, "server")):
                raise NoPilot(
                    f"{named} ({source}) is no pilot's directory: correct it, or `pilotq start --dir {named}`"
                )
            return Pilot(_itself(named))
    here = os.getcwd()
    place = here
    while True:
        current = os.path.join(place, HOME, "current")
        if os.path.isdir(current):
            return Pilot(os.path.realpath(current))
        parent = os.path.dirname(place)
        if parent == place:
            raise NoPilot(
                f"no pilot was found: --dir and PILOTQ_DIR are not set, and neither {here} nor a directory above it "
                f"has {HOME}/current; start one with `pilotq start`"
            )
        place = parent


def establish_epoch(pilot: Pilot, link: Link) -> str:
    """Name this queue's life on an empty server, or check that the server holds the queue of this directory.

    Raises StateLost when the server's data is not what the directory remembers, PilotFailed when another version of
    pilotq wrote it.
    """
    path = pilot.path("server", "epoch")
    remembered = ""
    with suppress(FileNotFoundError), open(path) as file:
        remembered = file.read()
    if not remembered:
        link.call("SET", keys.SCHEMA, SCHEMA_VERSION, "NX")
        link.call("SET", keys.EPOCH, os.urandom(8).hex(), "NX")
    schema, epoch = (text.decode() if text else "" for text in link.call("MGET", keys.SCHEMA, keys.EPOCH))
    if remembered and epoch != remembered:
        raise StateLost(
            f"the server does not hold the tasks of {pilot.directory} any more "
            f"({'it holds another queue' if epoch else 'it is empty'}): what has ended stands in journal.jsonl; start "
            "a new pilot in another directory"
        )
    if schema != SCHEMA_VERSION:
        raise PilotFailed(
            f"the server's data is of version {schema!r}, this pilotq knows {SCHEMA_VERSION!r}: "
            "use the pilotq it was made with"
        )
    if not remembered:
        write_private(path, epoch.encode())
    return epoch


def write_private(path: str, data: bytes) -> None:
    """Replace a file in one step with one that only its owner can read, whatever the umask."""
    fresh = f"{path}.{os.urandom(4).hex()}"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise


def remember_total(pilot: Pilot, total: int) -> None:
    """Note how many tasks were submitted: the journal tells only of those that ran or ended."""
    write_private(pilot.path(TOTAL), str(total).encode())


def forget_total(pilot: Pilot) -> None:
    """The pilot has been started again: what was noted is no longer true."""
    with suppress(FileNotFoundError):
        os.unlink(pilot.path(TOTAL))
