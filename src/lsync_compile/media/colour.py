"""Colour tags of video, as ITU-T H.273 numbers them."""

from __future__ import annotations

from dataclasses import dataclass

from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import Colorspace

_UNSPECIFIED = 2
_BT709, _SMPTE170M = 1, 6
_HD_FROM = 720

# H.273's number of a YCbCr matrix -> swscale's, for those that swscale converts.
_SWSCALE = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}

_BT2020 = (9, 10)

# swscale's fast path darkens a picture by one level on its way to RGB; these flags round properly.
# They are bilinear, full_chroma_int and accurate_rnd, by number: PyAV 17 has no names for them.
EXACT = 0x2 | 0x2000 | 0x40000


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
    def of(decoder: VideoCodecContext) -> ColourTags:
        """The tags of a track whose first frame was decoded."""
        return ColourTags(
            int(decoder.colorspace), int(decoder.color_primaries), int(decoder.color_trc)
        )

    def resolved(self, height: int) -> ColourTags:
        """The same with a matrix that can be converted with.

        A file without one, or of a kind that is not YCbCr, is taken for BT.709 from 720 lines on
        and for BT.601 below.
        """
        if self.matrix in _SWSCALE:
            return self
        matrix = _BT709 if height >= _HD_FROM else _SMPTE170M
        return ColourTags(matrix, self.primaries, self.transfer)

    def writable(self, height: int) -> ColourTags:
        """The same as `resolved`, with BT.709 for a matrix that this PyAV cannot convert to."""
        tags = self.resolved(height)
        # Reading BT.2020 always works; PyAV 17 converts to BT.601 when asked for BT.2020.
        if tags.matrix in _BT2020 and not hasattr(Colorspace, "BT2020"):
            return ColourTags(_BT709, self.primaries, self.transfer)
        return tags

    @property
    def swscale_matrix(self) -> int:
        """swscale's number of the matrix; only for `resolved` tags."""
        return _SWSCALE[self.matrix]
