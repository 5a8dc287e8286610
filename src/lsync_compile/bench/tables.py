"""What a benchmark found, as data for a Markdown table, plots and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lsync_compile.bench.plots import Bar, Point, bars, scatter
from lsync_compile.bench.rows import ORIGINAL
from lsync_compile.quality.bars import BARS

REAL_TIME = 25.0
EQUAL_DB = 100.0  # stands for rows that differ in nothing

HEADINGS = [
    "row", "frames/s", "chunk ms", "UNet step ms", "calls", "encode ms", "decode ms", "peak GiB",
    "mouth PSNR dB", "SSIM", "worst frame dB", "flicker", "bar",
]  # fmt: skip

JOB_HEADINGS = ["row", "frames/s", "frames", "peak GiB"]


@dataclass(frozen=True)
class Joined:
    """A row with what is known of its speed and of its quality."""

    name: str
    speed: Mapping[str, Any]
    quality: Mapping[str, Any]
    note: str = ""

    @property
    def fps(self) -> float | None:
        return self.speed.get("frames_per_s")

    @property
    def psnr(self) -> float | None:
        """dB; None where it was not measured."""
        if "mouth_psnr" not in self.quality:
            return None
        found: float | None = self.quality["mouth_psnr"]
        return EQUAL_DB if found is None else found


def newest(sections: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """The section of a kind that was begun last."""
    found = [section for section in sections if section["kind"] == kind]
    return found[-1] if found else None


def joined(sections: Sequence[Mapping[str, Any]]) -> list[Joined]:
    """The rows of the newest sections of speed and quality, by name, in their order."""
    speed, quality = newest(sections, "speed"), newest(sections, "quality")
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for place, section in enumerate((speed, quality)):
        for row in section["rows"] if section else []:
            by_name.setdefault(row["row"], [{}, {}])[place] = row
    return [
        Joined(name, ours, judged, str(ours.get("note") or judged.get("note") or ""))
        for name, (ours, judged) in by_name.items()
    ]


def verdict(row: Joined) -> str:
    """Whether a preset's quality is above its bar; empty for other rows."""
    bar, psnr = BARS.get(row.name), row.psnr
    if bar is None or psnr is None:
        return ""
    ssim = row.quality["mouth_ssim"]
    missed = psnr < bar.psnr or (bar.ssim is not None and ssim < bar.ssim)
    words = f"{bar.psnr:g} dB" + (f", {bar.ssim:g}" if bar.ssim is not None else "")
    return f"{'below' if missed else 'clears'} {words}"


def cells(row: Joined) -> list[str]:
    """A row's cells under :data:`HEADINGS`."""
    speed, quality = row.speed, row.quality
    chunk, peak = speed.get("chunk_ms"), speed.get("peak_mib")
    equal = row.psnr == EQUAL_DB
    return [
        row.name,
        _shown(row.fps, 2) if "refused" not in speed else "refused",
        _shown(chunk["p50"] if chunk else None, 1),
        _shown(speed.get("unet_step_ms"), 2),
        _shown(speed.get("unet_calls"), 1),
        _shown(speed.get("encode_ms"), 1),
        _shown(speed.get("decode_ms"), 1),
        _shown(peak / 1024 if peak else None, 1),
        "equal" if equal else _shown(quality.get("mouth_psnr"), 2),
        _shown(quality.get("mouth_ssim"), 4),
        "" if equal else _shown(quality.get("worst_frame_psnr"), 2),
        _shown(quality.get("flicker"), 2),
        verdict(row),
    ]


