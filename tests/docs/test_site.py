"""The site builds without a warning, and its pages ask no other host for anything."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason="mkdocs-material is not installed (pip install -e '.[docs]')",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


class Requests(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        fetched = tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload")
        address = values.get("href") if fetched else values.get("src")
        if address:
            self.found.append(address)


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        requests = Requests()
        requests.feed(page.read_text("utf-8"))
        assert requests.found
        for address in requests.found:
            assert not re.match(r"(https?:)?//", address), f"{page.name}: {address}"
            if not address.startswith("data:") and page.name != "404.html":
                assert (page.parent / address.partition("?")[0]).is_file(), address
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\((['\"]?)https?:", sheet.read_text("utf-8")), sheet.name


def test_the_readme_is_the_first_page_and_results_are_listed(site: Path) -> None:
    home = (site / "index.html").read_text("utf-8")
    assert 'src="pictures/demo.jpg"' in home
    assert 'href="performance.html"' in home
    results = (site / "results.html").read_text("utf-8")
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert file.name in results


def test_the_search_knows_every_page(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f'"{page.stem}.html"' in index
