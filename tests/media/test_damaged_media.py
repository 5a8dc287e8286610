"""Films and sounds that went wrong, and names that are unusual: read, or one clear error."""

from __future__ import annotations

import struct
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from fuzzing import few
from hypothesis import given
from hypothesis import strategies as st
from media_films import Film, film_maker, read_number, sweep

from lsync_compile.errors import MediaError
from lsync_compile.files import partial_name, remove_partials
from lsync_compile.media.audio import SoundReader, load_audio
from lsync_compile.media.video import (
    PingPongReader,
    VideoWriter,
    count_frames,
    probe,
    read_frames,
)


def y4m(folder: Path, *, width: int, height: int, frames: int = 1, rate: str = "25:1") -> Path:
    """A raw film, of as much of its pictures as 64 KiB hold."""
    path = folder / "raw.y4m"
    size = width * height + 2 * (-(-width // 2) * -(-height // 2))
    head = f"YUV4MPEG2 W{width} H{height} F{rate} Ip A1:1 C420jpeg\n".encode()
    picture = b"FRAME\n" + bytes(range(256)) * (min(size, 2**16) // 256 + 1)
    path.write_bytes(head + picture[: 6 + size] * frames)
    return path


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 7), (3, 5), (17, 1)])
def test_tiny_and_odd_films_are_read_and_written(tmp_path: Path, width: int, height: int) -> None:
    path, out = y4m(tmp_path, width=width, height=height, frames=3), tmp_path / "out.mp4"
    assert (probe(path).width, probe(path).height) == (width, height)
    frames = list(read_frames(path))
    assert [frame.shape for frame in frames] == [(height, width, 3)] * 3
    with VideoWriter(out, width, height) as film:
        for frame in frames:
            film.write(frame)
    assert count_frames(out) == 3


def test_a_film_of_one_frame(tmp_path: Path) -> None:
    path = y4m(tmp_path, width=16, height=16)
    assert len(list(PingPongReader(path, 9))) == 9


@pytest.mark.parametrize("side", [60_000, 2**30, 2**40])
def test_a_size_that_no_memory_holds_is_an_error(tmp_path: Path, side: int) -> None:
    path = y4m(tmp_path, width=side, height=side)
    for read in (probe, count_frames, load_audio):
        with pytest.raises(MediaError, match=r"raw\.y4m"):
            read(path)


def test_no_frames_a_second_are_read_as_they_come(tmp_path: Path) -> None:
    path = y4m(tmp_path, width=16, height=16, frames=4, rate="0:1")
    assert 1 <= count_frames(path, most=100) <= 100
    assert probe(path).fps >= 0


def test_time_stamps_that_go_back_do_not_end_the_film(film: Film, tmp_path: Path) -> None:
    path = film(10, name="film.ts", options={"crf": "10", "bf": "0"})
    path.write_bytes(2 * path.read_bytes())  # the second half begins at 0 again
    numbers = [read_number(frame) for frame in islice(read_frames(path), 100)]
    assert numbers[:9] == list(range(9))
    assert 10 <= len(numbers) <= 30


def test_frames_of_another_size_are_stretched_to_the_first(film: Film, tmp_path: Path) -> None:
    one = film(5, name="one.ts", size=(128, 64)).read_bytes()
    times = [Fraction(5 + number, 25) for number in range(5)]
    other = film(5, name="two.ts", size=(160, 96), times=times).read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(one + other)
    frames = list(islice(read_frames(path), 60))
    assert len(frames) >= 8  # what joins two films may lose a frame
    assert {frame.shape for frame in frames} == {(64, 128, 3)}


def test_a_film_that_claims_to_last_for_years_is_counted_as_far_as_wanted(
    tmp_path: Path, film: Film
) -> None:
    path = film(8)
    data = bytearray(path.read_bytes())
    table = data.index(b"stts")
    entries = struct.unpack_from(">I", data, table + 8)[0]
    # The last entry's duration in ticks of 1/12800 s.
    struct.pack_into(">I", data, table + 12 + 8 * (entries - 1) + 4, 2**31 - 1)
    path.write_bytes(data)
    assert count_frames(path, most=1000) == 1000


