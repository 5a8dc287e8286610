"""The site builds without a warning, and its pages ask no other host for anything."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


@pytest.mark.slow
def test_every_page_in_a_browser(site: Path) -> None:
    """On a phone and on a screen; then the search."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = os.environ.get("CHROMIUM")
    if chromium is None:
        pytest.skip(
            "opens each page twice, which takes long: set CHROMIUM to the program to run it"
        )
    pages = sorted(path.name for path in site.glob("*.html") if path.name != "404.html")
    with served(site) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        phone = browser.new_page(viewport={"width": 390, "height": 844})
        screen = browser.new_page(viewport={"width": 1280, "height": 900})
        assert faults(phone, address, pages) == []
        assert faults(screen, address, pages) == []
        for start in (address, site.as_uri() + "/"):  # from a server and from the disk
            screen.goto(f"{start}index.html?q=capture")
            screen.wait_for_selector(".md-search-result__item")
        browser.close()


def faults(tab: Any, address: str, pages: list[str]) -> list[str]:
    """Errors, requests to others, missing pictures, and what is wider than the page."""
    found: list[str] = []
    asked: set[str] = set()
    tab.on("pageerror", lambda error: found.append(str(error)))
    tab.on("request", lambda request: asked.add(request.url))
    for name in pages:
        tab.goto(address + name)
        if tab.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
            found.append(f"{name} is wider than the page")
        if tab.evaluate("[...document.images].some(image => !image.naturalWidth)"):
            found.append(f"{name}: a picture is missing")
    return found + [url for url in asked if not url.startswith((address, "data:", "blob:"))]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder at an address of this machine."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    """Says nothing of each request."""

    def log_message(self, *args: object) -> None:
        pass
