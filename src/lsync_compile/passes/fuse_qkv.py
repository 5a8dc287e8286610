"""Project queries, keys and values in one matrix product.

The projections of an attention read the same input three times, and each alone is a small product.
With their weights above each other they are one, whose result is read in slices::

    q = linear(x, wq)                   w = cat([wq, wk, wv])
    k = linear(x, wk)                   p = linear(x, w)
    v = linear(x, wv)             ->    q, k, v = split(p, [len(wq), len(wk), len(wv)], -1)
    a = attention(heads(q), …)          a = attention(heads(q), …)

In attention to the sound, keys and values have an input of their own, so only these two are joined.
Biases are joined as weights are; a projection without one, beside one that has it, stays alone.
``cat`` of weights does not depend on the input: it is computed once and not in every call, and the
joined copy costs the memory of the projections again.

The slices are views with gaps between their rows, which every attention kernel here reads as they
are. The product may be computed with another kernel than three small ones, so it rounds otherwise.

The pass stays away from linears that feed no attention, from weights of unlike dtypes and from
quantised ones, and where the weights are not inputs of the graph (they could not be joined once).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lsync_compile.graph.attention import projections
from lsync_compile.graph.build import call, example, item, replace
from lsync_compile.graph.match import argument
from lsync_compile.kernels.temporal_attention import SPEC
from lsync_compile.passes.kernel_pass import KernelPass
from lsync_compile.passes.spec import PassContext, PassSpec, Phase, register


@register
class FuseQkv(KernelPass):
    """Joins the projections of each attention; counts the joined products."""

    # Of the kernels that read the slices; a CPU gains nothing from joining.
    kernel = SPEC
    spec = PassSpec(
        name="fuse_qkv",
        phase=Phase.REWRITE,
        option="fuse_qkv",
        after=("fuse_temporal_attention",),
        exact=False,
        summary="Projects queries, keys and values of one input in one matrix product. Rounds "
        "otherwise.",
    )

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        joined = 0
        for node in list(gm.graph.nodes):
            linears = [each for each in projections(node) if self.takes(each, context)]
            for group in _joinable(linears):
                _join(group)
                joined += 1
        return joined


def _joinable(linears: Iterable[Node]) -> list[list[Node]]:
    """Those of one input, with weights and biases of one kind; at least two each."""
    groups: dict[object, list[Node]] = {}
    for linear in linears:
        x, weight, bias = _arguments(linear)
        value = example(weight)
        if weight is None or value is None or weight.op != "placeholder" or value.dim() != 2:
            continue
        if bias is not None and bias.op != "placeholder":
            continue
        group = groups.setdefault((x, bias is None, value.dtype, value.device), [])
        if linear not in group:
            group.append(linear)
    return [group for group in groups.values() if len(group) > 1]


def _join(linears: list[Node]) -> None:
    """Replace linears of one input by slices of one."""
    first = min(linears)  # nodes compare by their place in the graph
    graph = first.graph
    x, _, bias = _arguments(first)
    weights = [_arguments(linear)[1] for linear in linears]
    biases = [_arguments(linear)[2] for linear in linears]
    with graph.inserting_before(first):
        weight = call(graph, torch.cat, weights, like=first)
        if bias is not None:
            bias = call(graph, torch.cat, biases, like=first)
        product = call(graph, F.linear, x, weight, bias, like=first)
        widths = [example(linear).shape[-1] for linear in linears]  # type: ignore[union-attr]  # takes()
        parts = call(graph, "split", product, widths, -1, like=first)
        slices = [item(parts, index) for index in range(len(linears))]
    for linear, part in zip(linears, slices, strict=True):
        replace(linear, part)


def _arguments(linear: Node) -> tuple[Node | None, Node | None, Node | None]:
    given = (argument(linear, i, name) for i, name in enumerate(("input", "weight", "bias")))
    x, weight, bias = (value if isinstance(value, Node) else None for value in given)
    return x, weight, bias
