"""Frames and sound to a video file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import av.error
import numpy as np
import numpy.typing as npt
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from lsync_compile.cores import codec_threads
from lsync_compile.errors import MediaError
from lsync_compile.files import partial_name
from lsync_compile.media.audio import SoundReader
from lsync_compile.media.colour import EXACT, ColourTags
from lsync_compile.media.container import local_url

Frame = npt.NDArray[np.uint8]

_LIMITED_RANGE = 1
_AUDIO_BIT_RATE = 64_000


class VideoWriter:
    """Context manager that encodes frames, and sound beside them, into a video file.

    The file is written under a temporary name in the same folder and takes its place only when
    the block ends without an exception; otherwise it is removed, and a file that was there before
    stays as it was.

    4:2:0 video has even sizes only: an odd width or height is made even by repeating the last
    column or row, so nothing of the picture is lost.

    The sound is cut, or filled with silence, to the length of the picture.

    Args:
        path: the file to make; its suffix selects the container (``.mp4``, ``.mov``, ``.mkv``).
        width: width of the frames in pixels.
        height: height of the frames in pixels.
        fps: frames per second.
        audio: (n,) or (n, channels) float32 in [-1, 1], or a `SoundReader`, which is read as the
            frames come; None for a silent film.
        sample_rate: samples per second of an `audio` array; a reader knows its own.
        crf: constant quality of x264 and x265, 0 (lossless) to 51; 18 is visually lossless.
        codec: FFmpeg's name of the video encoder.
        preset: the encoder's trade of time against size at the same quality.
        colour: tags to write; the frames are converted accordingly. Pass the source's
            (``probe(path).colour``) to keep its colours; the default is BT.709.
        pixel_aspect: width of a pixel over its height.

    Raises:
        MediaError: the folder is missing or not writable, the container or codec is not
            available, or encoding fails.
    """

    def __init__(
        self,
        path: str | Path,
        width: int,
        height: int,
        *,
        fps: float = 25,
        audio: npt.NDArray[np.float32] | SoundReader | None = None,
        sample_rate: int = 16000,
        crf: int = 18,
        codec: str = "libx264",
        preset: str = "fast",
        colour: ColourTags | None = None,
        pixel_aspect: Fraction = Fraction(1),
    ) -> None:
        self.path = Path(path)
        self.frames_written = 0
        self._size = (width, height)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._audio = _ArrayReader(audio, sample_rate) if isinstance(audio, np.ndarray) else audio
        self._samples_written = 0
        self._container: OutputContainer | None = None
        self._colour = (colour or ColourTags(1, 1, 1)).writable(height)
        self._reformatter = VideoReformatter()
        self._temporary = self._checked_name()
        try:
            self._open(codec, {"crf": str(crf), "preset": preset}, pixel_aspect)
        except BaseException:
            self._discard()
            raise

    def write(self, frame: Frame) -> None:
        """Append a frame, (height, width, 3) uint8 RGB.

        Raises:
            MediaError: encoding fails, for example on a full disk.
            ValueError: the frame has another shape than the writer.
        """
        width, height = self._size
        if frame.shape != (height, width, 3):
            raise ValueError(f"frame of shape {frame.shape}, expected {(height, width, 3)}")
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = self._reformatter.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
            format="yuv420p",
            dst_colorspace=self._colour.swscale_matrix,
            dst_color_range=_LIMITED_RANGE,
            interpolation=EXACT,
        )
        picture.pts = self.frames_written
        picture.time_base = 1 / self._fps
        self._encode(self._video, picture)
        self.frames_written += 1
        self._write_sound()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _checked_name(self) -> Path:
        """The name to write under, beside where the file is to be."""
        try:
            if "\0" in str(self.path) or not self.path.parent.is_dir():
                raise MediaError(f"{self.path}: the folder {self.path.parent} does not exist")
            if self.path.is_dir():
                raise MediaError(f"{self.path}: is a folder; give the name of a file")
        except OSError as error:  # a name that is too long
            raise MediaError(f"{self.path}: cannot be written: {error.strerror}") from error
        return partial_name(self.path)

    def _open(self, codec: str, options: dict[str, str], pixel_aspect: Fraction) -> None:
        try:
            container = av.open(local_url(self._temporary), "w", options={"movflags": "+faststart"})
        except av.error.FFmpegError as error:
            raise MediaError(f"{self.path}: cannot be written: {error.strerror}") from error
        except ValueError as error:
            raise MediaError(
                f"{self.path}: {self.path.suffix or 'no suffix'} names no video format; use .mp4"
            ) from error
        self._container = container
        try:
            video = container.add_stream(codec, rate=self._fps, options=options)
        except ValueError as error:
            raise MediaError(
                f"{self.path}: video encoder {codec!r} is not in this build of FFmpeg "
                f"or does not fit into a {self.path.suffix} file"
            ) from error
        assert isinstance(video, VideoStream)
        width, height = self._size
        video.width, video.height = width + width % 2, height + height % 2
        video.pix_fmt = "yuv420p"
        context = video.codec_context
        context.time_base = 1 / self._fps
        # PyAV's default, slices, keeps no more than a few cores busy with one picture.
        context.thread_type = "AUTO"
        context.thread_count = codec_threads()
        context.sample_aspect_ratio = pixel_aspect
        context.color_range = _LIMITED_RANGE
        context.colorspace = self._colour.matrix
        context.color_primaries = self._colour.primaries
        context.color_trc = self._colour.transfer
        self._video = video
        self._sound: AudioStream | None = None
        if self._audio is not None:
            layout = {1: "mono", 2: "stereo"}[self._audio.channels]
            self._sound = container.add_stream("aac", rate=self._audio.sample_rate, layout=layout)
            self._sound.bit_rate = _AUDIO_BIT_RATE * self._audio.channels
        try:
            # Opens the encoders and writes the header, so that what cannot work fails now.
            container.start_encoding()
        except av.error.FFmpegError as error:
            raise MediaError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _write_sound(self) -> None:
        """Encode the sound up to the end of the last frame."""
        if self._audio is None or self._sound is None:
            return
        rate = self._audio.sample_rate
        end = math.floor(self.frames_written * rate / self._fps + Fraction(1, 2))
        block = self._audio.read(end - self._samples_written)
        missing = end - self._samples_written - len(block)
        block = np.pad(block, ((0, missing), (0, 0)))
        samples = AudioFrame.from_ndarray(
            np.ascontiguousarray(block.T, dtype=np.float32),
            format="fltp",
            layout=self._sound.codec_context.layout.name,
        )
        samples.sample_rate = rate
        samples.pts = self._samples_written
        samples.time_base = Fraction(1, rate)
        self._samples_written = end
        self._encode(self._sound, samples)

    def _encode(
        self, stream: VideoStream | AudioStream, frame: VideoFrame | AudioFrame | None
    ) -> None:
        assert self._container is not None
        try:
            self._container.mux(stream.encode(frame))  # type: ignore[arg-type]
        except av.error.FFmpegError as error:
            raise MediaError(f"{self.path}: encoding failed: {error.strerror}") from error

    def _finish(self) -> None:
        assert self._container is not None
        if self.frames_written == 0:
            raise MediaError(f"{self.path}: no frame was written, so there is no video to make")
        self._encode(self._video, None)
        if self._sound is not None:
            self._encode(self._sound, None)
        try:
            self._container.close()
            self._temporary.replace(self.path)
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _discard(self) -> None:
        """Close and remove whatever is left of the temporary file."""
        container, self._container = self._container, None
        if container is not None:
            # A file that is thrown away need not be finished.
            with contextlib.suppress(av.error.FFmpegError):
                container.close()
        with contextlib.suppress(OSError):  # not there, or in a folder that became read-only
            self._temporary.unlink()


class _ArrayReader:
    """Sound in memory, read forward as a `SoundReader` is."""

    def __init__(self, samples: npt.NDArray[np.float32], sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self._samples = samples.reshape(len(samples), -1)
        self.channels = self._samples.shape[1]
        self._read = 0

    def read(self, count: int) -> npt.NDArray[np.float32]:
        begin, self._read = self._read, self._read + count
        return self._samples[begin : self._read]
