"""channels_last: no convolution sees another layout, and no copies are left between them."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from lsync_compile.graph.build import example
from lsync_compile.graph.copying import copy_graph
from lsync_compile.graph.results import result_strides
from lsync_compile.options import Options
from lsync_compile.passes.channels_last import ChannelsLast
from lsync_compile.passes.manager import PassManager

MOVES = (
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze"),
    *("contiguous", "chunk"),
)


def changed(gm: GraphModule, **options):
    return networks.run_pass(gm, ChannelsLast, **options)


def together(value: Tensor | None) -> bool:
    return value is not None and value.is_contiguous(memory_format=torch.channels_last)


def convolutions(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is F.conv2d]


def from_weights(node: Node) -> bool:
    """Computed from parameters alone, and so once and not in a step."""
    waiting, seen = [node], {node}
    while waiting:
        source = waiting.pop()
        if source.op == "placeholder" and "parameters" not in source.name:
            return False
        more = set(source.all_input_nodes) - seen
        seen |= more
        waiting += more
    return True


def copies(gm: GraphModule) -> list[Node]:
    """Nodes that only move numbers, but must copy them to do so; not of weights."""
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_method" or node.target not in MOVES or from_weights(node):
            continue
        before, after = example(node.args[0]), example(node)
        if before is not None and after is not None and _memory(before) != _memory(after):
            found.append(node)
    return found


def plain_copies(gm: GraphModule) -> list[Node]:
    """Calls of ``contiguous()``, but for those that give results their strides back."""
    results = gm.graph.output_node().all_input_nodes
    last = {result.args[0] for result in results if result.target == "permute"}
    nodes = [node for node in gm.graph.nodes if node.target == "contiguous" and not node.kwargs]
    return [node for node in nodes if node not in last]


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("network", "count", "dropped"),
    [
        # 97 convolutions, of which 45 with a 1x1 kernel need nothing; one copy a transformer
        (networks.latentsync_unet, 52, 16),
        (networks.stable_diffusion_unet, 52, 16),
        (networks.vae_encoder, 25, 0),
        (networks.vae_decoder, 33, 0),
    ],
)
def test_real_networks(network: Callable, count: int, dropped: int) -> None:
    gm, inputs = network()
    after, record = changed(gm, fuse_group_norm_silu=False)
    assert record.outcome == "applied"
    assert record.matches >= count  # torch's group norm gives NCHW again
    nodes = convolutions(after)
    assert len(nodes) == len(convolutions(gm))
    assert all(together(example(part)) for node in nodes for part in (node, *node.args[:2]))
    assert len(plain_copies(gm)) - len(plain_copies(after)) == dropped
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert changed(after)[1].outcome == "no match"


@pytest.mark.parametrize(
    ("network", "before", "left"),
    [
        # The frames of the input, its layout, and the layout of the result.
        (networks.latentsync_unet, 105, ["flatten", "contiguous", "contiguous"]),
        (networks.stable_diffusion_unet, 16, ["contiguous", "contiguous"]),
    ],
)
def test_all_passes_together_leave_no_copies(
    network: Callable, before: int, left: list[str]
) -> None:
    gm, inputs = network()
    assert len(copies(gm)) >= before
    after = copy_graph(gm)
    with torch.no_grad():
        PassManager(Options(kernels="on")).run(after, "unet", "graph")
    assert [node.target for node in copies(after)] == left
    assert result_strides(after.graph) == result_strides(gm.graph)
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert one.stride() == other.stride()

    class Watch(Interpreter):
        def run_node(self, node: Node):
            result = super().run_node(node)
            if node.target is F.conv2d:
                self.layouts.append(together(result))
            return result

    watch = Watch(after)
    watch.layouts = []
    with torch.no_grad():
        watch.run(*inputs)
    assert watch.layouts == [True] * len(convolutions(after))  # real tensors as the examples say


X, W = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, weight=w, padding=1)


def test_a_weight_is_converted_once() -> None:
    gm, inputs = capture(lambda x, w: conv(conv(x, w), w), X, W)
    after, record = changed(gm)
    assert record.matches == 2
    # The weight, the input, and the result.
    assert networks.ops(after)["contiguous"] == 3
    torch.testing.assert_close(after(*inputs), gm(*inputs))


def test_what_is_channels_last_already_stays_as_it_is() -> None:
    last = torch.channels_last
    gm, _ = capture(conv, X.to(memory_format=last), W.to(memory_format=last))
    after, record = changed(gm)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(gm)


def tokens(x: Tensor) -> Tensor:
    return x.sin().flatten(2).transpose(1, 2).cos()


def for_a_convolution(x: Tensor, w: Tensor) -> Tensor:
    return conv(tokens(conv(x, w)).transpose(1, 2).contiguous().view(2, 4, 6, 6), w)


def for_a_sum(x: Tensor, w: Tensor) -> Tensor:
    h = tokens(conv(x, w)).view(2, 6, 6, 4).permute(0, 3, 1, 2).contiguous()
    return h + x


def for_another_operation(x: Tensor, w: Tensor) -> Tensor:
    h = tokens(conv(x, w)).transpose(1, 2).contiguous()
    return conv(h.view(2, 4, 6, 6), w) + h.softmax(1).view(2, 4, 6, 6)


def for_the_caller(x: Tensor, w: Tensor) -> Tensor:
    return tokens(conv(x, w)).transpose(1, 2).contiguous()


def with_gaps(x: Tensor, w: Tensor) -> Tensor:
    h = tokens(torch.cat([x, x], 1))[..., :4].transpose(1, 2).contiguous()
    return conv(h.view(2, 4, 6, 6), w)


@pytest.mark.parametrize(
    ("function", "dropped"),
    [
        (for_a_convolution, 1),
        (for_a_sum, 1),
        (for_another_operation, 0),
        (for_the_caller, 0),
        (with_gaps, 0),
    ],
)
def test_which_copies_go(function: Callable, dropped: int) -> None:
    gm, inputs = capture(function, X, W)
    after, _ = changed(gm)
    assert len(plain_copies(gm)) - len(plain_copies(after)) == dropped
    (one,), (other,) = after(*inputs), gm(*inputs)
    torch.testing.assert_close(one, other)
    assert result_strides(after.graph) == result_strides(gm.graph)


def test_why_it_stays_away() -> None:
    gm, _ = capture(conv, X, W)
    assert changed(gm, kernels="auto")[1].reason == "convolutions on a CPU gain nothing"
    assert changed(gm, kernels="off")[1].outcome == "vetoed"
    assert changed(gm, channels_last=False)[1].outcome == "off"
    gm, _ = capture(tokens, X)
    assert changed(gm)[1].reason == "no 2-D convolutions"
    gm, _ = capture(lambda x, w: conv(x, w).add_(1), X, W)
    assert changed(gm)[1].reason == "the graph writes in place"
    gm, _ = capture(conv, X, W)
    with torch.autocast("cpu", torch.bfloat16):
        assert changed(gm)[1].reason == "autocast chooses the dtypes"
    gm, _ = capture(conv, X, W.clone().requires_grad_())
    with torch.enable_grad():
        (record,) = PassManager(Options(kernels="on"), [ChannelsLast]).run(gm, "unet", "graph")
    assert record.reason == "gradients of weights would take another layout"
