"""The benchmark: rows that can be gone on with, wrong outputs that are not timed, tables, plots."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lsync_compile.bench import command, engines, rows
from lsync_compile.bench.command import OutOfTime, Plan, matching_steps, run
from lsync_compile.bench.engines import Networks
from lsync_compile.bench.page import write_all
from lsync_compile.bench.quality import Judge, Recording
from lsync_compile.bench.results import Results
from lsync_compile.bench.rows import ORIGINAL, PACKAGE, Row
from lsync_compile.bench.speed import Marks, spent_on
from lsync_compile.bench.tables import markdown
from lsync_compile.bench.timing import Clock
from lsync_compile.errors import OptionError
from lsync_compile.media.mask import mouth_mask
from lsync_compile.options import PRESETS, resolve_options

CPU = torch.device("cpu")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(
        results=tmp_path / "bench.json",
        device=CPU,
        dtype=torch.float32,
        size="small",
        recording=tmp_path / "recording.safetensors",
        clip=tmp_path / "clip.mp4",
        frames=2,
        runs=1,
        steps=2,
        measures=("speed",),
        names=(ORIGINAL,),
    )


def test_every_row_has_a_name_of_its_own_and_valid_options() -> None:
    plan = Plan(
        Path("x"), torch.device("cuda"), torch.float16, "full", recording=Path("x"), clip=Path("x")
    )
    found = [*plan.rows((8,)), *rows.waterfall(on_gpu=True)]
    names = [row.name for row in found]
    assert len(set(names)) == len(names)
    assert {ORIGINAL, PACKAGE, "Inductor", "Inductor, UniPC 8", "TensorRT", *PRESETS} <= set(names)
    for row in found:
        if row.options is not None:
            resolve_options(options=row.options)
    package = next(row for row in found if row.name == PACKAGE)
    options = resolve_options(options=package.options)
    assert (options.deep_cache_interval, options.deep_cache_branch) == (3, 0)
    assert options.deep_cache_predictor == "reuse"
    assert not options.fuse_qkv


def test_a_waterfall_ends_with_all_of_exact() -> None:
    on_cpu, on_gpu = rows.waterfall(on_gpu=False), rows.waterfall(on_gpu=True)
    assert on_gpu[:-1] == on_cpu
    exact = resolve_options("exact")
    assert resolve_options(options=on_gpu[-1].options) == dataclasses.replace(exact, strict=True)
    found = [row.name.removeprefix("+ ") for row in on_cpu]
    # Each later row is about the device alone, with what a pass joins computed once.
    assert found[0] == "none"
    first_pass = found.index("remove_noops")
    assert {"cuda_graphs", "hoist_weights"} <= set(found[:first_pass])
    for before, after in itertools.pairwise(on_cpu):
        assert before.options is not None
        assert after.options is not None
        changed = [name for name in after.options if before.options[name] != after.options[name]]
        assert changed == [after.name.removeprefix("+ ")]


def test_rows_by_name_and_by_the_beginning_of_one() -> None:
    plan = Plan(
        Path("x"), torch.device("cuda"), torch.float16, "full", recording=Path("x"), clip=Path("x")
    )

    def named(*names: str) -> list[str]:
        return [row.name for row in dataclasses.replace(plan, names=names).rows()]

    assert named("Inductor") == ["Inductor"]  # and not what takes longest to compile
    assert named("Inductor, max") == ["Inductor, max-autotune"]
    assert len(named("Inductor,")) > 5
    assert named("exact", "orig") == [ORIGINAL, PACKAGE, "exact"]
    assert named("nothing") == []
    assert named() == [row.name for row in plan.rows()]


def test_rows_are_filed_once_and_gone_on_with(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    results, late = run(plan, told.append)
    assert late == ""
    (section,) = json.loads(plan.results.read_text())["sections"]
    (row,) = section["rows"]
    assert row["frames_per_s"] > 0
    assert row["step_error"] < 1e-3
    assert row["unet_calls"] == 2
    assert section["work"]["unet step"]["tflop"] > 0
    assert len(told) == 1
    monkeypatch.setattr(command, "make_networks", None)  # would fail if anything were measured
    again, _ = run(plan, told.append)
    assert again.sections == results.sections
    written = {path.name for path in write_all(plan.results.parent, again.sections)}
    assert {"bench.md", "chunk.svg", "roofline.svg"} <= written


def test_a_wrong_output_is_not_timed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    make = command.make_networks

    def broken(plan: Plan) -> Networks:
        networks = make(plan)
        forward = type(networks.unet).forward

        class Wrong(type(networks.unet)):  # type: ignore[misc]
            def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
                result = forward(self, *args, **kwargs)
                return dataclasses.replace(result, sample=1.1 * result.sample)

        networks.unet.__class__ = Wrong
        return networks

    monkeypatch.setattr(command, "make_networks", broken)
    told: list[str] = []
    results, _ = run(plan, told.append)
    (row,) = results.sections[0]["rows"]
    assert len(told) == 1, told  # tried once
    assert "UNet step differs by 0.1" in row["refused"]
    assert "frames_per_s" not in row
    page = markdown(results.sections)
    assert f"| {ORIGINAL} | refused |" in page
    assert "Refused: original, eager: UNet step differs" in page


def test_nan_is_wrong() -> None:
    row = Row("x", "eager", exact=False)
    with pytest.raises(engines.Refused, match="differs by nan"):
        engines._judged(row, "UNet step", float("nan"), torch.float32)


def test_what_is_not_there_says_why(plan: Plan) -> None:
    results, _ = run(dataclasses.replace(plan, names=("TensorRT",)))
    (row,) = results.sections[0]["rows"]
    assert row["not_measured"] == "TensorRT needs a GPU"


def test_time_is_up_before_the_next_row(plan: Plan) -> None:
    budget = command.Budget(dataclasses.replace(plan, seconds=-1.0))
    with pytest.raises(OutOfTime):
        budget.spend("it", lambda: pytest.fail("ran"))
    _, late = run(dataclasses.replace(plan, seconds=0.0))
    assert late == ORIGINAL


def test_other_machines_and_settings_have_sections_of_their_own(tmp_path: Path) -> None:
    path, here = tmp_path / "bench.json", {"device": "a", "date": "1"}
    first = Results(path)
    first.section("speed", {"frames": 16}, here).add({"row": "x", "value": 1}, here)
    second = Results(path)
    other = {"device": "b", "date": "1"}
    second.section("speed", {"frames": 16}, other).add({"row": "x", "value": 2}, other)
    third = Results(path)
    later = {"device": "a", "date": "2"}
    section = third.section("speed", {"frames": 16}, later)
    assert section.find({"row": "x"}) == {"row": "x", "value": 1}
    section.add({"row": "x", "value": 3}, later)
    found = json.loads(path.read_text())["sections"]
    assert [(each["machine"]["device"], each["rows"]) for each in found] == [
        ("a", [{"row": "x", "value": 3}]),
        ("b", [{"row": "x", "value": 2}]),
    ]
    path.write_text("[]")
    with pytest.raises(OptionError, match="is no file of `lsync bench`"):
        Results(path)


def sections() -> list[dict[str, Any]]:
    """Two rows of ours beside Inductor, as on file."""

    def timed(name: str, engine: str, exact: bool, ms: float, step: float) -> dict[str, Any]:
        return {
            "row": name, "engine": engine, "exact": exact, "steps": 20, "note": "",
            "frames_per_s": 16000 / ms, "chunk_ms": {"p20": ms, "p50": ms, "p80": ms},
            "unet_step_ms": step, "unet_calls": 20, "encode_ms": 100.0, "decode_ms": 100.0,
            "denoise_ms": ms - 200, "peak_mib": 2048,
        }  # fmt: skip

    def judged(name: str, psnr: float | None) -> dict[str, Any]:
        return {"row": name, "mouth_psnr": psnr, "mouth_ssim": 0.99, "worst_frame_psnr": psnr,
                "flicker": 0.1}  # fmt: skip

    machine = {"device": "H100", "torch": "2.11", "date": "2026-01-01"}
    work = {part: {"tflop": 35.0, "gb": 300.0} for part in ("unet step", "encode", "decode")}
    return [
        {
            "kind": "speed", "machine": machine,
            "setting": {"size": "full", "dtype": "float16", "frames": 16, "pixels": 512},
            "work": {**work, "ceilings": {"tflop_per_s": 700.0, "gb_per_s": 3000.0}},
            "rows": [
                timed(ORIGINAL, "eager", True, 4000, 190),
                timed("Inductor", "inductor", True, 2700, 125),
                timed("balanced", "lsync", False, 700, 40),
            ],
        },
        {
            "kind": "quality", "machine": machine,
            "setting": {"dtype": "float16", "clip": "a.mp4", "all_frames": 48, "steps": 20},
            "floors": [judged("floor: float32", 55.0)],
            "rows": [judged(ORIGINAL, None), judged("balanced", 30.0)],
        },
    ]  # fmt: skip


def test_fewer_steps_are_those_that_take_as_long() -> None:
    content = sections()[0]
    found = matching_steps(type("S", (), {"rows": content["rows"]})())  # type: ignore[arg-type]
    assert found == (4,)  # (700 - 200) / 125


def test_quality_is_judged_of_the_steps_that_were_timed_before(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.results.write_text(json.dumps({"sections": sections()}))
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(command, "measure_quality", lambda *given: asked.append(given[-1]))
    run(dataclasses.replace(plan, measures=("quality",)))
    assert asked == [(4,)]


def test_the_table_the_page_and_the_plots(tmp_path: Path) -> None:
    page = markdown(sections())
    assert "| original, eager | 4.00 | 4000.0 | 190.00 |" in page
    assert "below 35 dB, 0.97" in page
    assert "| equal |" in page
    written = write_all(tmp_path, sections())
    names = {path.name for path in written}
    assert {"pareto.svg", "chunk.svg", "roofline.svg", "bench.html"} <= names
    html = (tmp_path / "bench.html").read_text()
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", html)  # opens offline
    assert "5.7x the original" in html
    for name in ("pareto.svg", "roofline.svg"):
        text = (tmp_path / name).read_text()
        marks = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', text)
        assert marks
        assert all(0 <= float(x) <= 920 and 0 <= float(y) <= 380 for x, y in marks)


def test_quality_of_fewer_steps_on_the_bundled_model() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 16, 16, generator=generator)
    faces = torch.nn.functional.interpolate(coarse, size=(256, 256), mode="bicubic")
    recording = Recording(
        (255 * faces.clamp(0, 1)).to(torch.uint8),
        torch.randn(2, 50, 384, generator=generator),
        mouth_mask(256),
    )
    judge = Judge(recording, CPU, torch.float32, frames=2, steps=3)
    assert judge.judge(Row("plain", "eager"))["mouth_psnr"] is None
    fewer = judge.judge(Row("fewer", "eager", steps=10))
    assert 5 < fewer["mouth_psnr"] < 60
    assert isinstance(judge.reference, Tensor)


def test_options_of_the_runtime_reach_the_networks(plan: Plan, tmp_path: Path) -> None:
    """Whatever compiles them, chunks are denoised by the code that a run has."""
    path = tmp_path / "fast.json"
    path.write_text('{"options": {"preset": "exact", "few_steps": 1, "kernels": "off"}}')
    faster = dataclasses.replace(plan, names=("fast",), configurations=(path,), steps=4)
    results, _ = run(faster)
    (row,) = results.sections[0]["rows"]
    assert row["unet_calls"] == 1
    assert row["notes"] == []
    assert row["step_error"] < 1e-3


def test_chunks_go_on_from_one_another(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts from the chunk before is timed doing so, and not as after a cut."""
    options = {"preset": "balanced", "temporal_strength": 0.25, "kernels": "off"}
    row = Row("balanced", rows.LSYNC, {**options, "lowering": "eager"}, exact=False)
    monkeypatch.setattr(Plan, "rows", lambda *_: [row])
    results, _ = run(dataclasses.replace(plan, frames=8, steps=4))
    assert results.sections[0]["rows"][0]["unet_calls"] == 1


def test_what_the_device_idles_before_a_chunk_counts() -> None:
    marks = [Marks([1.0, 1.5, 2.0], 1, 20.0), Marks([3.0, 5.0, 6.0], 2, 5.0)]
    first, second = spent_on(marks, 0.2, Clock(CPU))
    assert (first.encode, first.denoise, first.decode) == pytest.approx((800, 500, 500))
    assert (second.encode, second.denoise, second.decode) == pytest.approx((500, 1000, 500))
    assert second.total == pytest.approx(2000)  # each of the two that shared calls
    assert second.calls == 5
