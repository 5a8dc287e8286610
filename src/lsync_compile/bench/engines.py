"""What runs the networks in a benchmark, and the check that it gives what the eager ones give."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import lsync_compile
from lsync_compile.bench.rows import AUTOTUNED, EAGER, INDUCTOR, LSYNC, TENSORRT, Row
from lsync_compile.bench.timing import relative_error
from lsync_compile.errors import LsyncError
from lsync_compile.models.scheduler import default_scheduler

# Relative, against the eager network of the same number format; beyond is a bug and not rounding.
ROUNDING = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
# What an approximate row's first step may differ: how good it is, a trained model has to say. No
# output at all differs by 1, one that has nothing to do with the eager one by 1.4.
SANE = 0.8

Runner = Callable[[Callable[[], Any]], Any]


class Refused(LsyncError):  # noqa: N818  the name of what it says of a row
    """A path whose output is wrong; nothing of it is timed."""

    exit_code = 9


class Networks:
    """The least that lsync takes for a pipeline."""

    def __init__(self, unet: Any, vae: Any) -> None:
        self.unet = unet
        self.vae = vae
        self.scheduler = default_scheduler()

    def __call__(self, work: Callable[[], Any]) -> Any:
        return work()


@contextlib.contextmanager
def running_with(row: Row, networks: Networks) -> Iterator[tuple[Runner, Any]]:
    """Run the networks as a row says inside the block.

    Yields:
        What to hand work to, and lsync's handle (None for others).
    """
    torch._dynamo.reset()
    parts: list[nn.Module] = [networks.unet, networks.vae.encoder, networks.vae.decoder]
    fast: Any = None
    if row.engine == LSYNC:
        fast = lsync_compile.compile(networks, **(row.options or {}))
    elif row.engine != EAGER:
        for module in parts:
            module.compile(dynamic=False, **_compile_arguments(row.engine, networks.unet.dtype))
    try:
        yield (networks if fast is None else fast), (None if fast is None else fast.lsync)
    finally:
        if fast is not None:
            fast.lsync.undo()
        for module in parts:
            module._compiled_call_impl = None
        del fast
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _compile_arguments(engine: str, dtype: torch.dtype) -> dict[str, Any]:
    if engine == INDUCTOR:
        return {"backend": "inductor"}
    if engine == AUTOTUNED:
        return {"backend": "inductor", "mode": "max-autotune-no-cudagraphs"}
    assert engine == TENSORRT
    importlib.import_module("torch_tensorrt")  # registers its backend
    options = {"enabled_precisions": {dtype}, "min_block_size": 5, "truncate_double": True}
    return {"backend": "torch_tensorrt", "options": options}


class Watched:
    """A UNet that keeps its first call, to be compared with the eager network's.

    Attributes:
        chunk_calls: calls so far, one for each chunk in them; with guidance.
    """

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self.inputs: tuple[tuple[Tensor, ...], dict[str, Any]] | None = None
        self.output: Tensor | None = None
        self.chunk_calls = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, *args: Tensor, **kwargs: Any) -> Any:
        result = self._unet(*args, **kwargs)
        self.chunk_calls += len(args[0]) / 2
        if self.inputs is None:
            self.inputs = tuple(a.clone() for a in args), dict(kwargs)
            self.output = result.sample.clone()
        return result


def check_step(row: Row, watched: Watched) -> float:
    """How far the first call of the UNet is from the eager network's, relative.

    For the eager row itself: from the same weights in float32.

    Raises:
        Refused: too far, or not finite.
    """
    assert watched.inputs is not None
    assert watched.output is not None
    args, kwargs = watched.inputs
    unet = watched._unet
    with torch.no_grad():
        if row.engine == EAGER:
            wide = nn.Module.to(copy.deepcopy(unet), torch.float32)
            args = tuple(a.float() if a.is_floating_point() else a for a in args)
            kwargs = {name: value.float() for name, value in kwargs.items()}
            expected = wide.forward(*args, **kwargs).sample
            del wide
        else:
            expected = unet.forward(*args, **kwargs).sample  # past what is compiled
    return _judged(row, "UNet step", relative_error(watched.output, expected), unet.dtype)


def check_faces(row: Row, vae: Any, decode: Callable[[Any], Tensor], dtype: torch.dtype) -> float:
    """How far decoded faces are from the eager decoder's, relative.

    Args:
        decode: gives faces with a VAE.

    Raises:
        Refused: too far, or not finite.
    """

    def eagerly(latents: Tensor) -> Any:
        if vae.post_quant_conv is not None:
            latents = vae.post_quant_conv(latents)
        return SimpleNamespace(sample=vae.decoder.forward(latents))

    ours = decode(vae).clone()
    expected = decode(SimpleNamespace(config=vae.config, decode=eagerly))
    return _judged(row, "decoded faces", relative_error(ours, expected), dtype)


def _judged(row: Row, what: str, error: float, dtype: torch.dtype) -> float:
    bound = ROUNDING[str(dtype).removeprefix("torch.")] if row.exact else SANE
    if not error < bound:
        raise Refused(f"{row.name}: {what} differs by {error:.3g}, allowed {bound:g}; not timed")
    return error
