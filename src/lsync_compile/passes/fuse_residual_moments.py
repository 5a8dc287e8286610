"""Measure sums for the group norm after them while they are written.

Case 1, the end of a residual block or transformer; ``h`` and ``r`` may be views of convolutions,
whose biases the op adds, as cuDNN would in passes of their own::

    h = conv2d(z, v, c)                        h = conv2d(z, v)
    s = r + h                                  s, m = lsync.residual_moments(r, h, c)
    n = lsync.group_norm_silu(s, …)      ->    n = lsync.group_norm_from_moments(s, m, …)

Case 2, a convolution with a bias that more than the norm sees, as after a downsampler::

    s = conv2d(z, v, c)                        s, m = lsync.residual_moments(conv2d(z, v), None, c)
    n = lsync.group_norm_silu(s, …)      ->    n = lsync.group_norm_from_moments(s, m, …)

Case 3, the entrance of a decoder's block, where each part is one of the above::

    s = cat([a, b], 1)                         m = cat([m_a, m_b], 3)
    n = lsync.group_norm_silu(s, …)      ->    n = lsync.group_norm_from_moments(s, m, …)

Between sum and norm may be views that keep frames, channels, rows and columns apart and in order:
``(B, C, F, H, W)`` to ``(B*F, C, H, W)`` or back. Moments are by frame and channel, so that norms
over a frame and over a video, and two norms of one sum, use the same. The pass leaves alone what
``fuse_group_norm_silu`` has given a shift: there the norm alone sees the convolution.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lsync_compile.graph.axes import Axes, Digit, after_view, viewed
from lsync_compile.graph.biases import convolution_bias, sum_of_biases, without_bias
from lsync_compile.graph.build import call, drop, example, replace
from lsync_compile.graph.match import ADD, argument, calls, operands, sole_user
from lsync_compile.kernels.residual_moments import SPEC
from lsync_compile.passes.fuse_group_norm_silu import OP as NORM
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.residual_moments.default
NORM_FROM_MOMENTS = torch.ops.lsync.group_norm_from_moments.default


@register
class FuseResidualMoments(KernelPass):
    """Case by case above; counts the norms."""

    spec = PassSpec(
        name="fuse_residual_moments",
        phase=Phase.REWRITE,
        option="fuse_residual_moments",
        # Which make the norms, and take sums and convolutions.
        after=(
            "fuse_group_norm_silu",
            "fuse_add_layer_norm",
            "fuse_temporal_attention",
            "fuse_upsample_conv",
            "fuse_feed_forward",
        ),
        exact=False,
        summary="Residual sums, with convolutions' biases, that measure themselves for the group "
        "norm after them, which reads them once less; rounding differs.",
        source="Welford (1962), https://doi.org/10.1080/00401706.1962.10490022",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        matches = 0
        for norm in list(gm.graph.nodes):
            if not calls(norm, NORM) or not self.takes(argument(norm, 0, "x"), context):
                continue
            if argument(norm, 6, "shift") is not None:
                continue
            moments = _moments(norm.args[0])
            if moments is None:
                continue
            with gm.graph.inserting_before(norm):
                rest = norm.args[1:6]
                new = call(gm.graph, NORM_FROM_MOMENTS, norm.args[0], moments, *rest, like=norm)
            replace(norm, new)
            drop(norm)
            matches += 1
        return matches


def _moments(x: Node) -> Node | None:
    """The moments of a norm's input, by frames; inserts what measures them."""
    if not _measurable(x):
        return None
    source = _source(x)
    assert source is not None  # _measurable() has found it
    if calls(source, torch.cat):
        count = len(argument(source, 0, "tensors"))
        # Looked up one by one, as measuring a part replaces it.
        parts = [_moments(argument(source, 0, "tensors")[place]) for place in range(count)]
        with source.graph.inserting_before(source):
            return call(source.graph, torch.cat, parts, 3, like=source)
    if not calls(source, operator.getitem):
        source = _measure(source)
    op = source.args[0]
    assert isinstance(op, Node)
    for user in op.users:
        if user.args[1] == 1:
            return user
    with op.graph.inserting_after(source):
        return call(op.graph, operator.getitem, op, 1, like=op)


