"""Which tokens of a picture attend in full, and which are pooled.

A region is a square map of cells, true where the mouth is generated, written as text so that it can
be an argument of an operator: the side in cells, a colon, and the bits of all rows in hexadecimal.
At a level with fewer tokens than cells a token is in the region if any of its cells is.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsync_compile.errors import OptionError


def encode_region(inside: Tensor) -> str:
    """The text for a square boolean map.

    Raises:
        OptionError: it is not square, or empty.

    >>> encode_region(torch.tensor([[False, True], [True, True]]))
    '2:7'
    """
    if inside.dim() != 2 or inside.shape[0] != inside.shape[1] or not inside.numel():
        raise OptionError(f"a mouth region is a square map, not {tuple(inside.shape)}")
    bits = "".join("1" if cell else "0" for cell in inside.flatten().tolist())
    return f"{len(inside)}:{int(bits, 2):x}"


def decode_region(region: str) -> Tensor:
    """The boolean map ``(side, side)`` that :func:`encode_region` wrote.

    Raises:
        OptionError: this is no such text.
    """
    side_text, _, digits = region.partition(":")
    try:
        side, value = int(side_text), int(digits, 16)
    except ValueError:
        raise OptionError(f"mouth region {region[:40]!r} is not 'side:hexadecimal'") from None
    if side < 1 or value < 0 or value.bit_length() > side * side:
        raise OptionError(f"mouth region {region[:40]!r} has more cells than its side says")
    bits = f"{value:0{side * side}b}"
    return torch.tensor([bit == "1" for bit in bits]).view(side, side)


def region_at(region: str, side: int, halo: int = 0) -> Tensor:
    """The region at a level of ``side`` tokens a side, grown by ``halo`` tokens on all sides.

    Raises:
        OptionError: ``side`` does not divide the region's side.
    """
    cells = decode_region(region)
    if side < 1 or len(cells) % side:
        raise OptionError(f"a mouth region of side {len(cells)} has no level of {side} tokens")
    step = len(cells) // side
    inside = cells.view(side, step, side, step).any(3).any(1)
    if halo:
        wide = torch.nn.functional.max_pool2d(
            inside[None, None].float(), 2 * halo + 1, stride=1, padding=halo
        )
        inside = wide[0, 0] > 0
    return inside


@dataclass(frozen=True, eq=False)
class Grouping:
    """Tokens as groups: those of the region alone, the others pooled by square cells.

    Attributes:
        group_of: (L,) int32, which group each token belongs to.
        members: (G, P) int32, the tokens of each group; -1 fills up.
        counts: (G,) int32, how many those are. Groups of one come first.
        log_weights: (G,) float64, what is added to a key's scores: the logarithm of its tokens'
            number, and of the weight of the lips for groups inside the region.
        alone: how many groups are of one token; known to the host without asking a device.
    """

    group_of: Tensor
    members: Tensor
    counts: Tensor
    log_weights: Tensor
    alone: int

    def __len__(self) -> int:
        return len(self.counts)

    def to(self, device: torch.device) -> Grouping:
        """The same tables on a device."""
        return Grouping(
            self.group_of.to(device),
            self.members.to(device),
            self.counts.to(device),
            self.log_weights.to(device),
            self.alone,
        )


@functools.cache
def grouping(region: str, tokens: int, halo: int, pool: int, lip_weight: float) -> Grouping:
    """The groups of a picture's tokens, row by row.

    Args:
        region: as :func:`encode_region` writes it.
        tokens: of the picture, a square number.
        halo: tokens around the region that attend in full too.
        pool: side of a pooled cell in tokens; 1 pools nothing.
        lip_weight: how much more than others the region's own tokens count, without the halo.

    Raises:
        OptionError: the region has no such level.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise OptionError(f"lip attention needs a square picture, not {tokens} tokens")
    lips = region_at(region, side).flatten()
    full = region_at(region, side, halo).flatten()
    row, column = torch.arange(side)[:, None], torch.arange(side)[None, :]
    across = -(-side // pool)
    cells = ((row // pool) * across + column // pool).flatten()
    # Alone: a number of its own; pooled: that of its cell, after all tokens'.
    keys = torch.where(full, torch.arange(tokens), tokens + cells)
    _, group_of, counts = keys.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    group_of, counts = place[group_of], counts[order]
    members = torch.full((len(counts), int(counts.max())), -1)
    by_group = group_of.argsort(stable=True)
    first = counts.cumsum(0) - counts
    members[group_of[by_group], torch.arange(tokens) - first[group_of[by_group]]] = by_group
    weights = counts.double().log()
    weights[group_of[lips]] += math.log(lip_weight)
    alone = int((counts == 1).sum())
    return Grouping(group_of.int(), members.int(), counts.int(), weights, alone)


_on_device: dict[object, Any] = {}
_lock = threading.Lock()


def grouping_on(
    device: torch.device, region: str, tokens: int, halo: int, pool: int, lip_weight: float
) -> Grouping:
    """:func:`grouping` on a device; kept for good, as captured graphs know its address."""
    settings = (region, tokens, halo, pool, lip_weight)
    groups: Grouping = _kept((device, *settings), lambda: grouping(*settings).to(device))
    return groups


def query_channels(groups: Grouping) -> Tensor:
    """(G, 2) float32: what :func:`key_channels` is multiplied by."""
    return _tensor((groups, "queries"), lambda: groups.log_weights.new_ones(len(groups), 2).float())


def key_channels(groups: Grouping, factor: float, dtype: torch.dtype) -> Tensor:
    """(G, 2) float32: numbers of a dtype whose sum, times the factor, is the logarithm of weight.

    Two, as one number of half precision would be wrong by a thousandth.
    """

    def make() -> Tensor:
        values = groups.log_weights / factor
        high = values.to(dtype).double()
        return torch.stack([high, (values - high).to(dtype).double()], dim=1).float()

    return _tensor((groups, factor, dtype), make)


def tokens_alone(groups: Grouping) -> Tensor:
    """(L,) int32: one token each, the counts for copying groups' results to their tokens."""
    return _tensor((groups, "tokens"), lambda: torch.ones_like(groups.group_of))


def _tensor(key: object, make: Callable[[], Tensor]) -> Tensor:
    kept: Tensor = _kept(key, make)
    return kept


def _kept(key: object, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, the same object for the same key in all of the process."""
    with _lock:
        if key not in _on_device:
            with torch.inference_mode(False):
                _on_device[key] = make()
        return _on_device[key]
