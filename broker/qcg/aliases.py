"""QCG-PilotJob's module names as aliases of this package, for programs that cannot be edited.

An installed original stays where it is: ``qcg`` and ``qcg.pilotjob`` are namespace packages, so what we do not
replace (``qcg.pilotjob.utils``...) is still found there. A module is made when it is imported, not before.
``python -m qcg.pilotjob.service`` runs our service.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False  # every program of an environment may import this: without typing and its like it takes a third
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

_OURS = "pilotq.broker.qcg"
_HOMES = {
    "qcg.pilotjob.api.errors": f"{_OURS}.errors",
    "qcg.pilotjob.api.job": f"{_OURS}.jobs",
    "qcg.pilotjob.api.jobinfo": f"{_OURS}.jobinfo",
    "qcg.pilotjob.api.manager": f"{_OURS}.manager",
    "qcg.pilotjob.executor_api.qcgpj_executor": f"{_OURS}.executor",
    "qcg.pilotjob.executor_api.qcgpj_future": f"{_OURS}.executor",
    "qcg.pilotjob.executor_api.templates.basic_template": f"{_OURS}.executor",
    "qcg.pilotjob.executor_api.templates.qcgpj_template": f"{_OURS}.executor",
}
# Programs, for `python -m`.
_PROGRAMS = {"qcg.pilotjob.service": "pilotq.cli.qcg.service"}
# Packages that hold their modules only; the code of an original's __init__ is not run.
_PACKAGES = frozenset(
    ("qcg", "qcg.pilotjob", "qcg.pilotjob.api", "qcg.pilotjob.executor_api", "qcg.pilotjob.executor_api.templates")
)


def install() -> None:
    """Let ``import qcg.pilotjob.api.manager`` and its like find this package; may be called again.

    It wins over an installed original. One that was imported before is forgotten, but names that were taken from it
    (``from ... import LocalManager``) stay what they are: call it first.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name in (*_HOMES, *_PROGRAMS):
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds and makes the modules of _HOMES, _PROGRAMS and _PACKAGES; all others are left to the finders behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = fullname in _PACKAGES
        if not package and fullname not in _HOMES and fullname not in _PROGRAMS:
            return None
        # No subclass of Loader: importing importlib.abc takes longer than all of this.
        spec = ModuleSpec(fullname, self, is_package=package)  # type: ignore[arg-type]
        if fullname in _PROGRAMS:
            spec.origin = _code_of(fullname)[0]  # what sys.argv[0] becomes
        if package:
            original = PathFinder.find_spec(fullname, path)
            spec.submodule_search_locations = list((original and original.submodule_search_locations) or ())
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Nothing of our own: an empty module is made."""

    def exec_module(self, module: ModuleType) -> None:
        home = (_HOMES | _PROGRAMS).get(module.__name__)
        if home is not None:
            names = vars(import_module(home))
            vars(module).update({name: value for name, value in names.items() if not name.startswith("__")})

    def get_code(self, fullname: str) -> CodeType | None:
        """What `python -m` runs; nothing for the other modules, which are no programs."""
        return _code_of(fullname)[1] if fullname in _PROGRAMS else None


def _code_of(fullname: str) -> tuple[str | None, CodeType | None]:
    """The file and the code of our program in the place of ``fullname``."""
    from importlib.util import find_spec

    home = _PROGRAMS[fullname]
    spec = find_spec(home)
    assert spec is not None and spec.loader is not None, "it is part of this package"
    return spec.origin, spec.loader.get_code(home)  # type: ignore[attr-defined]
