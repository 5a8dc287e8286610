"""Tables, plots, bars and the page."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from lsync_compile.errors import MediaError
from lsync_compile.quality.bars import BARS, judge_presets
from lsync_compile.quality.compare import Clip, Study, compare
from lsync_compile.quality.floors import Floor
from lsync_compile.quality.plots import Level, Line, line_plot
from lsync_compile.quality.report import write_page
from lsync_compile.quality.runs import Run, Setting
from lsync_compile.quality.scores import compare_runs
from lsync_compile.quality.tables import print_tables, study_tables

from .faces import syllables, voice
from .standin import FRAMES, StandIn


class Page(HTMLParser):
    """What a browser would fetch, show and nest."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: dict[str, int] = {}
        self.feed(text)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[Study, list[Run]]:
    """A study of two candidates, one of them compiled with a preset."""
    monkeypatch.setattr(
        "lsync_compile.quality.compare.load_audio",
        lambda path, sample_rate: voice(syllables(FRAMES), sample_rate=sample_rate),
    )
    runs: list[Run] = []
    study = compare(
        StandIn(missing=(7,)),
        Clip(Path("<talk>.mp4")),
        [
            Setting("balanced", options={"preset": "balanced", "lowering": "eager"}),
            Setting("three", steps=3),
        ],
        prepare=lambda pipeline, setting: pipeline,
        measure_floors=lambda run: [Floor("nothing at all", compare_runs(run, run))],
        keep=runs.append,
    )
    return study, runs


def test_tables_hold_every_row_and_say_what_is_missing(made: tuple[Study, list[Run]]) -> None:
    tables = {table.title: table for table in study_tables(made[0])}
    mouth = tables["Mouth region against reference"]
    assert [row[0] for row in mouth.rows] == ["balanced", "three", "nothing at all"]
    assert mouth.rows[0][1] == "∞"
    assert 15 < float(mouth.rows[1][1]) < 40
    assert any(note.startswith("MS-SSIM: ") for note in mouth.notes)
    truth = tables["Full frame against the original"]
    assert [row[0] for row in truth.rows] == ["reference", "balanced", "three"]
    sync = tables["Mouth opening against the sound"]
    assert sync.rows[0][0] == "original"
    assert float(sync.rows[0][2]) > 0.8
    assert all(len(row) == len(t.headings) for t in tables.values() for row in t.rows)


def test_tables_print_in_the_terminal(made: tuple[Study, list[Run]]) -> None:
    out = io.StringIO()
    print_tables(made[0], Console(file=out, width=80))
    assert "…" not in out.getvalue()
    for words in ("Mouth region against reference", "worst frame in dB", "nothing at all", "three"):
        assert words in out.getvalue()


def test_page_stands_alone(made: tuple[Study, list[Run]], tmp_path: Path) -> None:
    study, runs = made
    path = tmp_path / "quality.html"
    path.write_text("an older page")
    write_page(path, study, runs, judge_presets(study))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.tags["svg"] == 2
    # Two candidates, up to six frames of four pictures and one of three.
    assert 2 * (4 * 4 + 3) <= page.tags["img"] <= 2 * (6 * 4 + 3)
    words = " ".join(page.words)
    assert "Quality of <talk>.mp4" in words
    assert "balanced clears the bar of balanced" in words
    assert "1 frames without a face" in words
    assert list(tmp_path.iterdir()) == [path]


def test_page_needs_its_folder(made: tuple[Study, list[Run]], tmp_path: Path) -> None:
    study, runs = made
    with pytest.raises(MediaError, match=r"folder .*missing does not exist"):
        write_page(tmp_path / "missing" / "page.html", study, runs)
    with pytest.raises(MediaError, match="is a folder; name a file"):
        write_page(tmp_path, study, runs)


def test_bars_name_what_falls_short(made: tuple[Study, list[Run]]) -> None:
    study, _ = made
    assert [verdict.passed for verdict in judge_presets(study)] == [True]
    three = study.candidates[1]
    object.__setattr__(three.setting, "options", {"preset": "balanced"})
    verdict = judge_presets(study)[1]
    assert not verdict.passed
    assert re.fullmatch(
        r"three is below the bar of balanced: mouth PSNR \d+\.\d\d dB, promised 35; "
        r"mouth SSIM 0\.\d{4}, promised 0\.97; \d+\.\d\d dB further from the original, allowed 0.1",
        str(verdict),
    )


def test_bars_are_those_of_the_presets() -> None:
    from lsync_compile.options import PRESETS

    assert set(BARS) == set(PRESETS)
    assert [BARS[name].psnr for name in ("exact", "balanced", "turbo")] == [45, 35, 30]


def test_plot_draws_values_where_they_belong() -> None:
    svg = line_plot(
        [Line("a", [0, 5, math.nan, 10, math.inf], "s0")],
        y_label="dB & more",
        levels=[Level("floor", 5), Level("none", math.nan)],
        marks=[2],
    )
    lines = re.findall(r'class="line s0" d="M([^"]*)"', svg)
    assert len(lines) == 2  # NaN leaves a gap
    (left, low), (_, middle) = (map(float, point.split()) for point in lines[0].split(" L"))
    heights = [float(point.split()[1]) for point in lines[1].split(" L")]
    assert left == 52
    assert low == 260 - 34  # the lowest value lies on the axis
    assert heights == [12, 12]  # the largest and infinity at the upper edge
    assert middle == pytest.approx((low + 12) / 2, abs=0.1)
    assert f'class="level" d="M52 {middle:.1f}' in svg
    assert svg.count('class="level"') == 1
    assert "dB &amp; more" in svg
