"""Full resolution for the mouth, less elsewhere: what a run tells the passes that make use of it.

Three passes work on less than the whole picture, :mod:`lsync_compile.passes.lip_attention`,
:mod:`lsync_compile.passes.crop_decode` and :mod:`lsync_compile.passes.crop_encode`. All need to
know the region that is generated, and the first how coarsely the rest may be looked at. That
depends on the picture: cells of tokens are averaged, which loses nothing where neighbours are
alike. The strength of edges outside the mouth tells (Sobel and Feldman, 1968).

The answer is part of what a graph is compiled for. So it is found once a run, from its first faces,
and the cells are of one of three sizes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from lsync_compile.report import Session
from lsync_compile.runtime.region import MouthRegion, make_region, mouth_region
from lsync_compile.runtime.running import options_of

# Detail (see `detail_score`) up to which cells of this many latents a side are pooled; above the
# last, none are. Talking heads measure 0.04 to 0.09 and lose nothing to cells of 4; pictures of
# more detail than that were not at hand.
POOLS: tuple[tuple[float, int], ...] = ((0.1, 4), (0.2, 2))


class MultiScaleProcessor:
    """Finds a run's region and how coarse the rest may be; made anew for each run.

    Args:
        mask: (1, R, R), 1 where the picture is kept.
        side: latents a side.
        session: of the compiled pipeline; its options say whether any pass wants to know.
    """

    def __init__(self, mask: Tensor, side: int, session: Session | None) -> None:
        self._mask = mask
        self._side = side
        options = None if session is None else options_of(session)
        wanted = options is not None and (
            options.lip_attention or options.crop_decode or options.crop_encode
        )
        self._session = session if wanted else None
        self._found: tuple[MouthRegion | None] | None = None

    def telling(self, pixels: Tensor) -> AbstractContextManager[None]:
        """Set the run's region for the block, for calls of the UNet and the decoder.

        Around a call of the encoder it says more: that the first half of the pictures is the
        second half with the region masked.

        Args:
            pixels: (f, 3, R, R) in [-1, 1], faces of a chunk; looked at in the first call alone.
        """
        if self._found is None:
            self._found = (self._find(pixels),)
        return mouth_region(self._found[0])

    def _find(self, pixels: Tensor) -> MouthRegion | None:
        if self._session is None:
            return None
        options, pool = options_of(self._session), 1
        if options.lip_attention and options.lip_pool == "auto":
            score = detail_score(pixels[:1] / 2 + 0.5, self._mask, self._side)
            pool = pool_for(score)
            self._session.most("multi_scale", detail=round(score, 4), pooled_cell=pool)
            if pool == 1 and options.lip_weight == 1:
                self._session.note(
                    f"lip_attention does nothing: detail outside the mouth is {score:.2f}, too "
                    "much to pool; lip_pool='2' pools all the same"
                )
        region = make_region(self._mask, self._side, pool)
        if region is None:
            self._session.note("lip_attention and crop_decode do nothing: the mask keeps all")
        else:
            first, after = region.rows
            self._session.most("multi_scale", rows=after - first, of_rows=region.side)
        return region


def pool_for(score: float) -> int:
    """Side in latents of the cells that a picture of this detail allows."""
    return next((pool for limit, pool in POOLS if score <= limit), 1)


def detail_score(pictures: Tensor, mask: Tensor, side: int) -> float:
    """Mean strength of edges where the picture is kept, at the resolution of the latents.

    Args:
        pictures: (f, 3, R, R) in [0, 1].
        mask: (1, R, R), 1 where the picture is kept.
        side: latents a side.

    Returns:
        Length of the gradient of the grey picture from one latent to the next: 0 where all is
        alike or nothing kept, 0.5 and more for edges between black and white everywhere.
    """
    grey = F.adaptive_avg_pool2d(pictures.float().mean(1, keepdim=True), side)
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([slope, slope.T])[:, None].to(grey)
    edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    strength = edges.square().sum(1).sqrt()
    kept = F.adaptive_avg_pool2d(mask.to(grey), side).expand_as(strength)
    total = float(kept.sum())
    return float((strength * kept).sum()) / total if total > 0 else 0.0
