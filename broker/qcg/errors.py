"""The errors of QCG-PilotJob's Python interface, under the names that its users catch.

They hang below `PilotqError`, so that a program which catches that misses none of them, and each takes the branch of
broker/errors.py that says the same. `TimeoutElapsed` is apart, as there: ``except QCGPJMAError`` does not catch it.
"""

from __future__ import annotations

from pilotq.broker.errors import InvalidInput, PilotFailed, PilotqError, UnknownTask, WaitTimedOut


class QCGPJMAError(PilotqError):
    pass


class InternalError(QCGPJMAError):
    """A reply is not of the form that it should have."""


class InvalidJobDescriptionError(QCGPJMAError, InvalidInput):
    pass


class JobNotDefinedError(QCGPJMAError, UnknownTask):
    pass


class ConnectionError(QCGPJMAError):
    """A request was refused, or nobody answers: QCG-PilotJob has one name for both, and it hides Python's own."""


class WrongArgumentsError(QCGPJMAError, InvalidInput):
    pass


class FileError(QCGPJMAError, InvalidInput):
    pass


class ServiceError(QCGPJMAError, PilotFailed):
    """The pilot could not be started, or would not end."""


class TimeoutElapsed(WaitTimedOut):
    pass
