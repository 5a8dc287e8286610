"""From the host to the device without the host waiting for what the device was given before.

A copy from ordinary memory is done when the call returns: behind all work that its stream has. A
copy from pinned memory takes its turn, and the host goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, in the turn of the current stream."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def event_now(device: torch.device) -> Any:
    """An event after all that the current stream was given so far; None where no GPU works."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
