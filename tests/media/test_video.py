"""Reading films: timing, orientation, colours, damage, playing back and forth."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from media_films import numbered_picture, read_number

from lsync_compile.errors import MediaError
from lsync_compile.media.colour import ColourTags
from lsync_compile.media.container import rational
from lsync_compile.media.video import (
    PingPongReader,
    VideoWriter,
    count_frames,
    probe,
    read_frames,
)


def numbers(path: Path, **kw) -> list[int]:
    return [read_number(frame) for frame in read_frames(path, **kw)]


def test_same_rate_gives_every_frame_once(film):
    path = film(30)
    assert numbers(path) == list(range(30))
    assert count_frames(path) == 30


@pytest.mark.parametrize(("fps", "frames"), [(24, 48), (30, 60), (50, 100), (60, 61), (12, 24)])
def test_other_rates_keep_their_speed(film, fps, frames):
    path = film(frames, fps=fps)
    shown = numbers(path)
    assert len(shown) == count_frames(path) == int(frames / fps * 25 + 0.5)
    # Each picture is shown from its time to the next one's, to within half an output frame.
    for index, number in enumerate(shown[:-1]):
        assert index / 25 - number / fps >= -0.5 / 25 - 1e-6
        assert index / 25 - (number + 1) / fps <= 0.5 / 25 + 1e-6


def test_ntsc_rate(film):
    times = [Fraction(1001 * number, 30_000) for number in range(90)]
    shown = numbers(film(90, fps=30, times=times))
    assert len(shown) == 75
    assert max(abs(number * 1.001 / 30 - index / 25) for index, number in enumerate(shown)) < 0.03


def test_variable_rate_follows_the_time_stamps(film):
    times = [Fraction(t, 100) for t in (0, 4, 8, 40, 44, 100, 104, 112)]
    shown = numbers(film(8, times=times))
    assert shown[:3] == [0, 1, 2]
    assert shown[9] == 2
    assert shown[10] == 3
    assert shown[11:25] == [4] * 14
    assert shown[25] == 5


def test_repeated_frames_do_not_share_memory(film):
    first, second = islice(read_frames(film(10, fps=5)), 2)
    assert read_number(first) == read_number(second) == 0
    assert not np.shares_memory(first, second)
    assert first.flags.writeable
    assert first.flags.c_contiguous


@pytest.mark.parametrize("start", [1, 7, 29, 60, 74])
def test_start_gives_the_same_frames_as_reading_from_the_beginning(film, start):
    path = film(90, fps=30, options={"g": "12", "bf": "3", "crf": "12"})
    everything = list(read_frames(path))
    rest = list(read_frames(path, start=start))
    assert len(rest) == len(everything) - start
    assert all(map(np.array_equal, rest, everything[start:]))


def test_start_behind_the_end_gives_nothing(film):
    assert list(read_frames(film(10), start=10)) == []


def test_picture_that_begins_late_is_held_back(film):
    sound = np.zeros(48_000, dtype=np.float32)
    times = [Fraction(number + 5, 25) for number in range(20)]
    shown = numbers(film(20, times=times, sound=sound))
    assert shown == [0] * 5 + list(range(20))


@pytest.mark.skipif(not hasattr(VideoStream, "set_display_rotation"), reason="needs PyAV 18")
@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(film, rotation):
    path = film(3, rotation=rotation)
    info = probe(path)
    plain = next(read_frames(film(3, name="plain.mp4")))
    turned = next(read_frames(path))
    assert (info.width, info.height) == (turned.shape[1], turned.shape[0])
    assert info.rotation == rotation
    assert np.array_equal(turned, np.rot90(plain, rotation // 90))


@pytest.mark.parametrize("name", ["film.mkv", "film.mov", "film.ts", "film.avi"])
def test_containers(film, name):
    path = film(40, name=name, options={"bf": "0", "g": "10"})
    assert numbers(path) == list(range(40))
    assert numbers(path, start=33) == list(range(33, 40))


def test_raw_stream_without_time_stamps(film, tmp_path):
    source, raw = film(40, options={"bf": "0", "g": "10"}), tmp_path / "film.h264"
    with av.open(str(source)) as container:
        parts = av.BitStreamFilterContext("h264_mp4toannexb", container.streams.video[0])
        packets = (part for packet in container.demux(video=0) for part in parts.filter(packet))
        raw.write_bytes(b"".join(bytes(packet) for packet in packets))
    assert numbers(raw) == list(range(40))
    assert numbers(raw, start=30) == list(range(30, 40))
    assert [index for index, _ in PingPongReader(raw, 60, memory=1)][40:44] == [39, 38, 37, 36]


def test_probe(film):
    info = probe(film(30, fps=30, sound=np.zeros(48_000, dtype=np.float32)))
    assert (info.width, info.height, info.codec) == (128, 64, "h264")
    assert info.fps == 30
    assert info.duration == pytest.approx(1, abs=0.02)
    assert info.has_audio
    assert not probe(film(3, name="silent.mp4")).has_audio


@pytest.mark.parametrize(
    ("options", "memory"),
    [({"g": "250"}, 1), ({"g": "250"}, 150_000), ({"g": "7"}, 100_000), ({"g": "250"}, 2**30)],
)
def test_ping_pong_shows_the_same_pictures_backward(film, options, memory):
    path = film(23, options={**options, "crf": "12"})
    forward = list(read_frames(path))
    order = [*range(23), *range(22, -1, -1), *range(23), 22, 21]
    shown = list(PingPongReader(path, len(order), memory=memory))
    assert [index for index, _ in shown] == order
    assert all(np.array_equal(frame, forward[index]) for index, frame in shown)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": "open-gop=1:keyint=30:bframes=3"}),
        ("libx265", {"x265-params": "open-gop=1:keyint=30:bframes=4:log-level=none"}),
    ],
)
def test_open_groups_of_pictures_backward(film, codec, options):
    path = film(120, codec=codec, options={**options, "crf": "12"})
    forward = list(read_frames(path))
    assert [read_number(frame) for frame in forward] == list(range(120))
    backward = list(PingPongReader(path, 240, memory=17 * 128 * 64 * 3 // 2))[120:]
    assert [index for index, _ in backward] == list(range(119, -1, -1))
    assert all(np.array_equal(frame, forward[index]) for index, frame in backward)


def test_ping_pong_resamples(film):
    path = film(30, fps=30)
    forward = numbers(path)
    shown = [read_number(frame) for _, frame in PingPongReader(path, 60)]
    assert shown == [*forward, *forward[::-1], *forward[:10]]


def test_ping_pong_of_a_single_picture(film):
    assert [index for index, _ in PingPongReader(film(1), 5)] == [0] * 5


def test_ping_pong_stops_reading_where_it_may(film, monkeypatch):
    path = film(50)
    assert [index for index, _ in PingPongReader(path, 0)] == []
    assert [index for index, _ in PingPongReader(path, 7)] == list(range(7))


def test_memory_does_not_grow_with_the_number_of_frames(film):
    # Decoded pictures are FFmpeg's memory, so the whole process is measured, in its own.
    path = film(70, size=(640, 480), options={"g": "250", "crf": "35", "preset": "ultrafast"})
    script = (
        "import resource, sys\n"
        "from lsync_compile.media.video import PingPongReader\n"
        "for _ in PingPongReader(sys.argv[1], int(sys.argv[2]), memory=4 * 2**20): pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )

    def peak(count: int) -> int:
        command = [sys.executable, "-c", script, str(path), str(count)]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    forward, back_and_forth = peak(60), peak(200)
    # The 70 frames of this clip take 31 MiB.
    assert back_and_forth < forward + 4 + 8, (forward, back_and_forth)


def test_real_clip_from_its_middle(shared):
    # HEVC with a single key frame in 250: the search ends at the beginning.
    path = shared / "data/clips/demo1_video.mp4"
    expected = islice(read_frames(path), 30, 33)
    assert all(map(np.array_equal, islice(read_frames(path, start=30), 3), expected))


COLOURS = {
    "bt709": ColourTags(1, 1, 1),
    "bt601": ColourTags(6, 6, 6),
    "bt601-pal": ColourTags(5, 5, 6),
    "bt2020": ColourTags(9, 9, 14),
}


def bars(width: int = 256, height: int = 64) -> np.ndarray:
    colours = [[191, 191, 191], [191, 191, 0], [0, 191, 191], [0, 191, 0], [191, 0, 191]]
    colours += [[191, 0, 0], [0, 0, 191], [16, 16, 16]]
    return np.repeat(np.uint8(colours)[None].repeat(height, 0), width // 8, axis=1)


@pytest.mark.parametrize("tags", COLOURS.values(), ids=COLOURS.keys())
def test_colours_survive_and_keep_their_tags(tmp_path, tags):
    picture = bars()
    path = tmp_path / "bars.mp4"
    for _ in range(2):
        with VideoWriter(path, 256, 64, crf=1, colour=tags) as writer:
            for _ in range(3):
                writer.write(picture)
        assert probe(path).colour == tags.writable(64)
        picture = next(read_frames(path))
    middles = np.abs(picture[8:-8].astype(int) - bars()[8:-8])[:, 16::32]
    assert middles.max() <= 3


def test_untagged_colours_are_read_as_players_do(tmp_path):
    for height, matrix in ((720, 1), (240, 5)):
        path = tmp_path / f"{height}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
            stream.width, stream.height, stream.pix_fmt = 256, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(bars(256, height), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix)
            frame.colorspace = 2
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert probe(path).colour.matrix == 2
        shown = next(read_frames(path)).astype(int)
        assert np.abs(shown - bars(256, height))[8:-8, 16::32].max() <= 4


def test_full_range_is_read_as_such(tmp_path):
    path = tmp_path / "full.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25, options={"q:v": "1"})
        stream.width, stream.height, stream.pix_fmt = 256, 64, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(bars(), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuvj420p", dst_color_range=2)))
        container.mux(stream.encode(None))
    shown = next(read_frames(path)).astype(int)
    assert np.abs(shown - bars())[8:-8, 16::32].max() <= 4


def test_ten_bits_are_read(tmp_path):
    path = tmp_path / "ten.mkv"  # x265 into mp4 fails at random in FFmpeg 8
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx265", rate=25, options={"crf": "1", "x265-params": "log-level=none"}
        )
        stream.width, stream.height, stream.pix_fmt = 256, 64, "yuv420p10le"
        stream.codec_context.colorspace = stream.codec_context.color_primaries = 1
        frame = av.VideoFrame.from_ndarray(bars(), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p10le", dst_colorspace=1)))
        container.mux(stream.encode(None))
    shown = next(read_frames(path))
    assert shown.dtype == np.uint8
    assert np.abs(shown.astype(int) - bars())[8:-8, 16::32].max() <= 4


@pytest.mark.parametrize("size", [(129, 65), (131, 64)])
def test_odd_sizes_are_read_as_they_are(tmp_path, size):
    path = tmp_path / "odd.mkv"
    picture = numbered_picture(77, *size)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "bgr0"
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    assert np.array_equal(next(read_frames(path)), picture)


def test_conversion_has_no_bias(tmp_path):
    # The default conversion of FFmpeg's scaler is one level too dark.
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    path = tmp_path / "grey.mp4"
    with VideoWriter(path, 64, 64, crf=0) as writer:
        writer.write(grey)
    assert np.abs(next(read_frames(path)).astype(int) - 128).max() <= 1


def broken(path: Path, content: bytes | None) -> Path:
    if content is not None:
        path.write_bytes(content)
    return path


def test_broken_files_are_named(film, tmp_path):
    whole = film(60, options={"crf": "1"}).read_bytes()
    cases = {
        "missing.mp4": (None, "no such file"),
        "empty.mp4": (b"", "empty"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "not a media file"),
        "text.mp4": (b"this is no film\n" * 40, "not a media file"),
        "half.mp4": (whole[: len(whole) // 2], "not a media file"),
    }
    for name, (content, reason) in cases.items():
        path = broken(tmp_path / name, content)
        for use in (probe, count_frames, lambda path: next(read_frames(path))):
            with pytest.raises(MediaError) as caught:
                use(path)
            assert str(path) in str(caught.value)
            assert reason in str(caught.value)
            assert "\n" not in str(caught.value)


def test_file_with_index_at_the_front_that_was_cut_off(film, tmp_path):
    source, path = film(60, options={"crf": "1"}), tmp_path / "front.mp4"
    with (
        av.open(str(source)) as given,
        av.open(str(path), "w", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(MediaError, match=r"front\.mp4: cut off"):
        probe(path)


def test_folder_and_sound_file_are_no_films(tmp_path, make_speech):
    with pytest.raises(MediaError, match="folder"):
        probe(tmp_path)
    with pytest.raises(MediaError, match="no video track"):
        probe(make_speech(0.2))


def test_still_picture_is_a_film_of_one_frame(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "face.png"), numbered_picture(5, 128, 64)[:, :, ::-1])
    assert numbers(tmp_path / "face.png") == [5]


class Rational:
    """As PyAV 19 gives rates and times: 0, perhaps of 0 parts, where they are not known."""

    def __init__(self, numerator: int, denominator: int) -> None:
        self.numerator, self.denominator = numerator, denominator

    def __bool__(self) -> bool:
        return self.numerator != 0


@pytest.mark.parametrize("kind", [Fraction, Rational])
def test_rates_are_read_as_every_pyav_gives_them(kind: type) -> None:
    assert rational(kind(30000, 1001)) == Fraction(30000, 1001)
    assert type(rational(kind(1, 25))) is Fraction
    assert rational(kind(0, 1)) is None


def test_rates_that_nobody_knows() -> None:
    assert rational(None) is None
    assert rational(Rational(0, 0)) is None
    assert rational(Rational(1, 0)) is None
