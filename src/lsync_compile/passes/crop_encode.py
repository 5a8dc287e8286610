"""Encode of masked pictures only the rows in which something is masked.

A run encodes each face twice in one call, with the mouth masked out and as it is. Outside the mask
the two are the same picture, and most of what the VAE's encoder computes of them is. Up to its
middle, which attends to the whole picture, an encoder is convolutions, of which a row needs its
neighbours alone, and group norms, whose statistics are of the whole picture::

    h = down_blocks(conv_in(x))          first, b = down(cat([x[:1], x[half:]]))
    y = mid_block(h)               ->    a = down'(x[1:half, :, top:bottom])
                                         other = b[1:] + (first - b[:1])
                                         a = cat([other[above], a[within], other[below]], 2)
                                         y = mid_block(cat([first, a, b]))

The rows are those of the mask and a halo, and one more at each edge that is not used. The mask
moves the statistics of every norm, and with them every feature, wherever it is. So the first masked
picture is encoded whole: the norms of the others join the statistics of their own rows with those
of its other rows (``down'``), and the features of their other rows are those of the plain picture,
moved as the first one's were.

That the first half of the pictures is the second half masked no graph can know: a run says so by
setting its region around a call of the encoder. Without one the pass stays away, as it does from
encoders that are not laid out like Stable Diffusion's, where a gradient is wanted, and where the
rows are most of the picture.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from lsync_compile.graph.build import call
from lsync_compile.graph.modules import module_path
from lsync_compile.graph.purity import has_writes, wants_gradient
from lsync_compile.graph.rows import Norms, between, copied, knows_no_sizes, part, shape
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

MOST = 0.85  # share of the rows above which nothing is gained
EDGE = 1  # rows at the edges, which see zeros for their neighbours, are computed and not used


@register
class CropEncode(Pass):
    """Counts the group norms that see fewer rows."""

    spec = PassSpec(
        name="crop_encode",
        phase=Phase.SPECIALISE,
        option="crop_encode",
        targets=("vae.encoder",),
        exact=False,
        summary="Encodes of masked pictures only the rows that are masked. Approximate.",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        if context.region is None:
            return "no run says which region it masks"
        if wants_gradient(gm.graph):
            return "a gradient is wanted"
        if has_writes(gm.graph):
            return "the graph writes in place"
        picture, cut = _ends(gm.graph)
        if picture is None or cut is None:
            return "the encoder is not laid out like Stable Diffusion's"
        pictures, _, height, _ = shape(cut)
        if pictures % 2 or pictures < 4:
            return f"{pictures} pictures are no two pairs"
        if height != context.region.side:
            return f"the region has {context.region.side} rows of latents, the picture {height}"
        top, bottom = context.region.rows_with(context.options.crop_halo + EDGE)
        if bottom - top > MOST * height:
            return f"{bottom - top} of {height} rows are masked"
        return ""

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        graph = gm.graph
        picture, cut = _ends(graph)
        if picture is None or cut is None or context.region is None:
            return 0
        top, bottom = context.region.rows_with(context.options.crop_halo + EDGE)
        start, end = context.region.rows_with(context.options.crop_halo)
        pictures, _, height, _ = shape(cut)
        half, factor = pictures // 2, shape(picture)[2] // height
        head = between(picture, cut)
        with graph.inserting_after(cut):
            after = graph.call_function(torch.cat)  # only marks the place
        with graph.inserting_before(after):
            first, plain = part(picture, slice(0, 1)), part(picture, slice(half, None))
            both = call(graph, torch.cat, [first, plain], like=picture)
            whole = copied(head, {picture: both})
            rows = part(picture, slice(1, half), slice(top * factor, bottom * factor))
            cropped = copied(head, {picture: rows}, Norms(whole, (top, bottom, height), own=True))
            above = _other_rows(whole[cut], slice(0, start))
            below = _other_rows(whole[cut], slice(end, None))
            middle = part(cropped[cut], slice(None), slice(start - top, end - top))
            masked = call(graph, torch.cat, [above, middle, below], 2, like=cut)
            parts = [part(whole[cut], slice(0, 1)), masked, part(whole[cut], slice(1, None))]
            result = call(graph, torch.cat, parts, like=cut)
        graph.erase_node(after)
        if shape(result) != shape(cut):
            raise RuntimeError(f"encoding rows gave {shape(result)} instead of {shape(cut)}")
        made = {*whole.values(), *cropped.values()}
        cut.replace_all_uses_with(result, lambda user: user not in made)
        return sum(node.target is torch.nn.functional.group_norm for node in head)


def _other_rows(whole: Node, rows: slice) -> Node:
    """Rows of masked pictures without a mask in them, from (masked first, plain pictures)."""
    graph = whole.graph
    masked, plain = (part(whole, slice(index, index + 1), rows) for index in range(2))
    change = call(graph, torch.sub, masked, plain, like=whole)
    return call(graph, torch.add, part(whole, slice(2, None), rows), change, like=whole)


def _ends(graph: Graph) -> tuple[Node | None, Node | None]:
    """The pictures, and what enters the middle of the encoder."""
    entering = {
        source
        for node in graph.nodes
        if "mid_block" in module_path(node)
        for source in node.all_input_nodes
        if "down_blocks" in module_path(source) and source.op.startswith("call")
    }
    if len(entering) != 1 or len(shape(min(entering))) != 4:
        return None, None
    cut = entering.pop()
    count, _, height, _ = shape(cut)
    pictures = [
        node
        for node in graph.find_nodes(op="placeholder")
        # Weights have four dimensions too, and perhaps as many channels as there are pictures.
        if len(shape(node)) == 4 and shape(node)[0] == count and shape(node)[2] % height == 0
        if cut in between(node, cut)
    ]
    if len(pictures) != 1:
        return None, None
    picture = pictures[0]
    head = between(picture, cut)
    known = {picture, *head}
    # All of it depends on the pictures alone, nothing else looks into it, and no size is known.
    fits = all(
        source in known or source.op in ("placeholder", "get_attr")
        for node in head
        for source in node.all_input_nodes
    ) and all(user in known for node in known if node is not cut for user in node.users)
    return (picture, cut) if fits and knows_no_sizes(head) else (None, None)
