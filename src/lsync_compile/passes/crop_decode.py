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

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from lsync_compile.graph.build import call
from lsync_compile.graph.modules import module_path
from lsync_compile.graph.purity import has_writes, wants_gradient
from lsync_compile.graph.rows import Norms, between, copied, knows_no_sizes, part, shape
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
        pictures, _, height, _ = shape(cut)
        if height != context.region.side:
            return f"the region has {context.region.side} rows of latents, the picture {height}"
        top, bottom = context.region.rows_with(context.options.crop_halo)
        if bottom - top > MOST * height:
            return f"{bottom - top} of {height} rows are generated"
        if pictures < 2 and context.options.crop_statistics != "own":
            return "a single picture has no other's statistics"
        return ""

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        graph = gm.graph
        cut, final = _ends(graph)
        if cut is None or final is None or context.region is None:
            return 0
        top, bottom = context.region.rows_with(context.options.crop_halo)
        height, factor = shape(cut)[2], shape(final)[2] // shape(cut)[2]
        statistics = context.options.crop_statistics
        tail = between(cut, final)
        edges = (0, 0, top * factor, (height - bottom) * factor)
        output = graph.output_node()
        with graph.inserting_before(output):
            if statistics == "own":
                cropped = copied(tail, {cut: part(cut, slice(None), slice(top, bottom))})
                result = call(graph, F.pad, cropped[final], edges, like=final)
            else:
                whole = copied(tail, {cut: part(cut, slice(0, 1))})
                rows = part(cut, slice(1, None), slice(top, bottom))
                cropped = copied(
                    tail, {cut: rows}, Norms(whole, (top, bottom, height), statistics == "both")
                )
                padded = call(graph, F.pad, cropped[final], edges, like=final)
                result = call(graph, torch.cat, [whole[final], padded], like=final)
        if shape(result) != shape(final):
            raise RuntimeError(f"decoding rows gave {shape(result)} instead of {shape(final)}")
        output.replace_input_with(final, result)
        return sum(node.target is F.group_norm for node in tail)


def _ends(graph: Graph) -> tuple[Node | None, Node | None]:
    """What leaves the middle of the decoder, and the picture."""
    results = list(graph.output_node().all_input_nodes)
    if len(results) != 1 or len(shape(results[0])) != 4:
        return None, None
    leaving = {
        source
        for node in graph.nodes
        if "up_blocks" in module_path(node)
        for source in node.all_input_nodes
        if "mid_block" in module_path(source) and source.op.startswith("call")
    }
    if len(leaving) != 1 or len(shape(min(leaving))) != 4:
        return None, None
    cut = leaving.pop()
    tail = between(cut, results[0])
    # Everything after the cut must come through it alone, and know no sizes.
    known = {cut, *tail}
    fits = results[0] in known and all(
        source in known or source.op in ("placeholder", "get_attr")
        for node in tail
        for source in node.all_input_nodes
    )
    return (cut, results[0]) if fits and knows_no_sizes(tail) else (None, None)
