"""A small convolutional encoder of sound, for models that ship without Whisper.

It gives features of the same form as Whisper-tiny's: five states of 384 at 50 Hz. It sees 0.3 s to
either side of a step, so it runs over sounds of any length in pieces.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lsync_compile.errors import CheckpointError

from .audio import (
    SAMPLES_PER_STEP,
    WINDOW_STEPS,
    AudioFeatures,
    EncoderModule,
    check_samples,
)
from .mel import LogMel
from .weights import build, check_layers, read_state_dict

QUIET = -6.0  # log10 of the mel power at and below which everything is silence
_CHUNK = 1500  # steps encoded at a time
_STEM_REACH = 2  # steps that the two convolutions of the stem see to either side, rounded up


class _Residual(nn.Module):
    """``x + conv(gelu(conv(norm(x))))`` over time; the norm is over channels alone.

    Norms over time would make a step depend on how the sound is cut into pieces.
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv1 = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1)
        self.reach = dilation + 1

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width, T)`` -> ``(B, width, T)``."""
        h = self.norm(x.transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.conv2(F.gelu(self.conv1(h)))
        return out


class MelAudioEncoder(EncoderModule):
    """Log-mel bands -> convolutions -> one normed projection for each layer's output.

    Args:
        bands: mel bands.
        width: channels of the convolutions.
        layers: residual layers; layer i has dilation i. There is one state more than layers.
        feature_dim: channels of each state.
    """

    def __init__(
        self, *, bands: int = 80, width: int = 96, layers: int = 4, feature_dim: int = 384
    ) -> None:
        super().__init__()
        self.config = {"bands": bands, "width": width, "layers": layers, "feature_dim": feature_dim}
        self.feature_dim = feature_dim
        self.states = layers + 1
        self.log_mel = LogMel(bands)
        self.conv1 = nn.Conv1d(bands, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        residuals = [_Residual(width, i + 1) for i in range(layers)]
        self.layers = nn.ModuleList(residuals)
        self.projections = nn.ModuleList(nn.Linear(width, feature_dim) for _ in range(layers + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(feature_dim) for _ in range(layers + 1))
        self.marks = nn.Parameter(0.5 * torch.randn(WINDOW_STEPS, feature_dim))
        self.reach = _STEM_REACH + sum(layer.reach for layer in residuals)

    def mel(self, samples: Tensor) -> Tensor:
        """What `forward` takes: ``(..., n)`` at 16 kHz, n a multiple of 320, at least 320 ->
        ``(..., bands, n / 160)``, about -1 for silence to 1 for loud speech."""
        return self._scale(self.log_mel(samples))

    def forward(self, mel: Tensor) -> Tensor:
        """``mel (B, bands, 2 T)`` -> ``(B, T, states, feature_dim)``, unit variance at first."""
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x))  # (B, width, T)
        outputs = [x]
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        states = [
            norm(projection(h.transpose(1, 2)))
            for h, projection, norm in zip(outputs, self.projections, self.norms, strict=True)
        ]
        return torch.stack(states, dim=2)

    def mark(self, windows: Tensor) -> Tensor:
        """Add to each token the learned mark of its place in the window; see `AudioEncoder`."""
        marks = self.marks.repeat_interleave(self.states, dim=0)
        return windows + marks.to(windows.dtype)

    def open(self, samples: Tensor) -> AudioFeatures:
        """Features of ``samples (n,)``, computed in pieces as read. See `AudioEncoder`."""
        return _MelFeatures(self, check_samples(samples))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write ``audio.json`` and ``audio.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "audio.safetensors")
        text = json.dumps({"class": type(self).__name__, **self.config}, indent=2)
        (folder / "audio.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MelAudioEncoder:
        """Read what `save_pretrained` wrote; weights become float32.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit the other.
        """
        path = Path(folder) / "audio.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("class", None)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: is no audio encoder's configuration ({error})"
            ) from error
        check_layers(config, path)
        weights = path.with_suffix(".safetensors")
        return build(
            lambda: cls(**config),
            read_state_dict(weights),
            dtype=torch.float32,
            source=weights,
            config=path,
        )

    def _scale(self, logs: Tensor) -> Tensor:
        return (logs.clamp(min=QUIET) + 3.0) / 3.0

    @torch.no_grad()
    def _read(self, samples: Tensor, start: int, stop: int) -> Tensor:
        """Steps ``start <= t < stop``: encode with the margin that they depend on, and cut it."""
        first = max(start - self.reach, 0)
        last = min(stop + self.reach, samples.shape[0] // SAMPLES_PER_STEP)
        mel = self._scale(self.log_mel.frames(samples, 2 * first, 2 * last))
        features: Tensor = self(mel[None].to(self.dtype))[0, start - first : stop - first]
        return features.float()


class _MelFeatures:
    def __init__(self, encoder: MelAudioEncoder, samples: Tensor) -> None:
        self._encoder = encoder
        self._samples = samples

    def __len__(self) -> int:
        return self._samples.shape[0] // SAMPLES_PER_STEP

    def read(self, start: int, stop: int) -> Tensor:
        edges = [*range(start, stop, _CHUNK), stop]
        pieces = [self._encoder._read(self._samples, a, b) for a, b in itertools.pairwise(edges)]
        return torch.cat(pieces)