def test_samples_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 4, 16_000, 0, "NONE", "not compressed"))
        file.writeframes(np.full(1600, np.nan, dtype="<f4").tobytes())
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, data.index(b"fmt ") + 8, 3)  # floating point
    path.write_bytes(data)
    with pytest.raises(MediaError, match="no finite numbers"):
        load_audio(path)


UNUSUAL = [
    "12:30.mp4",
    "http:film.mp4",
    "file:film.mp4",
    "-film.mp4",
    "a film.mp4",
    "%03d.mp4",
    "'\"[*]?.mp4",
    "ünïcödé 口.mp4",
    "two\nlines.mp4",
    "bad\udcff.mp4",  # a byte that is no UTF-8
    "x" * 250 + ".mp4",
]


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.parametrize("relative", [True, False])
def test_any_name_is_a_files(
    film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, relative: bool
) -> None:
    content = film(3, sound=sweep(0.12, 48_000)).read_bytes()
    monkeypatch.chdir(tmp_path)
    path = Path(name) if relative else tmp_path / name
    path.write_bytes(content)
    assert count_frames(path) == 3
    assert len(load_audio(path)) > 1000
    frames = list(read_frames(path))
    with VideoWriter(path, 128, 64) as writer:  # in the place of what it is made of
        for frame in frames:
            writer.write(frame)
    assert count_frames(path) == 3
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["film.mp4", name])


@pytest.mark.parametrize("name", ["nul\0.mp4", "x" * 300 + ".mp4", "x." + "y" * 250])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for read in (probe, load_audio):
        with pytest.raises(MediaError):
            read(tmp_path / name)
    with pytest.raises(MediaError), VideoWriter(tmp_path / name, 16, 16):
        pass
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_have_room_for_their_names(tmp_path: Path) -> None:
    path = tmp_path / ("口" * 83 + ".mp4")  # 253 bytes
    partial = partial_name(path)
    partial.write_bytes(b"")
    remove_partials(path, int(partial.name.split(".")[-2].split("-")[0]))
    assert not partial.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/film.mp4", "tcp://127.0.0.1:9", "pipe:0"])
def test_nothing_is_asked_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MediaError, match="no such file"):
        probe(url)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError):
        probe(playlist)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The bytes of small films in containers of all kinds."""
    make = film_maker(tmp_path_factory.mktemp("films"))
    kinds = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "libx264")]
    return [
        make(10, name=name, codec=codec, sound=sweep(0.4, 48_000)).read_bytes()
        for name, codec in kinds
    ]


def frames_of(path: Path) -> Iterator[object]:
    return islice(read_frames(path), 100)


READERS: list[Callable[[Path], object]] = [
    probe,
    lambda path: list(frames_of(path)),
    lambda path: list(islice(read_frames(path, start=4), 100)),
    lambda path: list(PingPongReader(path, 25)),
    lambda path: count_frames(path, most=1000),
    load_audio,
    lambda path: SoundReader(path).read(10_000),
]


@few(40)
@given(data=st.data())
def test_any_damage_is_read_or_one_line(
    films: list[bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes changed, a stretch zeroed or shown twice, the end lost, another suffix."""
    content = bytearray(data.draw(st.sampled_from(films)))
    suffix = data.draw(st.sampled_from([".mp4", ".mkv", ".avi", ".ts", ".png", ".wav", ""]))
    place = data.draw(st.integers(0, len(content) - 1))
    long = data.draw(st.integers(1, 2000))
    kind = data.draw(st.sampled_from(["cut", "zero", "twice", "flips", "head"]))
    if kind == "cut":
        del content[place:]
    elif kind == "zero":
        content[place : place + long] = bytes(len(content[place : place + long]))
    elif kind == "twice":
        content[place:place] = content[place : place + long]
    else:
        reach = 1000 if kind == "head" else len(content)
        for _ in range(data.draw(st.integers(1, 30))):
            content[data.draw(st.integers(0, reach - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / f"film{suffix}"
    path.write_bytes(content)
    for read in READERS:
        said = ""
        try:
            read(path)
        except MediaError as error:
            said = str(error)
        assert "\n" not in said
