"""The directory of a pilot: makes it, finds it, reads and writes its files. Everything about one pilot is below it.

``connection.json`` is written last, atomically: it exists as long as the pilot may be used.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from pilotq.broker.errors import InvalidInput, NoPilot, PilotFailed, StateLost
from pilotq.broker.os_strings import from_json, from_utf8, to_json, to_utf8
from pilotq.broker.ownership import foreign, writable_by_others
from pilotq.broker.pilot.lock import holder
from pilotq.broker.store import keys
from pilotq.broker.store.connection import Address, Connection

HOME = ".pilotq"  # pilots for which no directory is named have one in here
TOTAL = "submitted"  # file of a pilot that was asked to end: the number of tasks submitted to it
FOLDERS = ("server", "logs", "output")
SCHEMA_VERSION = "6"


class ConnectionInfo(msgspec.Struct, kw_only=True):
    """How to reach a running pilot: the content of connection.json, as secret as the passwords in it.

    ``address`` is the one to use, ``admin`` (None on a server of the user's own) is for diagnosis. ``queue_id`` is the
    random name of the queue. ``pid`` is the supervisor's. ``started`` is in unix seconds. ``job`` is the Slurm job in
    whose allocation it runs, if any.
    """

    address: Address
    admin: Address | None = None
    queue_id: str
    pilot: str
    host: str
    pid: int
    version: str
    directory: str
    started: float
    job: str = ""


def _paths_by(convert: Callable[[str], str], info: ConnectionInfo) -> ConnectionInfo:
    """The same with its paths converted: the file may be read in another locale than it was written in."""
    admin = info.admin and msgspec.structs.replace(info.admin, path=convert(info.admin.path))
    address = msgspec.structs.replace(info.address, path=convert(info.address.path))
    own = convert(info.directory)
    return msgspec.structs.replace(info, address=address, admin=admin, directory=own, pilot=convert(info.pilot))


class Pilot(msgspec.Struct, frozen=True):
    """A pilot's directory (absolute), whether the pilot runs or has ended: ``find().connection()``."""

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

    def connection(self) -> ConnectionInfo:
        """How to reach the pilot.

        Raises NoPilot when it does not run, InvalidInput when others may read the file, PilotFailed when another
        version of pilotq wrote it.
        """
        path = self.path("connection.json")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NoPilot(
                f"no pilot runs in {self.directory}: it has ended, or is not ready yet; go on with it by "
                f"`pilotq start --resume {shlex.quote(self.directory)}`, or start one with `pilotq start`"
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
            try:
                return _paths_by(from_utf8, from_json(file.read(), ConnectionInfo))
            except ValueError as error:
                if not isinstance(error, msgspec.ValidationError):
                    raise PilotFailed(
                        f"{path} is damaged, it is no JSON: once the pilot has ended `pilotq start --resume "
                        f"{self.directory}` writes it anew"
                    ) from None
                raise PilotFailed(
                    f"{path} was written by another version of pilotq: use the pilotq that started this pilot, "
                    "or start a new pilot in another directory"
                ) from None

    def await_connection(self, seconds: float) -> ConnectionInfo:
        """Wait until the pilot is ready, as its parts do. Raises NoPilot after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.connection()
            except NoPilot:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.005)

    def write_connection(self, connection: ConnectionInfo) -> None:
        write_private(self.path("connection.json"), to_json(_paths_by(to_utf8, connection)))

    def remove_connection(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path("connection.json"))

    def job(self) -> str:
        """The Slurm job the pilot runs in; empty when there is none, or when the pilot does not run."""
        try:
            return self.connection().job
        except NoPilot:
            return ""

    def alive(self) -> bool:
        """Whether its supervisor lives; one on another host must have sent a heartbeat within the last minute."""
        return holder(self.path("lock")) is not None


def create(directory: str | None = None, *, temporary: bool = False) -> Pilot:
    """Make a pilot's directory, or use one that exists; only its owner may enter it.

    By default it is ``.pilotq/<id>`` below the current directory. ``.pilotq/current`` is a link to the last one made or
    used so; of a ``temporary`` pilot, which ends with a command, only where it leads to no pilot that runs. Raises
    InvalidInput when the place cannot be used, or others may change what is there.
    """
    if directory is None:
        path = os.path.abspath(os.path.join(HOME, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"))
    else:
        path = _resolve_link(directory)
        if os.path.exists(path):
            _check_usable(path)
    home = os.path.dirname(path)
    try:
        if directory is None:
            with suppress(FileExistsError):
                os.mkdir(home, 0o700)
        else:
            os.makedirs(home, exist_ok=True)
        if os.path.basename(home) == HOME:
            _check_own(home)  # who may write there could redirect `current`
        for folder in (path, *(os.path.join(path, name) for name in FOLDERS)):
            _make_private(folder)
        if os.path.basename(home) == HOME and not (temporary and Pilot(os.path.join(home, "current")).alive()):
            _point_current_at(path)
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be the pilot's directory ({error.filename}: {error.strerror}); name another with --dir"
        ) from None
    return Pilot(path)


def _check_own(path: str) -> None:
    """Raises InvalidInput where another user may have put what is there, or may do so."""
    if why := foreign(path):
        raise InvalidInput(f"{path} {why}, who could run commands as you: name a directory of your own with --dir")
    if why := writable_by_others(path):
        raise InvalidInput(
            f"{path} {why}, who could run commands as you: if you trust what is in it, `chmod go-w {path}`; "
            "else name another directory with --dir"
        )


def _make_private(folder: str) -> None:
    """A directory that only this user may enter; one that exists must be this user's."""
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    if why := foreign(folder):
        raise InvalidInput(f"{folder} {why}: it cannot be the pilot's; name another directory with --dir")
    os.chmod(folder, 0o700)  # it may have existed, or the umask may have taken too much


def _resolve_link(directory: str) -> str:
    """The directory itself: the link ``.pilotq/current`` leads elsewhere as soon as another pilot starts."""
    path = os.path.abspath(directory)
    return os.path.realpath(path) if os.path.islink(path) else path


def _check_usable(path: str) -> None:
    if not os.path.isdir(path):
        raise InvalidInput(f"{path} cannot be the pilot's directory: it is a file; name another with --dir")
    if why := foreign(path):
        raise InvalidInput(f"{path} cannot be the pilot's directory: it {why}; name another with --dir")
    if not os.listdir(path):
        os.chmod(path, 0o700)  # from here on nobody puts anything into it
    content = set(os.listdir(path))
    if content and not content.issuperset(FOLDERS):
        # The directory is closed to everybody else, which must not happen to somebody's project.
        raise InvalidInput(f"{path} is neither empty nor a pilot's directory: name another with --dir")
    if content:
        _check_own(path)


def _point_current_at(path: str) -> None:
    home = os.path.dirname(path)
    fresh = os.path.join(home, f"current.{os.urandom(4).hex()}")
    os.symlink(os.path.basename(path), fresh)
    os.replace(fresh, os.path.join(home, "current"))


def find(directory: str | None = None) -> Pilot:
    """The pilot of ``directory``, else of PILOTQ_DIR, else ``.pilotq/current`` here or in a parent directory.

    Raises NoPilot, or InvalidInput for one that others may change: it could hold commands of theirs. The pilot may have
    ended: then `Pilot.connection` raises.
    """
    for named, source in ((directory, "--dir"), (os.environ.get("PILOTQ_DIR"), "PILOTQ_DIR")):
        if named:
            if not os.path.isdir(os.path.join(named, "server")):
                raise NoPilot(
                    f"{named} ({source}) is no pilot's directory: correct it, or `pilotq start --dir {named}`"
                )
            path = _resolve_link(named)
            _check_own(path)
            return Pilot(path)
    here = os.getcwd()
    place = here
    while True:
        current = os.path.join(place, HOME, "current")
        if os.path.isdir(current):
            _check_own(os.path.dirname(current))  # not only what `current` leads to: it could lead elsewhere soon
            path = os.path.realpath(current)
            _check_own(path)
            return Pilot(path)
        parent = os.path.dirname(place)
        if parent == place:
            raise NoPilot(
                f"no pilot was found: --dir and PILOTQ_DIR are not set, and neither {here} nor a directory above it "
                f"has {HOME}/current; start one with `pilotq start`"
            )
        place = parent


def establish_queue_id(pilot: Pilot, connection: Connection) -> str:
    """The id of the queue on the server: a new random one on an empty server, else the one of this directory's queue.

    Raises StateLost when the server holds another queue than this directory remembers, PilotFailed when another version
    of pilotq has written its data.
    """
    path = pilot.path("server", "queue-id")
    remembered = ""
    with suppress(FileNotFoundError), open(path) as file:
        remembered = file.read()
    # Version 1 has the queue's id in server/epoch: a new queue must not replace that one.
    if not remembered and not os.path.exists(pilot.path("server", "epoch")):
        connection.call("SET", keys.SCHEMA, SCHEMA_VERSION, "NX")
        if connection.call("GET", keys.SCHEMA) == SCHEMA_VERSION.encode():
            connection.call("SET", keys.QUEUE_ID, os.urandom(8).hex(), "NX")
    schema, queue_id = (text.decode() if text else "" for text in connection.call("MGET", keys.SCHEMA, keys.QUEUE_ID))
    if remembered and queue_id != remembered:
        raise StateLost(
            f"the server does not hold the tasks of {pilot.directory} any more "
            f"({'it holds another queue' if queue_id else 'it is empty'}): what has ended stands in journal.jsonl; "
            "start a new pilot in another directory"
        )
    if schema != SCHEMA_VERSION:
        raise PilotFailed(
            f"the data of {pilot.directory} is of version {schema or '1'}, this pilotq knows version "
            f"{SCHEMA_VERSION}: use the pilotq that made it, or start a new pilot in another directory"
        )
    if not remembered:
        write_private(path, queue_id.encode())
    return queue_id


def write_private(path: str, data: bytes) -> None:
    """Replace a file atomically by one that only its owner can read, whatever the umask."""
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
    """Save how many tasks were submitted: the journal has only those that ran or ended."""
    write_private(pilot.path(TOTAL), str(total).encode())


def forget_total(pilot: Pilot) -> None:
    """Remove the number saved by `remember_total`: the pilot has been started again."""
    with suppress(FileNotFoundError):
        os.unlink(pilot.path(TOTAL))
