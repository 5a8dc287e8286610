"""Small random Whisper models, written as OpenAI and as transformers write them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperConfig, WhisperModel

WIDTH, LAYERS, HEADS, BANDS = 16, 4, 2, 80


def random_weights(
    context: int, *, positions: bool = True, width: int = WIDTH
) -> dict[str, Tensor]:
    """An encoder in OpenAI's names, without the prefix ``encoder.``."""
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        scale = torch.tensor(shape[1:]).prod() ** -0.5
        return torch.randn(shape, generator=generator) * scale

    def vector(mean: float = 0.0) -> Tensor:
        return mean + 0.1 * torch.randn(width, generator=generator)

    angles = torch.arange(context)[:, None] / 10_000 ** (torch.arange(width // 2) * 2 / width)
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    state = {
        "conv1.weight": matrix(width, BANDS, 3),
        "conv1.bias": vector(),
        "conv2.weight": matrix(width, width, 3),
        "conv2.bias": vector(),
        "positional_embedding": table if positions else torch.zeros_like(table),
        "ln_post.weight": vector(1.0),
        "ln_post.bias": vector(),
    }
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        for name in ("query", "key", "value", "out"):
            state[f"{block}attn.{name}.weight"] = matrix(width, width)
            if name != "key":
                state[f"{block}attn.{name}.bias"] = vector()
        for name in ("attn_ln", "mlp_ln"):
            state[f"{block}{name}.weight"] = vector(1.0)
            state[f"{block}{name}.bias"] = vector()
        state[f"{block}mlp.0.weight"] = matrix(4 * width, width)
        state[f"{block}mlp.0.bias"] = 0.1 * torch.randn(4 * width, generator=generator)
        state[f"{block}mlp.2.weight"] = matrix(width, 4 * width)
        state[f"{block}mlp.2.bias"] = vector()
    return state


def write_openai(path: Path, weights: dict[str, Tensor]) -> Path:
    """Write OpenAI's format: dimensions and a state dict, with a decoder that nobody needs."""
    context, width = weights["positional_embedding"].shape
    dims = {
        "n_mels": BANDS,
        "n_audio_ctx": context,
        "n_audio_state": width,
        "n_audio_head": HEADS,
        "n_audio_layer": LAYERS,
        "n_vocab": 10,
        "n_text_ctx": 4,
        "n_text_state": width,
        "n_text_head": HEADS,
        "n_text_layer": 1,
    }
    state = {f"encoder.{name}": value for name, value in weights.items()}
    state["decoder.token_embedding.weight"] = torch.zeros(10, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"dims": dims, "model_state_dict": state}, path)
    return path


def write_transformers(folder: Path, context: int) -> tuple[Path, WhisperModel]:
    """Save a random transformers model, whose encoder has a final norm that matters."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=WIDTH,
        max_source_positions=context,
        vocab_size=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperModel(config).eval()
    torch.nn.init.normal_(model.encoder.layer_norm.weight)
    model.save_pretrained(folder)
    return folder, model


def encode_by_hand(weights: dict[str, Tensor], mel: Tensor) -> Tensor:
    """The encoder's definition in a few lines: ``mel (bands, 2 T)`` -> ``(T, LAYERS + 1, width)``.

    States are the input of the first block and the output of each; no final norm.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.gelu(F.conv1d(mel[None], weights["conv1.weight"], weights["conv1.bias"], padding=1))
    x = F.gelu(F.conv1d(x, weights["conv2.weight"], weights["conv2.bias"], stride=2, padding=1))
    x = x[0].T + weights["positional_embedding"]
    states = [x]
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        h = norm(x, f"{block}attn_ln")
        q, k, v = (
            linear(h, f"{block}attn.{name}").view(len(x), HEADS, -1).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        scores = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
        x = x + linear((scores @ v).transpose(0, 1).flatten(1), f"{block}attn.out")
        h = F.gelu(linear(norm(x, f"{block}mlp_ln"), f"{block}mlp.0"))
        x = x + linear(h, f"{block}mlp.2")
        states.append(x)
    return torch.stack(states, dim=1)
