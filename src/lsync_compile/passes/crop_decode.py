"""Decode only the rows of the picture that are generated.

All other rows of what the VAE's decoder makes are replaced by the original. Its middle sees the
whole picture (it has attention), but is 4 % of the work; what follows is convolutions, of which a
row needs its neighbours alone, and group norms, whose statistics are of the whole picture::

    h = mid_block(conv_in(z))          h = mid_block(conv_in(z))
    y = up_blocks(h)             ->    y = pad(up_blocks(h[:, :, top:bottom]))

The rows are those of the mask and a halo. Rows that are not decoded come out as zeros. Statistics
of the cropped rows alone are wrong, more so the more they differ from the others. With
``crop_statistics="both"`` or ``"first"``, the first picture of the chunk is decoded whole::

    a = up_blocks(h[:1])
    b = up_blocks'(h[1:, :, top:bottom])     # norms: statistics with those of a's rows, or a's
    y = cat([a, pad(b)])

The pass stays away where no run says which rows it generates, from decoders that are not laid out
like Stable Diffusion's, where a gradient is wanted, where the rows are most of the picture, and
from a single picture unless the statistics are its ``own``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.fx.node import map_arg

from lsync_compile.graph.build import call, example
from lsync_compile.graph.match import argument
from lsync_compile.graph.modules import module_path
from lsync_compile.graph.purity import has_writes, wants_gradient
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

MOST = 0.85  # share of the rows above which nothing is gained


@register
class CropDecode(Pass):
    """Counts the group norms that see fewer rows."""

    spec = PassSpec(
        name="crop_decode",
        phase=Phase.SPECIALISE,
        option="crop_decode",
        targets=("vae.decoder",),
        exact=False,
        summary="Decodes only the rows of the picture that are generated. Approximate.",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        if context.region is None:
            return "no run says which region it generates"
        if wants_gradient(gm.graph):
            return "a gradient is wanted"
        if has_writes(gm.graph):
            return "the graph writes in place"
        cut, final = _ends(gm.graph)
        if cut is None or final is None:
            return "the decoder is not laid out like Stable Diffusion's"
        pictures, _, height, _ = _shape(cut)
        if height != context.region.side:
            return f"the region has {context.region.side} rows of latents, the picture {height}"
        top, bottom = _rows(context)
        if bottom - top > MOST * height:
            return f"{bottom - top} of {height} rows are generated"
        if pictures < 2 and context.options.crop_statistics != "own":
            return "a single picture has no other's statistics"
        return ""

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        graph = gm.graph
        cut, final = _ends(graph)
        if cut is None or final is None:
            return 0
        top, bottom = _rows(context)
        height, factor = _shape(cut)[2], _shape(final)[2] // _shape(cut)[2]
        statistics = context.options.crop_statistics
        tail = _between(cut, final)
        edges = (0, 0, top * factor, (height - bottom) * factor)
        output = graph.output_node()
        with graph.inserting_before(output):
            if statistics == "own":
                copied = _copy(tail, {cut: _part(cut, slice(None), slice(top, bottom))})
                result = call(graph, F.pad, copied[final], edges, like=final)
            else:
                whole = _copy(tail, {cut: _part(cut, slice(0, 1))})
                rows = _part(cut, slice(1, None), slice(top, bottom))
                copied = _copy(
                    tail, {cut: rows}, _Norms(whole, (top, bottom, height), statistics == "both")
                )
                padded = call(graph, F.pad, copied[final], edges, like=final)
                result = call(graph, torch.cat, [whole[final], padded], like=final)
        if _shape(result) != _shape(final):
            raise RuntimeError(f"decoding rows gave {_shape(result)} instead of {_shape(final)}")
        output.replace_input_with(final, result)
        return sum(node.target is F.group_norm for node in tail)


class _Norms:
    """Makes group norms of cropped pictures with the statistics of a whole one.

    Args:
        whole: the copies of all nodes that see the whole first picture.
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
        top, bottom, height = self._rows
        factor = _shape(first)[2] // height
        groups = int(groups) if isinstance(groups, int) else 1
        eps = 1e-5 if eps is None else float(eps)

        def merged(x: Tensor, first: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            rows = (top * factor, bottom * factor, height * factor)
            return norm_with_rows(x, first, weight, bias, groups, eps, rows)

        def borrowed(x: Tensor, first: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return norm_as_of(x, first, weight, bias, groups, eps)

        return _inline(norm, merged if self._own else borrowed, x, first, weight, bias)


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
    """Group norm of x, rows top to bottom of pictures whose other rows are taken to be as first's.

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


def _rows(context: PassContext) -> tuple[int, int]:
    """First row of latents to decode and the row after the last."""
    assert context.region is not None
    (first, after), halo = context.region.rows, context.options.crop_halo
    return max(0, first - halo), min(context.region.side, after + halo)


def _ends(graph: Graph) -> tuple[Node | None, Node | None]:
    """What leaves the middle of the decoder, and the picture."""
    results = list(graph.output_node().all_input_nodes)
    if len(results) != 1 or len(_shape(results[0])) != 4:
        return None, None
    leaving = {
        source
        for node in graph.nodes
        if "up_blocks" in module_path(node)
        for source in node.all_input_nodes
        if "mid_block" in module_path(source) and source.op.startswith("call")
    }
    if len(leaving) != 1 or len(_shape(min(leaving))) != 4:
        return None, None
    cut = leaving.pop()
    tail = _between(cut, results[0])
    # Everything after the cut must come through it alone, and know no sizes.
    known = {cut, *tail}
    fits = results[0] in known and all(
        source in known or source.op in ("placeholder", "get_attr")
        for node in tail
        for source in node.all_input_nodes
    )
    sized = any(node.target in ("view", "reshape", "expand") for node in tail)
    norms = all(
        isinstance(argument(node, place, name), Node)
        for node in tail
        if node.target is F.group_norm
        for place, name in ((2, "weight"), (3, "bias"))
    )
    return (cut, results[0]) if fits and norms and not sized else (None, None)


def _between(cut: Node, final: Node) -> list[Node]:
    """The nodes that are computed from ``cut``, in order, as far as ``final`` needs them."""
    after, found = {cut}, []
    for node in cut.graph.nodes:
        if node.op.startswith("call") and any(each in after for each in node.all_input_nodes):
            after.add(node)
            found.append(node)
        if node is final:
            break
    return found


def _copy(
    nodes: Iterable[Node], known: dict[Node, Node], norms: _Norms | None = None
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


def _part(node: Node, *slices: slice) -> Node:
    """``node[slices]`` of pictures and rows, all channels."""
    index = slices if len(slices) == 1 else (slices[0], slice(None), slices[1])
    return call(node.graph, operator.getitem, node, index, like=node)


def _inline(like: Node, function: Callable[..., Tensor], *inputs: Any) -> Node:
    """Insert what a function of tensors does, operation by operation."""
    traced = symbolic_trace(function).graph
    places = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.nodes:
        if node.op in ("call_function", "call_method"):
            args, kwargs = map_arg((node.args, node.kwargs), places.__getitem__)
            places[node] = call(like.graph, node.target, *args, like=like, **kwargs)
    result: Node = places[traced.output_node().args[0]]
    return result


def _shape(node: Node) -> tuple[int, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)
