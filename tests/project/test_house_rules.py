"""What CONTRIBUTING.md asks of the code, as far as a program can check it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOMS = ("package", "broker", "workers", "cli")
CODE = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
INTEGRATIONS = [path for path in sorted((ROOT / "integrations").rglob("*.py")) if "build" not in path.parts]
OTHER = [path for room in ("tests", "benchmarks", "examples") for path in sorted((ROOT / room).rglob("*.py"))]
OTHER += INTEGRATIONS
# What a program of a user imports.
USABLE = {"pilotq", *(f"pilotq.broker{name}" for name in ("", ".__init__", ".client", ".taskfiles", ".tasks"))}

# Longer than this asks for a reason: a file as "broker/x.py", a function as "broker/x.py:name" -> why it is one thing.
FILE_LINES, FUNCTION_LINES = 500, 60
LONG_FILES: dict[str, str] = {
    "workers/execution/node.py": "all that changes the state of an execution: apart, no part could be understood",
}
LONG_FUNCTIONS: dict[str, str] = {}

# row of the table -> the rows it may import
MAY_IMPORT = {
    row["name"]: {f"pilotq.{other}" for other in row["imports"]}
    for row in tomllib.loads((ROOT / "docs/design/packages.toml").read_text(encoding="utf-8"))["package"]
}

# These can be tested and simulated without a server or a process: time is an argument.
PURE = (
    "scheduling.placement", "scheduling.quarantine", "tasks.array_indices", "tasks.dependencies",
    "tasks.model", "tasks.quantities",
    "tasks.retry_policy", "tasks.runtime_estimate", "tasks.spec", "tasks.states", "tasks.validation",
)  # fmt: skip
IMPURE = {
    "asyncio", "datetime", "hiredis", "multiprocessing", "os", "psutil", "redis", "rq", "select", "selectors", "signal",
    "socket", "subprocess", "threading", "time",
}  # fmt: skip


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    """The name a file has when installed: broker/tasks/model.py is pilotq.broker.tasks.model."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "package" else parts
    return ".".join(["pilotq", *(p for p in parts if p != "__init__")])


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever in it; for ``from a import b`` both a and a.b, as b may be a module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: write the import in full"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def written(path: Path) -> str:
    """As `module`, but the face of a package has a name of its own: pilotq.broker.__init__."""
    return module(path) + (".__init__" if path.name == "__init__.py" else "")


def row_of(imported: str) -> str:
    """The row of the table that a module belongs to: that of the longest name."""
    return max((row for row in MAY_IMPORT if under(imported, row)), key=len)


def under(imported: str, *packages: str) -> bool:
    return any(imported == p or imported.startswith(p + ".") for p in packages)


def test_the_list_of_packages_is_the_list_of_folders() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {module(path.with_name("__init__.py")) for path in CODE}
    scripts = {module(path.with_name("__init__.py")) for room in ROOMS for path in (ROOT / room).rglob("*.lua")}
    assert set(setuptools["packages"]) == folders | scripts
    assert len(setuptools["packages"]) == len(set(setuptools["packages"]))
    # Without an __init__.py of its own a package loses against any folder of its name.
    assert all((path.parent / "__init__.py").is_file() for path in CODE)
    # Every room is mapped, and the scripts' folder brings its scripts.
    assert setuptools["package-dir"] == {"pilotq": "package"} | {f"pilotq.{r}": r for r in ROOMS if r != "package"}
    assert scripts <= {p for p, patterns in setuptools["package-data"].items() if "*.lua" in patterns}


