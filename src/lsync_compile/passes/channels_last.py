"""Keep images and videos with their channels together from end to end.

Tensor cores convolve ``(N, H, W, C)`` in memory; with the channels apart, cuDNN turns each input
and output around. Transformers want the channels together too. torch's operations hand their
input's layout on, so a few conversions set the layout of a whole network:

Case 1, the weights, which a prologue converts once (``hoist_weights``)::

    y = conv2d(x, w)                 ->    w' = w.contiguous(memory_format=channels_last)
                                           y = conv2d(x, w')

Case 2, copies into the other layout that only convolutions, norms and sums see::

    h = t.transpose(1, 2)                  # (n, s, c) in memory
    k = h.contiguous()               ->
    y = conv2d(k.view(n, c, a, b), w)      y = conv2d(h.view(n, c, a, b), w)

Case 3, what still reaches a convolution in another layout, such as the graph's input::

    y = conv2d(x, w)                 ->    x' = x.contiguous(memory_format=channels_last)
                                           y = conv2d(x', w)

Case 2 leaves copies that anything else sees, an operator of another library for instance. The pass
manager copies the graph's results back to the strides that they had.

The numbers of a convolution may round otherwise, as another kernel is chosen. The pass stays away
on a CPU, where the layout gains nothing (with ``kernels="on"`` it runs there too), where a gradient
is wanted, as weights' gradients would take another layout, and from graphs that write in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lsync_compile.graph.build import call, drop, example, refresh, replace
from lsync_compile.graph.match import ADD, MULTIPLY, argument, calls
from lsync_compile.graph.purity import has_writes, wants_gradient
from lsync_compile.passes.kernel_pass import uses_autocast
from lsync_compile.passes.spec import Pass, PassContext, PassSpec, Phase, register

_VIEWS = ("view", "reshape", "unflatten", "flatten", "transpose", "permute", "unsqueeze", "squeeze")
# What takes any layout and does not depend on it.
_EVERY_LAYOUT = (
    *ADD,
    *MULTIPLY,
    *(F.conv2d, F.group_norm, F.silu, torch.cat),
    torch.ops.lsync.group_norm_silu.default,
    torch.ops.lsync.group_norm_from_moments.default,
    torch.ops.lsync.residual_moments.default,
    torch.ops.lsync.upsample_conv.default,
)


@register
class ChannelsLast(Pass):
    """Case by case above; counts the convolutions that it changes something for."""

    spec = PassSpec(
        name="channels_last",
        phase=Phase.FINISH,
        option="channels_last",
        exact=False,
        summary="Convolutions and all between them with the channels together in memory, weights "
        "included, on a GPU; rounding may differ.",
    )

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        convolutions = _convolutions(gm.graph)
        if not convolutions:
            return "no 2-D convolutions"
        values = [value for node in convolutions if (value := example(node)) is not None]
        if context.options.kernels != "on" and not any(value.is_cuda for value in values):
            return "convolutions on a CPU gain nothing"
        if wants_gradient(gm.graph):
            return "gradients of weights would take another layout"
        if uses_autocast(gm.graph):
            return "autocast chooses the dtypes"
        return "the graph writes in place" if has_writes(gm.graph) else ""

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        graph = gm.graph
        convolutions = _convolutions(graph)
        changed = {node for node in convolutions if _convert(node, 1, "weight")}
        for node in [node for node in graph.nodes if _needless(node)]:
            replace(node, node.args[0])
            drop(node)
        changed |= {node for node in convolutions if _convert(node, 0, "input")}
        return len(changed)


def _convolutions(graph: Graph) -> list[Node]:
    """2-D convolutions of batches, each with its weight a tensor of its own."""
    found = []
    for node in graph.nodes:
        value = example(node) if calls(node, F.conv2d) else None
        if value is not None and value.dim() == 4:
            found.append(node)
    return found


def _convert(convolution: Node, index: int, name: str) -> bool:
    """Cases 1 and 3; whether anything was to do."""
    source = argument(convolution, index, name)
    value = example(source)
    if value is None or value.is_contiguous(memory_format=torch.channels_last):
        return False
    graph = convolution.graph
    converted = next((user for user in source.users if _converts(user)), None)
    if converted is None or not converted < convolution:
        with graph.inserting_before(convolution):
            converted = call(
                graph,
                "contiguous",
                source,
                like=convolution,
                memory_format=torch.channels_last,
            )
    if len(convolution.args) > index:
        convolution.update_arg(index, converted)
    else:
        convolution.update_kwarg(name, converted)
    refresh(converted)
    return True


def _converts(node: Node) -> bool:
    return calls(node, "contiguous") and node.kwargs == {"memory_format": torch.channels_last}


def _needless(node: Node) -> bool:
    """Case 2."""
    if not calls(node, "contiguous") or len(node.args) > 1 or node.kwargs:
        return False
    value = example(node.args[0])
    return value is not None and _channels_together(value) and _any_layout_does(node)


def _channels_together(value: Tensor) -> bool:
    """Whether the second dimension is the innermost of a dense tensor, and not by chance."""
    if value.dim() < 3 or value.is_contiguous() or value.stride(1) != 1:
        return False
    return torch.empty_like(value).stride() == value.stride()  # kept where there are no gaps


def _any_layout_does(node: Node) -> bool:
    """Whether every user takes any layout, through views or directly."""
    return all(
        calls(user, *_EVERY_LAYOUT) or (calls(user, *_VIEWS) and _any_layout_does(user))
        for user in node.users
    )
