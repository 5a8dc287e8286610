"""Runs of a stand-in pipeline, and what is measured on them."""

from __future__ import annotations

import json
import math
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lsync_compile.errors import NoFaceError, OptionError
from lsync_compile.media.audio import load_audio
from lsync_compile.quality import metrics
from lsync_compile.quality.compare import Clip, Compiler, Study, compare
from lsync_compile.quality.footage import Footage
from lsync_compile.quality.runs import Run, Setting, collect, sound
from lsync_compile.quality.scores import score
from lsync_compile.runtime.timesteps import make_solver

from .faces import syllables, voice
from .standin import FRAMES, SIDE, StandIn


@pytest.fixture
def own_sound(monkeypatch: pytest.MonkeyPatch) -> Clip:
    """A clip whose sound goes with the stand-in's mouth."""
    monkeypatch.setattr(
        "lsync_compile.quality.compare.load_audio",
        lambda path, sample_rate: voice(syllables(FRAMES), sample_rate=sample_rate),
    )
    return Clip(Path("clip.mp4"))


def footage(clip: torch.Tensor) -> Footage:
    kept = Footage()
    for frame in clip:
        kept.append(frame.permute(1, 2, 0).numpy())
    return kept


def test_footage_gives_back_what_it_got() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (9, 5, 7, 3), dtype=np.uint8)
    kept = Footage()
    for picture in pictures:
        kept.append(picture)
        np.testing.assert_array_equal(kept.picture(len(kept) - 1), picture)
    assert kept.size == (5, 7)
    expected = torch.from_numpy(pictures[2:6]).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(kept.clip(2, 6), expected, atol=0, rtol=0)
    assert [len(piece) for piece in kept.pieces(4)] == [4, 4, 1]
    with pytest.raises(ValueError, match=r"picture 9 is \(5, 7, 3\) float32"):
        kept.append(pictures[0].astype(np.float32))


