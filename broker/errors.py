"""Every error that pilotq raises on purpose.

    PilotqError                      exit code 3 unless a branch below says otherwise
    ├── InvalidInput                 2   what the user asked for cannot be: nothing was changed
    │   ├── NeverFits                2   no node of this pilot can ever hold the request
    │   └── UnknownTask              2   no such task, here or in the journal
    ├── NoPilot                      2   no pilot was found where we looked
    ├── PilotExists                  2   a pilot lives in that directory already
    ├── PilotFailed                  3   a part of the pilot failed for good
    │   ├── ServerUnavailable        3   the server does not answer (may pass: callers decide how long to wait)
    │   │   └── ServerRefused        3   it answers, but refuses (wrong password, out of memory, disk full)
    │   ├── StateLost                3   the server came back empty or older: nothing is guessed
    │   └── Superseded               3   another dispatcher, or another worker of this node, has taken over
    ├── FunctionFailed               1   a Python function did not return a value, and not by an exception of its own
    │   └── FunctionCanceled         1   it was canceled, or stopped
    └── WaitTimedOut                 4   a wait asked for by the user ran out of time

A message is one sentence that says what is wrong, where, and what to do.
"""

from __future__ import annotations


class PilotqError(Exception):
    """Root of the tree; ``exit_code`` is what the command line ends with."""

    exit_code = 3


class InvalidInput(PilotqError):
    exit_code = 2


class NeverFits(InvalidInput):
    pass


class UnknownTask(InvalidInput):
    pass


class NoPilot(PilotqError):
    exit_code = 2


class PilotExists(PilotqError):
    exit_code = 2


class PilotFailed(PilotqError):
    pass


class ServerUnavailable(PilotFailed):
    pass


class ServerRefused(ServerUnavailable):
    pass


class StateLost(PilotFailed):
    pass


class Superseded(PilotFailed):
    pass


class FunctionFailed(PilotqError):
    exit_code = 1


class FunctionCanceled(FunctionFailed):
    pass


class WaitTimedOut(PilotqError):
    exit_code = 4
