"""The exceptions of QCG-PilotJob's Python interface, under the names that its users catch.

All are subclasses of `PilotqError`, and each also of the class in broker/errors.py that means the same.
`TimeoutElapsed` stands apart, as in the original: ``except QCGPJMAError`` does not catch it.
"""

from __future__ import annotations

from pilotq.broker.errors import InvalidInput, PilotFailed, PilotqError, UnknownTask, WaitTimedOut


class QCGPJMAError(PilotqError):
    """The base of all but `TimeoutElapsed`."""


class InternalError(QCGPJMAError):
    """A reply has not the form that it should have."""


class InvalidJobDescriptionError(QCGPJMAError, InvalidInput):
    """The description of a job is wrong."""


class JobNotDefinedError(QCGPJMAError, UnknownTask):
    """There is no job of this name."""


class ConnectionError(QCGPJMAError):
    """A request was refused, or not answered: QCG-PilotJob has one name for both, and it hides Python's own."""


class WrongArgumentsError(QCGPJMAError, InvalidInput):
    """The arguments of a call are wrong."""


class FileError(QCGPJMAError, InvalidInput):
    """A file of jobs cannot be read or written."""


class ServiceError(QCGPJMAError, PilotFailed):
    """The pilot could not be started, or would not end."""


class TimeoutElapsed(WaitTimedOut):
    """What was waited for has not happened in time."""
