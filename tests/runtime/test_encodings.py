"""Encodings kept in memory: chunks as a whole, in batches of one size, within the bound."""

from __future__ import annotations

import torch
from torch import Tensor

from lsync_compile.models.conditions import Prepared
from lsync_compile.runtime.encodings import Encodings


class Encoder:
    """Encodes faces to their own values; counts the calls."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls = 0

    def pixels(self, faces: Tensor) -> Tensor:
        return faces.float() / 127.5 - 1

    def prepare(self, faces: Tensor) -> Prepared:
        self.calls += 1
        pixels = self.pixels(faces)
        plain = pixels[:, :1, :4, :4].repeat(1, 8, 1, 1)
        return Prepared(pixels, [plain - 5, plain])

    def crops(self, chunk: int | None) -> bool:
        return False


def faces(*sources: int) -> Tensor:
    return torch.stack([torch.full((3, 8, 8), 10 * source) for source in sources]).byte()


def test_a_loop_is_encoded_once_and_gives_the_same() -> None:
    encoder, encodings = Encoder(), Encodings()
    first = encodings.prepare(encoder, faces(0, 1, 2), [0, 1, 2])  # type: ignore[arg-type]
    encodings.prepare(encoder, faces(3, 4, 4), [3, 4, 4])  # type: ignore[arg-type]
    again = encodings.prepare(encoder, faces(4, 2, 0), [4, 2, 0])  # type: ignore[arg-type]
    assert encoder.calls == 2
    expected = encoder.prepare(faces(4, 2, 0))
    for found, truth in zip(again.moments, expected.moments, strict=True):
        assert torch.equal(found, truth)
    assert torch.equal(again.pixels, expected.pixels)
    assert torch.equal(first.moments[1][2], again.moments[1][1])
    assert (encodings.counts.frames, encodings.counts.reused) == (9, 3)


def test_a_chunk_that_is_known_in_part_or_in_another_size_is_encoded() -> None:
    encoder, encodings = Encoder(), Encodings()
    encodings.prepare(encoder, faces(0, 1, 2), [0, 1, 2])  # type: ignore[arg-type]
    encodings.prepare(encoder, faces(1, 2, 3), [1, 2, 3])  # type: ignore[arg-type]
    encodings.prepare(encoder, faces(1, 2), [1, 2])  # type: ignore[arg-type]
    assert encoder.calls == 3
    assert encodings.counts.reused == 0


def test_memory_is_bounded() -> None:
    encoder = Encoder()
    each = 2 * 8 * 4 * 4 * 4
    encodings = Encodings(capacity=4 * each)
    for first in range(0, 12, 2):
        encodings.prepare(encoder, faces(first, first + 1), [first, first + 1])  # type: ignore[arg-type]
    assert encodings.counts.bytes <= 5 * each
    encodings.prepare(encoder, faces(10, 11), [10, 11])  # type: ignore[arg-type]
    encodings.prepare(encoder, faces(0, 1), [0, 1])  # type: ignore[arg-type]
    assert encoder.calls == 7  # the last were held, the first not