def _measurable(x: Any) -> bool:
    """Whether moments of this value can be had: nothing is changed before that is sure."""
    source = _source(x)
    if source is None:
        return False
    if calls(source, torch.cat):
        return all(_measurable(part) for part in argument(source, 0, "tensors"))
    if calls(source, operator.getitem) and calls(source.args[0], OP):
        return bool(source.args[1] == 0)
    return operands(source, ADD) is not None or convolution_bias(source) is not None


def _source(x: Any) -> Node | None:
    """The sum, convolution or joined channels that a value is, or is a view by frames of."""
    views: list[Node] = []
    node: Any = x
    while isinstance(node, Node) and (below := viewed(node)) is not None:
        views.append(node)
        node = below
    value, last = example(node), example(x)
    if value is None or last is None or value.dtype != last.dtype:
        return None
    if not _same_frames(node, views[::-1]):
        return None
    if calls(node, torch.cat):
        parts = argument(node, 0, "tensors")
        by_channel = argument(node, 1, "dim", 0) in (1, 1 - value.dim())
        values = [example(part) for part in parts] if isinstance(parts, (list, tuple)) else []
        alike = all(part is not None and part.dtype == value.dtype for part in values)
        if not by_channel or not alike or not values:
            return None
    return node if isinstance(node, Node) else None


def _same_frames(source: Node, views: list[Node]) -> bool:
    """Whether frames, channels, rows and columns of the last view are those of the source."""
    value = example(source)
    axes = None if value is None else _by_frame(value.shape)
    for view in views:
        axes = None if axes is None else after_view(view, axes)
    last = example(views[-1]) if views else value
    return axes is not None and last is not None and axes == _by_frame(last.shape)


def _by_frame(shape: Any) -> Axes | None:
    """The axes of images or videos, their frames numbered as one."""
    if len(shape) not in (4, 5):
        return None
    frames = shape[2] if len(shape) == 5 else 1
    channels, (height, width) = shape[1], shape[-2:]
    batch = (_digit("frame", frames, frames * shape[0]), _digit("channel", 1, channels))
    video = (_digit("frame", 1, frames),) if len(shape) == 5 else ()
    return (*batch, *video, _digit("row", 1, height), _digit("column", 1, width))


def _digit(of: str, low: int, high: int) -> tuple[Digit, ...]:
    return () if low == high else (Digit(of, low, high),)


def _measure(source: Node) -> Node:
    """Replace a sum or convolution by the op; gives the sum."""
    graph, pair = source.graph, operands(source, ADD)
    if pair is None:
        bias = convolution_bias(source)
        with graph.inserting_before(source):
            op = call(graph, OP, without_bias(source), None, bias, like=source)
            return _instead(source, op)
    # A convolution's result, with the channels together, sets the layout of the sum.
    places = sorted((0, 1), key=lambda place: _added(pair[place]) is None)
    bias = None
    for place in (0, 1):
        convolution = _added(source.args[place])
        if convolution is None or pair[0] is pair[1]:  # whose bias would be due twice
            continue
        with graph.inserting_before(source):
            bias = sum_of_biases(bias, convolution_bias(convolution), source)
        with graph.inserting_before(convolution):
            replace(convolution, without_bias(convolution))
        drop(convolution)
    with graph.inserting_before(source):
        first, second = (source.args[place] for place in places)
        return _instead(source, call(graph, OP, first, second, bias, like=source))


def _instead(source: Node, op: Node) -> Node:
    """Give the users of ``source`` to the first result of ``op``."""
    new = call(source.graph, operator.getitem, op, 0, like=source)
    replace(source, new)
    drop(source)
    return new


def _added(part: Any) -> Node | None:
    """The convolution with a bias that a summand is, or is a view by frames of, for it alone."""
    views: list[Node] = []
    node = part
    while isinstance(node, Node) and sole_user(node) is not None:
        if convolution_bias(node) is not None:
            return node if _same_frames(node, views[::-1]) else None
        views.append(node)
        node = viewed(node)
    return None
