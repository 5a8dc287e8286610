"""The page: what is on it and what its buttons do. Imports gradio."""

from __future__ import annotations

import html
import logging
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from lsync_compile.errors import Interrupted, LsyncError
from lsync_compile.web.runner import Job, Moment, Order, Outcome, Runner

log = logging.getLogger(__name__)

SAMPLE = Path(str(files("lsync_compile"))) / "assets" / "sample"
_POLL = 0.25  # seconds between looks at a job
_KEPT, _LOOKED = 3600, 60  # seconds that uploads and results are kept, and between looks

_PRESETS = [("Exact", "exact"), ("Balanced", "balanced"), ("Turbo", "turbo")]
_IDLE = (
    "<div class='note'>Give a clip with one talking face, and a speech. The result appears here, "
    "beside the clip.</div>"
)

CSS = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
SCRIPT = files(__package__).joinpath("page.js").read_text(encoding="utf-8")

Update = dict[Any, Any]


def build_page(runner: Runner, *, about: str, preset: str, folder: Path) -> gr.Blocks:
    """The page.

    Args:
        runner: does the jobs.
        about: one line on the checkpoint and the device.
        preset: which one is chosen at first.
        folder: for the files of jobs under way.
    """
    with gr.Blocks(
        title="lsync", analytics_enabled=False, delete_cache=(_LOOKED, _KEPT), fill_width=False
    ) as page:
        gr.HTML(f"<header><h1>Lip sync</h1><p>{html.escape(about)}</p></header>", elem_id="head")
        with gr.Row(elem_id="work"):
            with gr.Column(scale=5, min_width=300):
                with gr.Row(elem_id="given"):
                    video = gr.Video(
                        label="Clip", sources=["upload"], height=240, buttons=[], elem_id="clip"
                    )
                audio = gr.Audio(
                    label="Speech (the clip's own sound without it)",
                    sources=["upload", "microphone"],
                    type="filepath",
                    editable=False,
                    buttons=[],
                    elem_id="speech",
                )
                chosen = gr.Radio(
                    _PRESETS,
                    value=preset,
                    label="Preset",
                    info="Exact computes everything; turbo is fastest and costs a little quality.",
                    elem_id="preset",
                )
                with gr.Accordion("More", open=False):
                    seed = gr.Number(1247, label="Seed", precision=0, minimum=0, elem_id="seed")
                    steps = gr.Slider(4, 40, 20, step=1, label="Denoising steps", elem_id="steps")
                    guidance = gr.Slider(
                        1.0, 3.0, 1.5, step=0.1, label="Guidance (1 is off)", elem_id="guidance"
                    )
                with gr.Row(elem_id="buttons"):
                    start = gr.Button("Sync", variant="primary", elem_id="sync", min_width=90)
                    stop = gr.Button("Cancel", interactive=False, elem_id="cancel", min_width=90)
                    sample = gr.Button("Sample", elem_id="sample", min_width=90)
            with gr.Column(scale=7, min_width=300):
                status = gr.HTML(_IDLE, elem_id="status")
                with gr.Group(visible=False, elem_id="result") as result:
                    with gr.Row(elem_id="pair"):
                        before = gr.Video(
                            label="Original", interactive=False, min_width=130, buttons=[],
                            elem_id="before",
                        )  # fmt: skip
                        after = gr.Video(
                            label="Synced", interactive=False, min_width=130, buttons=[],
                            elem_id="after",
                        )  # fmt: skip
                    save = gr.DownloadButton("Download the synced clip", elem_id="save")
                    with gr.Accordion("Report", open=False, elem_id="report"):
                        report = gr.HTML()

        def sync(
            video: str | None,
            audio: str | None,
            preset: str,
            seed: float | None,
            steps: float,
            guidance: float,
            request: gr.Request,
        ) -> Iterator[Update]:
            if video is None:
                yield {status: say_error("Give a clip first.")}
                return
            order = Order(
                Path(video),
                Path(audio) if audio else None,
                preset,
                int(seed or 0),
                int(steps),
                guidance,
            )
            busy = {start: gr.Button(interactive=False), stop: gr.Button(interactive=True)}
            free = {start: gr.Button(interactive=True), stop: gr.Button(interactive=False)}
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                job = runner.start(str(request.session_hash), order, Path(scratch))
                try:
                    yield {**busy, result: gr.Group(visible=False), status: say(job.moment())}
                    while not job.wait(_POLL):
                        yield {status: say(runner.moment(job))}
                    yield {**free, **_outcome(job)}
                finally:
                    # Also where the page is closed: then this generator is.
                    job.cancel()
                    job.wait(60)

        def _outcome(job: Job) -> Update:
            error = job.future.exception()
            if error is not None:
                return {status: say_failure(error, job.order)}
            done = job.future.result()
            return {
                status: say_done(done),
                result: gr.Group(visible=True),
                before: str(done.original),
                after: str(done.synced),
                save: gr.DownloadButton(value=str(done.synced)),
                report: f"<pre>{html.escape(done.report)}</pre>",
            }

        def cancel(request: gr.Request) -> None:
            runner.cancel(str(request.session_hash))

        shown = [start, stop, status, result, before, after, save, report]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        start.click(
            sync,
            [video, audio, chosen, seed, steps, guidance],
            shown,
            concurrency_limit=None,  # the runner has the queue
            **quiet,
        )
        stop.click(cancel, queue=False, **quiet)
        sample.click(
            lambda: (str(SAMPLE / "talking.mp4"), str(SAMPLE / "speech.wav")),
            outputs=[video, audio],
            **quiet,
        )
        page.unload(cancel)
    return page


