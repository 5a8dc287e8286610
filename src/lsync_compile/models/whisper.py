"""Whisper's encoder as a source of features for lip sync.

The network is that of transformers; weights come from OpenAI's ``tiny.pt`` or a transformers
folder. Features are what LatentSync takes: the encoder's input (after its position table) and the
output of each layer, without the final norm.

Whisper sees 30 s at a time. Longer sounds are cut into windows that overlap by at least 5 s and
are blended there, since a step's features depend on its place in the window: with windows end to
end they jump every 30 s.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lsync_compile.errors import CheckpointError, OptionError

from .audio import SAMPLES_PER_STEP, AudioFeatures, EncoderModule, check_samples
from .mel import MOST_BANDS, LogMel
from .weights import (
    build,
    check_layers,
    check_weights,
    configured_by,
    read_archive,
    read_state_dict,
)

_OVERLAP_DIVISOR = 6  # of a window is shared with the next one at least: 5 s of 30 s
_DYNAMIC_RANGE = 8.0  # decades below the loudest moment that Whisper hears
_MEL_CHUNK = 6000  # frames at a time in search of that moment

# OpenAI's names and those of transformers. The final norm is left out: nothing uses it.
_RENAMED = {
    "positional_embedding": "embed_positions.weight",
    "blocks.": "layers.",
    ".attn.query.": ".self_attn.q_proj.",
    ".attn.key.": ".self_attn.k_proj.",
    ".attn.value.": ".self_attn.v_proj.",
    ".attn.out.": ".self_attn.out_proj.",
    ".attn_ln.": ".self_attn_layer_norm.",
    ".mlp.0.": ".fc1.",
    ".mlp.2.": ".fc2.",
    ".mlp_ln.": ".final_layer_norm.",
}
# OpenAI's names of sizes, and those of transformers.
_DIMS = {
    "n_audio_state": "d_model",
    "n_audio_layer": "encoder_layers",
    "n_audio_head": "encoder_attention_heads",
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
}
_FINAL_NORM = {"openai": "ln_post.", "transformers": "layer_norm."}


class WhisperAudioEncoder(EncoderModule):
    """Sound to ``layers + 1`` states of Whisper's width at 50 Hz (tiny: 5 of 384).

    Args:
        network: a transformers Whisper encoder; its final norm is removed.
        overlap: steps that neighbouring windows share at least; a sixth of a window (5 s) if none.
    """

    def __init__(self, network: WhisperEncoder, *, overlap: int | None = None) -> None:
        super().__init__()
        network.layer_norm = nn.Identity()
        self.network = network.eval().requires_grad_(False)
        self.feature_dim = int(network.config.d_model)
        self.states = int(network.config.encoder_layers) + 1
        self.window = int(network.config.max_source_positions)
        self.overlap = self.window // _OVERLAP_DIVISOR if overlap is None else overlap
        if not 0 <= self.overlap < self.window:
            raise OptionError(f"overlap: {overlap} is not within a window of {self.window} steps")
        self.log_mel = LogMel(int(network.config.num_mel_bins))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, overlap: int | None = None
    ) -> WhisperAudioEncoder:
        """Load OpenAI's ``.pt`` file, or a folder that transformers saved a Whisper model to.

        Raises:
            CheckpointError: a file is missing, damaged, or holds no Whisper encoder.
        """
        path = Path(path)
        config, state, source = _read_folder(path) if path.is_dir() else _read_openai(path)
        network = build(
            lambda: _without_norm(WhisperEncoder(config)), state, dtype=torch.float32, source=source
        )
        return cls(network, overlap=overlap)

    def open(self, samples: Tensor) -> AudioFeatures:
        """Features of ``samples (n,)``, computed window by window as read. See `AudioEncoder`."""
        return _WhisperFeatures(self, check_samples(samples))

    @torch.no_grad()
    def encode_window(self, mel: Tensor) -> Tensor:
        """Scaled ``mel (bands, m)``, ``m <= 2 * window`` -> ``(window, states, feature_dim)``.

        Shorter spectrograms are continued with zeros, as LatentSync does.
        """
        mel = nn.functional.pad(mel, (0, 2 * self.window - mel.shape[1]))
        output = self.network(mel[None].to(self.dtype), output_hidden_states=True, return_dict=True)
        return torch.stack(output.hidden_states, dim=2)[0].float()


class _WhisperFeatures:
    """Windows are placed evenly so that all of them are full; the last few read are kept."""

    def __init__(self, encoder: WhisperAudioEncoder, samples: Tensor) -> None:
        self._encoder = encoder
        self._samples = samples
        self._steps = samples.shape[0] // SAMPLES_PER_STEP
        self._starts = window_starts(self._steps, encoder.window, encoder.overlap)
        self._windows: OrderedDict[int, Tensor] = OrderedDict()
        self._loudest = self._find_loudest()

    def __len__(self) -> int:
        return self._steps

    def read(self, start: int, stop: int) -> Tensor:
        encoder = self._encoder
        total: Tensor | None = None
        weights: Tensor | None = None
        for index, begin in enumerate(self._starts):
            first, last = max(start, begin), min(stop, begin + encoder.window)
            if first >= last:
                continue
            window = self._window(index)[first - begin : last - begin]
            weight = self._weight(index, first, last).to(window)[:, None, None]
            if total is None or weights is None:
                total = window.new_zeros(stop - start, encoder.states, encoder.feature_dim)
                weights = window.new_zeros(stop - start, 1, 1)
            total[first - start : last - start] += window * weight
            weights[first - start : last - start] += weight
        if total is None or weights is None:
            raise IndexError(f"steps {start} to {stop} of {self._steps}")
        return total / weights

    def _weight(self, index: int, first: int, last: int) -> Tensor:
        """Weights ``(last - first,)`` of a window: 1, with ramps towards its neighbours."""
        steps = torch.arange(first, last)
        begin, ramp = self._starts[index], self._encoder.overlap + 1
        weight = torch.ones(last - first)
        if index > 0:
            weight = torch.minimum(weight, (steps - begin + 1) / ramp)
        if index < len(self._starts) - 1:
            weight = torch.minimum(weight, (begin + self._encoder.window - steps) / ramp)
        return weight

    def _window(self, index: int) -> Tensor:
        if index in self._windows:
            self._windows.move_to_end(index)
            return self._windows[index]
        begin = self._starts[index]
        end = min(begin + self._encoder.window, self._steps)
        logs = self._encoder.log_mel.frames(self._samples, 2 * begin, 2 * end)
        mel = (logs.clamp(min=self._loudest - _DYNAMIC_RANGE) + 4.0) / 4.0
        self._windows[index] = self._encoder.encode_window(mel)
        if len(self._windows) > 3:  # at most three windows meet at one step
            self._windows.popitem(last=False)
        return self._windows[index]

    def _find_loudest(self) -> float:
        """The largest log10 mel power of the whole sound, which Whisper's input is relative to."""
        frames = 2 * self._steps
        return max(
            float(self._encoder.log_mel.frames(self._samples, i, min(i + _MEL_CHUNK, frames)).max())
            for i in range(0, frames, _MEL_CHUNK)
        )


