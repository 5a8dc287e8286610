"""Sound from any file that FFmpeg reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av.error
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.filter import Graph

from lsync_compile.errors import MediaError
from lsync_compile.media.container import audio_stream, open_media, origin, rational

Samples = npt.NDArray[np.float32]

_LAYOUTS = {1: "mono", 2: "stereo"}
_HIGHEST_RATE = 48_000  # Hz; more is not heard, and not every player takes it
_BLOCK = 2**16  # samples at a time


def load_audio(path: str | Path, *, sample_rate: int = 16000, channels: int = 1) -> Samples:
    """The first sound track of a file, resampled.

    Sample 0 belongs to the file's time zero, which is that of `read_frames`: where the sound of a
    film begins after the picture, silence fills the gap.

    Args:
        path: any media file with sound.
        sample_rate: samples per second wanted.
        channels: 1 mixes all channels together, without going beyond full scale, and gives
            (n,); 2 gives (n, 2).

    Returns:
        float32, nominally in [-1, 1], of shape (n,) or (n, 2).

    Raises:
        MediaError: the file cannot be read, is damaged, or has no sound track, or an empty one.
    """
    sound = np.concatenate(list(_decode(path, sample_rate, channels)))
    if not np.isfinite(sound).all():
        raise MediaError(f"{path}: its sound holds samples that are no finite numbers")
    return sound[:, 0] if channels == 1 else sound


def resample(samples: Samples, source_rate: int, sample_rate: int) -> Samples:
    """Samples of one channel, (n,) float32, at another rate."""
    if source_rate == sample_rate:
        return samples
    resampler = _Resampler(sample_rate, 1)
    blocks = []
    for begin in range(0, len(samples), _BLOCK):
        part = np.ascontiguousarray(samples[None, begin : begin + _BLOCK], dtype=np.float32)
        frame = AudioFrame.from_ndarray(part, format="flt", layout="mono")
        frame.sample_rate = source_rate
        blocks += resampler(frame)
    return np.concatenate(blocks + resampler.flush())


class SoundReader:
    """The first sound track of a file, read forward piece by piece, in memory of any length.

    Args:
        path: any media file with sound.
        sample_rate: samples per second wanted; that of the track where None, at most 48,000.
        channels: 1 or 2; those of the track where None, at most 2.

    Attributes:
        sample_rate: samples per second that are read.
        channels: channels that are read.

    Raises:
        MediaError: the file cannot be read or has no sound track; from `read`, it is damaged.
    """

    def __init__(
        self, path: str | Path, *, sample_rate: int | None = None, channels: int | None = None
    ) -> None:
        with open_media(path) as container:
            track = audio_stream(path, container)
            self.sample_rate = sample_rate or min(track.rate or _HIGHEST_RATE, _HIGHEST_RATE)
            self.channels = channels or max(1, min(track.channels, 2))  # 0 in damaged files
        self._blocks = _decode(path, self.sample_rate, self.channels)
        self._rest = np.zeros((0, self.channels), dtype=np.float32)

    def read(self, count: int) -> Samples:
        """The next `count` samples, (count, channels) float32; fewer at the end of the sound."""
        parts, have = [self._rest], len(self._rest)
        while have < count and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            have += len(block)
        joined = np.concatenate(parts)
        self._rest = joined[count:]
        return joined[:count]


def _decode(path: str | Path, sample_rate: int, channels: int) -> Iterator[Samples]:
    """Blocks (m, channels) of the sound, from the file's time zero on."""
    with open_media(path) as container:
        track = audio_stream(path, container)
        resampler = _Resampler(sample_rate, channels)
        held: deque[Samples] = deque()  # the last codec block, of which a part may be too much
        begun, total = False, 0
        time = lasts = Fraction(0)
        try:
            for frame in chain(container.decode(track), [None]):
                if frame is not None:
                    unit = rational(frame.time_base)
                    if frame.pts is not None and unit is not None:
                        time = frame.pts * unit
                    if not begun:
                        silence = round(max(Fraction(0), time - origin(container)) * sample_rate)
                        yield np.zeros((silence, channels), dtype=np.float32)
                        begun = True
                    lasts = Fraction(frame.samples, frame.sample_rate)
                for block in resampler.flush() if frame is None else resampler(frame):
                    held.append(block.reshape(-1, channels))
                    total += len(held[-1])
                while sum(map(len, held)) - len(held[0] if held else ()) > lasts * sample_rate:
                    yield held.popleft()
        except av.error.FFmpegError as error:
            raise MediaError(
                f"{path}: sound damaged or cut off after {float(time):.2f} s ({error.strerror})"
            ) from error
        unit = rational(track.time_base)
        duration = None if unit is None else (track.duration or 0) * unit
        if not total:
            raise MediaError(f"{path}: its audio track is empty")
        rest = np.concatenate(held)
        # Codecs work in blocks; MP4 says where in its last block the sound ends. Other containers
        # only estimate their length, which is then off by more than a block and not used.
        if duration and 0 < Fraction(total, sample_rate) - duration < lasts:
            rest = rest[: len(rest) - (total - round(duration * sample_rate))]
        yield rest


class _Resampler:
    """Decoded frames to interleaved float32 blocks of one rate and number of channels.

    PyAV's own resampler mixes floating-point channels without bringing their sum back to full
    scale: stereo would come out 3 dB too loud, and clipped where it is written again.
    """

    def __init__(self, sample_rate: int, channels: int) -> None:
        self._target = f"{sample_rate}:ochl={_LAYOUTS[channels]}:osf=flt:rematrix_maxval=1"
        self._source: tuple[str, str, int] | None = None
        self._graph = Graph()

    def __call__(self, frame: AudioFrame) -> list[Samples]:
        source = (frame.format.name, frame.layout.name, frame.sample_rate)
        blocks = []
        if source != self._source:
            # Broadcasts switch between stereo and surround in mid-stream.
            blocks = self.flush()
            self._source, self._graph = source, self._build(*source)
        # The filter would take a gap between time stamps for lost samples.
        frame.pts = None
        self._graph.push(frame)
        return blocks + self._pull()

    def flush(self) -> list[Samples]:
        """What the filter still holds."""
        if self._source is None:
            return []
        self._graph.push(None)
        return self._pull()

    def _build(self, form: str, layout: str, rate: int) -> Graph:
        graph = Graph()
        given = graph.add_abuffer(
            format=form, layout=layout, sample_rate=rate, time_base=Fraction(1, rate)
        )
        graph.link_nodes(
            given, graph.add("aresample", self._target), graph.add("abuffersink")
        ).configure()
        return graph

    def _pull(self) -> list[Samples]:
        blocks: list[Samples] = []
        while True:
            try:
                block = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return blocks
            assert isinstance(block, AudioFrame)
            blocks.append(np.asarray(block.to_ndarray(), dtype=np.float32).reshape(-1))
