"""The ways to run a network that benchmarks compare, by name.

    eager, inductor                the network without lsync
    lsync                          the preset ``exact``
    lsync lowering=eager           its graphs operation by operation
    lsync none                     with every optimisation switched off
    lsync to=NAME                  with NAME and all that come before it: a step of the waterfall
    lsync only=NAME                with NAME alone
    lsync without=NAME             with all but NAME
    lsync with=NAME+NAME           with fusions that are off in ``exact`` as well

Each of lsync's may end in ``lowering=eager``.

NAME is a boolean option that is on in ``exact``: CUDA graphs and what is hoisted, then the passes
in running order.
After ``with=`` it is a fusion that is off, see :func:`candidates`, or one of `LOSSY`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import lsync_compile
from lsync_compile.bench.rows import switches
from lsync_compile.options import resolve_options
from lsync_compile.passes.manager import ordered
from lsync_compile.passes.spec import registered

LOSSY = ("fp8_linear",)
WATERFALLS = ("to", "only", "without")
EAGERLY = "lowering=eager"


class Pipeline:
    """The least that lsync takes for a pipeline, so that networks compile as they do in one."""

    def __init__(self, unet: nn.Module, vae: nn.Module | None = None) -> None:
        self.unet = unet
        self.vae = vae
        self.scheduler = None

    def __call__(self, work: Callable[[], Any]) -> Any:
        return work()


def candidates() -> list[str]:
    """Fusions that are off in ``exact`` until they are timed, in running order."""
    exact = resolve_options("exact")
    names = (cls.spec.option for cls in ordered(registered().values()))
    return [name for name in names if name.startswith("fuse_") and not getattr(exact, name)]


def options_of(variant: str) -> dict[str, Any] | None:
    """Options of a variant of lsync; None for "eager" and "inductor".

    Raises:
        ValueError: for a name that is no variant.
    """
    names = switches()
    if variant in ("eager", "inductor"):
        return None
    common = {"preset": "exact", "strict": True}
    words = variant.split()
    if words[1:] and words[-1] == EAGERLY:
        common["lowering"] = "eager"
        words.pop()
    if words == ["lsync"]:
        return common
    if len(words) == 2 and words[0] == "lsync":
        kind, _, name = words[1].partition("=")
        if words[1] == "none":
            return {**common, **dict.fromkeys(names, False)}
        more = name.split("+")
        if kind == "with" and set(more) <= {*candidates(), *LOSSY}:
            return {**common, **dict.fromkeys(more, True)}
        if kind in WATERFALLS and name in names:
            place = names.index(name)
            on = {
                "to": names[: place + 1],
                "only": [name],
                "without": names[:place] + names[place + 1 :],
            }[kind]
            return {**common, **{each: each in on for each in names}}
    raise ValueError(f"no variant {variant!r}; see --list")


def all_variants() -> list[str]:
    """Every name that :func:`options_of` takes."""
    more = [*candidates(), "+".join(candidates())] if candidates() else []
    plain = ["eager", "inductor", f"lsync {EAGERLY}", "lsync"]
    return [*plain, *(f"lsync with={name}" for name in more), *waterfall(*WATERFALLS)]


def waterfall(*kinds: str, lowering: str = "inductor") -> list[str]:
    """ "lsync none" and then, for each kind of waterfall, its steps in order."""
    names = ["lsync none", *(f"lsync {kind}={name}" for kind in kinds for name in switches())]
    return [f"{name} {EAGERLY}" for name in names] if lowering == "eager" else names


@contextmanager
def compiled(
    variant: str, unet: nn.Module, vae: nn.Module | None = None, **more: Any
) -> Iterator[Any]:
    """Run the networks as a variant inside the block; yields lsync's handle, None without it.

    Args:
        more: options on top of the variant's.
    """
    torch._dynamo.reset()
    options = options_of(variant)
    parts = [unet] if vae is None else [unet, vae.encoder, vae.decoder]
    fast = None
    if variant == "inductor":
        for module in parts:
            module.compile(backend="inductor", dynamic=False)
    elif options is not None:
        options = {"compile_vae": vae is not None, **options, **more}
        fast = lsync_compile.compile(Pipeline(unet, vae), **options)
    try:
        yield None if fast is None else fast.lsync
    finally:
        if fast is not None:
            fast.lsync.undo()
        for module in parts:
            module._compiled_call_impl = None
        del fast
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