@pytest.mark.parametrize("path", CODE + OTHER, ids=name)
def test_long_files_and_functions_have_a_reason(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES or name(path) in LONG_FILES, "split it, or say in LONG_FILES why it is one thing"
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            named = f"{name(path)}:{node.name}" in LONG_FUNCTIONS
            assert length <= FUNCTION_LINES or named, f"{node.name} has {length} lines"


def test_exceptions_of_length_are_needed() -> None:
    """An exception for a file or function that is short enough by now, or gone, goes too."""
    files = {name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in CODE + OTHER}
    functions = {
        f"{name(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in CODE + OTHER
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert all(files.get(n, 0) > FILE_LINES for n in LONG_FILES)
    assert all(functions.get(n, 0) > FUNCTION_LINES for n in LONG_FUNCTIONS)


def docstrings(module_tree: ast.Module) -> set[int]:
    """ids of the constants that are docstrings, and of strings that stand alone."""
    return {id(node.value) for node in ast.walk(module_tree) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("path", [p for p in CODE if name(p) != "broker/store/keys.py"], ids=name)
def test_keys_are_spelled_in_one_module(path: Path) -> None:
    skipped = docstrings(tree(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and id(node) not in skipped:
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            # "pilotq: no such task" is a message, "pilotq:inbox" a key.
            assert not re.match(r"(rq|pilotq):(?!\s)", text), (
                f"line {node.lineno}: {text!r} belongs in broker/store/keys.py"
            )


@pytest.mark.parametrize("path", CODE, ids=name)
def test_imports_go_up_the_table_of_packages(path: Path) -> None:
    """docs/design/packages.toml says who may import whom, wherever in a file the import stands."""
    mine = row_of(written(path))
    for imported in imports(path):
        if under(imported, "pilotq") and (theirs := row_of(imported)) not in ("pilotq", mine):
            assert theirs in MAY_IMPORT[mine], f"{mine} imports {imported}: packages.toml does not let it"


def test_the_table_of_packages_has_no_circle_and_no_idle_line() -> None:
    rows = list(MAY_IMPORT)
    used: dict[str, set[str]] = {row: set() for row in rows}
    for path in CODE:
        found = {row_of(imported) for imported in imports(path) if under(imported, "pilotq")}
        used[row_of(written(path))] |= found - {"pilotq", row_of(written(path))}
    for number, row in enumerate(rows):
        assert MAY_IMPORT[row] <= set(rows[:number]), f"{row} may import what stands below it"
        assert MAY_IMPORT[row] == used[row], f"{row} may import what it does not, or the other way round"


@pytest.mark.parametrize("path", CODE, ids=name)
def test_only_the_broker_talks_to_redis_and_one_module_to_rq(path: Path) -> None:
    for imported in imports(path):
        assert not under(imported, "redis", "hiredis") or name(path).startswith("broker/"), f"imports {imported}"
        assert not under(imported, "rq") or name(path) == "broker/rq/jobs.py", "only broker/rq/jobs.py imports rq"


@pytest.mark.parametrize("path", INTEGRATIONS, ids=name)
def test_integrations_are_programs_of_users(path: Path) -> None:
    """They use what any program may use."""
    assert not {row_of(imported) for imported in imports(path) if under(imported, "pilotq")} - USABLE


@pytest.mark.parametrize("path", CODE + OTHER, ids=name)
def test_no_import_of_the_bare_folders(path: Path) -> None:
    for imported in imports(path):
        assert not under(imported, "broker", "workers", "cli", "package"), f"write pilotq.{imported}"


@pytest.mark.parametrize("start", PURE)
def test_pure_modules_reach_no_server_clock_or_process(start: str) -> None:
    """Neither directly nor through another module of ours."""
    files = {module(p): p for p in CODE}
    first = f"pilotq.broker.{start}"
    waiting = [first] if first in files and files[first].name != "__init__.py" else []
    waiting += [m for m in files if m.startswith(first + ".")]
    assert waiting, f"pilotq.broker.{start} does not exist: PURE names a module that is gone"
    seen = set(waiting)
    while waiting:
        current = waiting.pop()
        for imported in imports(files[current]):
            assert imported.partition(".")[0] not in IMPURE, f"{first} imports {imported}, in {current}"
            if imported in files and imported not in seen:
                seen.add(imported)
                waiting.append(imported)


def texts() -> Iterator[Path]:
    """Every file of the project that a person wrote."""
    kinds = {".py", ".lua", ".md", ".toml", ".txt", ".yml", ".json", ".cfg", ""}
    for path in [*ROOT.iterdir(), *(ROOT / ".ci").rglob("*")]:
        if path.is_file() and path.suffix in kinds and (path.name == ".gitignore" or not path.name.startswith(".")):
            yield path
    for folder in (*ROOMS, "integrations", "tests", "benchmarks", "examples", "docs", "scripts"):
        for path in sorted((ROOT / folder).rglob("*")):
            hidden = any(part.startswith(".") or part in ("results", "build") for part in path.relative_to(ROOT).parts)
            if path.is_file() and path.suffix in kinds and not hidden:
                yield path


def test_no_path_of_one_machine_and_no_registry_host() -> None:
    # Put together here so that this file does not hold what it looks for.
    places = ["/ro" + "ot/", "/ho" + r"me/(?!USER|user|you|me\b)", "/wo" + "rk/", "/Us" + "ers/"]
    hosts = ["pypi" + r"\.org", "pythonhos" + "ted", "crates" + r"\.io", "deb\\.debi" + "an", "npm" + "js"]
    pattern = re.compile("|".join([rf"(?<![\w./}}-])(?:{'|'.join(places)})", *hosts]))
    found = [
        f"{name(path)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_version_stands_in_one_place() -> None:
    found = re.findall(r'^__version__ = "(.+)"$', (ROOT / "package" / "__init__.py").read_text(), re.MULTILINE)
    assert len(found) == 1
    quoted = re.compile(rf"[\"'=v]{re.escape(found[0])}[\"'\s]")
    homes = [name(p) for p in [*CODE, ROOT / "pyproject.toml", ROOT / "Makefile"] if quoted.search(p.read_text())]
    assert homes == ["package/__init__.py"]
