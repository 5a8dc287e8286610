"""Every option, its default, its presets and its checks.

One frozen dataclass holds them all. What a field means, which values it takes and whether changing
it means compiling anew is data on the field, from which the checks and the table in the
documentation are made.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lsync_compile.combinations import (
    CombinationError,
    LatentSyncSpeedOptimizer,
    check_combination,
)
from lsync_compile.errors import OptionError
from lsync_compile.option_checks import PATHS, check, listed
from lsync_compile.option_checks import nearest as nearest

# What a preset changes against the defaults below; docs/performance.md has the measurements.
# Chunks after the first take 5 and 3 of 20 steps.
_REGION = {"lip_attention": True, "crop_decode": True}
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "balanced": {"temporal_start": "path", "temporal_strength": 0.25, **_REGION},
    "turbo": {"temporal_start": "path", "temporal_strength": 0.15, **_REGION},
}


def _about(
    help: str,
    *,
    choices: tuple[str, ...] = (),
    between: tuple[float, float] | None = None,
    rebuild: bool = True,
) -> dict[str, Any]:
    """A field's documentation.

    Args:
        help: one sentence for the table.
        choices: the allowed names.
        between: the smallest and the largest allowed number, for fields that are numbers.
        rebuild: whether a change means compiling anew.
    """
    return {"help": help, "choices": choices, "between": between, "rebuild": rebuild}


@dataclass(frozen=True)
class Options:
    """Checked options of one compiled object; make them with :func:`resolve_options`.

    Raises:
        OptionError: for a value of the wrong type or outside the allowed ones, and for two that
            exclude each other.
    """

    preset: str = field(
        default="balanced",
        metadata=_about(
            "The set of defaults. On a bare module, where nothing knows the denoising step, "
            "`exact` is the default.",
            choices=tuple(PRESETS),
            rebuild=False,
        ),
    )
    lowering: str = field(
        default="inductor",
        metadata=_about(
            "What runs a rewritten graph: `inductor` compiles it, `eager` runs it operation by "
            "operation, bit for bit as the plain module does.",
            choices=("inductor", "eager"),
        ),
    )
    strict: bool = field(
        default=False,
        metadata=_about(
            "Raise `CompileError` where a graph cannot be compiled, instead of running it "
            "eagerly with a warning.",
            rebuild=False,
        ),
    )
    compile_vae: bool = field(
        default=True, metadata=_about("Compile the VAE's encoder and decoder beside the UNet.")
    )
    remove_noops: bool = field(
        default=True, metadata=_about("Pass: remove operations that return their input.")
    )
    share_repeated: bool = field(
        default=True, metadata=_about("Pass: compute equal operations on equal inputs once.")
    )
    fuse_group_norm_silu: bool = field(
        default=True,
        metadata=_about(
            "Pass: group norms in one kernel, with the SiLU after and the shift before them."
        ),
    )
    kernels: str = field(
        default="auto",
        metadata=_about(
            "Passes that put this package's Triton kernels into graphs: `auto` for graphs on a "
            "GPU, `on` also on a CPU, where slow references stand in for the kernels, `off` never.",
            choices=("auto", "on", "off"),
        ),
    )
    cuda_graphs: bool = field(
        default=True,
        metadata=_about(
            "Capture each graph on a GPU as a CUDA graph with static memory and replay it; "
            "elsewhere, and where a graph cannot be captured, it runs as it was lowered."
        ),
    )
    fuse_geglu: bool = field(
        default=True, metadata=_about("Pass: the gate of each feed-forward in one kernel.")
    )
    fuse_linear_geglu: bool = field(
        default=True,
        metadata=_about(
            "Pass: each feed-forward's first projection with its gate in one kernel, where timing "
            "finds that faster than a library's product."
        ),
    )
    fuse_add_layer_norm: bool = field(
        default=True,
        metadata=_about("Pass: residual sums with the layer norm after them in one kernel."),
    )
    fuse_upsample_conv: bool = field(
        default=True,
        metadata=_about(
            "Pass: convolve enlarged pictures as four smaller convolutions, where timing finds "
            "that faster."
        ),
    )
    fuse_layer_norm: bool = field(
        default=True,
        metadata=_about("Pass: layer norms that no sum precedes in one kernel."),
    )
    fuse_residual_moments: bool = field(
        default=True,
        metadata=_about(
            "Pass: residual sums that measure themselves for the group norm after them."
        ),
    )
    channels_last: bool = field(
        default=True,
        metadata=_about("Pass: images and videos with their channels together in memory."),
    )
    fuse_temporal_attention: bool = field(
        default=True,
        metadata=_about("Pass: attend across frames without rearranging to positions and back."),
    )
    guidance_prefix: bool = field(
        default=True,
        metadata=_about(
            "Pass: compute what both halves of a guided batch have in common at half the batch, "
            "where the runtime vouches for it."
        ),
    )
    null_audio: bool = field(
        default=True,
        metadata=_about(
            "Pass: skip attention to the sound in the half of a guided batch that has none, "
            "where the runtime vouches for it."
        ),
    )
    split_conv_in: bool = field(
        default=False,
        metadata=_about(
            "Pass: convolve the channels of the sample that stay the same once a chunk, where the "
            "runtime vouches for it."
        ),
    )
    hoist_weights: bool = field(
        default=True,
        metadata=_about(
            "Compute what depends on weights alone once, and again when a weight changes."
        ),
    )
    hoist_audio: bool = field(
        default=True,
        metadata=_about(
            "Compute what depends on the sound (`encoder_hidden_states`) alone once for each chunk."
        ),
    )
    hoist_timestep: bool = field(
        default=True,
        metadata=_about("Compute what depends on the timestep alone once for each timestep."),
    )
    fuse_qkv: bool = field(
        default=True,
        metadata=_about("Pass: project queries, keys and values in one product where they can be."),
    )
    choose_sdpa: bool = field(
        default=True,
        metadata=_about(
            "Pass: run attention within frames and to the sound with the fastest kernel, found "
            "by timing them."
        ),
    )
    deep_cache: bool = field(
        default=False,
        metadata=_about(
            "Approximate: in some steps of a chunk, take the deep features of an earlier step and "
            "compute the outermost layers alone."
        ),
    )
    deep_cache_branch: int = field(
        default=0,
        metadata=_about(
            "Skip join at which deep features enter, from the outside: 0 computes least and is "
            "the DeepCache package's branch 0.",
            between=(0, 99),
        ),
    )
    deep_cache_schedule: str = field(
        default="interval",
        metadata=_about(
            "Which steps compute deep features: every `deep_cache_interval`-th, or those that "
            "`lsync calibrate` found for this checkpoint.",
            choices=("interval", "calibrated"),
            rebuild=False,
        ),
    )
    deep_cache_interval: int = field(
        default=3,
        metadata=_about(
            "Of how many steps one computes deep features; 1 computes all.",
            between=(1, 1000),
            rebuild=False,
        ),
    )
    deep_cache_head: int = field(
        default=1,
        metadata=_about(
            "First steps of a chunk that all compute deep features.",
            between=(1, 1000),
            rebuild=False,
        ),
    )
    deep_cache_tail: int = field(
        default=0,
        metadata=_about(
            "Last steps of a chunk that all compute deep features.",
            between=(0, 1000),
            rebuild=False,
        ),
    )
    deep_cache_steps: tuple[int, ...] | None = field(
        default=None,
        metadata=_about(
            "The steps, from 0, that compute deep features, in place of a schedule; 0 always does.",
            rebuild=False,
        ),
    )
    deep_cache_predictor: str = field(
        default="reuse",
        metadata=_about(
            "What stands for deep features that are not computed: the last ones, or the line or "
            "the parabola through the last two or three.",
            choices=("reuse", "linear", "quadratic"),
            rebuild=False,
        ),
    )
    deep_cache_blend: float = field(
        default=0.0,
        metadata=_about(
            "Share of the predicted features that is mixed into computed ones before they are "
            "kept.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    deep_cache_similarity: float = field(
        default=0.0,
        metadata=_about(
            "Compute a step where the last two computed features are less alike than this "
            "(cosine); 0 does not look, and the host never waits for the device.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    few_steps: int = field(
        default=0,
        metadata=_about(
            "Approximate: denoise in so many steps, spread over those that the call asks for; "
            "0 takes all.",
            between=(0, 1000),
            rebuild=False,
        ),
    )
    adaptive_steps: bool = field(
        default=False,
        metadata=_about(
            "Approximate: choose the steps of each chunk by how much its faces changed.",
            rebuild=False,
        ),
    )
    adaptive_min_steps: int = field(
        default=10,
        metadata=_about(
            "Steps of a chunk that changed by less than `adaptive_low`.",
            between=(1, 1000),
            rebuild=False,
        ),
    )
    adaptive_max_steps: int = field(
        default=30,
        metadata=_about(
            "Steps of a chunk that changed by more than `adaptive_high`.",
            between=(1, 1000),
            rebuild=False,
        ),
    )
    adaptive_low: float = field(
        default=0.01,
        metadata=_about(
            "Mean squared difference of faces below which a chunk takes the fewest steps.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    adaptive_middle: float = field(
        default=0.05,
        metadata=_about(
            "The same below which it takes three quarters.", between=(0.0, 1.0), rebuild=False
        ),
    )
    adaptive_high: float = field(
        default=0.2,
        metadata=_about(
            "The same above which it takes the most steps.", between=(0.0, 1.0), rebuild=False
        ),
    )
    temporal_start: str = field(
        default="off",
        metadata=_about(
            "Approximate: denoise a chunk in fewer steps with what the one before tells: `path` "
            "adds what long steps missed there, `renoise` starts from its result in the middle.",
            choices=("off", "path", "renoise"),
            rebuild=False,
        ),
    )
    temporal_strength: float = field(
        default=0.25,
        metadata=_about(
            "Part of the steps that such a chunk runs, where `adaptive_steps` does not say.",
            between=(0.01, 1.0),
            rebuild=False,
        ),
    )
    temporal_refresh: int = field(
        default=0,
        metadata=_about(
            "Denoise every so-manieth chunk in full; 0: only the first of each scene.",
            between=(0, 100_000),
            rebuild=False,
        ),
    )
    temporal_momentum: float = field(
        default=0.7,
        metadata=_about(
            "For `renoise`: weight of the last result in the start; the rest is the clip's face.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    temporal_noise: float = field(
        default=0.01,
        metadata=_about(
            "For `renoise`: standard deviation of the fresh part of the start's noise.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    scene_cut: float = field(
        default=0.02,
        metadata=_about(
            "Squared difference of neighbouring faces above which a scene is cut; the next chunk "
            "starts from noise.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    solver: str = field(
        default="pipeline",
        metadata=_about(
            "Approximate unless `pipeline`: denoise with this solver on the schedule of the "
            "pipeline's scheduler.",
            choices=("pipeline", "ddim", "dpmpp_2m", "unipc"),
            rebuild=False,
        ),
    )
    batch_chunks: int = field(
        default=1,
        metadata=_about(
            "Denoise up to so many chunks in the same calls of the UNet, within rounding of one "
            "by one; 1 shares none.",
            between=(1, 64),
            rebuild=False,
        ),
    )
    batch_memory_gib: float = field(
        default=0.0,
        metadata=_about(
            "GiB of device memory that `batch_chunks` may fill; 0 is half of what is free when a "
            "run begins.",
            between=(0.0, 10000.0),
            rebuild=False,
        ),
    )
    speculate: bool = field(
        default=False,
        metadata=_about(
            "Approximate: start a chunk that looks like the one before in the middle of its steps, "
            "in the calls of that one, and take it back where a check fails; `batch_chunks=2`.",
            rebuild=False,
        ),
    )
    speculate_similarity: float = field(
        default=0.9,
        metadata=_about(
            "For `speculate`: how alike its faces must be, 1 minus the root of their mean squared "
            "difference.",
            between=(0.0, 1.0),
            rebuild=False,
        ),
    )
    speculate_skip: float = field(
        default=0.5,
        metadata=_about(
            "For `speculate`: part of the steps that such a chunk leaves out, but for two.",
            between=(0.1, 0.9),
            rebuild=False,
        ),
    )
    speculate_tolerance: float = field(
        default=0.1,
        metadata=_about(
            "For `speculate`: how far two guesses of the start may be apart, in standard "
            "deviations of clean latents.",
            between=(0.0, 10.0),
            rebuild=False,
        ),
    )
    lip_attention: bool = field(
        default=False,
        metadata=_about(
            "Approximate pass: attend within frames in full in the mouth region, by pooled cells "
            "elsewhere."
        ),
    )
    lip_pool: str = field(
        default="auto",
        metadata=_about(
            "Side in latents of the cells that `lip_attention` pools; `auto` looks at the detail "
            "outside the mouth.",
            choices=("auto", "1", "2", "4", "8"),
        ),
    )
    lip_halo: int = field(
        default=1,
        metadata=_about("Latents around the mouth that `lip_attention` keeps.", between=(0, 16)),
    )
    lip_weight: float = field(
        default=1.0,
        metadata=_about(
            "How much more than others the mouth's keys count in `lip_attention`; 1 is no "
            "difference.",
            between=(0.1, 10.0),
        ),
    )
    fp8_linear: bool = field(
        default=False,
        metadata=_about(
            "Approximate pass: multiply in 8-bit floating point where a linear layer has many "
            "rows and timing finds that faster."
        ),
    )
    crop_decode: bool = field(
        default=False,
        metadata=_about(
            "Approximate pass: decode only the rows of the picture that are generated."
        ),
    )
    crop_halo: int = field(
        default=1,
        metadata=_about(
            "Rows of latents around the generated ones that `crop_decode` decodes too.",
            between=(0, 16),
        ),
    )
    crop_statistics: str = field(
        default="both",
        metadata=_about(
            "Where the norms of `crop_decode` have their statistics from: the rows decoded "
            "(`own`), the chunk's first picture, decoded whole (`first`), or the rows decoded and "
            "that picture's other rows (`both`).",
            choices=("own", "first", "both"),
        ),
    )
    parallel_stages: str = field(
        default="auto",
        metadata=_about(
            "Read, find faces, encode, denoise, decode and paste in stages that overlap, each in "
            "a thread and on a stream of its own; same bytes. `auto` is on for a GPU.",
            choices=("auto", "on", "off"),
            rebuild=False,
        ),
    )
    batch_faces: str = field(
        default="auto",
        metadata=_about(
            "Cut and paste the faces of a chunk together on the device, within rounding of doing "
            "it frame by frame. `auto` is on for a GPU.",
            choices=("auto", "on", "off"),
            rebuild=False,
        ),
    )
    face_cache: bool = field(
        default=True,
        metadata=_about(
            "Search equal frames for a face once, and encode a frame that is shown again once.",
            rebuild=False,
        ),
    )
    face_tolerance: float = field(
        default=0.0,
        metadata=_about(
            "Approximate above 0: take a face found before where brows and nose have moved by "
            "fewer pixels than this.",
            between=(0.0, 20.0),
            rebuild=False,
        ),
    )
    track_faces: bool = field(
        default=False,
        metadata=_about(
            "Approximate: look for the face where it was in the frame before, and search the "
            "frame at cuts and once a second only.",
            rebuild=False,
        ),
    )
    clip_cache: bool = field(
        default=False,
        metadata=_about(
            "Keep faces and encodings of a clip in the user's cache folder, so that the same clip "
            "with another sound needs neither again.",
            rebuild=False,
        ),
    )
    clip_cache_gib: float = field(
        default=2.0,
        metadata=_about(
            "GiB that the clips kept may take; the least recently used go first.",
            between=(0.001, 10000.0),
            rebuild=False,
        ),
    )
    guard_every: int = field(
        default=0,
        metadata=_about(
            "Also compute every so-manieth chunk exactly, measure how far the approximate one is, "
            "and fall back where that is too far; 0 trusts the options.",
            between=(0, 100_000),
            rebuild=False,
        ),
    )
    guard_floor: float = field(
        default=30.0,
        metadata=_about(
            "Least PSNR of the mouth in dB that `guard_every` accepts.",
            between=(0.0, 100.0),
            rebuild=False,
        ),
    )
    trace: Path | None = field(
        default=None,
        metadata=_about(
            "File for a timeline of each run: a Chrome trace (`.json`) or a picture (`.png`, "
            "`.svg`).",
            rebuild=False,
        ),
    )
    inductor: Mapping[str, Any] = field(
        default_factory=dict,
        hash=False,
        metadata=_about(
            "Inductor settings for these graphs only, such as `{'max_autotune': True}`; names as "
            "in `torch._inductor.list_options()`."
        ),
    )
    dump_dir: Path | None = field(
        default=None,
        metadata=_about(
            "Folder for the readable graph before and after each pass, named "
            "`phase.index.pass.stage.py`.",
            rebuild=False,
        ),
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            checked = check(
                spec.name,
                getattr(self, spec.name),
                spec.metadata["choices"],
                spec.metadata["between"],
            )
            object.__setattr__(self, spec.name, checked)
        check_combination(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        values["inductor"] = dict(self.inductor)
        for name in PATHS:
            values[name] = None if values[name] is None else str(values[name])
        return values

    @functools.cached_property
    def rebuild_key(self) -> tuple[Hashable, ...]:
        """The values that graphs are made by, to file them under."""
        return tuple(
            repr(sorted(value.items())) if isinstance(value, Mapping) else value
            for spec in fields(self)
            if spec.metadata["rebuild"]
            for value in [getattr(self, spec.name)]
        )

    def needs_rebuild(self, other: Options) -> bool:
        """Whether graphs compiled with ``other`` are wrong for these options."""
        return self.rebuild_key != other.rebuild_key


OPTION_NAMES: tuple[str, ...] = tuple(spec.name for spec in fields(Options))


def resolve_options(
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    default_preset: str = "balanced",
    **more: Any,
) -> Options:
    """What the user said, on top of what its preset says, on top of the defaults.

    Args:
        mode: a preset's name (``torch.compile(..., mode="turbo")``); ``"default"`` counts as none.
        options: option names to values; ``None`` as a value means the preset's default. Not
            changed.
        default_preset: the preset where none is named.
        **more: as ``options``; a name given in both must have one value.

    Raises:
        OptionError: naming the option that is unknown, contradicted or outside its values.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a mapping of names, got {type(options).__name__}")
    given: dict[str, Any] = {}
    for name, value in [*(options or {}).items(), *more.items()]:
        if name not in OPTION_NAMES:
            raise OptionError(f"unknown option {name!r}{nearest(str(name), OPTION_NAMES)}")
        if value is None:
            continue
        if name in given and given[name] != value:
            raise OptionError(f"option {name} is given twice: {given[name]!r} and {value!r}")
        given[name] = value
    if mode is not None and mode != "default":
        if mode not in PRESETS:
            hint = nearest(str(mode), PRESETS)
            raise OptionError(f"unknown mode {mode!r}{hint}; modes are {listed(PRESETS)}")
        if given.setdefault("preset", mode) != mode:
            raise OptionError(f"mode {mode!r} contradicts the option preset={given['preset']!r}")
    preset = check("preset", given.pop("preset", default_preset), tuple(PRESETS))
    return LatentSyncSpeedOptimizer(PRESETS[preset], given).combine(
        functools.partial(Options, preset=preset)
    )


