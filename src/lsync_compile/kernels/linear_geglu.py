"""A feed-forward's first projection and its gate: ``out = v * gelu(g)``, ``v, g = x @ w.T + b``.

gelu is the exact one (Shazeer, 2020, https://arxiv.org/abs/2002.05202). Apart, the two write and
read the hidden channels, eight times as many as the input has; together they write the gated half
alone, and the hidden channels are not rounded in between. Whether that beats a library's product
with `lsync_compile.kernels.geglu` after it depends on the shape: they are timed, once for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels import linear_geglu_kernels as kernels
from lsync_compile.kernels.fastest import Choices
from lsync_compile.kernels.geglu import geglu_kernel, geglu_reference
from lsync_compile.kernels.launch import recording, runs_kernel
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return geglu_kernel(F.linear(x, weight, bias), out)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "library": _library,
    "tiles": kernels.tiles,
    "stream": kernels.stream,
}
"""What to choose from: of ``x (rows, channels)``, weight and bias, and where to write if wanted."""

_chosen = Choices(__name__)


def linear_geglu_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute it in the way found fastest for arguments like these.

    The first call with new shapes or dtypes times the candidates. While a CUDA graph is captured
    nothing can be timed: then the library multiplies.

    Args:
        x, weight, bias: as `linear_geglu` accepts them.
        out: ``(rows, C)`` to write to, columns together and rows at multiples of 16 bytes.
    """
    shape, rows = _shape(x, weight, bias), x.reshape(-1, x.shape[-1])
    made = KERNELS[choice(rows, weight, bias)](rows, weight, bias, out)
    return made if out is not None else made.view(shape)


def choice(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str:
    """The fastest of `KERNELS` for these tensors."""
    names = usable(x, weight, bias)
    if len(names) == 1 or not x.is_cuda:
        return names[-1]
    key = (x.dtype, tuple(x.shape), x.stride(), tuple(weight.shape), bias is None)
    calls = {name: functools.partial(KERNELS[name], x, weight, bias) for name in names}
    return _chosen.fastest(x.device, key, lambda: calls) or "library"


def usable(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[str]:
    """Those of `KERNELS` that take these tensors; on a CPU for the interpreter."""
    own = runs_kernel(x) or recording()
    names = ["library"]
    if own and kernels.streams(x, weight, bias):
        names.append("stream")
    if own and kernels.takes(x, weight, bias):
        names.append("tiles")
    return names


def linear_geglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with torch's product and gelu."""
    return geglu_reference(F.linear(x, weight, bias))


@torch.library.custom_op(
    "lsync::linear_geglu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
)
def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Project, then multiply one half of the channels with the exact gelu of the other.

    Args:
        x: ``(..., K)``; float16, bfloat16 or float32.
        weight: ``(2*C, K)`` of ``x``'s dtype, the rows of the values, then those of the gates.
        bias: ``(2*C,)`` of ``x``'s dtype, or none.

    Returns:
        ``(..., C)``, contiguous, of ``x``'s dtype.

    Raises:
        OptionError: shapes or dtypes that do not fit each other, or an odd number of channels.
    """
    _shape(x, weight, bias)
    if x.is_cuda or runs_kernel(x):
        return linear_geglu_kernel(x, weight, bias)
    return linear_geglu_reference(x, weight, bias).contiguous()


@linear_geglu.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(_shape(x, weight, bias))


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] % 2:
        raise OptionError(
            f"linear_geglu: weight {tuple(weight.shape)} must be (even, {tuple(x.shape)[-1:]})"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise OptionError(f"linear_geglu: bias {tuple(bias.shape)} must be ({weight.shape[0]},)")
    if any(each is not None and each.dtype != x.dtype for each in (weight, bias)):
        raise OptionError("linear_geglu: x, weight and bias differ in dtype")
    return (*x.shape[:-1], weight.shape[0] // 2)


SPEC = register(
    KernelSpec(
        name="linear_geglu",
        summary="A projection and its gate, `v * gelu(g)` of its halves, ours or the library's",
        op=linear_geglu,
        kernel=linear_geglu_kernel,
        reference=linear_geglu_reference,
        source="Shazeer (2020), https://arxiv.org/abs/2002.05202",
        tolerances={
            torch.float32: Tolerance(1e-5, "the libraries' float32 products"),
            torch.float16: Tolerance(1e-3, "hidden channels and result are rounded to 11 bits"),
            torch.bfloat16: Tolerance(8e-3, "hidden channels and result are rounded to 8 bits"),
        },
    )
)
