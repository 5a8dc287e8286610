"""Video files as streams of RGB frames at a constant rate, and back into files.

Frames are placed by their time stamps, so inputs of any rate, constant or variable, keep their
speed: output frame k is the last one whose time, rounded to the output's grid, is at most k. The
rotation that phones store beside the picture is applied. Memory does not grow with the length of
the clip.

Colours follow the file's tags; a file without them is read as BT.709 from 720 lines on and as
BT.601 below, as players do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from lsync_compile.errors import MediaError
from lsync_compile.media.colour import EXACT, ColourTags
from lsync_compile.media.container import open_media, origin, rational, video_stream
from lsync_compile.media.writer import VideoWriter

__all__ = [
    "PingPongReader",
    "VideoInfo",
    "VideoWriter",
    "count_frames",
    "on_grid",
    "probe",
    "read_frames",
]

Frame = npt.NDArray[np.uint8]

# A file is searched for a key frame this many seconds ahead of the frame wanted, which is more
# than any codec reorders by. Where its index leads behind that frame, the next is tried.
_SEEK_AHEAD = (1, 10)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself.

    Attributes:
        width: pixels, after rotation.
        height: pixels, after rotation.
        fps: average frames per second.
        duration: seconds; 0 where the file does not say.
        codec: FFmpeg's name of the video codec, such as ``h264``.
        has_audio: whether there is a sound track.
        rotation: degrees counter-clockwise that were applied to the stored picture.
        colour: the tags of the colour space.
        pixel_aspect: width of a pixel over its height, after rotation.
    """

    width: int
    height: int
    fps: float
    duration: float
    codec: str
    has_audio: bool
    rotation: int
    colour: ColourTags
    pixel_aspect: Fraction


def probe(path: str | Path) -> VideoInfo:
    """Size, rate and colours of a video file. Decodes a single frame.

    Raises:
        MediaError: the file cannot be read or shows no picture.
    """
    with open_media(path) as container:
        track = video_stream(path, container)
        frame = next(container.decode(track), None)
        if frame is None:
            raise MediaError(f"{path}: its video track holds no frame")
        # FFmpeg gives -180 for upside down.
        rotation = 180 if frame.rotation == -180 else frame.rotation
        turned = rotation % 180 != 0
        width, height = frame.width, frame.height
        aspect = rational(track.sample_aspect_ratio) or Fraction(1)
        duration, unit = Fraction(container.duration or 0, av.time_base), rational(track.time_base)
        if track.duration is not None and unit is not None:
            duration = track.duration * unit
        name = track.codec_context.name
        return VideoInfo(
            width=height if turned else width,
            height=width if turned else height,
            fps=float(_rate(track) or 0),
            duration=float(duration),
            codec=name,
            has_audio=bool(container.streams.audio),
            rotation=rotation,
            colour=ColourTags.of(track.codec_context),
            pixel_aspect=1 / aspect if turned else aspect,
        )


def read_frames(path: str | Path, *, fps: float = 25, start: int = 0) -> Iterator[Frame]:
    """Frames of a video at a constant rate.

    Args:
        path: the video file.
        fps: output frames per second, whatever the file's own rate.
        start: output index of the first frame wanted; the file is searched, not read up to there.

    Yields:
        (H, W, 3) uint8 RGB, each an array of its own.

    Raises:
        MediaError: the file cannot be read, or is damaged from some frame on.
    """
    convert = _Converter()
    with _Clip(path, fps) as clip:
        for _, frame in clip.frames(start):
            yield convert(frame)


def count_frames(path: str | Path, fps: float = 25, *, most: int | None = None) -> int:
    """How many frames `read_frames` yields, counted up to `most`. Decodes the whole clip.

    Raises:
        MediaError: the file cannot be read.
    """
    with _Clip(path, fps) as clip:
        return sum(1 for _ in islice(clip.frames(), most))


class PingPongReader:
    """Frames of a clip played forward, backward, forward and so on, until `count` are out.

    Both ends are shown twice at each turn, as LatentSync does. Going backward, the clip is decoded
    in segments from the last to the first; a segment's decoded frames take at most `memory` bytes,
    however far apart the file's key frames are. Frames shown backward are bit for bit those shown
    forward.

    Args:
        path: the video file.
        count: how many frames to give.
        fps: output frames per second.
        memory: bytes for decoded frames of one segment. With key frames n frames apart and s
            frames to a segment, going backward decodes each frame n / 2s times or so.
    """

    def __init__(
        self, path: str | Path, count: int, fps: float = 25, *, memory: int = 192 * 2**20
    ) -> None:
        self._path = path
        self._count = count
        self._fps = fps
        self._memory = memory

    def __iter__(self) -> Iterator[tuple[int, Frame]]:
        """Yield (index in the clip, frame (H, W, 3) uint8 RGB).

        Raises:
            MediaError: the file cannot be read, or holds no frame.
        """
        convert = _Converter()
        with _Clip(self._path, self._fps) as clip:
            for index, frame in islice(self._play(clip), self._count):
                yield index, convert(frame)

    def _play(self, clip: _Clip) -> Iterator[tuple[int, VideoFrame]]:
        """Forward and backward without end."""
        left = self._count
        segment = length = 0
        while True:
            for index, frame in clip.frames():
                yield index, frame
                left -= 1
                length = max(length, index + 1)
                segment = segment or max(1, self._memory // _bytes(frame))
            for end in range(length, 0, -segment):
                # Of the last segment wanted, only the part that is wanted is decoded.
                first = max(0, end - segment, end - left)
                left -= end - first
                yield from reversed(list(islice(clip.frames(first), end - first)))


def _bytes(frame: VideoFrame) -> int:
    return sum(plane.buffer_size for plane in frame.planes)


class _Converter:
    """Decoded frames to upright RGB arrays, all of the first one's size.

    Films that were put together, and streams that adapt to the line, change size on the way;
    players stretch such frames to the first one's.
    """

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: VideoFrame) -> Frame:
        tags = ColourTags(int(frame.colorspace)).resolved(frame.height)
        self._size = self._size or (frame.width, frame.height)
        picture = self._reformatter.reformat(
            frame,
            *self._size,
            format="rgb24",
            src_colorspace=tags.swscale_matrix,
            interpolation=EXACT,
        ).to_ndarray()
        turned = np.rot90(picture, round(frame.rotation / 90))
        return np.array(turned, dtype=np.uint8, order="C")


