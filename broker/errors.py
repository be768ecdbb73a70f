"""Every exception that pilotq raises on purpose, as one tree, with the exit code of the command line.

    PilotqError                      exit code 3 unless a branch below says otherwise
    ├── InvalidInput                 2   a request of the user is impossible: nothing was changed
    │   ├── NeverFits                2   no node of this pilot can ever hold the request
    │   └── UnknownTask              2   no such task, here or in the journal
    ├── NoPilot                      2   no pilot was found in the places searched
    ├── PilotExists                  2   a pilot lives in that directory already
    ├── PilotFailed                  3   a part of the pilot failed for good
    │   ├── ServerUnavailable        3   the server does not answer (it may pass: callers decide how long to wait)
    │   │   └── ServerRefused        3   it answers, but refuses (wrong password, out of memory, disk full)
    │   ├── StateLost                3   the server came back empty or rolled back: nothing is guessed
    │   └── Superseded               3   another dispatcher, or another worker of this node, has taken over
    ├── FunctionFailed               1   a Python function returned no value, and not because of its own exception
    │   ├── FunctionCanceled         1   it was canceled, or stopped
    │   └── MemoryExceeded           1   it used too much memory
    └── WaitTimedOut                 4   a wait asked for by the user ran out of time

A message is one sentence that says what is wrong, where, and what to do about it. `JournalDamaged` is a warning.
"""

from __future__ import annotations


class PilotqError(Exception):
    """Root of the tree; ``exit_code`` is what the command line ends with."""

    exit_code = 3


class InvalidInput(PilotqError):
    """A request of the user is impossible; nothing was changed."""

    exit_code = 2


class NeverFits(InvalidInput):
    """No node of the pilot can ever hold the request."""


class UnknownTask(InvalidInput):
    """There is no such task, in the server or in the journal."""


class NoPilot(PilotqError):
    """No pilot was found in the places searched."""

    exit_code = 2


class PilotExists(PilotqError):
    """The directory is already used by a pilot that runs."""

    exit_code = 2


class PilotFailed(PilotqError):
    """A part of the pilot failed for good."""


class ServerUnavailable(PilotFailed):
    """The server does not answer."""


class ServerRefused(ServerUnavailable):
    """The server answers, but refuses."""


class StateLost(PilotFailed):
    """The server no longer has the state of this queue."""


class Superseded(PilotFailed):
    """Another dispatcher, or another worker of this node, has taken over."""


class FunctionFailed(PilotqError):
    """A Python function returned no value, and not because of its own exception."""

    exit_code = 1


class FunctionCanceled(FunctionFailed):
    """The function was canceled, or stopped."""


class MemoryExceeded(FunctionFailed):
    """The function used more memory than it may, and was ended with its interpreter."""


class WaitTimedOut(PilotqError):
    """A wait with a timeout ran out of time."""

    exit_code = 4


class JournalDamaged(UserWarning):
    """A line of a pilot's journal cannot be read; all others are."""
