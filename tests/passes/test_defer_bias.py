"""defer_bias: the biases of every transformer of real networks, and none that others see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import networks
import pytest
import torch
import torch.nn.functional as F
from captures import capture
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lsync_compile.graph.copying import copy_graph
from lsync_compile.graph.match import argument
from lsync_compile.options import Options
from lsync_compile.passes.defer_bias import DeferBias
from lsync_compile.passes.fuse_add_layer_norm import OP as SUM_NORM
from lsync_compile.passes.fuse_add_layer_norm import FuseAddLayerNorm
from lsync_compile.passes.fuse_feed_forward import OP as FEED_FORWARD
from lsync_compile.passes.fuse_feed_forward import FuseFeedForward
from lsync_compile.passes.fuse_group_norm_silu import FuseGroupNormSilu
from lsync_compile.passes.fuse_layer_norm import OP as NORM
from lsync_compile.passes.fuse_layer_norm import FuseLayerNorm
from lsync_compile.passes.fuse_linear_geglu import FuseLinearGeglu
from lsync_compile.passes.fuse_residual_moments import OP as MOMENTS
from lsync_compile.passes.fuse_residual_moments import FuseResidualMoments
from lsync_compile.passes.fuse_temporal_attention import FuseTemporalAttention
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.remove_noops import RemoveNoops
from lsync_compile.passes.spec import PassContext, Phase

BEFORE = (
    RemoveNoops,
    FuseGroupNormSilu,
    FuseTemporalAttention,
    FuseAddLayerNorm,
    FuseLayerNorm,
    FuseLinearGeglu,
    FuseFeedForward,
    FuseResidualMoments,
)
NAMES = [cls.spec.name for cls in (*BEFORE, DeferBias)]


def deferred(gm: GraphModule):
    """The graph after the passes before it, and after itself; its record."""
    passes = []
    for index, cls in enumerate((*BEFORE, DeferBias)):
        earlier = () if cls.spec.phase == Phase.CLEAN else tuple(NAMES[1:index])
        passes.append(type(cls.__name__, (cls,), {"spec": replace(cls.spec, after=earlier)}))
    before, after = copy_graph(gm), copy_graph(gm)
    options = Options(kernels="on", **dict.fromkeys(NAMES, True))
    with torch.no_grad():
        PassManager(options, passes[:-1]).run(before, "module", "graph")
        *_, record = PassManager(options, passes).run(after, "module", "graph")
    after.graph.lint()
    return before, after, record


def nodes(gm: GraphModule, *targets: object) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target in targets]


@pytest.mark.parametrize(
    ("network", "blocks", "endings"),
    [
        # Transformers and motion modules; all but those whose last sum an upsampler alone sees
        (networks.latentsync_unet, 16 + 20, 36 - 3),
        (networks.stable_diffusion_unet, 16, 16 - 2),
    ],
)
def test_real_networks(network: Callable, blocks: int, endings: int) -> None:
    """Of each block the entrance and two attentions, and what ends it."""
    gm, inputs = network()
    before, after, record = deferred(gm)
    assert (record.outcome, record.matches) == ("applied", 3 * blocks + endings)
    assert not networks.ops(before) - networks.ops(after)
    assert (networks.ops(after) - networks.ops(before)).keys() <= {"float", "add"}
    for node in nodes(after, NORM, SUM_NORM, FEED_FORWARD):
        place = {NORM: 5, SUM_NORM: 6, FEED_FORWARD: 10}[node.target]
        assert argument(node, place, "shift") is not None
    assert sum(node.args[8] is None for node in nodes(after, FEED_FORWARD)) == endings
    (one,), (other,) = networks.results(after, inputs), networks.results(gm, inputs)
    assert networks.distance(one, other) < 1e-5
    assert one.stride() == other.stride()
    assert deferred(after)[2].outcome == "no match"


class Block(nn.Module):
    """A transformer's entrance and attention: a projection, its norm, a layer, the sum's norm."""

    def __init__(self, picture: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.picture = picture
        self.entrance = nn.Conv2d(8, 8, 1) if picture else nn.Linear(8, 8)
        self.layer = nn.Linear(8, 8, bias=bias)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.requires_grad_(False)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entrance, what the layer gives, their sum."""
        entered = self.entrance(x)
        if self.picture:
            entered = entered.flatten(2).transpose(1, 2)
        given = self.layer(self.first(entered).sin())
        return entered, given, given + entered

    def forward(self, x: Tensor) -> Tensor:
        _, _, total = self.parts(x)
        return self.second(total).cos() + total


def picture(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (2, 3)).contiguous()


