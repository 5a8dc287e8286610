"""Copies to the device for which the host does not wait."""

from __future__ import annotations

from typing import Any

import torch

from lsync_compile.runtime.transfers import event_now, uploaded

CPU = torch.device("cpu")


class OnHost:
    """What a tensor in ordinary memory is asked on its way to a GPU."""

    is_cuda = False

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def pin_memory(self) -> OnHost:
        self.asked.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> OnHost:
        self.asked.append((device.type, non_blocking))
        return self


def test_a_copy_to_a_gpu_is_pinned_and_takes_its_turn() -> None:
    tensor = OnHost()
    uploaded(tensor, torch.device("cuda"))  # type: ignore[arg-type]
    assert tensor.asked == ["pinned", ("cuda", True)]


def test_on_a_cpu_nothing_is_copied_and_nothing_to_wait_for() -> None:
    tensor = torch.arange(3)
    assert uploaded(tensor, CPU) is tensor
    assert event_now(CPU) is None
