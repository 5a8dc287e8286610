"""Working on some rows of pictures in a captured graph: the part that knows rows, again for fewer.

Convolutions need a row's neighbours alone; group norms have statistics of the whole picture, which
:class:`Norms` takes from a picture that is there whole. Used by the passes ``crop_decode`` and
``crop_encode``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node, symbolic_trace
from torch.fx.node import map_arg

from lsync_compile.graph.build import call, example
from lsync_compile.graph.match import argument


class Norms:
    """Makes group norms of cropped pictures with the statistics of a whole one.

    Args:
        whole: the copies of all nodes that see whole pictures, of which the first one counts.
        rows: first row, row after the last and number of rows, in latents.
        own: whether the cropped rows' own statistics count, beside the whole picture's others.
    """

    def __init__(self, whole: dict[Node, Node], rows: tuple[int, int, int], own: bool) -> None:
        self._whole = whole
        self._rows = rows
        self._own = own

    def __call__(self, norm: Node, x: Node) -> Node:
        groups, weight, bias, eps = (
            argument(norm, place, name)
            for place, name in enumerate(("num_groups", "weight", "bias", "eps"), start=1)
        )
        source = norm.args[0]
        assert isinstance(source, Node)
        first = self._whole[source]
        if shape(first)[0] > 1:
            first = part(first, slice(0, 1))
        top, bottom, height = self._rows
        factor = shape(first)[2] // height
        groups = int(groups) if isinstance(groups, int) else 1
        eps = 1e-5 if eps is None else float(eps)

        def merged(x: Tensor, first: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            rows = (top * factor, bottom * factor, height * factor)
            return norm_with_rows(x, first, weight, bias, groups, eps, rows)

        def borrowed(x: Tensor, first: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return norm_as_of(x, first, weight, bias, groups, eps)

        return inline(norm, merged if self._own else borrowed, x, first, weight, bias)


def norm_as_of(
    x: Tensor, first: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    """Group norm of x (n, C, h, w) with the statistics of first (1, C, H, W)."""
    values = first.float().flatten(2).unflatten(1, (groups, -1)).flatten(2)
    mean, variance = values.mean(2), values.var(2, unbiased=False)
    return _normed(x, mean, variance, weight, bias, groups, eps)


def norm_with_rows(
    x: Tensor,
    first: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    rows: tuple[int, int, int],
) -> Tensor:
    """Group norm of x, rows top to bottom of pictures whose other rows are taken to be first's.

    Statistics of the parts are joined as Chan et al. (1979) do.

    Args:
        x: (n, C, bottom - top, W).
        first: (1, C, H, W).
        weight, bias: (C,).
        rows: top, bottom, H.
    """
    top, bottom, height = rows
    own = x.float().flatten(2).unflatten(1, (groups, -1)).flatten(2)
    others = torch.cat([first[:, :, :top], first[:, :, bottom:]], 2).float()
    others = others.flatten(2).unflatten(1, (groups, -1)).flatten(2)
    share = (bottom - top) / height
    own_mean, others_mean = own.mean(2), others.mean(2)
    between = own_mean - others_mean
    mean = share * own_mean + (1 - share) * others_mean
    within = share * own.var(2, unbiased=False) + (1 - share) * others.var(2, unbiased=False)
    variance = within + share * (1 - share) * between * between
    return _normed(x, mean, variance, weight, bias, groups, eps)


def _normed(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
) -> Tensor:
    """``(x - mean) / std * weight + bias`` by channel; mean and variance are (n or 1, groups)."""
    inverse = torch.rsqrt(variance + eps)[:, :, None]
    slope = inverse * weight.float().unflatten(0, (groups, -1))
    offset = bias.float().unflatten(0, (groups, -1)) - mean[:, :, None] * slope
    slope, offset = slope.flatten(1)[:, :, None, None], offset.flatten(1)[:, :, None, None]
    out: Tensor = (x.float() * slope + offset).to(x.dtype)
    return out


def knows_no_sizes(nodes: Iterable[Node]) -> bool:
    """Whether nodes do the same for any number of rows, and their norms can be made anew."""
    nodes = list(nodes)
    sized = any(node.target in ("view", "reshape", "expand") for node in nodes)
    norms = all(
        isinstance(argument(node, place, name), Node)
        for node in nodes
        if node.target is F.group_norm
        for place, name in ((2, "weight"), (3, "bias"))
    )
    return norms and not sized


def between(cut: Node, final: Node) -> list[Node]:
    """The nodes that are computed from ``cut``, in order, as far as ``final`` needs them."""
    after, found = {cut}, []
    for node in cut.graph.nodes:
        if node.op.startswith("call") and any(each in after for each in node.all_input_nodes):
            after.add(node)
            found.append(node)
        if node is final:
            break
    return found


def copied(
    nodes: Iterable[Node], known: dict[Node, Node], norms: Norms | None = None
) -> dict[Node, Node]:
    """Insert the nodes again, computed from other inputs; old node to new one."""
    copies = dict(known)
    for node in nodes:
        if norms is not None and node.target is F.group_norm:
            source = node.args[0]
            assert isinstance(source, Node)
            copies[node] = norms(node, copies[source])
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: copies.get(each, each))
        copies[node] = call(node.graph, node.target, *args, like=node, **kwargs)
    return copies


def part(node: Node, *slices: slice) -> Node:
    """``node[slices]`` of pictures and rows, all channels."""
    index = slices if len(slices) == 1 else (slices[0], slice(None), slices[1])
    return call(node.graph, operator.getitem, node, index, like=node)


def inline(like: Node, function: Callable[..., Tensor], *inputs: Any) -> Node:
    """Insert what a function of tensors does, operation by operation."""
    traced = symbolic_trace(function).graph
    places = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.nodes:
        if node.op in ("call_function", "call_method"):
            args, kwargs = map_arg((node.args, node.kwargs), places.__getitem__)
            places[node] = call(like.graph, node.target, *args, like=like, **kwargs)
    result: Node = places[traced.output_node().args[0]]
    return result


def shape(node: Node) -> tuple[int, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)
