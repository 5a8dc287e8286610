"""Sound from any file that FFmpeg reads."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av.error
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.filter import Graph

from lsync_compile.errors import MediaError
from lsync_compile.media.container import audio_stream, open_media, origin

Samples = npt.NDArray[np.float32]

_LAYOUTS = {1: "mono", 2: "stereo"}


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
    with open_media(path) as container:
        track = audio_stream(path, container)
        resampler = _Resampler(sample_rate, channels)
        blocks: list[Samples] = []
        begin: Fraction | None = None
        time = lasts = Fraction(0)
        try:
            for frame in container.decode(track):
                if frame.pts is not None and frame.time_base is not None:
                    time = frame.pts * frame.time_base
                if begin is None:
                    begin = max(Fraction(0), time - origin(container))
                lasts = Fraction(frame.samples, frame.sample_rate)
                blocks.extend(resampler(frame))
            blocks.extend(resampler.flush())
        except av.error.FFmpegError as error:
            raise MediaError(
                f"{path}: sound damaged or cut off after {float(time):.2f} s ({error.strerror})"
            ) from error
        duration = None if track.time_base is None else (track.duration or 0) * track.time_base
    if not blocks or begin is None:
        raise MediaError(f"{path}: its audio track is empty")
    sound = np.concatenate(blocks).reshape(-1, channels)
    # Codecs work in blocks; MP4 says where in its last block the sound ends. Other containers only
    # estimate their length, which is then off by more than a block and not used.
    if duration and 0 < Fraction(len(sound), sample_rate) - duration < lasts:
        sound = sound[: round(duration * sample_rate)]
    silence = np.zeros((round(begin * sample_rate), channels), dtype=np.float32)
    sound = np.concatenate([silence, sound])
    return sound[:, 0] if channels == 1 else sound


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
