"""What the pipeline asks of an audio encoder, and how frames pick their features.

An encoder turns sound into features at 50 Hz. Every feature step holds several states (the
encoder's layers), and every video frame attends to the steps around it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lsync_compile.errors import OptionError

SAMPLE_RATE = 16_000
FEATURE_RATE = 50
SAMPLES_PER_STEP = SAMPLE_RATE // FEATURE_RATE  # 320
WINDOW_STEPS = 10  # around each video frame: four before its centre, its own two, four after


@runtime_checkable
class AudioFeatures(Protocol):
    """The features of one sound, computed when they are read."""

    def __len__(self) -> int:
        """Number of steps T at 50 Hz."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Steps ``start <= t < stop``, at least one, as ``(stop - start, S, D)`` float32."""
        ...


@runtime_checkable
class AudioEncoder(Protocol):
    """Sound to features; see `WhisperAudioEncoder` and `MelAudioEncoder`."""

    feature_dim: int
    states: int

    def open(self, samples: Tensor) -> AudioFeatures:
        """Features of ``samples (n,)``, float32 mono at 16 kHz, in memory independent of n."""
        ...

    def encode(self, samples: Tensor) -> Tensor:
        """All features at once: ``(T, states, feature_dim)`` with ``T = ceil(n / 320)``."""
        ...

    def mark(self, windows: Tensor) -> Tensor:
        """Finish windows that `audio_windows` cut, ``(count, 10 * S, D)`` to the same.

        Attention sees the tokens of a window as a set. Whisper's positions let it tell them
        apart; an encoder without positions marks them here.
        """
        ...


class EncoderModule(nn.Module):
    """What encoders that are modules share. Subclasses set the attributes and define `open`."""

    feature_dim: int
    states: int

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the features will be."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; features are always float32."""
        return next(self.parameters()).dtype

    def open(self, samples: Tensor) -> AudioFeatures:
        """Features of ``samples (n,)``, computed when read. See `AudioEncoder`."""
        raise NotImplementedError

    def encode(self, samples: Tensor) -> Tensor:
        """``samples (n,)`` float at 16 kHz -> ``(ceil(n / 320), states, feature_dim)`` float32.

        Raises:
            OptionError: ``samples`` is no sound.
        """
        features = self.open(samples)
        return features.read(0, len(features))

    def mark(self, windows: Tensor) -> Tensor:
        """Windows as they are. See `AudioEncoder`."""
        return windows


def check_samples(samples: Tensor) -> Tensor:
    """Return ``samples (n,)`` as float32, zero-padded to whole feature steps.

    Raises:
        OptionError: not one-dimensional, empty, or not floating point.
    """
    if samples.ndim != 1 or samples.numel() == 0 or not samples.is_floating_point():
        raise OptionError(
            "samples: expected a non-empty float tensor (n,) of mono sound at 16 kHz, "
            f"got {samples.dtype} of shape {tuple(samples.shape)}"
        )
    return torch.nn.functional.pad(samples.float(), (0, -samples.numel() % SAMPLES_PER_STEP))


def audio_windows(
    features: Tensor | AudioFeatures,
    start_frame: int,
    count: int,
    *,
    fps: float = 25,
    context: tuple[int, int] = (2, 2),
) -> Tensor:
    """The sound around each of ``count`` video frames, as tokens to attend to.

    Frame ``i`` is centred on step ``floor(i * 50 / fps)`` and sees ``2 * context[0]`` steps
    before it, and the two steps of its own and of each frame of ``context[1]`` after it. Beyond
    the ends of the sound the first and last steps are repeated.

    Args:
        features: ``(T, S, D)``, or features to be read as needed.
        start_frame: number of the first frame; not negative.
        count: number of frames.
        fps: frame rate of the video.
        context: frames of sound before and after.

    Returns:
        ``(count, 2 * (context[0] + 1 + context[1]) * S, D)``: step after step, all states of one
        step together. 50 tokens for five states and the default context.

    Raises:
        OptionError: a negative frame number, no frames, or features without a step.
    """
    steps = len(features)
    if steps == 0 or count < 1 or start_frame < 0:
        raise OptionError(
            f"audio_windows: frames {start_frame} to {start_frame + count - 1} of {steps} steps"
        )
    before, after = 2 * context[0], 2 * (context[1] + 1)
    centres = torch.tensor(
        [int(i * FEATURE_RATE / fps) for i in range(start_frame, start_frame + count)]
    )
    index = centres[:, None] + torch.arange(-before, after)  # (count, steps of a window)
    index = index.clamp(0, steps - 1)
    first = int(index[0, 0])
    stop = int(index[-1, -1]) + 1
    block = features[first:stop] if isinstance(features, Tensor) else features.read(first, stop)
    windows = block[(index - first).to(block.device)]  # (count, steps of a window, S, D)
    return windows.flatten(1, 2)
