"""Encodings of frames that are shown again: on loops, and in another run over the same clip.

What is kept of a frame are the parameters of the posteriors of its masked and its plain face, 128
KiB in half precision at 512 pixels, on the host. The random draw from them is made anew each
time, in the order of the chunks, so results are what encoding again would give. A chunk is taken
from here as a whole or not at all, and only if its frames were encoded in a batch of the same
size: kernels may round differently in another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lsync_compile.models.conditions import Prepared
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.runtime.transfers import event_now, uploaded


@dataclass
class EncodingCounts:
    """What became of the frames of a run.

    Attributes:
        frames: wanted.
        reused: not encoded again; of those `stored` come from an earlier run.
        bytes: held in memory at the most.
    """

    frames: int = 0
    reused: int = 0
    stored: int = 0
    bytes: int = 0


class EncodingStore(Protocol):
    """Encodings that outlive the run."""

    def read(self, source: int, batch: int) -> Tensor | None:
        """Encoding of a frame that was encoded in a batch of this size, else None."""
        ...

    def write(self, source: int, batch: int, encoding: Tensor) -> None:
        """Keep an encoding, (2, 8, h, w) on the host."""
        ...


class Encodings:
    """The encodings of one run.

    Args:
        store: of earlier runs over the same clip; None where there is none.
        capacity: bytes of host memory; the least recently used frames are forgotten.
    """

    def __init__(self, store: EncodingStore | None = None, *, capacity: int = 256 * 2**20) -> None:
        self.counts = EncodingCounts()
        self._store = store
        self._capacity = capacity
        self._held: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._bytes = 0

    def prepare(
        self, synthesizer: ChunkSynthesizer, faces: Tensor, shown: Sequence[int]
    ) -> Prepared:
        """What ``synthesizer.prepare(faces)`` gives, from memory where all of it is known.

        Args:
            faces: (f, 3, R, R) uint8.
            shown: which frame of the clip each face is from.
        """
        batch = len(shown)
        self.counts.frames += batch
        known = [self._find(source, batch) for source in shown]
        found = [encoding for encoding in known if encoding is not None]
        if len(found) == batch:
            self.counts.reused += batch
            device = synthesizer.device
            pixels, seen = synthesizer.pixels(faces), event_now(device)
            moments = list(uploaded(torch.stack(found, dim=1), device))
            return Prepared(pixels, moments, synthesizer.crops(None), seen)
        prepared = synthesizer.prepare(faces)
        encodings = torch.stack(prepared.moments, dim=1).cpu()
        for source, encoding in zip(shown, encodings, strict=True):
            if (source, batch) not in self._held:
                # A copy: a view would hold the encodings of the whole chunk.
                self._hold(source, batch, encoding.clone())
                if self._store is not None:
                    self._store.write(source, batch, encoding)
        return prepared

    def _find(self, source: int, batch: int) -> Tensor | None:
        encoding = self._held.get((source, batch))
        if encoding is not None:
            self._held.move_to_end((source, batch))
            return encoding
        if self._store is None:
            return None
        encoding = self._store.read(source, batch)
        if encoding is not None:
            self.counts.stored += 1
            self._hold(source, batch, encoding)
        return encoding

    def _hold(self, source: int, batch: int, encoding: Tensor) -> None:
        self._held[source, batch] = encoding
        self._bytes += encoding.nbytes
        while self._bytes > self._capacity:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.nbytes
        self.counts.bytes = max(self.counts.bytes, self._bytes)
