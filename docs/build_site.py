"""Builds the documents as a site: copies them below .site/, and has Zensical make site/ of them, without network.

    python docs/build_site.py

The README is the start page. Links between documents, and heads of fences that name a file, are rewritten for the
generator; a link to what is not part of the site fails, as does one that leads nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
STAGE, SITE = ROOT / ".site", ROOT / "site"
CONFIGURATION = ROOT / "docs" / "zensical.toml"
KINDS = (".md", ".svg", ".png", ".json", ".css", ".toml")
# Documents at the top of the repository -> their places in the site.
OF_ROOT = {
    "README.md": "index.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md", "LICENSE": "license.txt",
}  # fmt: skip
FENCED = re.compile(r"^(?P<mark>`{3,})(?P<kind>\w*) *(?P<file>\S*)\n(?P<body>.*?)^(?P=mark)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<heading>#[^)\s]*)?(?=\))")


def places() -> dict[str, str]:
    """Every file of the site: its path in the repository -> its path in the site."""
    found = dict(OF_ROOT)
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.is_file() and path.suffix in KINDS and path != CONFIGURATION:
            found[path.relative_to(ROOT).as_posix()] = path.relative_to(ROOT / "docs").as_posix()
    for path in sorted((ROOT / "examples").glob("*/README.md")):
        found[path.relative_to(ROOT).as_posix()] = f"example-{path.parent.name}.md"
    return found


def pages_of_navigation(entries: Any = None) -> Iterator[str]:
    """The pages that the navigation names."""
    if entries is None:
        entries = tomllib.loads(CONFIGURATION.read_text(encoding="utf-8"))["project"]["nav"]
    for entry in entries:
        for below in entry.values():
            yield from [below] if isinstance(below, str) else pages_of_navigation(below)


def staged(text: str, path: str, known: dict[str, str]) -> str:
    """The text of a document as the generator takes it; ``path`` is its own. Raises ValueError for a wrong link."""
    pieces, end = [], 0
    for fence in FENCED.finditer(text):
        pieces.append(_linked(text[end : fence.start()], path, known))
        mark, kind, file, body = fence["mark"], fence["kind"], fence["file"], fence["body"]
        title = f' title="{file}"' if file else ""
        pieces.append(f"{mark}{kind or 'text'}{title}\n{body}{mark}")
        end = fence.end()
    return "".join([*pieces, _linked(text[end:], path, known)])


def _linked(text: str, path: str, known: dict[str, str]) -> str:
    def moved(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        goal = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if goal not in known:
            raise ValueError(f"{path}: {target} is not part of the site: see docs/build_site.py")
        return os.path.relpath(known[goal], os.path.dirname(known[path]) or ".") + (link["heading"] or "")

    return LINK.sub(moved, text)


def main() -> int:
    shutil.rmtree(STAGE, ignore_errors=True)
    known = places()
    for source, goal in known.items():
        place = STAGE / "pages" / goal
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".md"):
            place.write_text(staged((ROOT / source).read_text(encoding="utf-8"), source, known), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / source, place)
    shutil.copyfile(CONFIGURATION, STAGE / CONFIGURATION.name)
    program = os.path.join(os.path.dirname(sys.executable), "zensical")
    if not os.path.exists(program):
        sys.exit("zensical is not installed beside this Python: `make docs` does that, with Python 3.11 or newer")
    done = subprocess.run([program, "build", "--strict", "--config-file", CONFIGURATION.name], cwd=STAGE, check=False)
    if done.returncode == 0:
        shutil.rmtree(SITE, ignore_errors=True)
        (STAGE / "site").rename(SITE)
        print(f"The site is in {SITE}: open index.html.")  # noqa: T201 - a program of its own
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
