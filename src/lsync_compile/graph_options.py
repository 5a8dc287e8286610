"""The options of compilation: the preset, the passes, the lowering.

Fields of :class:`lsync_compile.options.Options`, which is where they are checked and combined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsync_compile.option_checks import about
from lsync_compile.presets import PRESETS


@dataclass(frozen=True)
class GraphOptions:
    """What is done to graphs. Most of it means compiling anew."""

    preset: str = field(
        default="balanced",
        metadata=about(
            "The set of defaults. On a bare module, where nothing knows the denoising step, "
            "`exact` is the default.",
            choices=tuple(PRESETS),
            rebuild=False,
        ),
    )
    lowering: str = field(
        default="inductor",
        metadata=about(
            "What runs a rewritten graph: `inductor` compiles it, `eager` runs it operation by "
            "operation, bit for bit as the plain module does.",
            choices=("inductor", "eager"),
        ),
    )
    strict: bool = field(
        default=False,
        metadata=about(
            "Raise `CompileError` where a graph cannot be compiled, instead of running it "
            "eagerly with a warning.",
            rebuild=False,
        ),
    )
    compile_vae: bool = field(
        default=True, metadata=about("Compile the VAE's encoder and decoder beside the UNet.")
    )
    remove_noops: bool = field(
        default=True, metadata=about("Pass: remove operations that return their input.")
    )
    share_repeated: bool = field(
        default=True, metadata=about("Pass: compute equal operations on equal inputs once.")
    )
    fuse_group_norm_silu: bool = field(
        default=True,
        metadata=about(
            "Pass: group norms in one kernel, with the SiLU after and the shift before them."
        ),
    )
    kernels: str = field(
        default="auto",
        metadata=about(
            "Passes that put this package's Triton kernels into graphs: `auto` for graphs on a "
            "GPU, `on` also on a CPU, where slow references stand in for the kernels, `off` never.",
            choices=("auto", "on", "off"),
        ),
    )
    cuda_graphs: bool = field(
        default=True,
        metadata=about(
            "Capture each graph on a GPU as a CUDA graph with static memory and replay it; "
            "elsewhere, and where a graph cannot be captured, it runs as it was lowered."
        ),
    )
    keep_captures: bool = field(
        default=True,
        metadata=about(
            "Keep captured graphs on disk beside Inductor's cache, so that a later process need "
            "not capture again.",
            rebuild=False,
        ),
    )
    fuse_geglu: bool = field(
        default=True, metadata=about("Pass: the gate of each feed-forward in one kernel.")
    )
    fuse_linear_geglu: bool = field(
        default=True,
        metadata=about(
            "Pass: each feed-forward's first projection with its gate in one kernel, where timing "
            "finds that faster than a library's product."
        ),
    )
    fuse_feed_forward: bool = field(
        default=True,
        metadata=about(
            "Pass: the end of a feed-forward, its residual sum and the transformer's last "
            "projection as one product."
        ),
    )
    fuse_add_layer_norm: bool = field(
        default=True,
        metadata=about("Pass: residual sums with the layer norm after them in one kernel."),
    )
    fuse_upsample_conv: bool = field(
        default=True,
        metadata=about(
            "Pass: convolve enlarged pictures as four smaller convolutions, where timing finds "
            "that faster."
        ),
    )
    fuse_layer_norm: bool = field(
        default=True,
        metadata=about("Pass: layer norms that no sum precedes in one kernel."),
    )
    fuse_residual_moments: bool = field(
        default=True,
        metadata=about(
            "Pass: residual sums that measure themselves for the group norm after them."
        ),
    )
    defer_bias: bool = field(
        default=True,
        metadata=about("Pass: projections' biases in the sums and norms that read them."),
    )
    pad_channels: bool = field(
        default=True,
        metadata=about(
            "Pass: zeros up to a multiple of eight channels for convolutions in half precision."
        ),
    )
    channels_last: bool = field(
        default=True,
        metadata=about("Pass: images and videos with their channels together in memory."),
    )
    fuse_temporal_attention: bool = field(
        default=True,
        metadata=about("Pass: attend across frames without rearranging to positions and back."),
    )
    guidance_prefix: bool = field(
        default=True,
        metadata=about(
            "Pass: compute what both halves of a guided batch have in common at half the batch, "
            "where the runtime vouches for it."
        ),
    )
    null_audio: bool = field(
        default=True,
        metadata=about(
            "Pass: skip attention to the sound in the half of a guided batch that has none, "
            "where the runtime vouches for it."
        ),
    )
    split_conv_in: bool = field(
        default=False,
        metadata=about(
            "Pass: convolve the channels of the sample that stay the same once a chunk, where the "
            "runtime vouches for it."
        ),
    )
    hoist_weights: bool = field(
        default=True,
        metadata=about(
            "Compute what depends on weights alone once, and again when a weight changes."
        ),
    )
    hoist_audio: bool = field(
        default=True,
        metadata=about(
            "Compute what depends on the sound (`encoder_hidden_states`) alone once for each chunk."
        ),
    )
    hoist_timestep: bool = field(
        default=True,
        metadata=about("Compute what depends on the timestep alone once for each timestep."),
    )
    fuse_qkv: bool = field(
        default=True,
        metadata=about("Pass: project queries, keys and values in one product where they can be."),
    )
    choose_sdpa: bool = field(
        default=True,
        metadata=about(
            "Pass: run attention within frames and to the sound with the fastest kernel, found "
            "by timing them."
        ),
    )
    lip_attention: bool = field(
        default=False,
        metadata=about(
            "Approximate pass: attend within frames in full in the mouth region, by pooled cells "
            "elsewhere."
        ),
    )
    lip_pool: str = field(
        default="auto",
        metadata=about(
            "Side in latents of the cells that `lip_attention` pools; `auto` looks at the detail "
            "outside the mouth.",
            choices=("auto", "1", "2", "4", "8"),
        ),
    )
    lip_halo: int = field(
        default=1,
        metadata=about("Latents around the mouth that `lip_attention` keeps.", between=(0, 16)),
    )
    lip_weight: float = field(
        default=1.0,
        metadata=about(
            "How much more than others the mouth's keys count in `lip_attention`; 1 is no "
            "difference.",
            between=(0.1, 10.0),
        ),
    )
    fp8_linear: bool = field(
        default=False,
        metadata=about(
            "Approximate pass: multiply in 8-bit floating point where a linear layer has many "
            "rows and timing finds that faster."
        ),
    )
    crop_decode: bool = field(
        default=False,
        metadata=about("Approximate pass: decode only the rows of the picture that are generated."),
    )
    crop_encode: bool = field(
        default=False,
        metadata=about(
            "Approximate pass: encode of the masked faces only the rows that are masked, and take "
            "the others from the faces as they are."
        ),
    )
    crop_halo: int = field(
        default=1,
        metadata=about(
            "Rows of latents around the generated ones that `crop_decode` and `crop_encode` "
            "take too.",
            between=(0, 16),
        ),
    )
    crop_statistics: str = field(
        default="both",
        metadata=about(
            "Where the norms of `crop_decode` have their statistics from: the rows decoded "
            "(`own`), the chunk's first picture, decoded whole (`first`), or the rows decoded and "
            "that picture's other rows (`both`).",
            choices=("own", "first", "both"),
        ),
    )
    inductor: Mapping[str, Any] = field(
        default_factory=dict,
        hash=False,
        metadata=about(
            "Inductor settings for these graphs only, such as `{'max_autotune': True}`; names as "
            "in `torch._inductor.list_options()`."
        ),
    )
    plugins: Mapping[str, bool] | bool = field(
        default_factory=dict,
        hash=False,
        metadata=about(
            "Passes of other installed distributions, such as `{'reshape_once': True}`, which "
            "`reshape_once=True` says too; those that keep the bits are on. `False` loads none."
        ),
    )
    dump_dir: Path | None = field(
        default=None,
        metadata=about(
            "Folder for the readable graph before and after each pass, named "
            "`phase.index.pass.stage.py`.",
            rebuild=False,
        ),
    )