def window_starts(steps: int, window: int, overlap: int) -> list[int]:
    """First steps of the fewest windows over ``steps`` that share at least ``overlap`` steps.

    They are spread evenly from the first step to the last; one window if all fits.
    """
    if steps <= window:
        return [0]
    count = 1 + math.ceil((steps - window) / (window - overlap))
    return [round(i * (steps - window) / (count - 1)) for i in range(count)]


def _without_norm(network: WhisperEncoder) -> WhisperEncoder:
    network.layer_norm = nn.Identity()
    return network


def _read_openai(path: Path) -> tuple[WhisperConfig, dict[str, Tensor], Path]:
    archive = read_archive(path)
    dims, weights = archive.get("dims"), archive.get("model_state_dict")
    if not isinstance(dims, dict) or not isinstance(weights, dict):
        raise CheckpointError(f"{path}: is not one of OpenAI's Whisper files (dims is missing)")
    check_weights(weights, path)
    missing = [name for name in _DIMS if name not in dims]
    if missing:
        raise CheckpointError(f"{path}: dims has no {missing[0]!r}")
    values = {own: dims[name] for name, own in _DIMS.items()}
    config = _config(values, path)
    config.encoder_ffn_dim = 4 * config.d_model
    state = {}
    for name, value in _part(weights, "encoder.", _FINAL_NORM["openai"]).items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        state[name] = value
    return config, state, path


def _read_folder(path: Path) -> tuple[WhisperConfig, dict[str, Tensor], Path]:
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / 'config.json'}: cannot be read ({error})") from error
    config = _config(values, path / "config.json")
    names = ("model.safetensors", "pytorch_model.bin")
    source = next((path / name for name in names if (path / name).is_file()), None)
    if source is None:
        raise CheckpointError(f"{path}: no weights; looked for {', '.join(names)}")
    weights = {
        name.removeprefix("model."): value for name, value in read_state_dict(source).items()
    }
    return config, _part(weights, "encoder.", _FINAL_NORM["transformers"]), source


def _config(values: Any, path: Path) -> WhisperConfig:
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    check_layers(values, path)
    for name in _DIMS.values():
        if type(values.get(name, 1)) is not int or values.get(name, 1) < 1:
            raise CheckpointError(f"{path}: {name} {values[name]!r} is not a positive whole number")
    if values.get("num_mel_bins", 1) > MOST_BANDS:
        raise CheckpointError(f"{path}: num_mel_bins {values['num_mel_bins']} is over {MOST_BANDS}")
    with configured_by(path):
        return WhisperConfig(**values)


def _part(weights: dict[str, Any], prefix: str, without: str) -> dict[str, Tensor]:
    """Entries under ``prefix``, without it, except those that then begin with ``without``."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix) and not name.startswith(prefix + without)
    }
