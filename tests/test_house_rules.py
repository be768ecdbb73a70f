"""What CONTRIBUTING.md asks of the code, as far as a program can check it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
ROOMS = ("package", "broker", "workers", "cli")
CODE = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
OTHER = [path for room in ("tests", "benchmarks", "examples") for path in sorted((ROOT / room).rglob("*.py"))]

# name -> ceiling; a file as "broker/x.py", a function as "broker/x.py:name". Only ever shorter.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}

# These can be tested and simulated without a server or a process: time is an argument.
PURE = ("aside", "placement", "quantities", "retries", "states", "task")
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
    """The name a file has when installed: broker/task.py is pilotq.broker.task."""
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
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONG_FILES.get(name(path), 500 if name(path).startswith("tests/") else 400)
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= LONG_FUNCTIONS.get(f"{name(path)}:{node.name}", 60), f"{node.name} has {length} lines"


def test_exceptions_of_length_are_needed() -> None:
    """An exception for a file or function that is short enough by now, or gone, goes too."""
    files = {name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in CODE + OTHER}
    functions = {
        f"{name(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in CODE + OTHER
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert all(files.get(n, 0) > (500 if n.startswith("tests/") else 400) for n in LONG_FILES)
    assert all(functions.get(n, 0) > 60 for n in LONG_FUNCTIONS)


def docstrings(module_tree: ast.Module) -> set[int]:
    """ids of the constants that are docstrings, and of strings that stand alone."""
    return {id(node.value) for node in ast.walk(module_tree) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("path", [p for p in CODE if name(p) != "broker/keys.py"], ids=name)
def test_keys_are_spelled_in_one_module(path: Path) -> None:
    skipped = docstrings(tree(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and id(node) not in skipped:
            text = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            # "pilotq: no such task" is a message, "pilotq:inbox" a key.
            assert not re.match(r"(rq|pilotq):(?!\s)", text), f"line {node.lineno}: {text!r} belongs in broker/keys.py"


@pytest.mark.parametrize("path", CODE, ids=name)
def test_imports_go_from_cli_to_workers_to_broker(path: Path) -> None:
    room = name(path).partition("/")[0]
    forbidden = {
        "broker": ("pilotq.workers", "pilotq.cli"),
        "workers": ("pilotq.cli", "redis", "hiredis"),
        "cli": ("redis", "hiredis"),
        "package": ("redis", "hiredis"),
    }[room]
    for imported in imports(path):
        assert not under(imported, *forbidden), f"{room} imports {imported}"
        assert not under(imported, "rq") or name(path) == "broker/rq_jobs.py", "only broker/rq_jobs.py imports rq"


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
    assert waiting, f"broker/{start}.py does not exist: PURE names a module that is gone"
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
    for folder in (*ROOMS, "tests", "benchmarks", "examples", "docs", "scripts"):
        for path in sorted((ROOT / folder).rglob("*")):
            hidden = any(part.startswith(".") or part == "results" for part in path.relative_to(ROOT).parts)
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