@pytest.mark.parametrize("pictures", [False, True], ids=["tokens", "pictures"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_entrance_and_the_layer(pictures: bool, bias: bool) -> None:
    x = torch.randn(4, 6, 8)
    gm, inputs = capture(Block(pictures, bias), picture(x) if pictures else x)
    _, after, record = deferred(gm)
    assert record.matches == 1 + bias
    (norm,), (total,) = nodes(after, NORM), nodes(after, SUM_NORM)
    assert norm.kwargs.keys() == total.kwargs.keys() == {"shift"}
    # Of both: what the norm adds once, the sum adds with the other bias.
    assert (total.kwargs["shift"] is not norm.kwargs["shift"]) == bias
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_less_exact(dtype: torch.dtype) -> None:
    module, x = Block().to(dtype), torch.randn(64, 6, 8).to(dtype)
    gm, inputs = capture(module, x)
    _, after, record = deferred(gm)
    assert record.matches == 2
    exact = copy.deepcopy(module).double()(x.double())
    new, old = (networks.distance(each(*inputs)[0], exact) for each in (after, gm))
    assert 0 < new < 1.2 * old


class Ending(nn.Module):
    """A projection whose sum a group norm measures, as pictures or videos."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
        self.requires_grad_(False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = F.linear(x, self.layer.weight[:, :, 0, 0], self.layer.bias)
        total = y.transpose(1, 2).reshape(residual.shape) + residual
        return F.silu(self.norm(total)) + total


def test_a_projection_that_a_measured_sum_ends() -> None:
    gm, inputs = capture(Ending(), torch.randn(4, 6, 8), torch.randn(4, 8, 2, 3))
    _, after, record = deferred(gm)
    assert record.matches == 1
    (node,) = nodes(after, MOMENTS)
    assert node.args[2] is not None
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0])


class EntranceUsedAgain(Block):
    """Something else sees the entrance; the layer's bias goes."""

    def forward(self, x: Tensor) -> Tensor:
        entered, _, total = self.parts(x)
        return self.second(total).cos() + total + entered.exp()


class LayerUsedAgain(Block):
    """Something else sees what the layer gives; the entrance's bias goes."""

    def forward(self, x: Tensor) -> Tensor:
        _, given, total = self.parts(x)
        return self.second(total).cos() + total + given.exp()


@pytest.mark.parametrize("block", [EntranceUsedAgain, LayerUsedAgain])
def test_a_result_that_others_see_keeps_its_bias(block: type[Block]) -> None:
    gm, inputs = capture(block(), torch.randn(4, 6, 8))
    _, after, record = deferred(gm)
    assert record.matches == 1
    torch.testing.assert_close(after(*inputs)[0], gm(*inputs)[0])


class Doubled(nn.Module):
    """One result is both parts of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.requires_grad_(False)

    def arranged(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        y = self.arranged(self.layer(x.sin()))
        total = y + y
        return self.norm(total) * total


class Mixed(nn.Module):
    """The norm's channels are not all of the projection's, or more."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(channels)
        self.requires_grad_(False)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x.sin()).reshape(4, -1, self.channels)).cos()


class Result(Block):
    """The graph returns what the layer gives."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        given = self.layer(x.sin())
        return given, self.second(given).cos()


class Expanded(nn.Module):
    """The bias is one number for all channels, or others for each row."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(shape))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.linear(x.sin(), self.weight, self.bias)).cos()


def test_it_stays_away_from_writes_and_gradients() -> None:
    block = Block().requires_grad_(False)

    def written(x: Tensor) -> Tensor:
        y = x.sin()
        y.add_(1)
        return block(y)

    gm, _ = capture(written, torch.randn(4, 6, 8))
    veto = DeferBias().veto(gm, PassContext(Options(kernels="on"), "module"))
    assert veto == "the graph writes in place"
    gm, _ = capture(block, torch.randn(4, 6, 8, requires_grad=True))
    veto = DeferBias().veto(gm, PassContext(Options(kernels="on"), "module"))
    assert veto.startswith("a gradient is wanted")


@pytest.mark.parametrize(
    "make",
    [
        *(Doubled, lambda: Mixed(4), lambda: Mixed(16), Result),
        *(lambda: Expanded(1), lambda: Expanded(1, 8), lambda: Expanded(6, 8)),
    ],
    ids=[
        *("both parts", "fewer channels", "more channels", "result"),
        *("one number", "one row", "rows"),
    ],
)
def test_it_does_not_fire(make: Callable[[], nn.Module]) -> None:
    gm, _ = capture(make(), torch.randn(4, 6, 8))
    before, after, record = deferred(gm)
    assert nodes(before, NORM, SUM_NORM)
    assert record.outcome == "no match"
    assert networks.ops(after) == networks.ops(before)
