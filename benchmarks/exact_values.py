"""What a network gives in float64: what errors are measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

SCORES = 2**28  # float64 attention scores at a time: 2 GiB


def in_float64(module: nn.Module, call: Callable[[nn.Module, Any], Tensor], inputs: Any) -> Tensor:
    """``call(module, inputs)`` with weights and inputs as they are, computed in float64."""
    wide = copy.deepcopy(module).double()
    with sliced_attention(), torch.no_grad():
        return call(wide, tree_map(_double, inputs))


@contextmanager
def sliced_attention() -> Iterator[None]:
    """Attention a few heads at a time: in float64 torch holds the scores, 34 GiB at full size."""
    plain = F.scaled_dot_product_attention

    def sliced(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs.get("attn_mask") is not None or query.dim() != 4:
            return plain(query, key, value, *args, **kwargs)
        step = max(1, SCORES // (query.shape[1] * query.shape[2] * key.shape[2]))
        parts = (x.split(step) for x in (query, key, value))
        return torch.cat([plain(*part, **kwargs) for part in zip(*parts, strict=True)])

    F.scaled_dot_product_attention = sliced
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value
