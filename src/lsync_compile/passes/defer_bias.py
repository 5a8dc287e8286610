"""Leave a projection's bias to the sums and norms that read its result.

Case 1, what attention gives, whose sum a norm is taken of::

    y = linear(z, w, b)                            y = linear(z, w)
    t, n = lsync.add_layer_norm(y, r, …)     ->    t, n = lsync.add_layer_norm(y, r, …, shift=b)

also into ``lsync.feed_forward`` and ``lsync.residual_moments``.

Case 2, the entrance of a transformer, which is read twice. It may be a convolution with views
behind it, and a shift that is there already is added to, of weights alone and so once
(``hoist_weights``)::

    x = conv2d(z, w, b)                            x = conv2d(z, w)
    n = lsync.layer_norm(view(x), …)         ->    n = lsync.layer_norm(view(x), …, shift=b)
    t, m = lsync.add_layer_norm(y, view(x), …)     t, m = lsync.add_layer_norm(…, shift=b)

Case 3, what ends a transformer in one op::

    y = lsync.feed_forward(…, v, c)                y = lsync.feed_forward(…, v, None)
    s, m = lsync.residual_moments(view(y), r, d)   s, m = lsync.residual_moments(view(y), r, d + c)

Those ops read a number for each channel anyway, while libraries pay for a bias: cuDNN adds it in a
pass of its own, and of cuBLASLt's products of 131072 rows and 320 channels the one chosen for a
bias takes 0.084 ms on an H200 where that without takes 0.058. The pass stays away from a result
that anything else sees, or that such an op is given twice as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lsync_compile.graph.axes import Axes, after_view, viewed, whole
from lsync_compile.graph.biases import bias_of, convolution_bias, sum_of_biases, without_bias
from lsync_compile.graph.build import drop, example, replace
from lsync_compile.graph.match import argument, calls
from lsync_compile.passes.kernel_pass import why_no_kernel
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

FEED_FORWARD = torch.ops.lsync.feed_forward.default
CHANNELS = "channels"  # names the index of what a bias has one number for


@dataclass(frozen=True)
class _Taker:
    """How an op takes a bias: with which of its arguments, of which dimension, under which name."""

    inputs: int
    dimension: int
    index: int
    name: str


_TAKERS: dict[Any, _Taker] = {
    torch.ops.lsync.layer_norm.default: _Taker(1, -1, 5, "shift"),
    torch.ops.lsync.add_layer_norm.default: _Taker(2, -1, 6, "shift"),
    FEED_FORWARD: _Taker(1, -1, 10, "shift"),
    torch.ops.lsync.residual_moments.default: _Taker(2, 1, 2, "bias"),
}


@register
class DeferBias(Pass):
    """Case by case above; counts the biases."""

    spec = PassSpec(
        name="defer_bias",
        phase=Phase.REWRITE,
        option="defer_bias",
        # Which make the ops that take a bias, and what takes linear layers whole.
        after=(
            "fuse_add_layer_norm",
            "fuse_layer_norm",
            "fuse_feed_forward",
            "fuse_residual_moments",
            "fp8_linear",
        ),
        exact=False,
        summary="Biases of projections in the sums and norms that read their results, where they "
        "cost nothing; rounding differs.",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        return why_no_kernel(gm.graph)

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        return sum(_defer(node) for node in list(gm.graph.nodes))


def _defer(node: Node) -> bool:
    found = _biased(node)
    if found is None:
        return False
    bias, index, name, axes = found
    takers = _takers(node, axes)
    if not takers:
        return False
    for taker in takers:
        _give(taker, bias)
    with node.graph.inserting_before(node):
        new = without_bias(node, index, name)
    replace(node, new)
    drop(node)
    return True


def _biased(node: Node) -> tuple[Node, int, str, Axes] | None:
    """A projection's bias, where it is given, and which axis of the result has the channels."""
    index, name, place = 2, "bias", -1
    if calls(node, F.linear):
        bias = bias_of(node, index, name)
    elif calls(node, FEED_FORWARD):
        index, name = 8, "bias_out"
        bias = bias_of(node, index, name)
    else:
        place, bias = 1, convolution_bias(node)
    value = example(node)
    if bias is None or value is None or value.dim() < 2 or value.shape[place] < 2:
        return None
    numbers = example(bias)
    if numbers is None or numbers.shape != (value.shape[place],):  # ``linear`` expands others
        return None
    names: list[Any] = list(range(value.dim()))
    names[place] = CHANNELS
    return bias, index, name, whole(tuple(value.shape), names)


def _takers(node: Node, axes: Axes) -> list[Node] | None:
    """All that see a value or a view of it, in order; None where one of them takes no bias."""
    found: list[Node] = []
    for user in node.users:
        if viewed(user) is node:
            after = after_view(user, axes)
            further = None if after is None else _takers(user, after)
        else:
            further = [user] if _takes(user, node, axes) else None
        if further is None:
            return None
        found += further
    return found


def _takes(user: Node, node: Node, axes: Axes) -> bool:
    taker = _TAKERS.get(user.target)
    if taker is None or user.kwargs.keys() - {taker.name}:
        return False
    places = [place for place, given in enumerate(user.args) if given is node]
    if len(places) != 1 or places[0] >= taker.inputs:
        return False
    parts = [digit for axis in axes for digit in axis if digit.of == CHANNELS]
    return len(parts) == 1 and axes[taker.dimension] == (parts[0],)


def _give(user: Node, bias: Node) -> None:
    """Let an op add a bias to what it adds already."""
    taker = _TAKERS[user.target]
    with user.graph.inserting_before(user):
        total = sum_of_biases(argument(user, taker.index, taker.name), bias, user)
    if len(user.args) > taker.index:
        user.update_arg(taker.index, total)
    else:
        user.update_kwarg(taker.name, total)
