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

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

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
        chain = _to_convolution(sample)
        if chain is None:
            return 0
        *views, convolution = chain
        with gm.graph.inserting_before(convolution):
            parts = [slice(None, VARIABLE), slice(VARIABLE, None)]
            variable, constant = (_part(sample, views, convolution, part) for part in parts)
            total = call(gm.graph, operator.add, variable, constant, like=convolution)
        replace(convolution, total)
        return 1


def _to_convolution(sample: Node) -> list[Node] | None:
    """What lies between the sample and its convolution: a slice of halves, frames to the batch."""
    chain: list[Node] = []
    node = sole_user(sample)
    if node is not None and _slices_the_batch(node):
        chain.append(node)
        node = sole_user(node)
    for target, arguments in (("transpose", (1, 2)), ("flatten", (0, 1))):
        if node is None or not calls(node, target) or node.args[1:] != arguments:
            return None
        chain.append(node)
        node = sole_user(node)
    if node is None or not calls(node, F.conv2d) or argument(node, 6, "groups", 1) != 1:
        return None
    weight = argument(node, 1, "weight")
    return [*chain, node] if isinstance(weight, Node) and weight.op == "placeholder" else None


def _slices_the_batch(node: Node) -> bool:
    index = node.args[1] if node.target is operator.getitem else None
    return isinstance(index, tuple) and len(index) == 1 and isinstance(index[0], slice)


def _part(sample: Node, views: list[Node], convolution: Node, channels: slice) -> Node:
    """The convolution of some of the channels; the constant ones bring the bias."""
    graph = sample.graph
    constant = channels.start is not None
    node = call(graph, operator.getitem, sample, (slice(None), channels), like=views[0])
    if constant:
        node.meta[STAGE_KEY] = Stage.CHUNK
    for view in views:
        node = call(graph, view.target, node, *view.args[1:], like=view)
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