@dataclass(frozen=True)
class _Placed:
    """A decoded frame, the index where it begins to show and the one where the next one would."""

    begin: int
    end: int
    frame: VideoFrame


class _Clip:
    """A film opened for reading from any place in it, by one reader at a time.

    It stays open between readings so that the decoder's buffers are used again.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self._path = path
        self._fps = Fraction(fps).limit_denominator(1001)
        self._opened = ExitStack()

    def _open(self) -> None:
        self._container = self._opened.enter_context(open_media(self._path))
        self._track = video_stream(self._path, self._container)
        self._fresh = True

    def __enter__(self) -> _Clip:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self._opened.__exit__(kind, error, trace)

    def frames(self, start: int = 0) -> Iterator[tuple[int, VideoFrame]]:
        """Yield (index, decoded frame) for every index from `start` on; frames may repeat."""
        for ahead in _SEEK_AHEAD if start > 0 else ():
            if self._seek(start / self._fps - ahead):
                decoded = self._decode(from_middle=True)
                first = next(decoded, None)
                if first is not None and first.begin <= start:
                    yield from _spread(chain([first], decoded), start)
                    return
        if not self._fresh:
            self._opened.close()
            self._open()
        decoded = self._decode(from_middle=False)
        first = next(decoded, None)
        if first is None:
            raise MediaError(f"{self._path}: its video track holds no frame")
        yield from _spread(chain([first], decoded), start)

    @property
    def _stamped(self) -> bool:
        # AVI stores the order of decoding only; FFmpeg's time stamps for it are off by the delay
        # of its reordering.
        return self._container.format.name != "avi"

    def _seek(self, time: Fraction) -> bool:
        """Go to the last key frame before a time in seconds; False if that is not possible."""
        unit = rational(self._track.time_base)
        if time <= 0 or unit is None or not self._stamped:
            return False
        self._fresh = False
        offset = math.floor((origin(self._container) + time) / unit)
        try:
            self._container.seek(offset, stream=self._track)
        except av.error.FFmpegError:
            # No index, as in a raw stream.
            return False
        return True

    def _decode(self, *, from_middle: bool) -> Iterator[_Placed]:
        """Decode on; yields nothing from the middle of a film without time stamps."""
        self._fresh = False
        zero = origin(self._container)
        rate = _rate(self._track) or self._fps
        time = Fraction(0)
        try:
            for number, frame in enumerate(self._container.decode(self._track)):
                unit = rational(frame.time_base) or rational(self._track.time_base)
                lasts = 1 / rate
                if self._stamped and frame.pts is not None and unit is not None:
                    time = frame.pts * unit - zero
                    lasts = frame.duration * unit or lasts
                elif from_middle:
                    return
                else:
                    # Without time stamps frames come at a constant rate.
                    time = number / rate
                yield _Placed(on_grid(time, self._fps), on_grid(time + lasts, self._fps), frame)
        except av.error.FFmpegError as error:
            raise MediaError(
                f"{self._path}: damaged or cut off {float(time):.2f} s into the clip "
                f"({error.strerror})"
            ) from error


def _rate(track: VideoStream) -> Fraction | None:
    """Frames a second, as the file says or FFmpeg guesses."""
    return rational(track.average_rate) or rational(track.guessed_rate)


def _spread(decoded: Iterable[_Placed], start: int) -> Iterator[tuple[int, VideoFrame]]:
    """Hold each frame until the next one begins."""
    index, held = start, None
    for placed in decoded:
        while index < placed.begin:
            # A track that begins late shows its first frame from the start.
            yield index, (held or placed).frame
            index += 1
        held = placed
    while held is not None and index < max(held.end, 1):
        yield index, held.frame
        index += 1


def on_grid(time: Fraction, fps: Fraction) -> int:
    """The output index nearest to a time in seconds, halves upward."""
    return math.floor(time * fps + Fraction(1, 2))
