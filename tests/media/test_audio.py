"""Loading sound: lengths, timing, and errors that name the file."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_films import lag, sweep

from lsync_compile.errors import MediaError
from lsync_compile.media.audio import SoundReader, load_audio


def record(path: Path, samples: np.ndarray, rate: int, codec: str, layout: str = "mono") -> Path:
    """Write samples (n,) to every channel of a sound file."""
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        kind = stream.codec_context.format.name
        planar = np.repeat(samples[None], channels, axis=0)
        if kind.startswith("s"):
            dtype = np.int16 if "16" in kind else np.int32
            planar = (planar * np.float64(np.iinfo(dtype).max)).round().astype(dtype)
        shaped = planar if kind.endswith("p") else planar.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(shaped), format=kind, layout=layout)
        frame.sample_rate = rate
        frame.pts, frame.time_base = 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout"),
    [
        ("a.wav", "pcm_s16le", 16_000, "mono"),
        ("a.wav", "pcm_s16le", 44_100, "stereo"),
        ("a.wav", "pcm_s16le", 8_000, "mono"),
        ("a.flac", "flac", 48_000, "stereo"),
        ("a.m4a", "aac", 44_100, "stereo"),
        ("a.m4a", "aac", 48_000, "5.1"),
        ("a.mp3", "libmp3lame", 44_100, "stereo"),
        ("a.mp3", "libmp3lame", 22_050, "mono"),
        ("a.opus", "libopus", 48_000, "mono"),
    ],
)
def test_any_format_gives_the_same_samples(tmp_path, name, codec, rate, layout):
    seconds = 2.345
    path = record(tmp_path / name, sweep(seconds, rate), rate, codec, layout)
    heard, played = load_audio(path), sweep(seconds, 16_000)
    assert heard.dtype == np.float32
    assert heard.ndim == 1
    # Lossy codecs may round the end up to a block where the container does not say.
    assert 0 <= len(heard) - len(played) <= 16_000 * 1152 // rate + 1
    assert abs(lag(heard, played)) <= 1
    both = slice(200, 16_000)
    assert np.corrcoef(heard[both], played[both])[0, 1] > 0.98
    # Equal channels mix to themselves, not to their sum; surround is mixed quieter.
    loudness = np.abs(heard[both]).mean() / np.abs(played[both]).mean()
    assert 0.9 < loudness < 1.1


@pytest.mark.parametrize("samples", [1, 159, 16_000, 48_001])
def test_lengths_are_exact_without_resampling(tmp_path, samples):
    given = sweep(samples / 16_000, 16_000)
    heard = load_audio(record(tmp_path / "a.wav", given, 16_000, "pcm_s16le"))
    assert len(heard) == samples
    assert np.abs(heard - given).max() <= 1 / 32767


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_flushes_its_last_samples(tmp_path, rate):
    path = record(tmp_path / "a.wav", sweep(1.0, rate), rate, "pcm_s16le")
    heard = load_audio(path)
    assert abs(len(heard) - 16_000) <= 1
    assert np.abs(heard[-200:]).max() > 0.3


def test_another_rate_and_two_channels(tmp_path):
    path = record(tmp_path / "a.wav", sweep(1.0, 44_100), 44_100, "pcm_s16le", "stereo")
    heard = load_audio(path, sample_rate=44_100, channels=2)
    assert heard.shape == (44_100, 2)
    assert np.array_equal(heard[:, 0], heard[:, 1])


@pytest.mark.parametrize("delay", [Fraction(0), Fraction(1, 5)])
def test_sound_of_a_film_is_timed_by_its_picture(film, delay):
    played = sweep(1.0, 48_000)
    heard = load_audio(film(40, sound=played, sound_delay=delay))
    shift = round(delay * 16_000)
    # MP4 stores delays in milliseconds.
    assert abs(lag(heard, sweep(1.0, 16_000)) - shift) <= 16
    assert np.abs(heard[: max(shift - 400, 0)]).max(initial=0) < 0.01


def test_film_without_sound(film):
    with pytest.raises(MediaError, match=r"film\.mp4: has no audio track"):
        load_audio(film(3))


@pytest.mark.parametrize("content", [None, b"", b"RIFF but no sound" * 20])
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "speech.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=r"speech\.wav: "):
        load_audio(path)


def test_track_without_a_sample(tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
    with pytest.raises(MediaError, match=r"a\.wav: its audio track is empty"):
        load_audio(path)


@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout", "read"),
    [
        ("a.wav", "pcm_s16le", 44_100, "stereo", (44_100, 2)),
        ("a.m4a", "aac", 48_000, "5.1", (48_000, 2)),
        ("a.wav", "pcm_s16le", 96_000, "mono", (48_000, 1)),
        ("a.mp3", "libmp3lame", 22_050, "mono", (22_050, 1)),
    ],
)
def test_pieces_are_the_whole_sound(tmp_path, name, codec, rate, layout, read):
    path = record(tmp_path / name, sweep(1, rate), rate, codec, layout)
    reader = SoundReader(path)
    assert (reader.sample_rate, reader.channels) == read
    pieces = []
    while len(piece := reader.read(1_764)):
        assert piece.shape[1] == reader.channels
        pieces.append(piece)
    assert all(len(piece) == 1_764 for piece in pieces[:-1])
    whole = load_audio(path, sample_rate=reader.sample_rate, channels=reader.channels)
    np.testing.assert_array_equal(np.concatenate(pieces), whole.reshape(-1, reader.channels))
    assert len(reader.read(10)) == 0


def test_a_reader_of_a_film_without_sound(film):
    with pytest.raises(MediaError, match="no audio track"):
        SoundReader(film(frames=3))
