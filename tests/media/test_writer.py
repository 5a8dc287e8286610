"""Writing films: exact lengths, sound in step, and nothing left behind by a failure."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from media_films import lag, numbered_picture, read_number, sweep

from lsync_compile.errors import MediaError
from lsync_compile.media.audio import load_audio
from lsync_compile.media.video import VideoWriter, count_frames, probe, read_frames


def write(path: Path, frames: int = 10, **kw) -> None:
    with VideoWriter(path, 128, 64, **kw) as writer:
        for number in range(frames):
            writer.write(numbered_picture(number, 128, 64))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("fps", [25, 30, 30000 / 1001])
def test_frames_come_back_in_order(tmp_path, suffix, fps):
    path = tmp_path / f"out{suffix}"
    write(path, 31, fps=fps)
    assert [read_number(frame) for frame in read_frames(path, fps=fps)] == list(range(31))
    assert probe(path).fps == pytest.approx(fps, rel=1e-3)
    assert count_frames(path, fps) == 31


@pytest.mark.parametrize(("width", "height"), [(129, 64), (128, 65), (131, 67)])
def test_odd_sizes_are_padded_to_even_ones(tmp_path, width, height):
    picture = numbered_picture(3, width, height)
    path = tmp_path / "odd.mp4"
    with VideoWriter(path, width, height, crf=1) as writer:
        writer.write(picture)
    shown = next(read_frames(path))
    assert shown.shape == (height + height % 2, width + width % 2, 3)
    assert read_number(shown) == 3
    # The pattern has wrapped edges, so only the grey value is compared.
    error = shown[20:height, :width].astype(int).mean(2) - picture[20:].astype(int).mean(2)
    assert abs(error.mean()) < 1


@pytest.mark.parametrize("seconds", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_sound_has_the_length_of_the_picture_and_starts_with_it(tmp_path, seconds, rate):
    path = tmp_path / "out.mp4"
    played = sweep(seconds, rate)
    write(path, 26, audio=played, sample_rate=rate)
    heard = load_audio(path, sample_rate=rate)
    length = round(26 / 25 * rate)
    assert len(heard) == length
    both = min(len(played), length)
    assert abs(lag(heard[:both], played[:both])) <= 1
    assert np.corrcoef(heard[:both], played[:both])[0, 1] > 0.98
    assert np.abs(heard[both + 2048 :]).max(initial=0) < 1e-3
    with av.open(str(path)) as container:
        sound = container.streams.audio[0]
        assert sound.codec_context.name == "aac"
        assert sound.duration * sound.time_base == pytest.approx(26 / 25, abs=1 / rate)


def test_stereo_keeps_its_sides(tmp_path):
    path = tmp_path / "out.mp4"
    left, right = sweep(1, 48_000), np.zeros(48_000, dtype=np.float32)
    write(path, 25, audio=np.stack([left, right], axis=1), sample_rate=48_000)
    heard = load_audio(path, sample_rate=48_000, channels=2)
    assert heard.shape == (48_000, 2)
    assert np.corrcoef(heard[:, 0], left)[0, 1] > 0.99
    assert np.abs(heard[:, 1]).max() < 0.05


def test_pixel_aspect_is_kept(tmp_path):
    from fractions import Fraction

    write(tmp_path / "wide.mp4", pixel_aspect=Fraction(4, 3))
    assert probe(tmp_path / "wide.mp4").pixel_aspect == Fraction(4, 3)


def test_size_follows_crf(tmp_path):
    sizes = []
    for crf in (1, 18, 40):
        write(tmp_path / "out.mp4", 10, crf=crf)
        sizes.append((tmp_path / "out.mp4").stat().st_size)
    assert sizes[0] > 1.2 * sizes[1] > 1.4 * sizes[2]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("earlier", [None, b"what was there before"])
def test_failure_leaves_everything_as_it_was(tmp_path, failure, earlier):
    path = tmp_path / "out.mp4"
    if earlier is not None:
        path.write_bytes(earlier)

    def fail_half_way() -> None:
        with VideoWriter(path, 128, 64, audio=sweep(1, 16_000)) as writer:
            writer.write(numbered_picture(0, 128, 64))
            assert len(list(tmp_path.iterdir())) == (1 if earlier is None else 2)
            raise failure

    with pytest.raises(failure):
        fail_half_way()
    assert list(tmp_path.iterdir()) == ([] if earlier is None else [path])
    assert earlier is None or path.read_bytes() == earlier


def test_success_replaces_an_earlier_file(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"what was there before")
    write(path, 5)
    assert count_frames(path) == 5
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_path_do_not_meet(tmp_path):
    path = tmp_path / "out.mp4"
    with VideoWriter(path, 128, 64) as first, VideoWriter(path, 128, 64) as second:
        for number in range(4):
            first.write(numbered_picture(number, 128, 64))
        second.write(numbered_picture(9, 128, 64))
    assert count_frames(path) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_a_film_may_replace_its_source(film):
    path = film(12)
    with VideoWriter(path, 128, 64) as writer:
        for frame in read_frames(path):
            writer.write(255 - frame)
    assert count_frames(path) == 12


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("nowhere/out.mp4", {}, "nowhere does not exist"),
        ("out.foo", {}, "names no video format"),
        ("out", {}, "names no video format"),
        ("out.mp4", {"codec": "libnosuch"}, "libnosuch"),
        ("out.wav", {}, "does not fit"),
    ],
)
def test_what_cannot_work_fails_at_once_and_leaves_nothing(tmp_path, name, options, reason):
    with pytest.raises(MediaError, match=reason) as caught:
        VideoWriter(tmp_path / name, 128, 64, **options)
    assert name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_output_file(tmp_path):
    with pytest.raises(MediaError, match="is a folder"):
        VideoWriter(tmp_path, 128, 64)


def test_no_frame_makes_no_film(tmp_path):
    with pytest.raises(MediaError, match="no frame"), VideoWriter(tmp_path / "out.mp4", 128, 64):
        pass
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MediaError, match="No space left"):
        write(path, 2)
    assert list(tmp_path.iterdir()) == []


def test_frame_of_another_size_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"expected \(64, 128, 3\)"),
        VideoWriter(tmp_path / "out.mp4", 128, 64) as writer,
    ):
        writer.write(np.zeros((64, 64, 3), dtype=np.uint8))
    assert list(tmp_path.iterdir()) == []
