"""Opening media files, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
import av.stream
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from lsync_compile.cores import codec_threads
from lsync_compile.errors import MediaError

# A playlist may name files, but no servers.
_LOCAL_ONLY = {"protocol_whitelist": "file"}

# Titles in broken encodings must not keep a clip from being read; from PyAV 19 on they do not.
_OLDER = int(av.__version__.partition(".")[0]) < 19
_TITLES: dict[str, Any] = {"metadata_errors": "ignore"} if _OLDER else {}


@contextmanager
def open_media(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Open a file for reading; FFmpeg's errors inside the block become MediaError.

    Raises:
        MediaError: the file is missing, empty, cut off, no media file or damaged.
    """
    try:
        with av.open(local_url(path), container_options=_LOCAL_ONLY, **_TITLES) as container:
            # FFmpeg draws any text file as video.
            if container.format.name == "tty":
                raise MediaError(f"{path}: not a media file")
            _check_complete(path, container)
            yield container
    except av.error.FFmpegError as error:
        raise MediaError(f"{path}: {_reason(path, error)}") from error


def local_url(path: str | Path) -> str:
    """A path as FFmpeg takes nothing but a local file, whatever is in its name.

    Otherwise ``12:30.mp4`` would be a protocol "12", and ``http://…`` a reason to use the network.

    Raises:
        MediaError: no file can have this name.
    """
    if "\0" in str(path):
        raise MediaError(f"{str(path)!r}: is no name of a file")
    return f"file:{path}"


def video_stream(path: str | Path, container: av.container.InputContainer) -> VideoStream:
    """The first video track that is not a cover picture.

    Raises:
        MediaError: there is none, or this build of FFmpeg has no decoder for it.
    """
    covers = av.stream.Disposition.attached_pic
    tracks = [track for track in container.streams.video if not track.disposition & covers]
    if not tracks:
        raise MediaError(f"{path}: has no video track")
    _check_decoder(path, "video", tracks[0])
    tracks[0].thread_type = "AUTO"
    tracks[0].codec_context.thread_count = codec_threads()
    return tracks[0]


def audio_stream(path: str | Path, container: av.container.InputContainer) -> AudioStream:
    """The first audio track.

    Raises:
        MediaError: there is none, or this build of FFmpeg has no decoder for it.
    """
    if not container.streams.audio:
        raise MediaError(f"{path}: has no audio track; give a file with sound")
    track = container.streams.audio[0]
    _check_decoder(path, "audio", track)
    return track


def origin(container: av.container.InputContainer) -> Fraction:
    """Where the file's timeline begins, in seconds: the earliest start of picture and sound."""
    starts = [
        track.start_time * unit
        for track in (*container.streams.video[:1], *container.streams.audio[:1])
        if track.start_time is not None and (unit := rational(track.time_base)) is not None
    ]
    return min(starts, default=Fraction(0))


def rational(value: Any) -> Fraction | None:
    """A rate, ratio or unit of time of PyAV; None where the file does not say.

    From PyAV 19 on these are of a type of its own, and 0 where they were None before.
    """
    known = value and value.denominator
    return Fraction(value.numerator, value.denominator) if known else None


def _check_decoder(path: str | Path, kind: str, track: av.stream.Stream) -> None:
    # PyAV leaves the context out where FFmpeg knows no decoder for the track.
    if track.codec_context is None:
        raise MediaError(f"{path}: this build of FFmpeg cannot decode its {kind} track")


def _check_complete(path: str | Path, container: av.container.InputContainer) -> None:
    """Refuse a file whose index points beyond its end, before any work is done on its start."""
    size = container.size or 0  # None from PyAV 19 on where it is not known
    for track in container.streams:
        entries = track.index_entries
        end = entries[-1].pos + entries[-1].size if len(entries) else 0
        if end > size > 0:
            raise MediaError(
                f"{path}: cut off: {size} bytes of at least {end}; copy or download it again"
            )


def _reason(path: str | Path, error: av.error.FFmpegError) -> str:
    if isinstance(error, av.error.FileNotFoundError):
        return "no such file"
    if isinstance(error, av.error.IsADirectoryError):
        return "is a folder, not a media file"
    if isinstance(error, av.error.InvalidDataError):
        if Path(path).is_file() and Path(path).stat().st_size == 0:
            return "the file is empty"
        return "not a media file, cut off or damaged (FFmpeg finds invalid data)"
    return error.strerror or str(error)
