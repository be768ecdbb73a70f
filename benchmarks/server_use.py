"""What a server has done so far: commands, script calls, round trips, bytes of its log and messages."""

from __future__ import annotations

from typing import NamedTuple

from pilotq.broker.pilot.directory import Pilot
from pilotq.broker.store.connection import Connection

SCRIPT_CALL = "fcall"


class Use(NamedTuple):
    """``commands`` counts those of scripts, too; ``reads``: how often it has read what a client has sent."""

    commands: int
    script_calls: int
    reads: int
    log_bytes: int
    memory: int

    def __sub__(self, other: Use) -> Use:
        return Use(*(a - b for a, b in zip(self, other, strict=True)))

    def each(self, number: int) -> str:
        """For one of so many tasks, for people."""
        return (
            f"{self.log_bytes / number:,.0f} bytes of log, {self.commands / number:.2f} commands, "
            f"{self.script_calls / number:.3f} script calls, {self.reads / number:.3f} reads of the server"
        )


class ServerUse:
    """Asks the server of the pilot in this directory."""

    def __init__(self, directory: str) -> None:
        info = Pilot(directory).connection()
        self._link = Connection(info.admin or info.address)

    def now(self) -> Use:
        stats = self._info("stats")
        commands = self._info("commandstats")
        calls = {
            name.removeprefix("cmdstat_"): int(value.partition("calls=")[2].partition(",")[0])
            for name, value in commands.items()
        }
        return Use(
            sum(calls.values()),
            calls.get(SCRIPT_CALL, 0),
            int(stats["total_reads_processed"]),
            int(self._info("persistence").get("aof_current_size", 0)),
            int(self._info("memory")["used_memory"]),
        )

    def close(self) -> None:
        self._link.close()

    def _info(self, section: str) -> dict[str, str]:
        text: bytes = self._link.call("INFO", section)
        pairs = (line.partition(":") for line in text.decode().splitlines() if ":" in line)
        return {name: value for name, _, value in pairs}
