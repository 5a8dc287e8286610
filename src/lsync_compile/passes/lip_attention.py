"""Attend in full in the mouth region, and by pooled cells elsewhere.

What a run keeps of a picture is the mouth: everything else is replaced by the original. So at the
two largest levels, where self-attention within a frame is a sixth of a step, tokens outside the
region and its halo are pooled::

    q = linear(x, wq).view(n, l, h, d).transpose(1, 2)
    k = linear(x, wk).view(n, l, h, d).transpose(1, 2)
    v = linear(x, wv).view(n, l, h, d).transpose(1, 2)
    a = scaled_dot_product_attention(q, k, v)
    y = a.transpose(1, 2).flatten(2)

    ->

    y = lsync.lip_attention(linear(x, wq), linear(x, wk), linear(x, wv), h, region, halo, …)

`lsync_compile.kernels.lip_attention` says what the operation computes. It stays inside the frame,
needs nothing of other steps, and the graph has the same inputs and outputs as before.

The pass stays away where no run says which region it generates, where options leave nothing to be
approximated, from attention to the sound, across frames and at the smaller levels, from masks,
dropout and causal order, and where a gradient is wanted. It needs no GPU: the operation is the same
on a CPU, where its reference runs.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule

from lsync_compile.graph.attention import Attention, plain_attentions
from lsync_compile.graph.build import example
from lsync_compile.kernels.lip_attention import SPEC
from lsync_compile.passes.choose_sdpa import attend_by_rows
from lsync_compile.passes.kernel_pass import why_no_kernel
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register
from lsync_compile.runtime.region import MouthRegion

OP = torch.ops.lsync.lip_attention.default
LEVELS = 2  # from the latents' own size down; below, attention costs next to nothing


@register
class OptimizedLipAttention(Pass):
    """Counts the attentions."""

    spec = PassSpec(
        name="lip_attention",
        phase=Phase.SPECIALISE,
        option="lip_attention",
        after=("guidance_prefix",),
        targets=("unet",),
        exact=False,
        summary="Attends within frames in full in the mouth region, by pooled cells elsewhere. "
        "Approximate.",
        source="Bolya et al. (2023), https://arxiv.org/abs/2210.09461",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        if context.region is None:
            return "no run says which region it generates"
        if self._pool(context) == 1 and context.options.lip_weight == 1:
            return "nothing is pooled or weighted"
        return why_no_kernel(gm.graph)

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        region, options = context.region, context.options
        assert region is not None  # veto
        pool = self._pool(context)
        found = 0
        for each in plain_attentions(gm.graph):
            if not _within_frames(each, region):
                continue
            level = region.side // math.isqrt(_tokens(each))
            cells = max(1, pool // level)  # of as many pixels at each level
            halo = -(-options.lip_halo // level)
            if cells == 1 and options.lip_weight == 1:
                continue
            settings = (region.cells, halo, cells, cells, options.lip_weight, each.scale)
            attend_by_rows(each, OP, *settings)
            found += 1
        return found

    @staticmethod
    def _pool(context: PassContext) -> int:
        """Side of a pooled cell in latents: the option's, or what the run finds good."""
        chosen = context.options.lip_pool
        if chosen != "auto":
            return int(chosen)
        return 1 if context.region is None else context.region.pool


def _within_frames(found: Attention, region: MouthRegion) -> bool:
    """Whether it is self-attention over all tokens of pictures at one of the levels."""
    values = [example(operand) for operand in found.operands]
    query = values[0]
    if query is None or query.numel() == 0 or query.dtype not in SPEC.tolerances:
        return False
    if any(
        each is None or each.shape != query.shape or each.dtype != query.dtype for each in values
    ):
        return False
    if found.scale is not None and found.scale <= 0:
        return False
    sides = [region.side >> level for level in range(LEVELS) if region.side % (1 << level) == 0]
    return _tokens(found) in {side * side for side in sides if side > 1}


def _tokens(found: Attention) -> int:
    value = example(found.query)
    return 0 if value is None else int(value.shape[2])
