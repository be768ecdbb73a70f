"""Says which launcher starts tasks: the native one where it was compiled at installation, else that in Python.

``PILOTQ_LAUNCHER`` forces one.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from pilotq.broker.errors import InvalidInput

Kind = Literal["native", "python"]
VARIABLE: Final = "PILOTQ_LAUNCHER"
MODULE: Final = "pilotq.workers.launcher._native"


def native_module() -> Any:
    """The compiled part of the native launcher; raises ImportError where it was not built, or cannot be loaded."""
    return importlib.import_module(MODULE)


def native_failure() -> str:
    """Why the native launcher cannot be used; empty when it can."""
    try:
        native_module()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return "it was not built when pilotq was installed: that needs a C compiler and the headers of Python"
        return f"it cannot be loaded: {error}"
    return ""


def launcher_kind(variables: Mapping[str, str] = os.environ) -> Kind:
    """Which launcher serves here; raises InvalidInput for a wrong ``PILOTQ_LAUNCHER``.

    >>> launcher_kind({"PILOTQ_LAUNCHER": "python"})
    'python'
    """
    wanted = variables.get(VARIABLE, "")
    if wanted and wanted not in get_args(Kind):
        raise InvalidInput(f"{VARIABLE} is {wanted!r}: it can be {' or '.join(get_args(Kind))}, or unset")
    if wanted == "python":
        return "python"
    failure = native_failure()
    if failure and wanted:
        raise InvalidInput(f"{VARIABLE} asks for the native launcher, but {failure}; unset it, or set it to python")
    return "python" if failure else "native"
