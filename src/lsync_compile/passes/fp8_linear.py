"""Multiply in eight bits where a linear layer has many rows. Approximate.

::

    y = linear(x, w, c)                  ->    y = lsync.fp8_linear(x, w, c, q, s)

where ``q`` and ``s``, the weight rounded to float8_e4m3fn and a scale for each of its rows, are
computed of ``w`` alone and so once (``hoist_weights``); ``x`` is rounded in each call, each row by
its own scale. Taken are layers of at least `ROWS` rows whose sizes are multiples of 16, as tensor
cores ask: attention's and motion modules' projections and the feed-forwards. That leaves the time
embedding and the projections of the sound in 16 bits, whose errors every later layer would see and
which cost next to nothing, and what ``fuse_linear_geglu`` has taken. Convolutions stay too, the
first and the last of the network among them: torch has no product of codes for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, drop, example, replace
from lsync_compile.graph.match import argument, calls, share_dtype
from lsync_compile.kernels.fp8_linear import CODES, LARGEST, SMALLEST_ROW, SPEC
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register

OP = torch.ops.lsync.fp8_linear.default
ROWS = 2048  # 8x8 latents of a chunk of 16 frames with guidance; its sound has 1,600


@register
class Fp8Linear(KernelPass):
    """Counts the linear layers."""

    spec = PassSpec(
        name="fp8_linear",
        phase=Phase.REWRITE,
        option="fp8_linear",
        after=("fuse_qkv", "fuse_geglu", "fuse_linear_geglu"),
        exact=False,
        summary="Approximate: linear layers of many rows as products of 8-bit floating-point "
        "numbers, where that is faster.",
        source="Micikevicius et al. (2022), https://arxiv.org/abs/2209.05433",
    )
    kernel = SPEC

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        matches = 0
        for node in list(gm.graph.nodes):
            if not calls(node, F.linear) or not self.takes(node, context) or not _pays(node):
                continue
            x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
            with gm.graph.inserting_before(node):
                codes = _codes(weight, node)
                new = call(gm.graph, OP, x, weight, argument(node, 2, "bias"), *codes, like=node)
            replace(node, new)
            drop(node)
            matches += 1
        return matches


def _pays(linear: Node) -> bool:
    """Whether a layer has rows enough, sizes for tensor cores, and operands of one dtype."""
    operands = [argument(linear, i, name) for i, name in enumerate(("input", "weight", "bias"))]
    x, weight = example(operands[0]), example(operands[1])
    if x is None or weight is None or weight.dim() != 2 or not share_dtype(*operands):
        return False
    return x.numel() >= ROWS * x.shape[-1] and all(size % 16 == 0 for size in weight.shape)


def _codes(weight: Node, like: Node) -> tuple[Node, Node]:
    """The operations of `quantised` in this graph: Inductor and the stages see no function."""
    graph = like.graph
    wide = call(graph, "float", weight, like=like)
    most = call(graph, "amax", call(graph, "abs", wide, like=like), -1, True, like=like)
    most = call(graph, "clamp_min", most, SMALLEST_ROW, like=like)
    factor = call(graph, "mul", call(graph, "reciprocal", most, like=like), LARGEST, like=like)
    codes = call(graph, "to", call(graph, "mul", wide, factor, like=like), CODES, like=like)
    return codes, call(graph, "div", most, LARGEST, like=like)
