"""Attend to the sound only where there is any.

Without its condition, the network of classifier-free guidance is given zeros for the sound, in the
first half of the batch. Keys and values of zeros are zeros, as their projections have no bias;
attention to them gives zeros; and what is left of the layer is the bias of its output projection::

    k = linear(sound, wk)               k = linear(sound[n:], wk)
    v = linear(sound, wv)               v = linear(sound[n:], wv)
    q = linear(x, wq)             ->    q = linear(x[n:], wq)
    y = linear(attend(q, k, v), w, b)   h = linear(attend(q, k, v), w, b)
                                        y = cat([b.expand(n, ...), h])

The runtime vouches for the zeros (``StepContext.vouched``, "null_audio"). Values that pass through
anything but projections without bias and views are left alone, and so is attention under a mask.

The first half is the same bits. The second is computed at half the batch, where libraries choose
other kernels, which may round otherwise: not bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lsync_compile.graph.build import call, example, replace
from lsync_compile.graph.dependency import Stage, find_argument, node_stages
from lsync_compile.graph.halving import half_of, halved
from lsync_compile.graph.match import argument, calls, sole_user
from lsync_compile.graph.purity import why_seen
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

# Zeros in, zeros out; a projection without bias is the other such operation.
_KEEP_ZEROS = (
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute"),
    *("to", "float", "half", "bfloat16", "contiguous"),
)


@register
class NullAudio(Pass):
    """Counts the layers of attention to the sound."""

    spec = PassSpec(
        name="null_audio",
        phase=Phase.SPECIALISE,
        option="null_audio",
        targets=("unet",),
        exact=False,
        summary="Attends to the sound only in the half of a guided batch that has any; the other "
        "half's result is the output projection's bias.",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        """Not vouched for, no sound with two halves, or a graph whose values others see."""
        if "null_audio" not in context.vouched:
            return "nobody vouches that the first half of the sound is zero"
        sound = example(find_argument(gm.graph, "encoder_hidden_states"))
        if sound is None or sound.dim() == 0 or sound.shape[0] % 2:
            return "no sound with two halves"
        return why_seen(gm.graph)

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        sound = find_argument(gm.graph, "encoder_hidden_states")
        assert sound is not None  # see veto
        stages = node_stages(gm.graph, unet=True)
        found = [
            node
            for node in gm.graph.nodes
            if calls(node, F.scaled_dot_product_attention) and len(node.args) >= 3
        ]
        return sum(
            _rewrite_layer(node, sound)
            for node in found
            if all(stages[part] is Stage.CHUNK for part in node.args[1:3])
            and stages[node.args[0]] is Stage.STEP
        )


def _rewrite_layer(attention: Node, sound: Node) -> bool:
    """Rewrite one layer, from its projections to its result; whether that could be done."""
    query, _, value = attention.args[:3]
    projection = _output_projection(attention)
    if projection is None or not _is_zero(value, sound) or not isinstance(query, Node):
        return False
    source = _input_of_projection(query)
    if source is None:
        return False
    halves: dict[Node, Node | None] = {}

    def second_half(node: Node) -> Node | None:
        if node not in halves:
            halves[node] = (
                half_of(node, second=True)
                if node is sound or node is source
                else halved(node, second_half)
            )
        return halves[node]

    with attention.graph.inserting_before(projection.next):
        heard = second_half(projection)
        if heard is None:
            return False
        replace(projection, _with_silence(projection, heard))
    return True


def _with_silence(projection: Node, heard: Node) -> Node:
    """The projection's result for the whole batch, from that for the half with sound."""
    graph, value = projection.graph, example(heard)
    assert value is not None  # halved gives tensors for tensors
    bias = argument(projection, 2, "bias")
    if isinstance(bias, Node):
        silent = call(graph, "expand", bias, *value.shape, like=projection)
    else:
        silent = call(graph, torch.zeros_like, heard, like=projection)
    return call(graph, torch.cat, [silent, heard], like=projection)


def _output_projection(attention: Node) -> Node | None:
    """The linear layer that the heads' results go through, with nothing but views between."""
    node = sole_user(attention)
    while node is not None and calls(node, *_KEEP_ZEROS):
        node = sole_user(node)
    return node if calls(node, F.linear) else None


def _input_of_projection(query: Node) -> Node | None:
    """What the queries are projected from."""
    node = query
    while calls(node, *_KEEP_ZEROS) and isinstance(node.args[0], Node):
        node = node.args[0]
    source = node.args[0] if calls(node, F.linear) else None
    return source if isinstance(source, Node) else None


def _is_zero(value: object, sound: Node) -> bool:
    """Whether a value is zero wherever the sound is."""
    while isinstance(value, Node) and value is not sound:
        is_projection = calls(value, F.linear) and argument(value, 2, "bias") is None
        if not is_projection and not calls(value, *_KEEP_ZEROS):
            return False
        value = value.args[0]
    return value is sound
