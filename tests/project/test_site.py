"""The documents as a site: every one has its place in the navigation, and its links and fences suit the generator."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
from docs.build_site import FENCED, SITE, pages_of_navigation, places, staged

from tests.support.paths import ROOT

PAGES = sorted(path for path in places() if path.endswith(".md"))


def test_every_document_is_in_the_navigation_once() -> None:
    named = list(pages_of_navigation())
    assert sorted(named) == sorted(places()[page] for page in PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_stay_in_the_site(page: str) -> None:
    staged((ROOT / page).read_text(encoding="utf-8"), page, places())


def test_links_and_fences_are_rewritten() -> None:
    known = {"README.md": "index.md", "docs/a.md": "a.md", "docs/design/b.md": "design/b.md"}
    assert staged("[a](docs/a.md#x), [web](https://example.org/docs/a.md)", "README.md", known) == (
        "[a](a.md#x), [web](https://example.org/docs/a.md)"
    )
    assert staged("![b](../a.md)", "docs/design/b.md", known) == "![b](../a.md)"
    fence = "```toml x.toml\n[a](nowhere.md)\n```\n"
    assert staged(fence, "README.md", known) == '```toml title="x.toml"\n[a](nowhere.md)\n```\n'
    with pytest.raises(ValueError, match=r"README\.md: nowhere\.md is not part of the site"):
        staged("[a](nowhere.md)", "README.md", known)


@pytest.mark.parametrize("page", PAGES)
def test_fences_in_lists_are_indented_for_every_reader(page: str) -> None:
    """Two spaces are enough for some readers, four for all."""
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    found = [line for line in text.splitlines() if line.lstrip().startswith("```") and not line.startswith("    ")]
    assert not found


@pytest.mark.skipif(find_spec("zensical") is None, reason="zensical is not installed")
def test_the_site_is_built_and_loads_nothing_from_elsewhere() -> None:
    done = subprocess.run([sys.executable, "docs/build_site.py"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted(SITE.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not [mark for mark in ('src="http', 'rel="stylesheet" href="http', "fonts.g") if mark in text], page
