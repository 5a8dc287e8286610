"""Put group norms, with what stands before and after them, into one kernel.

Case 1, a group norm with its SiLU, as in each residual block::

    n = group_norm(x, 32, w, b, eps)
    y = silu(n)                          ->    y = lsync.group_norm_silu(x, 32, w, b, eps, True)

Case 2, a residual block's second norm takes the projected time embedding with it::

    e = t[:, :, None, None, None]
    s = h + e
    n = group_norm(s, 32, w, b, eps)
    y = silu(n)                          ->    y = lsync.group_norm_silu(h, 32, w, b, eps, True, t)

Case 3, a group norm alone, as at the entrance of transformers::

    n = group_norm(x, 32, w, b, eps)     ->    n = lsync.group_norm_silu(x, 32, w, b, eps, False)

Case 4, with case 1 or 2, where ``h`` is a convolution's result and only the norm sees it. cuDNN
would add the bias in a pass of its own over all of ``h``; a prologue adds it to ``t``::

    h = conv2d(z, v, c)                        h = conv2d(z, v)
    y = lsync.group_norm_silu(h, …, t)   ->    y = lsync.group_norm_silu(h, …, t.float() + c)

``x`` is ``(N, C, H, W)``, ``(N, C, F, H, W)`` or ``(N, C, L)``, in any memory layout, which the
kernel keeps where torch's makes a contiguous copy. Case 1 asks that nothing else uses the norm;
case 2 that nothing else uses the sum, and that the embedding has one row for each of ``x``. The
norm of the sum in case 2 is of the sum before rounding, so case 2 is closer to exact.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, drop, example, replace
from lsync_compile.graph.match import ADD, argument, calls, is_silu, sole_user
from lsync_compile.kernels.group_norm_silu import SPEC
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.group_norm_silu.default


@register
class FuseGroupNormSilu(KernelPass):
    """Case by case above; counts the group norms."""

    spec = PassSpec(
        name="fuse_group_norm_silu",
        phase=Phase.REWRITE,
        option="fuse_group_norm_silu",
        exact=False,
        summary="Group norms in one kernel, with the convolution's bias and the time embedding "
        "before and the SiLU after them, in the layout of their input; rounding differs.",
        source="Wu & He (2018), https://arxiv.org/abs/1803.08494",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        return sum(self._fuse(node, context) for node in list(gm.graph.nodes))

    def _fuse(self, norm: Node, context: PassContext) -> bool:
        if not calls(norm, F.group_norm):
            return False
        x, groups = argument(norm, 0, "input"), argument(norm, 1, "num_groups")
        weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
        eps = argument(norm, 4, "eps", 1e-5)
        value, result = example(x), example(norm)
        if not self.takes(x, context) or value is None or result is None:
            return False
        if value.dim() not in (3, 4, 5) or result.dtype != value.dtype:
            return False
        if example(weight) is None or example(bias) is None:
            return False
        user = sole_user(norm)
        last = user if user is not None and is_silu(user) else norm
        shift = convolution = None
        if value.dim() > 3:
            x, shift = _shifted(x) or (x, None)
            convolution = _convolution(x)
        with norm.graph.inserting_before(last):
            if convolution is not None:
                shift = _with_bias(convolution, shift, value.shape[0])
            image = call(norm.graph, "unsqueeze", x, 2, like=last) if value.dim() == 3 else x
            new = call(
                norm.graph, OP, image, groups, weight, bias, eps, last is not norm, shift, like=last
            )
            if value.dim() == 3:
                new = call(norm.graph, "squeeze", new, 2, like=last)
            replace(last, new)
        drop(last)
        return True


def _shifted(total: Node) -> tuple[Node, Node] | None:
    """``(h, t)`` where ``total`` is ``h + t[:, :, None, None]`` and the norm alone uses it."""
    if not calls(total, *ADD) or total.kwargs or len(total.args) != 2 or sole_user(total) is None:
        return None
    for h, broadcast in (total.args, reversed(total.args)):
        shift = _rows(broadcast)
        one, two, three = example(h), example(shift), example(total)
        if one is None or two is None or three is None or shift is None:
            continue
        fits = two.shape == one.shape[:2] and one.shape == three.shape
        fits = fits and one.dtype == two.dtype == three.dtype and one.device == two.device
        if fits and isinstance(h, Node):
            return h, shift
    return None


def _rows(broadcast: Any) -> Node | None:
    """``t`` of ``t[:, :, None, None]`` with any number of ``None``."""
    if not calls(broadcast, operator.getitem):
        return None
    source, index = broadcast.args
    whole = isinstance(index, tuple) and index[:2] == (slice(None), slice(None))
    if not whole or any(part is not None for part in index[2:]):
        return None
    value: Tensor | None = example(source)
    return source if value is not None and value.dim() == 2 else None


def _convolution(x: Node) -> Node | None:
    """The convolution with a bias that ``x`` is, or is the video of, and nothing else sees."""
    if sole_user(x) is None:
        return None
    frames = x if calls(x, F.conv2d) else _frames(x)
    if frames is None or not calls(frames, F.conv2d) or sole_user(frames) is None:
        return None
    value, bias = example(frames), argument(frames, 2, "bias")
    images = value is not None and value.dim() == 4
    return frames if images and example(bias) is not None else None


def _frames(video: Node) -> Node | None:
    """``h`` of ``h.view(batch, frames, C, H, W).transpose(1, 2)``."""
    view = video.args[0] if calls(video, "transpose") else None
    if not isinstance(view, Node) or not calls(view, "view", "reshape"):
        return None
    h = view.args[0]
    split, value = example(view), example(h)
    if split is None or value is None or split.dim() != 5 or sole_user(view) is None:
        return None
    by_frame = video.args[1:] in ((1, 2), (2, 1))
    by_frame = by_frame and value.shape == (split.shape[0] * split.shape[1], *split.shape[2:])
    return h if by_frame and isinstance(h, Node) else None


def _with_bias(convolution: Node, shift: Node | None, rows: int) -> Node:
    """Take the bias from the convolution, and insert its sum with the shift in float32."""
    graph, bias = convolution.graph, argument(convolution, 2, "bias")
    if len(convolution.args) > 2:
        convolution.update_arg(2, None)
    else:
        convolution.update_kwarg("bias", None)
    wide = call(graph, "float", bias, like=convolution)
    if shift is None:
        return call(graph, "repeat", wide, rows, 1, like=convolution)
    return call(graph, torch.add, call(graph, "float", shift, like=shift), wide, like=shift)
