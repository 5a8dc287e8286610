"""A 3x3 convolution of a picture enlarged twice: four 2x2 convolutions of the picture itself.

Each source pixel becomes a square of four equal ones, so that a 3x3 window of the large picture
sees 2x2 different pixels, and which ones depends on the place in the square alone. With the weights
that fall on one pixel added up beforehand, each of the four places is a convolution of the small
picture: 4/9 of the products, and the large picture is never stored (Shi et al., 2016,
https://arxiv.org/abs/1609.05158, derive the same from the other end). Whether that is faster than
a library's 3x3 convolution depends on the shape: both are timed, once for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.fastest import Choices
from lsync_compile.kernels.launch import recording, runs_kernel
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register
from lsync_compile.kernels.upsample_conv_kernels import spread, spreads


def phases_of(weight: Tensor) -> Tensor:
    """The four convolutions' weights, ``(O, I, 3, 3)`` -> ``(4, O, 2, 2, I)``.

    By rows, then columns of the square. Sums are as exact as ``weight``'s dtype.
    """
    parts = [part for rows in _halves(weight, 2) for part in _halves(rows, 3)]
    return torch.stack(parts).permute(0, 1, 3, 4, 2).contiguous()


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What the first and the second pixel of a pair see of three neighbours, two of them equal."""
    first, middle, last = (weight.narrow(dim, index, 1) for index in range(3))
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


def phased(x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor) -> Tensor:
    """Four convolutions of the small picture, each written to its places of the large one."""
    height, width = x.shape[2:]
    out = _empty(x, weight)
    for phase in range(4):
        down, right = divmod(phase, 2)
        windows = F.conv2d(x, phases[phase].permute(0, 3, 1, 2), padding=1)
        windows = windows[:, :, down : down + height, right : right + width]
        places = out[:, :, down::2, right::2]
        if (runs_kernel(x) or recording()) and spreads(windows, places):
            spread(windows, bias, places)
        else:
            shift = x.new_zeros(()) if bias is None else bias[:, None, None]
            torch.add(windows, shift, out=places)
    return out


def upsample_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor
) -> Tensor:
    """The same as two operations of torch; ``phases`` is not looked at."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]] = {
    "library": upsample_conv_reference,
    "phases": phased,
}
"""What to choose from."""

_chosen = Choices(__name__)


def upsample_conv_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor) -> Tensor:
    """Compute it in the way found fastest for arguments like these; on a CPU by phases.

    The first call with new shapes or dtypes times both. While a CUDA graph is captured nothing can
    be timed: then the library convolves.
    """
    name = "phases"
    if x.is_cuda:
        arguments = x, weight, bias, phases
        key = (x.dtype, tuple(x.shape), x.stride(), tuple(weight.shape), bias is None)
        calls = {name: functools.partial(call, *arguments) for name, call in KERNELS.items()}
        name = _chosen.fastest(x.device, key, lambda: calls) or "library"
    out = KERNELS[name](x, weight, bias, phases)
    return out.contiguous(memory_format=_format(x))


@torch.library.custom_op(
    "lsync::upsample_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor phases) -> Tensor",
)
def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor) -> Tensor:
    """Enlarge twice, each pixel to a square of four, then convolve 3x3 with a margin of zeros.

    Args:
        x: ``(N, I, H, W)``, channels-last or contiguous.
        weight: ``(O, I, 3, 3)`` of ``x``'s dtype.
        bias: ``(O,)`` of ``x``'s dtype, or none.
        phases: ``phases_of(weight)``, made once.

    Returns:
        ``(N, O, 2*H, 2*W)``, channels-last where ``x`` has its channels together, else contiguous.

    Raises:
        OptionError: shapes or dtypes that do not fit each other.
    """
    _check(x, weight, bias, phases)
    return upsample_conv_kernel(x, weight, bias, phases)


@upsample_conv.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor) -> Tensor:
    _check(x, weight, bias, phases)
    return _empty(x, weight)


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    n, _, height, width = x.shape
    shape = n, weight.shape[0], 2 * height, 2 * width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    together = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if together else torch.contiguous_format


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor) -> None:
    outside, inside = weight.shape[:2]
    if x.dim() != 4 or weight.shape != (outside, x.shape[1], 3, 3):
        raise OptionError(
            f"upsample_conv: x {tuple(x.shape)} must be (N, I, H, W) and weight "
            f"{tuple(weight.shape)} (O, I, 3, 3)"
        )
    if phases.shape != (4, outside, 2, 2, inside):
        raise OptionError(f"upsample_conv: phases {tuple(phases.shape)} are of another weight")
    if bias is not None and bias.shape != (outside,):
        raise OptionError(f"upsample_conv: bias {tuple(bias.shape)} must be ({outside},)")
    if any(each is not None and each.dtype != x.dtype for each in (weight, bias, phases)):
        raise OptionError("upsample_conv: x, weight, bias and phases differ in dtype")


SPEC = register(
    KernelSpec(
        name="upsample_conv",
        summary="Nearest enlargement and a 3x3 convolution as four 2x2 ones, or a library's",
        op=upsample_conv,
        kernel=upsample_conv_kernel,
        reference=upsample_conv_reference,
        source="Shi et al. (2016), https://arxiv.org/abs/1609.05158",
        tolerances={
            torch.float32: Tolerance(1e-5, "the libraries' float32 convolutions"),
            torch.float16: Tolerance(1e-3, "summed weights, windows and result have 11 bits"),
            torch.bfloat16: Tolerance(8e-3, "summed weights, windows and result have 8 bits"),
        },
    )
)
