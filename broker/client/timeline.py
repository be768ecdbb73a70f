"""`Timeline`: how busy the cores were, in cells of time x cores, for pictures of any number of executions. Pure."""

from __future__ import annotations

from array import array

from pilotq.broker.client.executions import Executions
from pilotq.broker.store.resources import parse_allocation


class Timeline:
    """``rows`` x ``columns`` cells, row after row, from the first start (``begin``) to the last end (``end``).

    A row is a group of neighbouring cores, in the order of `Executions.held`. ``busy`` and ``failed`` say which share
    of a cell's core-time executions held, and which share those held that did not finish, from 0 to 1.
    """

    def __init__(self, runs: Executions, columns: int, rows: int) -> None:
        held = runs.held()
        self.rows, self.columns = max(min(rows, len(held)), 1), columns
        self.begin = min(runs.started, default=0.0)
        self.end = max(runs.ended, default=0.0)
        row_of = {core: number * self.rows // len(held) for number, core in enumerate(held)}
        self.cores = [0] * self.rows  # of each row
        for row in row_of.values():
            self.cores[row] += 1
        self.busy, self.failed = self._cells(), self._cells()
        self._width = (self.end - self.begin) / columns or 1.0
        shares = [self._share(text, row_of) for text in runs.places.words]
        bad = [word != "finished" for word in runs.statuses.words]
        # Of cells that an execution held as a whole only the first and the one behind the last are noted.
        steps, bad_steps = self._cells(), self._cells()
        for place, status, started, ended in zip(runs.place, runs.status, runs.started, runs.ended, strict=True):
            for row, cores in shares[place]:
                self._fill(self.busy, steps, row, cores, started, ended)
                if bad[status]:
                    self._fill(self.failed, bad_steps, row, cores, started, ended)
        self._sum_up(self.busy, steps)
        self._sum_up(self.failed, bad_steps)

    def _cells(self) -> array[float]:
        return array("d", bytes(8 * self.rows * self.columns))

    def _sum_up(self, cells: array[float], steps: array[float]) -> None:
        """Core-seconds become shares."""
        for row, cores in enumerate(self.cores):
            held = 0.0
            for cell in range(row * self.columns, (row + 1) * self.columns):
                held += steps[cell]
                cells[cell] = min((cells[cell] / self._width + held) / cores, 1.0) if cores else 0.0

    @staticmethod
    def _share(text: str, row_of: dict[tuple[str, int], int]) -> list[tuple[int, int]]:
        """The cores of an allocation in each row."""
        found: dict[int, int] = {}
        for part in parse_allocation(text) if text else ():
            for core in part.cores:
                row = row_of[part.node, core]
                found[row] = found.get(row, 0) + 1
        return list(found.items())

    def _fill(
        self, cells: array[float], steps: array[float], row: int, cores: int, started: float, ended: float
    ) -> None:
        first = (started - self.begin) / self._width
        last = (ended - self.begin) / self._width
        low, high, base = int(first), min(int(last), self.columns - 1), row * self.columns
        if low >= high:
            cells[base + min(low, self.columns - 1)] += cores * (ended - started)
            return
        cells[base + low] += cores * (low + 1 - first) * self._width
        cells[base + high] += cores * (last - high) * self._width
        steps[base + low + 1] += cores
        steps[base + high] -= cores
