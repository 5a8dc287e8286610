"""The quality guard: what it measures, when it falls back, and that inputs alone decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lsync_compile import LatentSyncPipeline, compile
from lsync_compile.options import PRESETS, resolve_options
from lsync_compile.runtime import guard as module
from lsync_compile.runtime.guard import EQUAL_DB, guard_levels, mouth_psnr

Maker = Callable[..., Path]
# Bit for bit the plain networks.
EXACT = {
    "preset": "exact",
    "lowering": "eager",
    "strict": True,
    "guidance_prefix": False,
    "null_audio": False,
    "compile_vae": False,
}
# What no one should run: one step of four, of which another graph sees cells instead of pictures.
BAD = {"few_steps": 1, "lip_attention": True, "lip_pool": "4"}
FRAMES, CHUNKS, STEPS = 2, 3, 4


def run(pipeline: Any, clip: Path, speech: Path) -> list[Tensor]:
    """The faces of each chunk."""
    return [
        chunk.synced.clone()
        for chunk in pipeline.synthesize(
            clip,
            speech,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
        )
    ]


@pytest.fixture
def files(make_clip: Maker, make_speech: Maker) -> tuple[Path, Path]:
    return make_clip(FRAMES * CHUNKS), make_speech(FRAMES * CHUNKS / 25)


def test_a_bad_setting_is_left_for_the_exact_one(
    tiny_pipeline: LatentSyncPipeline, files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(tiny_pipeline, *files)
    bad = run(compile(tiny_pipeline, **EXACT, **BAD), *files)
    guarded = compile(tiny_pipeline, **EXACT, **BAD, guard_every=2, guard_floor=EQUAL_DB)
    first, again = run(guarded, *files), run(guarded, *files)
    # The second chunk is the first that is looked at; what is on its way is still the bad one.
    assert all(map(torch.equal, first[:2], bad[:2]))
    assert not torch.equal(first[1], plain[1])
    assert all(map(torch.equal, first[2:], plain[2:]))
    assert all(map(torch.equal, first, again))  # a run begins with its own options
    report = guarded.lsync.report()
    counted = report.features["guard"]
    assert (counted["checked"], counted["fallbacks"]) == (2, 2)
    assert counted["least_db"] == pytest.approx(
        mouth_psnr(bad[1], plain[1], tiny_pipeline.mask), abs=0.01
    )
    assert any("chunks from 2 on are computed as 'exact'" in note for note in report.notes)
    assert "quality guard: chunk 1" in caplog.text


def test_a_good_setting_is_only_watched_and_overlap_changes_nothing(
    tiny_pipeline: LatentSyncPipeline, files: tuple[Path, Path]
) -> None:
    options = {**EXACT, "few_steps": 3}
    alone = run(compile(tiny_pipeline, **options), *files)
    watched = compile(tiny_pipeline, **options, guard_every=1, guard_floor=1.0)
    assert all(map(torch.equal, run(watched, *files), alone))
    counted = watched.lsync.report().features["guard"]
    assert (counted["checked"], counted["fallbacks"]) == (CHUNKS, 0)
    assert 1.0 < counted["least_db"] < EQUAL_DB
    strict = {**options, "guard_every": 1, "guard_floor": EQUAL_DB}
    serial = run(compile(tiny_pipeline, **strict, parallel_stages="off"), *files)
    staged = run(compile(tiny_pipeline, **strict, parallel_stages="on"), *files)
    assert not torch.equal(serial[1], alone[1])
    assert all(map(torch.equal, serial, staged))


def test_turbo_falls_back_to_balanced_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "balanced", {"few_steps": 8})
    monkeypatch.setitem(PRESETS, "turbo", {"few_steps": 4, "crop_decode": True})
    turbo = guard_levels(resolve_options("turbo", lowering="eager"))
    assert [level.name for level in turbo] == ["turbo", "balanced", "exact"]
    assert [level.options.few_steps for level in turbo] == [4, 8, 0]
    assert [level.options.crop_decode for level in turbo] == [True, False, False]
    assert {level.options.lowering for level in turbo} == {"eager"}
    assert [level.name for level in guard_levels(resolve_options("balanced"))] == [
        "balanced",
        "exact",
    ]
    assert len(guard_levels(resolve_options("exact"))) == 1
    own = resolve_options("exact", solver="unipc", face_tolerance=1.0)
    assert [level.options.solver for level in guard_levels(own)] == ["unipc", "pipeline"]


def test_everything_approximate_is_taken_back() -> None:
    """By the word in the options' own documentation."""
    names = {"deep_cache", "few_steps", "solver", "lip_attention", "crop_decode", "temporal_start"}
    assert names <= module.approximate()
    assert not {"lowering", "cuda_graphs", "guard_every"} & module.approximate()


def test_psnr_is_of_the_mouth_alone() -> None:
    mask = torch.ones(1, 4, 4)
    mask[:, 2:] = 0
    exact, ours = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    ours[:, :, :2] = 1.0
    assert mouth_psnr(ours, exact, mask) == EQUAL_DB
    ours[:, :, 2:] = 0.2
    assert mouth_psnr(ours, exact, mask) == pytest.approx(20.0)
    assert mouth_psnr(ours * float("nan"), exact, mask) == 0.0
