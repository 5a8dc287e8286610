"""Attention within a frame or to the sound, by the fastest kernel for its shape.

``out[n, i, h] = sum_j softmax_j(scale * <q[n, i, h], k[n, j, h]>) v[n, j, h]`` with i over queries,
j over keys and h over heads (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762), exactly.
torch has several kernels for it, cuDNN's, FlashAttention's and a memory-efficient one, and takes
the first of a fixed order that can run. Which one is fastest depends on the shape: here they are
timed, beside one of our own for narrow heads and few keys and one for wide heads, once for each
shape, and tensors stay ``(batch, tokens, heads*head_dim)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as backends

from lsync_compile.errors import OptionError
from lsync_compile.kernels import wide_attention
from lsync_compile.kernels.fastest import Choices
from lsync_compile.kernels.launch import recording, runs_kernel
from lsync_compile.kernels.spatial_attention_kernels import flash_attention, takes
from lsync_compile.kernels.spec import KernelSpec, Tolerance, register

Attend = Callable[[Tensor, Tensor, Tensor, "float | None"], Tensor]


def _torch(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


# Called as they are: torch.nn.attention.sdpa_kernel switches backends for all threads at once.


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    out: Tensor = op(q, k, v, None, False, 0.0, False, False, scale=scale)[0]
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = op(q, k, v, 0.0, False, False, scale=scale)[0]
    return out


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    op = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = op(q, k, v, None, False, 0.0, False, scale=scale)[0]
    return out


KERNELS: dict[str, Attend] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "lsync": flash_attention,
    "products": wide_attention.attend,
}
"""What to choose from, on ``(N, heads, L, head_dim)``."""

_chosen = Choices(__name__)


def spatial_attention_kernel(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None
) -> Tensor:
    """Attend with the kernel found fastest for arguments like these.

    The first call with new shapes, strides or dtypes times the candidates, for some 30 calls each.
    While a CUDA graph is captured nothing can be timed: then torch's own order decides.
    """
    q, k, v = (_split(x, heads) for x in (q, k, v))
    name = choice(q, k, v, scale)
    attend = KERNELS[name] if name else _torch
    return _merge(attend(q, k, v, scale))


def choice(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> str:
    """The fastest of `KERNELS` for these tensors; "" where torch decides."""
    if not q.is_cuda:
        if not (runs_kernel(q) or recording()):
            return ""
        if wide_attention.takes(q, k):
            return "products"
        return "lsync" if takes(q, k, v, scale) else ""
    key = (q.dtype, *((tuple(x.shape), x.stride()) for x in (q, k, v)))
    return _chosen.fastest(
        q.device,
        key,
        lambda: {
            name: functools.partial(KERNELS[name], q, k, v, scale)
            for name in usable(q, k, v, scale)
        },
    )


def usable(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> list[str]:
    """Those of `KERNELS` that say they take these tensors on a GPU."""
    if q.shape[3] % 8:  # torch pads channels for some of them, which costs more than it gains
        return []
    parameters = backends.SDPAParams(q, k, v, None, 0.0, False, False)
    can = {
        "cudnn": backends.can_use_cudnn_attention(parameters),
        "flash": backends.can_use_flash_attention(parameters),
        "efficient": backends.can_use_efficient_attention(parameters),
        "lsync": runs_kernel(q) and takes(q, k, v, scale),
        "products": runs_kernel(q) and wide_attention.takes(q, k),
    }
    return [name for name, usable in can.items() if usable]


def spatial_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None
) -> Tensor:
    """The same with whatever torch chooses."""
    if q.dtype == torch.float64 and q.shape[0] > 1:
        # No GPU kernel takes it, and the scores of all rows together would not fit.
        rows = zip(q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([spatial_attention_reference(*row, heads, scale) for row in rows])
    return _merge(_torch(_split(q, heads), _split(k, heads), _split(v, heads), scale))


@torch.library.custom_op(
    "lsync::spatial_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int heads, float? scale=None) -> Tensor",
)
def spatial_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None
) -> Tensor:
    """Attention of every query and head over the keys of its row.

    Args:
        q: ``(batch, tokens, heads*head_dim)``; float16, bfloat16 or float32. Slices of a fused
            projection are read in place.
        k, v: ``(batch, keys, heads*head_dim)`` of the same dtype.
        heads: attention heads.
        scale: factor of the scores; ``head_dim ** -0.5`` when not given.

    Returns:
        ``(batch, tokens, heads*head_dim)``, contiguous, of ``q``'s dtype.

    Raises:
        OptionError: shapes or dtypes that differ, or that the heads do not divide.
    """
    _check(q, k, v, heads)
    if q.is_cuda or runs_kernel(q):
        return spatial_attention_kernel(q, k, v, heads, scale)
    return spatial_attention_reference(q, k, v, heads, scale)


@spatial_attention.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    _check(q, k, v, heads)
    return q.new_empty(q.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    fits = q.dim() == k.dim() == 3 and v.shape == k.shape
    if not fits or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise OptionError(
            "spatial_attention: q must be (batch, tokens, channels), k and v (batch, keys, "
            f"channels), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise OptionError(
            f"spatial_attention: q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if heads < 1 or q.shape[2] % heads:
        raise OptionError(f"spatial_attention: heads={heads} must divide {q.shape[2]} channels")


def _split(x: Tensor, heads: int) -> Tensor:
    """``(N, L, heads*head_dim)`` -> ``(N, heads, L, head_dim)``, a view."""
    out: Tensor = x.unflatten(2, (heads, -1)).transpose(1, 2)
    return out


def _merge(x: Tensor) -> Tensor:
    """``(N, heads, L, head_dim)`` -> ``(N, L, heads*head_dim)``, contiguous.

    A view for kernels that answer in the layout of their queries, as all of torch's do.
    """
    return x.transpose(1, 2).flatten(2).contiguous()


SPEC = register(
    KernelSpec(
        name="spatial_attention",
        summary="Attention in the `b s (h d)` layout by the fastest kernel, ours or a library's",
        op=spatial_attention,
        kernel=spatial_attention_kernel,
        reference=spatial_attention_reference,
        source="Vaswani et al. (2017), https://arxiv.org/abs/1706.03762",
        tolerances={
            torch.float32: Tolerance(1e-5, "the libraries' float32 kernels"),
            torch.float16: Tolerance(1e-3, "weights and result are rounded to 11 bits"),
            torch.bfloat16: Tolerance(8e-3, "weights and result are rounded to 8 bits"),
        },
    )
)
