"""Colour tags of video, as ITU-T H.273 numbers them."""

from __future__ import annotations

from dataclasses import dataclass

from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation

_UNSPECIFIED = 2
_BT709, _SMPTE170M = 1, 6
_HD_FROM = 720

# H.273's number of a YCbCr matrix -> swscale's, for those that swscale converts.
_SWSCALE = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}

# swscale's fast path darkens a picture by one level on its way to RGB; these flags round properly.
EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


@dataclass(frozen=True)
class ColourTags:
    """What a file says of its colours; 2 means that it says nothing.

    Attributes:
        matrix: how YCbCr is made of RGB (1 is BT.709, 5 and 6 BT.601).
        primaries: which colours the three channels are.
        transfer: the tone curve.
    """

    matrix: int = _UNSPECIFIED
    primaries: int = _UNSPECIFIED
    transfer: int = _UNSPECIFIED

    @staticmethod
    def of(frame: VideoFrame) -> ColourTags:
        """The tags of a decoded frame."""
        return ColourTags(int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc))

    def resolved(self, height: int) -> ColourTags:
        """The same with a matrix that can be converted with.

        A file without one, or of a kind that is not YCbCr, is taken for BT.709 from 720 lines on
        and for BT.601 below.
        """
        if self.matrix in _SWSCALE:
            return self
        matrix = _BT709 if height >= _HD_FROM else _SMPTE170M
        return ColourTags(matrix, self.primaries, self.transfer)

    @property
    def swscale_matrix(self) -> int:
        """swscale's number of the matrix; only for `resolved` tags."""
        return _SWSCALE[self.matrix]
