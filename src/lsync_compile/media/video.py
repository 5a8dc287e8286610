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
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from lsync_compile.errors import MediaError
from lsync_compile.media.colour import EXACT, ColourTags
from lsync_compile.media.container import open_media, origin, video_stream
from lsync_compile.media.writer import VideoWriter

__all__ = [
    "PingPongReader",
    "VideoInfo",
    "VideoWriter",
    "count_frames",
    "probe",
    "read_frames",
]

Frame = npt.NDArray[np.uint8]

# A file is searched for a key frame this many seconds ahead of the frame wanted, more than any
# codec reorders by. Where its index leads behind that frame, the next is tried; None reads from
# the beginning.
_SEEK_AHEAD = (1, 10, None)


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
        aspect = track.sample_aspect_ratio or Fraction(1)
        duration = Fraction(container.duration or 0, av.time_base)
        if track.duration is not None and track.time_base is not None:
            duration = track.duration * track.time_base
        name = track.codec_context.name
        return VideoInfo(
            width=height if turned else width,
            height=width if turned else height,
            fps=float(track.average_rate or track.guessed_rate or 0),
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
    for _, frame in _place(path, Fraction(fps).limit_denominator(1001), start):
        yield convert(frame)


def count_frames(path: str | Path, fps: float = 25) -> int:
    """How many frames `read_frames` yields. Decodes the whole clip.

    Raises:
        MediaError: the file cannot be read.
    """
    return sum(1 for _ in _place(path, Fraction(fps).limit_denominator(1001), 0))


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
        self._fps = Fraction(fps).limit_denominator(1001)
        self._memory = memory

    def __iter__(self) -> Iterator[tuple[int, Frame]]:
        """Yield (index in the clip, frame (H, W, 3) uint8 RGB).

        Raises:
            MediaError: the file cannot be read, or holds no frame.
        """
        left = self._count
        convert = _Converter()
        length = segment = 0
        while left > 0:
            for index, frame in _place(self._path, self._fps, 0):
                if left == 0:
                    return
                length = max(length, index + 1)
                if segment == 0:
                    size = sum(plane.buffer_size for plane in frame.planes)
                    segment = max(1, self._memory // size)
                left -= 1
                yield index, convert(frame)
            for end in range(length, 0, -segment):
                if left == 0:
                    return
                first = max(0, end - segment)
                # Of the first segment shown, only the part that is wanted is decoded.
                first = max(first, end - left)
                for index, frame in reversed(self._segment(first, end)):
                    left -= 1
                    yield index, convert(frame)

    def _segment(self, first: int, end: int) -> list[tuple[int, VideoFrame]]:
        frames = []
        for index, frame in _place(self._path, self._fps, first):
            frames.append((index, frame))
            if index == end - 1:
                break
        return frames


class _Converter:
    """Decoded frames to upright RGB arrays."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> Frame:
        tags = ColourTags(int(frame.colorspace)).resolved(frame.height)
        picture = self._reformatter.reformat(
            frame, format="rgb24", src_colorspace=tags.swscale_matrix, interpolation=EXACT
        ).to_ndarray()
        turned = np.rot90(picture, round(frame.rotation / 90))
        return np.array(turned, dtype=np.uint8, order="C")


@dataclass(frozen=True)
class _Placed:
    """A decoded frame, the index where it begins to show and the one where the next one would."""

    begin: int
    end: int
    frame: VideoFrame


def _place(path: str | Path, fps: Fraction, start: int) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (index, decoded frame) for every index from `start` on; frames may repeat."""
    for ahead in _SEEK_AHEAD if start > 0 else (None,):
        with open_media(path) as container:
            decoded = _decode(path, container, fps, None if ahead is None else (start, ahead))
            first = next(decoded, None)
            if ahead is None and first is None:
                raise MediaError(f"{path}: its video track holds no frame")
            if first is not None and (ahead is None or first.begin <= start):
                yield from _spread(chain([first], decoded), start)
                return


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


def _decode(
    path: str | Path, container: InputContainer, fps: Fraction, search: tuple[int, int] | None
) -> Iterator[_Placed]:
    """Decode from the beginning or, given (index, seconds ahead of it), from there if possible.

    Yields nothing where the file cannot be searched.
    """
    track = video_stream(path, container)
    zero = origin(container)
    rate = track.average_rate or track.guessed_rate or fps
    # AVI stores the order of decoding only; FFmpeg's time stamps for it are off by the delay of
    # its reordering.
    stamped = container.format.name != "avi"
    if search is not None:
        time = search[0] / fps - search[1]
        if time <= 0 or track.time_base is None or not stamped:
            return
        try:
            container.seek(math.floor((zero + time) / track.time_base), stream=track)
        except av.error.FFmpegError:
            # No index, as in a raw stream: the caller reads from the beginning.
            return
    time = Fraction(0)
    try:
        for number, frame in enumerate(container.decode(track)):
            unit = frame.time_base or track.time_base
            lasts = 1 / rate
            if stamped and frame.pts is not None and unit is not None:
                time = frame.pts * unit - zero
                lasts = frame.duration * unit or lasts
            elif search is None:
                # Without time stamps frames come at a constant rate.
                time = number / rate
            else:
                return
            yield _Placed(_grid(time, fps), _grid(time + lasts, fps), frame)
    except av.error.FFmpegError as error:
        raise MediaError(
            f"{path}: damaged or cut off {float(time):.2f} s into the clip ({error.strerror})"
        ) from error


def _grid(time: Fraction, fps: Fraction) -> int:
    """The index nearest to a time in seconds, halves upward."""
    return math.floor(time * fps + Fraction(1, 2))
