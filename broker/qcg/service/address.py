"""The address of a service: its directory, in the place where QCG-PilotJob has the address of a ZMQ socket. Pure."""

from __future__ import annotations

ADDRESS = "QCG_PM_ZMQ_ADDRESS"  # in tasks: the service that runs them, where it takes requests of programs
SCHEME = "pilotq"
AUXILIARY = ".qcgpjm-service-"  # the name of a service's directory begins so; its id follows


def address_of(directory: str) -> str:
    """``pilotq:DIRECTORY``"""
    return f"{SCHEME}:{directory}"


def directory_of(address: str) -> str | None:
    """The directory that an address names, with or without the scheme; None when it is of another kind."""
    scheme, colon, rest = address.partition(":")
    if colon and rest.startswith("//"):
        return None
    return rest if scheme == SCHEME else address
