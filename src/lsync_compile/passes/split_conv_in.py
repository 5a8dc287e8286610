"""Convolve the channels that stay the same through a chunk once.

LatentSync's UNet takes 13 channels: 4 of noisy latents, and 9 that say what is around the mouth and
how the person looks. Those 9 are the same in all steps of a chunk, and a convolution is a sum over
channels::

    y = conv2d(sample, w, b)            f = conv2d(sample[:, 4:], w[:, 4:], b)      once a chunk
                                  ->    v = conv2d(sample[:, :4], w[:, :4])
                                        y = v + f

The runtime vouches for it (``StepContext.vouched``, "constant_channels"). The slice of the sample
is marked as a value of the chunk, and staging (:mod:`lsync_compile.graph.staging`) takes it from
there; without that stage the pass would only add work, and stays away.

The sum is taken in another order: not bit for bit. Little is gained, and nothing where reading the
kept result takes longer than convolving 9 channels: measure before use.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from lsync_compile.graph.axes import Axes, after_view, arrange, merged, permuted, viewed, whole
from lsync_compile.graph.build import call, example, replace
from lsync_compile.graph.dependency import STAGE_KEY, Stage, find_argument
from lsync_compile.graph.match import argument, calls, sole_user
from lsync_compile.graph.purity import why_seen
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

VARIABLE = 4  # channels of noisy latents; `VOUCHES` says the rest is constant


@register
class SplitConvIn(Pass):
    """Counts the convolutions split: one, or none."""

    spec = PassSpec(
        name="split_conv_in",
        phase=Phase.SPECIALISE,
        option="split_conv_in",
        after=("guidance_prefix",),
        targets=("unet",),
        exact=False,
        summary="Convolves the sample's constant channels once a chunk. Rounds otherwise.",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        """Not vouched for, not kept, or a graph whose values others see."""
        if "constant_channels" not in context.vouched:
            return "nobody vouches that channels are constant"
        if not context.options.hoist_audio:
            return "option hoist_audio is off: nothing is kept for a chunk"
        return why_seen(gm.graph)

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        sample = find_argument(gm.graph, "sample")
        value = example(sample)
        if sample is None or value is None or value.dim() != 5 or value.shape[1] <= VARIABLE:
            return 0
        found = _to_convolution(sample)
        if found is None:
            return 0
        source, batch, convolution = found
        with gm.graph.inserting_before(convolution):
            parts = [slice(None, VARIABLE), slice(VARIABLE, None)]
            variable, constant = (_part(source, batch, convolution, part) for part in parts)
            total = call(gm.graph, operator.add, variable, constant, like=convolution)
        replace(convolution, total)
        return 1


def _to_convolution(sample: Node) -> tuple[Node, slice | None, Node] | None:
    """The sample, which part of its batch is taken, and the convolution of its frames.

    Between them are views that put the frames into the batch, in whatever way.
    """
    source, node = sample, sole_user(sample)
    batch = None if node is None else _slice_of_the_batch(node)
    if node is not None and batch is not None:
        sample, node = node, sole_user(node)
    value = example(sample)
    assert value is not None  # of five dimensions, see rewrite
    axes: Any = whole(tuple(value.shape))
    while node is not None and viewed(node) is not None and axes is not None:
        axes, node = after_view(node, axes), sole_user(node)
    if axes != _frames_in_the_batch(value) or not calls(node, F.conv2d):
        return None
    assert node is not None  # calls() says so
    if argument(node, 6, "groups", 1) != 1:
        return None
    weight = argument(node, 1, "weight")
    is_weight = isinstance(weight, Node) and weight.op == "placeholder"
    return (source, batch, node) if is_weight else None


def _frames_in_the_batch(value: Tensor) -> Axes:
    """``b c f h w -> (b f) c h w``."""
    first, second, *rest = permuted(whole(tuple(value.shape)), (0, 2, 1, 3, 4))
    return (merged((*first, *second)), *rest)


def _slice_of_the_batch(node: Node) -> slice | None:
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or len(index) != 1 or not isinstance(index[0], slice):
        return None
    return index[0]


def _part(sample: Node, batch: slice | None, convolution: Node, channels: slice) -> Node:
    """The convolution of some of the channels; the constant ones bring the bias."""
    graph = sample.graph
    constant = channels.start is not None
    node = call(graph, operator.getitem, sample, (slice(None), channels), like=convolution)
    if constant:
        node.meta[STAGE_KEY] = Stage.CHUNK
    if batch is not None:
        node = call(graph, operator.getitem, node, (batch,), like=convolution)
    value = example(node)
    assert value is not None  # a slice of a tensor
    axes = whole(tuple(value.shape))
    node = arrange(graph, node, axes, _frames_in_the_batch(value), convolution)
    weight = call(
        graph,
        operator.getitem,
        argument(convolution, 1, "weight"),
        (slice(None), channels),
        like=convolution,
    )
    bias = argument(convolution, 2, "bias") if constant else None
    rest = [
        argument(convolution, 3, "stride", 1),
        argument(convolution, 4, "padding", 0),
        argument(convolution, 5, "dilation", 1),
    ]
    return call(graph, torch.conv2d, node, weight, bias, *rest, like=convolution)