def test_scores_equal_the_measures() -> None:
    """Also across the pieces in which a clip is read."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(21, 3, 24, 20, generator=generator)
    candidate = (reference + 0.05 * torch.randn(reference.shape, generator=generator)).clamp(0, 1)
    region = torch.zeros(1, 24, 20, dtype=torch.bool)
    region[0, 10:20, 5:15] = True
    valid = [index != 9 for index in range(21)]
    scores = score(
        footage(candidate), footage(reference), region=region, valid=valid, starts=[0, 16]
    )
    kept = torch.tensor(valid)
    errors = metrics.squared_error(candidate, reference, region)[kept]
    assert scores.psnr.value == pytest.approx(metrics.pooled_psnr(errors).value)
    assert scores.ssim.value == pytest.approx(
        metrics.ssim(candidate, reference, region)[kept].mean().item()
    )
    steps = metrics.flicker(candidate, reference, region)
    both = kept[1:] & kept[:-1]
    assert scores.flicker.value == pytest.approx(metrics.rms(steps[both]).value)
    at_border = torch.arange(1, 21) == 16
    assert scores.seams.value == pytest.approx(metrics.seams(steps, at_border).value, rel=0.2)
    worst = metrics.psnr(candidate, reference, region).masked_fill(~kept, math.inf)
    assert scores.worst_psnr.value == pytest.approx(worst.min().item())
    assert scores.worst_psnr.note == f"frame {int(worst.argmin())}"
    assert math.isnan(scores.frames_psnr[9])
    assert "five scales need 176" in scores.ms_ssim.note
    assert "not available" in scores.lpips.note or scores.lpips.value > 0


def test_scores_of_no_frame_say_so() -> None:
    clip = footage(torch.rand(2, 3, 16, 16))
    empty = score(clip, clip, valid=[False, False])
    assert empty.psnr.note == "no frame to compare"
    assert empty.to_dict()["frames_psnr"] == [None, None]
    with pytest.raises(ValueError, match="2 frames against 1"):
        score(clip, footage(torch.rand(1, 3, 16, 16)))


def test_a_run_keeps_frames_and_puts_the_scheduler_back() -> None:
    pipeline = StandIn(missing=(3,))
    before = pipeline.scheduler
    setting = Setting("few", steps=8, solver="dpmpp_2m", num_frames=8)
    run = collect(pipeline, "clip.mp4", None, setting, max_frames=20)
    assert pipeline.scheduler is before
    assert pipeline.runs[0]["scheduler"] == "DPMSolverMultistepScheduler"
    assert (len(run), run.starts) == (20, [0, 8, 16])
    assert run.has_face.index(False) == 3
    assert run.frames_per_second == pytest.approx(8 / 0.08)
    assert run.synced.clip(0, 1).shape == (1, 3, SIDE, SIDE)
    again = collect(pipeline, "clip.mp4", None, setting, max_frames=20, beside=run)
    assert again.originals is run.originals
    assert score(again.synced, run.synced).psnr.note == "identical"


def test_a_part_of_a_run_is_what_was_run_there() -> None:
    run = collect(StandIn(missing=(9,)), "clip.mp4", None, Setting("reference"), max_frames=20)
    part = run.part(16, 20)
    assert (len(part), part.starts, part.chunk_seconds) == (4, [0], run.chunk_seconds[1:])
    assert torch.equal(part.synced.clip(0, 4), run.synced.clip(16, 20))
    assert torch.equal(part.synced.part(1, 9).clip(0, 3), run.synced.clip(17, 20))
    assert run.part(0, 16).has_face == [True] * 9 + [False] + [True] * 6


def test_the_error_of_the_speed_is_by_how_chunks_differ() -> None:
    run = Run(Setting("a"), torch.zeros(1, 2, 2))
    run.has_face, run.starts = [True] * 34, [0, 8, 16, 24, 32]
    run.chunk_seconds = [9.0, 1.0, 1.1, 0.9, 0.2]  # the first compiles, the last is short
    assert run.frames_per_second == pytest.approx(8 / 1.05)
    assert run.speed_error == pytest.approx(1.48 * 0.1 / 1.05 * 1.25 / 2)
    run.chunk_seconds = [1.0] * 5
    assert run.speed_error == 0.0


def test_a_clip_without_a_face_cannot_be_judged() -> None:
    pipeline = StandIn(missing=tuple(range(20)))
    with pytest.raises(NoFaceError, match=r"clip\.mp4: no frame shows a usable face"):
        collect(pipeline, "clip.mp4", None, Setting("any"), max_frames=20)


def test_solvers_share_the_noise_schedule() -> None:
    base = StandIn().scheduler
    for name in ("ddim", "dpmpp_2m", "unipc"):
        made = make_solver(base, name, "trailing")
        torch.testing.assert_close(made.alphas_cumprod, base.alphas_cumprod)
        assert made.config.timestep_spacing == "trailing"
        assert made is not base
        assert make_solver(base, name).config.timestep_spacing == "leading"


def test_unknown_solver_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'dpmpp_2m'"):
        Setting("wrong", solver="dpmpp")
    with pytest.raises(OptionError, match="did you mean 'trailing'"):
        Setting("wrong", spacing="trail")


def test_compare_orders_candidates_by_their_error(own_sound: Clip) -> None:
    pipeline = StandIn(missing=(5,))
    settings = [Setting("same"), Setting("ten", steps=10), Setting("five", steps=5)]
    kept: list[Run] = []
    study = compare(pipeline, own_sound, settings, keep=kept.append)
    same, ten, five = study.candidates
    assert same.against_reference["mouth"].psnr.note == "identical"
    assert same.against_reference["frame"].flicker.value == 0
    for region in ("mouth", "frame"):
        values = [r.against_reference[region].psnr.value for r in (ten, five)]
        assert values[0] > values[1] + 5
    # Most of a frame is the original: it flatters.
    scores = five.against_reference
    assert scores["frame"].psnr.value > scores["mouth"].psnr.value + 3
    assert [run.setting.name for run in kept] == ["reference", "same", "ten", "five"]
    assert study.frames_without_face == 1
    assert math.isnan(scores["mouth"].frames_psnr[5])


def test_compare_uses_the_clip_as_truth_only_with_its_own_sound(own_sound: Clip) -> None:
    study = compare(StandIn(), own_sound, [Setting("five", steps=5)])
    assert study.original_sync.best > 0.8
    reference, five = study.reference, study.candidates[0]
    truth = [r.against_original["mouth"].psnr.value for r in (reference, five)]
    assert truth[0] > truth[1]
    assert reference.against_reference == {}
    dubbed = compare(StandIn(), Clip(Path("clip.mp4"), Path("other.wav")), [])
    assert dubbed.reference.against_original == {}


def test_compare_prepares_candidates_only(own_sound: Clip) -> None:
    pipeline, compiled = StandIn(), StandIn()
    setting = Setting("compiled", options={"preset": "exact"})
    compare(pipeline, own_sound, [setting], prepare=lambda pipe, setting: compiled)
    assert (len(pipeline.runs), len(compiled.runs)) == (1, 1)


def test_a_study_becomes_json(own_sound: Clip) -> None:
    study: Study = compare(StandIn(), own_sound, [Setting("ten", steps=10)])
    text = json.dumps(study.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert back["candidates"][0]["setting"]["steps"] == 10
    assert back["candidates"][0]["against_reference"]["mouth"]["psnr"]["value"] > 20
    assert back["machine"]["torch"] == torch.__version__


def test_each_setting_starts_from_the_plain_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fake(pipeline: StandIn, **options: str) -> SimpleNamespace:
        name = options["preset"]
        done.append(f"compile {name}")
        return SimpleNamespace(lsync=SimpleNamespace(undo=lambda: done.append(f"undo {name}")))

    monkeypatch.setattr("lsync_compile.compile", fake, raising=False)
    compiler, pipeline = Compiler(), StandIn()
    for options in (None, {"preset": "exact"}, {"preset": "turbo"}, None, None):
        result = compiler(pipeline, Setting("any", options=options))
        assert (result is pipeline) == (options is None)
    assert done == ["compile exact", "undo exact", "compile turbo", "undo turbo"]


def test_muted_runs_hear_silence(tmp_path: Path) -> None:
    speech = tmp_path / "speech.wav"
    with wave.open(str(speech), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(b"\x01\x02" * 3200)
    with sound("clip.mp4", speech, muted=True) as path:
        heard = load_audio(path, sample_rate=16_000)
    assert len(heard) == 3200
    assert not heard.any()
    with sound("clip.mp4", speech, muted=False) as path:
        assert path == speech
