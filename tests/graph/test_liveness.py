"""Lifetimes of a graph's buffers: small graphs by hand, the real UNet against its bound."""

from __future__ import annotations

import torch
from captures import capture, captured_unet
from torch import Tensor

from lsync_compile.graph.liveness import lifetimes
from lsync_compile.runtime.memory import plan

KIB = 1024


def lives(function, *args) -> dict[str, tuple[int, int]]:
    """Size in KiB and length of life of each buffer."""
    gm, _ = capture(function, *args)
    return {each.name: (each.size // KIB, each.last - each.first) for each in lifetimes(gm.graph)}


def test_a_buffer_lives_to_its_last_use_and_results_to_the_end() -> None:
    def function(x: Tensor) -> Tensor:
        a = x.sin()
        b = a.cos()
        c = b + a
        return c * 2

    assert lives(function, torch.ones(KIB)) == {
        "a": (4, 2), "b": (4, 1), "c": (4, 1), "mul": (4, 1),
    }  # fmt: skip


def test_views_prolong_the_life_of_what_they_show_and_inputs_are_nobodys() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        a = x.exp()
        view = a.view(2, -1)
        b = x.view(2, -1).sin()
        return b.clone(), view[0]

    found = lives(function, torch.ones(KIB))
    assert found["a"][1] == 6  # to the output
    assert "view" not in found
    assert set(found) == {"a", "b", "clone"}


def test_writing_in_place_makes_no_buffer() -> None:
    found = lives(lambda x: x.exp().add_(1).mul_(2), torch.ones(KIB))
    assert list(found.values()) == [(4, 3)]


def test_each_result_of_an_operation_is_a_buffer() -> None:
    def function(x: Tensor) -> Tensor:
        values, indices = x.sort()
        return values + indices

    found = lives(function, torch.ones(KIB))
    assert sorted(size for size, _ in found.values()) == [4, 4, 8]


def test_the_real_unet_is_planned_at_its_bound() -> None:
    _, gm, _ = captured_unet()
    found = lifetimes(gm.graph)
    made = plan(found)
    assert len(found) > 900
    assert made.size <= 1.02 * made.bound
    assert made.summed > 20 * made.size