def left_out(options: Options) -> list[str]:
    """A line for each option of the preset that gave way to another one."""
    lines = []
    for name, value in PRESETS[options.preset].items():
        try:
            replace(options, **{name: value})
        except CombinationError as error:
            reason = error.exclusion.reason
            lines.append(f"preset {options.preset!r}: left out {name}; {reason}")
    return lines


def options_table() -> str:
    """The options as a Markdown table, for the documentation."""
    lines = [
        "| option | values | default | compiles anew | what it does |",
        "| --- | --- | --- | --- | --- |",
    ]
    for spec in fields(Options):
        choices = spec.metadata["choices"]
        values = ", ".join(f"`{choice}`" for choice in choices)
        values = values or _kind(spec.name, spec.metadata["between"])
        default = spec.default if spec.default is not MISSING else {}
        rebuild = "yes" if spec.metadata["rebuild"] else "no"
        lines.append(
            f"| `{spec.name}` | {values} | `{default}` | {rebuild} | {spec.metadata['help']} |"
        )
    return "\n".join(lines) + "\n"


def _kind(name: str, between: tuple[float, float] | None) -> str:
    if between is not None:
        return f"{between[0]} to {between[1]}"
    if name == "inductor":
        return "mapping"
    if name == "deep_cache_steps":
        return "steps"
    return "path" if name in PATHS else "`True`, `False`"