def notes(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has to be said of the figures, and of the rows that have none."""
    lines = []
    speed, quality = newest(sections, "speed"), newest(sections, "quality")
    if speed is not None:
        setting = speed["setting"]
        lines.append(
            f"Speed: {machine_words(speed)}; {setting['size']} networks, {setting['dtype']}, "
            f"{setting['frames']} frames a chunk, {setting['pixels']} px, guidance 1.5; "
            "UNet and VAE, no video files; medians."
        )
    if quality is not None:
        setting = quality["setting"]
        lines.append(
            f"Quality: {machine_words(quality)}; the bundled model in {setting['dtype']} on "
            f"{setting['clip']}, {setting['all_frames']} frames, against its own plain "
            f"{setting['steps']} steps; mouth region. What compiles was run eagerly, which leaves "
            "out Inductor's rounding alone."
        )
        for floor in quality.get("floors", []):
            lines.append(f"{floor['row']}: {floor['mouth_psnr']} dB, SSIM {floor['mouth_ssim']}.")
    for row in joined(sections):
        if row.note:
            lines.append(f"{row.name}: {row.note}.")
        for part in (row.speed, row.quality):
            if "refused" in part:
                lines.append(f"Refused: {part['refused']}.")
            if "not_measured" in part:
                lines.append(f"{row.name} was not measured: {part['not_measured']}.")
    return lines


def machine_words(section: Mapping[str, Any]) -> str:
    machine = section["machine"]
    return f"{machine['device']}, torch {machine['torch']}, {machine['date']}"


def markdown(sections: Sequence[Mapping[str, Any]]) -> str:
    """Everything as one Markdown page."""
    lines = ["# lsync bench", "", _row(HEADINGS), _row(["---"] * len(HEADINGS))]
    lines += [_row(cells(row)) for row in joined(sections)]
    lines += ["", *(f"- {note}" for note in notes(sections))]
    end = newest(sections, "end to end")
    if end is not None:
        clip, size = end["setting"]["clip"], end["setting"]["size"]
        about = f"{clip}, {machine_words(end)}, {size} networks"
        lines += ["", f"End to end, file to file: {about}.", ""]
        lines += [_row(JOB_HEADINGS), _row(["---"] * len(JOB_HEADINGS)), *map(_row, jobs(sections))]
    return "\n".join(lines) + "\n"


def jobs(sections: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of whole jobs under :data:`JOB_HEADINGS`."""
    found = []
    for row in (newest(sections, "end to end") or {"rows": []})["rows"]:
        peak = row.get("peak_mib")
        memory = _shown(peak / 1024 if peak else None, 1)
        speed = _shown(row.get("frames_per_s"), 2)
        found.append([row["row"], speed, str(row.get("frames", "")), memory])
    return found


def plots(sections: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """SVG by name: ``pareto``, ``chunk``, ``roofline``, ``waterfall``; those there is data for."""
    rows = joined(sections)
    found: dict[str, str] = {}
    both = [row for row in rows if row.fps is not None and row.psnr is not None]
    if both:
        quality = newest(sections, "quality")
        floors = [
            (floor["row"], floor["mouth_psnr"])
            for floor in (quality or {}).get("floors", [])
            if floor["mouth_psnr"] is not None
        ]
        finite = [psnr for row in both if (psnr := row.psnr or 0.0) < EQUAL_DB]
        top = max([*finite, *(value for _, value in floors)], default=40.0) + 5
        points = [
            Point(row.name, row.fps or 0.0, min(row.psnr or 0.0, top), style_of(row))
            for row in both
        ]
        found["pareto"] = scatter(
            points,
            x_label="frames/s, UNet and VAE",
            y_label="mouth PSNR, dB (uppermost: equal)",
            levels=floors,
            front=True,
        )
    timed = [row for row in rows if row.fps is not None]
    if timed:
        frames = (newest(sections, "speed") or {})["setting"]["frames"]
        found["chunk"] = bars(
            [
                Bar(
                    row.name,
                    [
                        (row.speed["encode_ms"], "s3"),
                        (row.speed["denoise_ms"], "s1"),
                        (row.speed["decode_ms"], "s2"),
                    ],
                    f"{row.fps:.1f}/s",
                )
                for row in timed
            ],
            x_label="ms a chunk: encode, denoise, decode",
            level=("real time", 1000 * frames / REAL_TIME),
        )
    found.update(_roofline(sections, timed))
    steps = newest(sections, "waterfall")
    if steps is not None:
        measured = [row for row in steps["rows"] if "unet_step_ms" in row]
        found["waterfall"] = bars(
            [
                Bar(row["row"], [(row["unet_step_ms"], "s1")], f"{row['unet_step_ms']:.1f} ms")
                for row in measured
            ],
            x_label="ms a UNet step, each pass added to those before",
        )
    return found


def _roofline(sections: Sequence[Mapping[str, Any]], timed: list[Joined]) -> dict[str, str]:
    speed = newest(sections, "speed")
    work = (speed or {}).get("work")
    if not work or not timed:
        return {}
    points = []
    for part, field, calls in (
        ("unet step", "unet_step_ms", 1),
        ("encode", "encode_ms", 1),
        ("decode", "decode_ms", 1),
    ):
        for row in timed:
            exact = row.speed.get("exact", False) and row.speed.get("steps") == 20
            if exact and row.speed[field] > 0:
                attained = work[part]["tflop"] * calls / (row.speed[field] / 1000)
                intensity = 1000 * work[part]["tflop"] / work[part]["gb"]
                points.append(Point(f"{part}, {row.name}", intensity, attained, style_of(row)))
    roof = work["ceilings"]["tflop_per_s"], work["ceilings"]["gb_per_s"] / 1000
    return {
        "roofline": scatter(
            points,
            x_label="FLOP for each byte that the eager operations move",
            y_label="TFLOP/s",
            log=True,
            roof=(roof[1], roof[0]),
        )
    }


def style_of(row: Joined) -> str:
    """Colour by kind: the original, Inductor and others, ours."""
    if row.name.startswith("original"):
        return "s0"
    return "s3" if row.name.startswith(("Inductor", "TensorRT")) else "s1"


def speedup(row: Joined, rows: Sequence[Joined]) -> float | None:
    """Over the original, eager."""
    base = next((each.fps for each in rows if each.name == ORIGINAL), None)
    return None if not base or row.fps is None else row.fps / base


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
