"""A layer norm, with the encoding of each token's frame added to it where there is one.

``out = (x - mean) / sqrt(var + eps) * weight + bias`` over the channels of each token (Ba et al.,
2016, https://arxiv.org/abs/1607.06450). The kernel is `lsync_compile.kernels.add_layer_norm`'s,
with nothing to add: several tokens a program, and the sum with the encoding costs no pass. Nor
does a ``shift`` of ``x``, such as the bias of the projection that made it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsync_compile.kernels.add_layer_norm import check_norm, norm_reference, normalise
from lsync_compile.kernels.launch import runs_kernel
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register


def layer_norm_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    position: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Launch the kernel on arguments that `layer_norm` accepts."""
    return normalise(x, None, weight, bias, eps, position, shift)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    position: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The same with torch's layer norm."""
    return norm_reference(x if shift is None else x + shift, weight, bias, eps, position)


@torch.library.custom_op(
    "lsync::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, float eps=1e-5, Tensor? position=None, "
    "Tensor? shift=None) -> Tensor",
)
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    position: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Normalise over the last dimension.

    Args:
        x: ``(..., C)``; float16, bfloat16 or float32.
        weight, bias: ``(C,)``, of any of these dtypes.
        eps: added to the variance.
        position: ``(F, C)``, added to the norm of frame ``f``. Then ``x`` is
            ``(batch*F, tokens, C)``, frames of a chunk one after another.
        shift: ``(C,)``, added to ``x``; the kernel does not round the sum, the reference does.

    Returns:
        ``(..., C)``, contiguous, of ``x``'s dtype.

    Raises:
        OptionError: shapes that do not fit each other, or more than 8192 channels.
    """
    check_norm("layer_norm", x, weight, bias, position, shift)
    if runs_kernel(x):
        return layer_norm_kernel(x, weight, bias, eps, position, shift)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    position = None if position is None else position.to(x.dtype)
    shift = None if shift is None else shift.to(x.dtype)
    return layer_norm_reference(x, weight, bias, eps, position, shift).contiguous()


@layer_norm.register_fake
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    position: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    check_norm("layer_norm", x, weight, bias, position, shift)
    return x.new_empty(x.shape)


SPEC = register(
    KernelSpec(
        name="layer_norm",
        summary="Layer norm, with the frame's encoding if wanted",
        op=layer_norm,
        kernel=layer_norm_kernel,
        reference=layer_norm_reference,
        source="Ba et al. (2016), https://arxiv.org/abs/1607.06450",
        tolerances={
            torch.float32: Tolerance(1e-6, "float32 arithmetic"),
            torch.float16: Tolerance(6e-4, "the norm, without its encoding, and it are rounded"),
            torch.bfloat16: Tolerance(5e-3, "the norm, without its encoding, and it are rounded"),
        },
    )
)
