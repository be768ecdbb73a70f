"""Compiles the small C programs that some benchmarks need."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def compiled(name: str, folder: str) -> str:
    """The path of benchmarks/<name>.c as a program in ``folder``; ends the benchmark where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit(f"benchmarks/{name}.c needs a C compiler (cc, gcc or clang) on PATH: install one")
    source, program = Path(__file__).with_name(f"{name}.c"), Path(folder, name)
    # Static: what counts is our part of the start, not the linker's.
    done = subprocess.run(
        [compiler, "-O2", "-static", "-o", program, source], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{compiler} cannot compile {source}: {done.stderr}")
    return str(program)
