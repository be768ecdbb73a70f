"""The wheel: what is in it, what is not, and that it works without the source beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCE = ("package", "broker", "workers", "cli")
FILES = ("pyproject.toml", "README.md", "LICENSE", "Makefile")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; PYTHONPATH and the like are not passed on."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which an old build left a module that is gone since."""
    copy = tmp_path_factory.mktemp("source")
    for folder in SOURCE:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy2(ROOT / file, copy / file)
    stale = copy / "build" / "lib" / "pilotq" / "broker" / "deleted_long_ago.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    # The tools are those that run this test: make must not install its own (--old-file).
    run("make", "--silent", f"--old-file={sys.prefix}/dev.stamp", "wheel", f"VENV={sys.prefix}", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a virtual environment with the wheel; dependencies are seen through a .pth file."""
    home = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    pip = (sys.executable, "-m", "pip", f"--python={home}/bin/python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    # A folder from a .pth file comes last, and .pth files in it, such as an editable install's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.fixture(params=["/", "beside a folder pilotq"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "/":
        return Path("/")
    (tmp_path / "pilotq").mkdir()
    return tmp_path


def version() -> str:
    (found,) = re.findall('__version__ = "(.+)"', (ROOT / "package" / "__init__.py").read_text())
    return found


def test_the_wheel_holds_every_module_and_script_and_nothing_else(source: Path, wheel: Path) -> None:
    expected = {
        "/".join(["pilotq", *path.relative_to(source).parts[folder == "package" :]])
        for folder in SOURCE
        for path in (source / folder).rglob("*")
        if path.suffix in (".py", ".lua", ".typed", ".html", ".css", ".js", ".svg")
    }
    assert "pilotq/py.typed" in expected
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"pilotq-{version()}.dist-info/"
    native = {n for n in names if n.startswith("pilotq/workers/launcher/_native.") and n.endswith(".so")}
    assert len(native) == 1 or shutil.which("cc") is None
    assert {n for n in names if not n.startswith(info)} == expected | native
    assert any(n.startswith("pilotq/broker/store/scripts/") and n.endswith(".lua") for n in names)
    assert any(n.startswith(info) and n.endswith("LICENSE") for n in names)


def test_without_a_compiler_the_rest_is_installed(source: Path, tmp_path: Path) -> None:
    build = (sys.executable, "-W", "ignore", "-c", "from setuptools import setup; setup()", "build_ext")
    run(*build, "--force", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}", cwd=source, CC="false")
    assert not list(tmp_path.rglob("*.so"))


def test_python_finds_the_installed_package(installed: Path, somewhere: Path) -> None:
    show = "import pilotq.broker, pilotq.workers, pilotq.cli as last; print(last.__file__)"
    found = Path(run(installed / "python", "-c", show, cwd=somewhere).strip())
    assert installed.parent in found.parents


def test_the_command_and_the_module_say_their_version(installed: Path, somewhere: Path) -> None:
    assert version() in run(installed / "pilotq", "--version", cwd=somewhere)
    assert version() in run(installed / "python", "-m", "pilotq", "--version", cwd=somewhere)


def test_scripts_are_found_in_the_installed_package(installed: Path, somewhere: Path) -> None:
    show = (
        "from importlib.resources import files; "
        "print(*[f.name for f in files('pilotq.broker.store.scripts').iterdir()])"
    )
    scripts = {f.name for f in (ROOT / "broker" / "store" / "scripts").glob("*.lua")}
    assert scripts
    assert scripts <= set(run(installed / "python", "-c", show, cwd=somewhere).split())


def test_no_generic_name_is_installed(installed: Path) -> None:
    (site,) = installed.parent.glob("lib/python*/site-packages")
    tops = {p.name for p in site.iterdir() if not p.name.endswith(".pth")}
    assert tops == {"pilotq", f"pilotq-{version()}.dist-info"}


REQUESTS = """[
  {"request": "submit", "jobs": [
    {"name": "example", "iteration": {"stop": 4}, "execution": {"script": "echo ${it}", "stdout": "job.out.${it}"}}
  ]},
  {"request": "control", "command": "finishAfterAllTasksDone"}
]"""
ORIGINAL = "#!/bin/sh\necho the original\n"


def test_programs_of_qcg_pilotjob_run_here_once_that_is_installed(installed: Path, tmp_path: Path) -> None:
    """The module that batch scripts run, the program and the imports, with an original's program beside them."""
    (tmp_path / "jobs.json").write_text(REQUESTS)
    (installed / "qcg-pm-service").write_text(ORIGINAL)
    (installed / "qcg-pm-service").chmod(0o755)
    run(installed / "pilotq", "qcg", "install", cwd=tmp_path)
    assert "QCG-PilotJob's programs run on" in run(installed / "pilotq", "qcg", "install", cwd=tmp_path)
    python, service = installed / "python", installed / "qcg-pm-service"
    try:
        where = run(
            python, "-c", "import qcg.pilotjob.api.manager as m; print(m.LocalManager.__module__)", cwd=tmp_path
        )
        assert where == "pilotq.broker.qcg.manager\n"
        for program in ((python, "-m", "qcg.pilotjob.service"), (service,)):
            run(*program, "--nodes", "2", "--file-path", "jobs.json", cwd=tmp_path)
            outputs = sorted(tmp_path.glob("job.out.*"))
            assert [path.read_text() for path in outputs] == ["0\n", "1\n", "2\n", "3\n"]
            for path in outputs:
                path.unlink()
        # In a program that calls it itself, too.
        call = (
            "import pilotq.broker.qcg as q, runpy, sys; q.install(); sys.argv[1:] = ['--help']; "
            "runpy.run_module('qcg.pilotjob.service', run_name='__main__')"
        )
        assert "--file-path" in run(python, "-S", "-c", f"import site; site.main(); {call}", cwd=tmp_path)
    finally:
        run(installed / "pilotq", "qcg", "uninstall", cwd=tmp_path)
    assert service.read_text() == ORIGINAL
    service.unlink()
    refused = subprocess.run(
        [python, "-m", "qcg.pilotjob.service"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1 and "No module named" in refused.stderr
    assert run(installed / "pilotq", "qcg", "uninstall", cwd=tmp_path) == ""
    test_no_generic_name_is_installed(installed)
    assert not list(installed.glob("qcg-pm-service*"))
