"""The end of a transformer, from its last residual sum to its last projection, in three kernels.

A block's feed-forward ends in a product and a residual sum, and the next thing is a product again::

    t = x + residual
    h = geglu(linear(layer_norm(t), w_in, b_in))
    y = linear(linear(h, w, b) + t, v, c)

Products in a row are one product, ``v (w h + b + t) + c = (v w) h + v t + (v b + c)``, and the sum
of two products is one of longer rows::

    y = linear([h, t], [v w, v], v b + c)

That is the same arithmetic in one matrix product instead of two, without the sum between: of what
the last four lines above move through memory, half is left. ``[h, t]`` costs nothing, as both
are written side by side to begin with. The joined weights are made once, in float32, and rounded as
the weights were; the sum between is not rounded any more.

Without a condition, attention to it gives the same for every token (``null_audio``): the rows of
``x`` that are known so are given as one, ``null``, and never written out. The other rows may be
given without the bias of the projection that made them, which is ``shift`` then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.errors import OptionError
from lsync_compile.kernels.add_layer_norm import add_layer_norm_reference, check_norm, normalise
from lsync_compile.kernels.launch import runs_kernel
from lsync_compile.kernels.linear_geglu import linear_geglu_kernel, linear_geglu_reference
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register


def joined_weight(weight: Tensor, last: Tensor) -> Tensor:
    """``[v w, v]`` of ``w (C, H)`` and ``v (O, C)``: ``(O, H + C)``, in float32 at least."""
    return torch.cat([torch.matmul(last, weight), last], 1)


def joined_bias(bias: Tensor, last: Tensor) -> Tensor:
    """``v b`` of ``b (C,)`` and ``v (O, C)``: ``(O,)``."""
    return torch.mv(last, bias)


def feed_forward_kernel(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    null: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Launch the kernels on arguments that `feed_forward` accepts."""
    channels, inner = x.shape[-1], weight_in.shape[0] // 2
    rows = residual.numel() // channels
    wide = x.new_empty(rows, inner + channels)
    sum_of = residual, wide[:, inner:]
    normed = normalise(x, sum_of, norm_weight, norm_bias, eps, None, shift, null)
    linear_geglu_kernel(normed.view(rows, channels), weight_in, bias_in, wide[:, :inner])
    return F.linear(wide, weight_out, bias_out).view(*residual.shape[:-1], -1)


def feed_forward_reference(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    null: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The same with torch's operations."""
    x = x if shift is None else x + shift
    if null is not None:
        missing = residual.shape[0] - x.shape[0]
        x = torch.cat([null.expand(missing, *x.shape[1:]), x])
    total, normed = add_layer_norm_reference(x, residual, norm_weight, norm_bias, eps)
    hidden = linear_geglu_reference(normed, weight_in, bias_in)
    return F.linear(torch.cat([hidden, total], -1), weight_out, bias_out)


@torch.library.custom_op(
    "lsync::feed_forward",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, Tensor? null=None, "
    "Tensor? shift=None) -> Tensor",
)
def feed_forward(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    null: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Sum, layer norm, gated projection, and the product of the gated channels and the sum.

    Args:
        x, residual: ``(N, ..., C)`` of one shape and dtype: float16, bfloat16 or float32. With
            ``null`` the first dimension of ``x`` may be smaller.
        norm_weight, norm_bias: ``(C,)``, of any of these dtypes.
        eps: added to the variance.
        weight_in: ``(2*H, C)`` of ``x``'s dtype, the rows of the values, then those of the gates.
        bias_in: ``(2*H,)``, or none.
        weight_out: ``(O, H + C)``, see `joined_weight`.
        bias_out: ``(O,)``, or none.
        null: ``(C,)``, what each row of ``x`` is that comes before those given.
        shift: ``(C,)``, of any of these dtypes, added to the rows given.

    Returns:
        ``(N, ..., O)``, contiguous, of ``x``'s dtype.

    Raises:
        OptionError: shapes or dtypes that do not fit each other, or more than 8192 channels.
    """
    products = weight_in, bias_in, weight_out, bias_out
    _check(x, residual, norm_weight, norm_bias, *products, null, shift)
    if runs_kernel(x):
        return feed_forward_kernel(x, residual, norm_weight, norm_bias, eps, *products, null, shift)
    norm_weight, norm_bias = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    shift = None if shift is None else shift.to(x.dtype)
    return feed_forward_reference(
        x, residual, norm_weight, norm_bias, eps, *products, null, shift
    ).contiguous()


@feed_forward.register_fake
def _fake(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    null: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    products = weight_in, bias_in, weight_out, bias_out
    _check(x, residual, norm_weight, norm_bias, *products, null, shift)
    return x.new_empty((*residual.shape[:-1], weight_out.shape[0]))


def _check(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    null: Tensor | None,
    shift: Tensor | None,
) -> None:
    fewer_rows = null is not None and residual.shape[1:] == x.shape[1:]
    fits = residual.shape == x.shape or (fewer_rows and residual.shape[0] > x.shape[0])
    if x.dim() < 2 or not fits:
        raise OptionError(
            f"feed_forward: x {tuple(x.shape)} and residual {tuple(residual.shape)} differ"
        )
    check_norm("feed_forward", x, norm_weight, norm_bias, None, shift)
    channels = x.shape[-1]
    if weight_in.dim() != 2 or weight_in.shape[1] != channels or weight_in.shape[0] % 2:
        raise OptionError(
            f"feed_forward: weight_in {tuple(weight_in.shape)} must be (even, {channels})"
        )
    wide = weight_in.shape[0] // 2 + channels
    if weight_out.dim() != 2 or weight_out.shape[1] != wide:
        raise OptionError(
            f"feed_forward: weight_out {tuple(weight_out.shape)} must be (channels, {wide})"
        )
    for name, bias, weight in (("in", bias_in, weight_in), ("out", bias_out, weight_out)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise OptionError(
                f"feed_forward: bias_{name} {tuple(bias.shape)} must be ({weight.shape[0]},)"
            )
    if null is not None and null.shape != (channels,):
        raise OptionError(f"feed_forward: null {tuple(null.shape)} must be ({channels},)")
    rest = (residual, null, weight_in, bias_in, weight_out, bias_out)
    if any(each is not None and each.dtype != x.dtype for each in rest):
        raise OptionError("feed_forward: x, residual, weights and biases differ in dtype")


SPEC = register(
    KernelSpec(
        name="feed_forward",
        summary="Residual sum, layer norm and gated projection, and one product of what was gated "
        "and the sum, in place of a projection, a sum and another projection",
        op=feed_forward,
        kernel=feed_forward_kernel,
        reference=feed_forward_reference,
        source="Shazeer (2020), https://arxiv.org/abs/2002.05202",
        tolerances={
            torch.float32: Tolerance(1e-5, "the libraries' float32 products"),
            torch.float16: Tolerance(1.5e-3, "sum, norm, gated channels and result have 11 bits"),
            torch.bfloat16: Tolerance(1.2e-2, "sum, norm, gated channels and result have 8 bits"),
        },
    )
)
