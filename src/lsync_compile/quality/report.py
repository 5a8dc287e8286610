"""One page that shows a study: pictures, plots and tables. Opens offline, in light and dark."""

from __future__ import annotations

import base64
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lsync_compile.errors import MediaError
from lsync_compile.files import write_whole
from lsync_compile.quality.bars import Verdict
from lsync_compile.quality.compare import Study
from lsync_compile.quality.extra import require
from lsync_compile.quality.plots import Level, Line, line_plot
from lsync_compile.quality.runs import FPS, Run
from lsync_compile.quality.sync import Array, speech_band
from lsync_compile.quality.tables import number, study_tables

Picture = NDArray[np.uint8]

# Differences of half precision are one or two levels of 255: invisible without this.
AMPLIFY = 8
_FACE_SIDE, _FRAME_HEIGHT = 256, 420
_WEBP_QUALITY = 90
_MAX_FRAMES = 6


@dataclass(frozen=True)
class Row:
    """One frame side by side."""

    title: str
    pictures: list[str]  # data URIs


def write_page(
    path: Path,
    study: Study,
    runs: Sequence[Run],
    verdicts: Sequence[Verdict] = (),
) -> None:
    """Write the page; an existing file is replaced only by a whole one.

    Args:
        path: the HTML file.
        study: the figures.
        runs: the reference's run and those of the candidates, in the study's order.
        verdicts: on the bars of the candidates.

    Raises:
        MediaError: the folder is missing or cannot be written to.
        MissingExtraError: jinja2 is not installed.
    """
    check_target(path)
    text = render_page(study, runs, verdicts)
    write_whole(path, text)


def check_target(path: Path) -> None:
    """Fail before the work and not after it.

    Raises:
        MediaError: the folder is missing, or the path is a folder.
        MissingExtraError: jinja2 is not installed.
    """
    require("jinja2")
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; name a file such as {path / 'quality.html'}")


def render_page(study: Study, runs: Sequence[Run], verdicts: Sequence[Verdict] = ()) -> str:
    """The page as text; arguments as for `write_page`."""
    jinja2: Any = importlib.import_module("jinja2")
    source = files("lsync_compile.quality").joinpath("templates", "report.html")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    base = runs[0]
    names = [result.setting.name for result in study.candidates]
    page: str = environment.from_string(source.read_text(encoding="utf-8")).render(
        study=study,
        video=study.clip.video.name,
        sound="its own sound" if study.clip.audio is None else study.clip.audio.name,
        seconds=study.reference.frames / FPS,
        side=base.mask.shape[-1],
        cards=_cards(study),
        verdicts=verdicts,
        tables=study_tables(study),
        psnr_plot=_psnr_plot(study, base),
        sync_plot=_sync_plot(study),
        line_names=names,
        sync_names=[study.reference.setting.name, *names],
        comparisons=[
            (name, _face_rows(study, index, base, run), _frame_row(study, index, base, run))
            for index, (name, run) in enumerate(zip(names, runs[1:], strict=True))
        ],
        amplify=AMPLIFY,
    )
    return page


def _cards(study: Study) -> list[tuple[str, str, str]]:
    """The figures to see first: (value, unit, what it is)."""
    cards = []
    heard = [result for result in study.candidates if not result.setting.muted]
    for result in heard[:1]:
        scores, base = result.against_reference["mouth"], study.reference
        speed = result.frames_per_second / base.frames_per_second
        against = f"mouth region against {base.setting.name}"
        cards += [
            (number(scores.psnr.value, 1), "dB", f"PSNR, {against}"),
            (number(scores.ssim.value, 4), "", f"SSIM, {against}"),
            (f"{speed:.2f}", "x", f"as fast as {base.setting.name}"),
            (number(result.sync.best, 2), "", _sync_words(result.sync.offset, result.sync.chance)),
        ]
    return cards


def _sync_words(offset: int, chance: float) -> str:
    side = "with no offset" if offset == 0 else f"at {offset:+d} frames"
    words = f"correlation of mouth and sound {side}"
    return words if math.isnan(chance) else f"{words}, chance {number(chance, 2)}"


def _psnr_plot(study: Study, base: Run) -> str:
    lines = [
        Line(result.setting.name, result.against_reference["mouth"].frames_psnr, f"s{index % 5}")
        for index, result in enumerate(study.candidates)
    ]
    levels = [Level(floor.name, floor.scores["mouth"].psnr.value) for floor in study.floors]
    return line_plot(lines, y_label="mouth PSNR, dB", levels=levels, marks=base.starts[1:])


def _sync_plot(study: Study) -> str:
    """Everything in its own standard deviation: the signals have different units."""
    lines = [Line("sound", _standard(study.energy), "sound", filled=True)]
    if study.clip.has_truth:
        lines.append(Line("original", _standard(study.original_opening), "original"))
    lines.append(Line(study.reference.setting.name, _standard(study.reference.opening), "base"))
    lines += [
        Line(result.setting.name, _standard(result.opening), f"s{index % 5}")
        for index, result in enumerate(study.candidates)
    ]
    return line_plot(lines, y_label="opening, sound (standardised)")


def _standard(signal: Array) -> list[float]:
    band = speech_band(signal, FPS)
    spread = float(band.std())
    return [float(value) / spread if spread > 0 else 0.0 for value in band]


def _face_rows(study: Study, index: int, base: Run, run: Run) -> list[Row]:
    """The worst frame, then some at equal distances, with the difference amplified."""
    values = study.candidates[index].against_reference["mouth"].frames_psnr
    rows = []
    for frame in _chosen(values):
        ours, theirs = run.synced.picture(frame), base.synced.picture(frame)
        pictures = [base.faces.picture(frame), theirs, ours]
        rows.append(
            Row(
                f"frame {frame}, {number(values[frame], 1)} dB",
                [*(_data_uri(p, _FACE_SIDE) for p in pictures), _difference(ours, theirs)],
            )
        )
    return rows


def _frame_row(study: Study, index: int, base: Run, run: Run) -> Row:
    """The full picture of the worst frame."""
    values = study.candidates[index].against_reference["mouth"].frames_psnr
    frame = _chosen(values)[0]
    pictures = [
        base.originals.picture(frame),
        base.frames.picture(frame),
        run.frames.picture(frame),
    ]
    return Row(f"frame {frame}", [_data_uri(p, _FRAME_HEIGHT) for p in pictures])


def _chosen(values: Sequence[float]) -> list[int]:
    known = [index for index, value in enumerate(values) if not math.isnan(value)]
    worst = min(known, key=lambda index: values[index])
    spread = np.linspace(0, len(known) - 1, _MAX_FRAMES - 1).round().astype(int)
    return list(dict.fromkeys([worst, *(known[place] for place in spread)]))


def _difference(ours: Picture, theirs: Picture) -> str:
    """Largest difference over the colours, amplified, as a heat map."""
    gap = np.abs(ours.astype(np.int16) - theirs).max(axis=2) * AMPLIFY
    heat = cv2.applyColorMap(gap.clip(0, 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return _data_uri(heat[:, :, ::-1].astype(np.uint8), _FACE_SIDE)


def _data_uri(picture: Picture, height: int) -> str:
    """RGB picture to a WebP in the page, at most so high."""
    if picture.shape[0] > height:
        width = round(picture.shape[1] * height / picture.shape[0])
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(
            np.uint8
        )
    bgr = np.ascontiguousarray(picture[:, :, ::-1])
    _, encoded = cv2.imencode(".webp", bgr, [cv2.IMWRITE_WEBP_QUALITY, _WEBP_QUALITY])
    return "data:image/webp;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")
