"""split_conv_in: the constant channels are a value of the chunk, the sum is the convolution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from captures import capture, captured_unet
from guided import guide, run_vouched
from networks import distance, ops, results, stable_diffusion_unet
from torch import Tensor, nn

from lsync_compile.graph.dependency import Stage, find_argument
from lsync_compile.graph.staging import cut
from lsync_compile.options import Options
from lsync_compile.passes.guidance_prefix import GuidancePrefix
from lsync_compile.passes.manager import PassManager
from lsync_compile.passes.split_conv_in import SplitConvIn


class Entrance(nn.Module):
    """A UNet's first convolution, and what else a graph may do with the sample."""

    def __init__(
        self, channels: int = 6, groups: int = 1, twice: bool = False, frames: str = "flatten"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1, groups=groups)
        self.twice = twice
        self.frames = frames

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        b, c, f, h, w = sample.shape
        pictures = {
            "flatten": lambda: sample.transpose(1, 2).flatten(0, 1),
            "einops": lambda: sample.permute([0, 2, 1, 3, 4]).reshape([b * f, c, h, w]),
            "frames outside": lambda: sample.permute(2, 0, 1, 3, 4).flatten(0, 1),
        }[self.frames]()
        made = self.conv(pictures) + encoder_hidden_states.sum()
        return made + sample.sum() if self.twice else made


def entrance(channels: int = 6, **more) -> tuple:
    network = Entrance(channels, **more).requires_grad_(False)
    return capture(network, torch.randn(2, channels, 3, 8, 8), torch.randn(2, 5))


@pytest.mark.parametrize("frames", ["flatten", "einops"])
def test_the_convolution_is_a_sum(frames: str) -> None:
    gm, inputs = entrance(frames=frames)
    after, record = run_vouched(gm, SplitConvIn)
    assert (record.outcome, record.matches) == ("applied", 1)
    assert ops(after)["conv2d"] == 2
    assert distance(results(after, inputs)[0], results(gm, inputs)[0]) < 1e-6
    found = cut(after, set(Stage), unet=True)
    assert found is not None
    chunk = ops(found.stages[Stage.CHUNK].gm)
    assert chunk["conv2d"] == 1
    assert ops(found.main.gm)["conv2d"] == 1
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    watched = [names[index] for index in found.watched[Stage.CHUNK]]
    assert watched == ["l_encoder_hidden_states_"]  # the sample is another object in each step


@pytest.mark.parametrize(
    "more",
    [{"channels": 4}, {"groups": 2}, {"twice": True}, {"frames": "frames outside"}],
    ids=str,
)
def test_it_does_not_fire(more: dict) -> None:
    gm, inputs = entrance(**more)
    after, record = run_vouched(gm, SplitConvIn)
    assert record.outcome == "no match"
    assert torch.equal(results(after, inputs)[0], results(gm, inputs)[0])


def test_vetoes() -> None:
    gm, _ = entrance()
    _, record = run_vouched(gm, SplitConvIn, frozenset({"guidance"}))
    assert record.reason == "nobody vouches that channels are constant"
    alone = type("Alone", (SplitConvIn,), {"spec": replace(SplitConvIn.spec, after=())})
    options = Options(split_conv_in=True, hoist_audio=False)
    vouched = frozenset({"constant_channels"})
    (record,) = PassManager(options, [alone]).run(gm, "unet", "graph", vouched)
    assert record.reason.startswith("option hoist_audio is off")


def test_the_real_unet_with_and_without_its_prefix_halved() -> None:
    _, gm, inputs = captured_unet()
    inputs = guide(gm, inputs, silent=False)
    expected = results(gm, inputs)[0]
    for before in (gm, run_vouched(gm, GuidancePrefix)[0]):
        after, record = run_vouched(before, SplitConvIn)
        assert record.matches == 1
        assert distance(results(after, inputs)[0], expected) < 1e-5
        found = cut(after, set(Stage), unet=True)
        assert found is not None
        assert ops(found.stages[Stage.CHUNK].gm)["conv2d"] == 1
    convolution = next(node for node in after.graph.nodes if node.target is F.conv2d)
    batch = find_argument(gm.graph, "sample").meta["example_value"].shape[0]
    assert convolution.meta["example_value"].shape[0] == batch * 4 // 2


def test_stable_diffusions_unet_has_no_constant_channels() -> None:
    _, record = run_vouched(stable_diffusion_unet()[0], SplitConvIn)
    assert record.outcome == "no match"
