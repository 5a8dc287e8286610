"""The pipeline end to end, with a tiny random model and a stand-in detector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lsync_compile.errors import MediaError, MemoryLimitError, NoFaceError, OptionError
from lsync_compile.media.audio import load_audio
from lsync_compile.media.sources import FrameArray, SoundArray
from lsync_compile.media.video import probe, read_frames
from lsync_compile.models.pipeline import LatentSyncPipeline

Maker = Callable[..., Path]


def run(pipeline: LatentSyncPipeline, clip: Path, speech: Path | None, **arguments: object) -> list:
    """All chunks of a run of two steps with a fixed seed."""
    arguments.setdefault("num_inference_steps", 2)
    arguments.setdefault("num_frames", 4)
    generator = torch.Generator().manual_seed(7)
    return list(pipeline.synthesize(clip, speech, generator=generator, **arguments))


def pictures(results: list) -> np.ndarray:
    """The finished frames of a run, (n, H, W, 3)."""
    return np.stack([frame for result in results for frame in result.frames])


def test_writes_a_file_as_long_as_the_sound(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    result = tiny_pipeline(
        make_clip(6), make_speech(0.36), out, num_inference_steps=2, num_frames=4
    )
    info = probe(out)
    assert result.num_frames == 9  # 0.36 s at 25 fps: longer than the clip, last chunk of one
    assert len(list(read_frames(out))) == 9
    assert (info.width, info.height, info.fps) == (160, 128, 25)
    assert len(load_audio(out)) / 16_000 == pytest.approx(0.36, abs=0.05)


def test_chunks_cover_the_frames_and_the_last_is_short(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    results = run(tiny_pipeline, make_clip(12), make_speech(0.4))
    assert [result.frame_indices for result in results] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert results[0].synced.shape == (4, 3, 64, 64)


def test_a_looped_clip_is_detected_once_and_played_back_and_forth(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    clip = make_clip(5)
    results = run(tiny_pipeline, clip, make_speech(0.4))
    source = list(read_frames(clip))
    original = [frame for result in results for frame in result.original]
    order = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert tiny_pipeline.detector.calls == 5
    for frame, position in zip(original, order, strict=True):
        np.testing.assert_array_equal(frame, source[position])


def test_only_the_face_square_changes_and_it_does(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    result = run(tiny_pipeline, make_clip(4), make_speech(0.16))[0]
    before, after = np.stack(result.original).astype(int), np.stack(result.frames).astype(int)
    assert np.abs(before - after).max() > 8
    assert np.abs(before - after)[:, :8].max() == 0


def test_kept_region_of_the_face_is_the_original(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    result = run(tiny_pipeline, make_clip(4), make_speech(0.16))[0]
    kept = (tiny_pipeline.mask == 1).expand_as(result.synced)
    original = result.faces.float() / 127.5 - 1
    torch.testing.assert_close(result.synced[kept], original[kept], atol=1e-6, rtol=0)


def test_same_seed_same_frames_and_b_after_a_is_b_alone(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    a, b = make_clip(4, name="a.mp4"), make_clip(8, name="b.mp4", size=(128, 160))
    speech = make_speech(0.3)
    alone = pictures(run(tiny_pipeline, b, speech))
    run(tiny_pipeline, a, speech, num_inference_steps=3, guidance_scale=1.0)
    np.testing.assert_array_equal(pictures(run(tiny_pipeline, b, speech)), alone)


def test_sound_reaches_the_mouth(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    clip, speech = make_clip(4), make_speech(0.16)
    heard = run(tiny_pipeline, clip, speech)[0].synced
    for parameter in tiny_pipeline.audio_encoder.parameters():
        parameter.data.mul_(-1.0)
    misheard = run(tiny_pipeline, clip, speech)[0].synced
    assert (heard - misheard).abs().max() > 1e-4


def test_frames_without_a_face_pass_through_and_do_not_disturb(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    clip = make_clip(12, black=(5, 8, 9, 10, 11))
    results = run(tiny_pipeline, clip, make_speech(0.48))
    assert [result.has_face for result in results] == [
        [True] * 4,
        [True, False, True, True],
        [False] * 4,
    ]
    np.testing.assert_array_equal(results[1].frames[1], results[1].original[1])
    assert results[2].synced is None
    # The faceless frame borrows its neighbour's face, so attention sees a plausible picture.
    assert torch.equal(results[1].faces[1], results[1].faces[0])


def test_missing_face_can_fail(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    clip = make_clip(6, black=(3,))
    with pytest.raises(NoFaceError, match="frame 3"):
        run(tiny_pipeline, clip, make_speech(0.2), on_missing_face="fail")


def test_no_face_at_all_leaves_an_existing_output_alone(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"precious")
    clip = make_clip(4, black=(0, 1, 2, 3))
    with pytest.raises(NoFaceError, match="no usable face"):
        tiny_pipeline(clip, make_speech(0.2), out, num_inference_steps=1)
    assert out.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clip.mp4",
        "out.mp4",
        "speech.wav",
    ]


def test_own_sound_is_used_without_audio_path(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker
) -> None:
    results = run(tiny_pipeline, make_clip(8), None)
    assert sum(len(result.frames) for result in results) == 8


def test_a_clip_without_sound_needs_audio(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker
) -> None:
    with pytest.raises(MediaError, match="no audio"):
        run(tiny_pipeline, make_clip(4, sound=False), None)


def test_guidance_off_uses_half_the_batch(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    batches = []
    tiny_pipeline.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    clip, speech = make_clip(4), make_speech(0.16)
    run(tiny_pipeline, clip, speech, guidance_scale=1.5)
    run(tiny_pipeline, clip, speech, guidance_scale=1.0)
    assert batches == [2, 2, 1, 1]


def test_callback_and_progress_see_every_step(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    steps: list[int] = []
    seen: list[tuple[int, int]] = []
    run(
        tiny_pipeline,
        make_clip(6),
        make_speech(0.24),
        num_inference_steps=3,
        callback=lambda step, timestep, latents: steps.append(step),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert steps == [0, 1, 2, 0, 1, 2]
    assert seen[-1] == (6, 6)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes."),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_do(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    tmp_path: Path,
    error: RuntimeError,
) -> None:
    def fail(*_: object) -> None:
        raise error

    tiny_pipeline.vae.decoder.register_forward_pre_hook(fail)
    out = tmp_path / "out.mp4"
    with pytest.raises(MemoryLimitError, match="num_frames=16; use a smaller"):
        tiny_pipeline(make_clip(4), make_speech(0.16), out, num_inference_steps=1)
    assert not out.exists()


def test_other_runtime_errors_keep_their_kind(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a plain bug")

    tiny_pipeline.vae.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a plain bug"):
        run(tiny_pipeline, make_clip(4), make_speech(0.16))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_frames": 0}, "num_frames must be a positive whole number"),
        ({"num_frames": 25}, "24 or fewer"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"height": 64, "width": 72}, "must be equal"),
        ({"height": 60, "width": 60}, "multiple of 8"),
        ({"audio_sample_rate": 44_100}, "16000"),
        ({"weight_dtype": torch.float16}, "weight_dtype"),
        ({"on_missing_face": "skip"}, "'pass' or 'fail'"),
        ({"max_frames": 0}, "max_frames"),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    tiny_pipeline: LatentSyncPipeline,
    make_clip: Maker,
    make_speech: Maker,
    arguments: dict,
    words: str,
) -> None:
    with pytest.raises(OptionError, match=words):
        tiny_pipeline.synthesize(make_clip(2), make_speech(0.1), **arguments)


def test_frames_and_sound_in_memory_give_the_files_bytes(
    tiny_pipeline: LatentSyncPipeline, make_clip: Maker, make_speech: Maker
) -> None:
    clip, speech = make_clip(6), make_speech(0.36)
    filed = run(tiny_pipeline, clip, speech)
    held = torch.from_numpy(np.stack(list(read_frames(clip)))).float() / 255
    sound = SoundArray(load_audio(speech), 16_000)
    kept = run(tiny_pipeline, FrameArray(held, 25), sound)
    assert np.array_equal(pictures(kept), pictures(filed))
    assert {result.total for result in kept} == {9} == {len(pictures(kept))}
    with pytest.raises(MediaError, match="give the speech"):
        tiny_pipeline.synthesize(FrameArray(held, 25))