def say(moment: Moment) -> str:
    """A job under way, as HTML."""
    if moment.ahead:
        others = "one other job" if moment.ahead == 1 else f"{moment.ahead} other jobs"
        return _bar(0.0, f"Waiting for {others}", "")
    left = "" if moment.left is None else f"about {_time(moment.left)} left"
    return _bar(moment.share, moment.doing or "Syncing", left)


def say_done(done: Outcome) -> str:
    """A finished job, as HTML."""
    missing = ""
    if done.missing:
        missing = f" · {done.missing} without a face, unchanged"
    rate = done.frames / done.seconds
    worth = {work: seconds for work, seconds in done.times.items() if seconds >= 0.05}
    times = " · ".join(f"{work} {_time(seconds, digits=1)}" for work, seconds in worth.items())
    lines = [html.escape(line) for line in (times, *done.notes) if line]
    small = "".join(f"<div class='small'>{line}</div>" for line in lines)
    return (
        f"<div class='note good'>{done.frames} frames in {_time(done.seconds, digits=1)} "
        f"({rate:.{1 if rate >= 1 else 2}f} frames/s){missing}{small}</div>"
    )


def say_failure(error: BaseException, order: Order) -> str:
    """A job that failed, as HTML: one line, with the names that its files had."""
    if isinstance(error, Interrupted):
        return "<div class='note'>Cancelled.</div>"
    if isinstance(error, LsyncError):
        line = str(error)
        for path in (order.video, order.audio):
            if path is not None:
                line = line.replace(str(path), path.name)
        return say_error(line)
    log.error("a job failed", exc_info=error)
    return say_error(
        f"{type(error).__name__}: {error}. This is a fault of lsync; the terminal has the details."
    )


def say_error(line: str) -> str:
    """What is wrong, as HTML."""
    return f"<div class='note bad' role='alert'>{html.escape(line)}</div>"


def _bar(share: float, doing: str, left: str) -> str:
    percent = f"{share:.0%}" if share else ""
    return (
        "<div class='note'>"
        f"<div class='line'><span>{html.escape(doing)}</span><span>{left}</span></div>"
        f"<div class='bar' role='progressbar' aria-valuenow='{share:.2f}'>"
        f"<div style='width: {100 * share:.1f}%'></div></div>"
        f"<div class='line'><span>{percent}</span></div></div>"
    )


def _time(seconds: float, *, digits: int = 0) -> str:
    if seconds < 10:
        return f"{seconds:.{digits}f} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
