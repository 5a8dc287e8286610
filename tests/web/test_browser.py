"""The page in headless Chromium: upload, sync, both clips side by side, cancel, errors.

Needs gradio, playwright and a Chromium (``CHROMIUM`` names one that is not on the path); skipped
with what is missing otherwise. Every request of the browser and every connection of the server is
looked at: none may leave this machine.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from told import Told

from lsync_compile.media.video import probe
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.web.runner import Runner
from lsync_compile.web.server import build_app, listening_socket, scratch_folder

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
if CHROMIUM is None:
    MISSING.append("Chromium")

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the page is tried in a browser only with {', '.join(MISSING)}"
)
Maker = Callable[..., Path]


class Site:
    """The page served from this process, and what it tried to reach."""

    def __init__(self, url: str, folder: Path, pipeline: LatentSyncPipeline) -> None:
        self.url = url
        self.folder = folder
        self.pipeline = pipeline
        self.presets: list[str] = []
        self.reached: set[str] = set()


@pytest.fixture
def site(tiny_pipeline: LatentSyncPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    import uvicorn

    vars(tiny_pipeline)["lsync"] = Told("what <was> done")
    with listening_socket("127.0.0.1", 0) as (taken, address), scratch_folder() as folder:
        # where Gradio makes folders is settled when it is imported, for the first of several sites
        monkeypatch.setattr("gradio.routes.DEFAULT_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])
        served = Site(address.url, folder, tiny_pipeline)
        connect = socket.socket.connect

        def watched(sock: socket.socket, where: Any) -> None:
            if sock.family != socket.AF_UNIX:
                served.reached.add(where[0])
            connect(sock, where)

        monkeypatch.setattr(socket.socket, "connect", watched)

        def compiled(preset: str) -> Any:
            served.presets.append(preset)
            return tiny_pipeline

        runner = Runner(compiled)
        app = build_app(runner, address, about="tiny <model>", preset="exact", folder=folder)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, args=([taken],))
        thread.start()
        yield served
        server.should_exit = True
        thread.join(20)
        runner.close()


def host_of(url: str) -> str:
    """Host and port; empty for what is in the address itself."""
    return urlsplit(url.removeprefix("blob:")).netloc


class Browser:
    """A page in Chromium, with all that went wrong in it and all that it asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.hosts.add(host_of(request.url)))
        page.on(
            "response",
            lambda response: (
                response.status >= 400 and self.wrong.append(f"{response.status} {response.url}")
            ),
        )

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.wrong.append(message.text)

    def give(self, video: Path, audio: Path | None = None) -> None:
        self.page.set_input_files("#clip input[type=file]", str(video))
        self.page.wait_for_selector("#clip video")
        if audio is not None:
            self.page.set_input_files("#speech input[type=file]", str(audio))
            self.page.wait_for_selector("#speech [data-testid^=waveform]")

    def set_steps(self, steps: int) -> None:
        if not self.page.is_visible("#steps"):
            self.page.click("text=More")
        self.page.fill("#steps input[type=number]", str(steps))

    def status(self, text: str, seconds: float = 120) -> None:
        self.page.wait_for_selector(f"#status :text('{text}')", timeout=seconds * 1000)


@pytest.fixture
def browser(site: Site) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1240, "height": 900})
        made = Browser(page)
        page.goto(site.url)
        page.wait_for_selector("#sync")
        yield made
        chromium.close()


def test_a_clip_is_synced_and_shown_beside_the_original(
    site: Site, browser: Browser, make_clip: Maker, make_speech: Maker
) -> None:
    page = browser.page
    assert page.inner_text("#head p") == "tiny <model>"
    browser.give(make_clip(12), make_speech(0.8))
    page.click("#preset label:has-text('Turbo')")
    browser.set_steps(4)
    page.click("#sync")
    browser.status("20 frames in")
    page.wait_for_function(
        "[...document.querySelectorAll('#pair video')].filter(v => v.readyState > 1).length == 2"
    )
    before, after = page.evaluate(
        """[...document.querySelectorAll('#pair video')].map(video => {
            const box = video.getBoundingClientRect();
            return {x: box.x, y: box.y, width: box.width, lasts: video.duration, from: video.src};
        })"""
    )
    assert before["from"].endswith("clip_original.mp4")
    assert after["from"].endswith("clip_synced.mp4")
    assert before["y"] == after["y"]
    assert before["x"] + before["width"] <= after["x"]
    assert before["lasts"] == pytest.approx(after["lasts"], abs=0.05) == pytest.approx(0.8, abs=0.1)
    page.evaluate("document.querySelector('#after video').play()")
    page.wait_for_function("document.querySelector('#before video').currentTime > 0.1")
    assert page.inner_text("#status .small >> nth=0") == "decode 1.5 s · paste 0.5 s"
    page.click("text=Report")
    assert page.inner_text("#report pre") == "what <was> done"
    with page.expect_download() as download:
        page.click("#save")
    assert probe(download.value.path()).has_audio
    assert site.presets == ["turbo"]
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.wrong == []
    assert browser.hosts - {""} == {host_of(site.url)}
    assert site.reached <= {"127.0.0.1"}
    # of the work only what is shown is left
    assert not list(site.folder.glob("tmp*"))


def test_errors_are_lines_and_cancel_ends_a_job(
    site: Site, browser: Browser, make_clip: Maker, make_speech: Maker
) -> None:
    page = browser.page
    page.click("#sync")
    browser.status("Give a clip first.")
    browser.give(make_clip(3, black=(0, 1, 2), name="dark.mp4"), make_speech(20.0))
    page.click("#sync")
    browser.status("dark.mp4: no usable face")
    assert str(site.folder) not in page.inner_text("#status")
    assert page.is_disabled("#cancel")
    page.click("#clip [aria-label=Clear]")
    browser.give(make_clip(6))
    page.click("#sync")
    browser.status("left")
    assert page.is_disabled("#sync")
    page.click("#cancel")
    browser.status("Cancelled.")
    assert not page.is_disabled("#sync")
    assert not page.is_visible("#result")
    assert browser.wrong == []


def test_a_closed_page_ends_its_job(
    site: Site, browser: Browser, make_clip: Maker, make_speech: Maker
) -> None:
    page = browser.page
    browser.give(make_clip(6), make_speech(20.0))
    page.click("#sync")
    browser.status("left")
    page.close()
    deadline = time.monotonic() + 60
    while list(site.folder.glob("tmp*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(site.folder.glob("tmp*"))
