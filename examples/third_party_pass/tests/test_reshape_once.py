"""What a pass's test asserts: the numbers, the count, what is gone and what is there, where not."""

from typing import Any

import torch
from torch import Tensor, nn

import lsync_compile
from lsync_compile.entry_points import entered
from lsync_compile.explain import GraphExplanation, explain


class Tokens(nn.Module):
    """A projection of a picture's tokens, (B, H*W, C) in, as a transformer block ends with."""

    def __init__(self, keep: bool = False, write: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 8, 1)
        self.keep, self.write = keep, write

    def forward(self, x: Tensor) -> Any:
        picture = x.transpose(1, 2).contiguous().view(2, 8, 4, 4)
        if self.write:
            picture.mul_(2)
        out = self.conv(picture)
        return (out, picture) if self.keep else out


def tokens() -> Tensor:
    return torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))


def explained(module: nn.Module, **options: Any) -> GraphExplanation:
    torch._dynamo.reset()
    explanation = explain(module, (tokens(),), reshape_once=True, **options)
    (graph,) = explanation.graphs
    return graph


def outcome(graph: GraphExplanation) -> tuple[str, int]:
    (record,) = (record for record in graph.record.passes if record.name == "reshape_once")
    return record.outcome, record.matches


def test_it_is_installed() -> None:
    assert "reshape_once" in entered()


def test_the_numbers_are_the_same_within_rounding() -> None:
    torch._dynamo.reset()
    module = Tokens()
    with torch.no_grad():
        expected = module(tokens())
        fast = lsync_compile.compile(module, lowering="eager", reshape_once=True, strict=True)
        torch.testing.assert_close(fast(tokens()), expected)
        assert fast(tokens()).stride() == expected.stride()


def test_the_copy_is_gone_and_a_reshape_is_there() -> None:
    graph = explained(Tokens())
    assert outcome(graph) == ("applied", 1)
    assert (graph.before.ops["contiguous"], graph.before.ops["view"]) == (1, 1)
    assert "view" not in graph.after.ops
    assert graph.after.ops["reshape"] == 1


def test_it_stays_away_from_results_and_from_writes() -> None:
    assert outcome(explained(Tokens(keep=True))) == ("no match", 0)
    assert outcome(explained(Tokens(write=True))) == ("vetoed", 0)


def test_it_is_off_until_asked_for() -> None:
    torch._dynamo.reset()
    (graph,) = explain(Tokens(), (tokens(),)).graphs
    assert outcome(graph) == ("off", 0)
