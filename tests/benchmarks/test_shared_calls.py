"""The benchmark of calls that chunks share compares like with like."""

from __future__ import annotations

import pytest
import torch
from batching import Chunks
from captures import make_unet


@pytest.mark.parametrize("guided", [True, False])
def test_chunks_are_compared_in_the_order_of_the_shared_call(guided: bool) -> None:
    unet = make_unet(layers=1, levels=2)
    chunks = Chunks(unet, chunks=3, side=8, frames=2, guided=guided)
    together = chunks()
    assert together.shape == (6 if guided else 3, 4, 2, 8, 8)
    torch.testing.assert_close(together, chunks.alone(), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    if guided:
        assert torch.equal(chunks.joined[0, 3].audio[:6], torch.zeros(6, 50, 384))  # type: ignore[index]
