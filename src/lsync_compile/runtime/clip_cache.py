"""Clips seen before: their faces and encodings in the user's cache folder.

For "same video, new sound": a second run over a clip needs no detection and no encoding. A clip
is known by a hash of its whole file, so a changed file is another clip, whatever its name and
date; what depends on options or networks is kept beside it under a hash of those.

    <cache folder>/clips/<clip>/<faces>.npz        landmarks by frame
    <cache folder>/clips/<clip>/<encodings>.bin    one record a frame, after a checksum and JSON

Files are written under a temporary name and renamed when complete, so runs at the same time, or
broken off, never see half a file. Each encoding has a checksum; what does not match is not used.
Clips that were used least recently are removed when the folder outgrows its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from lsync_compile.errors import MediaError
from lsync_compile.files import replaced
from lsync_compile.media.faces import Face
from lsync_compile.runtime.cache_folder import cache_folder

FORMAT = 2  # of the files; another one is another cache
# What numpy and the parsers raise for files that are damaged, or that claim to hold terabytes.
_DAMAGED = (
    *(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, IndexError),
    *(TypeError, AttributeError, SyntaxError, OverflowError, MemoryError, RuntimeError),
)
_MOST_HEAD = 2**26  # bytes of the line that says what a file of encodings holds


def clip_key(path: str | Path) -> str:
    """A hash of a file's content.

    Raises:
        MediaError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with Path(path).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


def networks_key(vae: Any, mask: Tensor, device: torch.device) -> str:
    """A hash of all that an encoding depends on beside the faces: weights, mask, machine."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = {**vae.encoder.state_dict(), "mask": mask}
    quant = getattr(vae, "quant_conv", None)
    if isinstance(quant, nn.Module):
        tensors.update({f"quant.{name}": value for name, value in quant.state_dict().items()})
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    digest.update(f"{where} {torch.__version__}".encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    """The values of any dtype as they are in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@dataclass(frozen=True)
class ClipEntry:
    """One clip in the folder: its key, bytes, and seconds since it was used."""

    key: str
    bytes: int
    age: float


class ClipCache:
    """The folder of clips.

    Args:
        folder: :func:`cache_folder` by default.
        limit: bytes that all clips together may take.
    """

    def __init__(self, folder: Path | None = None, *, limit: int = 2 * 2**30) -> None:
        self.folder = (folder or cache_folder()) / "clips"
        self.limit = limit

    def open(self, clip: str, faces: str, encodings: str) -> ClipStore:
        """What is kept of a clip.

        Args:
            clip: its :func:`clip_key`.
            faces, encodings: what these depend on beside the clip, any text.
        """
        return ClipStore(self, clip, _name(faces), _name(encodings))

    def entries(self) -> list[ClipEntry]:
        """All clips, the least recently used first."""
        now = time.time()
        found = []
        for folder in _inside(self.folder):
            with contextlib.suppress(OSError):  # removed by another run, or none of ours
                size = sum(file.stat().st_size for file in folder.iterdir())
                found.append(ClipEntry(folder.name, size, now - folder.stat().st_mtime))
        return sorted(found, key=lambda entry: -entry.age)

    def clear(self) -> int:
        """Remove all clips; the bytes that they took."""
        freed = sum(entry.bytes for entry in self.entries())
        shutil.rmtree(self.folder, ignore_errors=True)
        return freed

    def shrink(self, keep: str) -> None:
        """Remove clips until the limit holds, `keep` last."""
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        for entry in sorted(entries, key=lambda entry: (entry.key == keep, -entry.age)):
            if total <= self.limit:
                return
            shutil.rmtree(self.folder / entry.key, ignore_errors=True)
            total -= entry.bytes


def _inside(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none, or none that may be read."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


class ClipStore:
    """What is kept of one clip, for one run. Used by one thread at a time.

    Attributes:
        faces: by position in the clip, None for no usable face.
    """

    def __init__(self, cache: ClipCache, clip: str, faces: str, encodings: str) -> None:
        self._cache = cache
        self._clip = clip
        folder = cache.folder / clip
        self._faces_file = folder / f"{faces}.npz"
        # Crops follow from the faces, so encodings do too.
        self._encodings_file = folder / f"{faces}-{encodings}.bin"
        self.faces: dict[int, Face | None] = _read_faces(self._faces_file)
        self._known = len(self.faces)
        self._records = _Records(self._encodings_file)
        self._fresh = _FreshRecords(folder, cache.limit)
        self._kept = 0

    def read(self, source: int, batch: int) -> Tensor | None:
        """See :class:`lsync_compile.runtime.encodings.EncodingStore`."""
        return self._records.read(source, batch)

    def write(self, source: int, batch: int, encoding: Tensor) -> None:
        """Keep an encoding, (2, 8, h, w) on the host, when the run has ended well."""
        self._fresh.add(source, batch, encoding)

    def discard(self) -> None:
        """Forget what is new."""
        self._fresh.close()

    def commit(self, faces: Mapping[int, Face | None], clip: str) -> None:
        """Store what is new; nothing if the file changed meanwhile (`clip` is its key now)."""
        try:
            if clip != self._clip:
                return
            folder = self._faces_file.parent
            with contextlib.suppress(OSError):  # a full disk, a folder that is read-only
                folder.mkdir(parents=True, exist_ok=True)
                if len(faces) > self._known:
                    _write_faces(self._faces_file, faces)
                if self._fresh.count:
                    self._fresh.merge(self._records, self._encodings_file)
                    self._kept = self._fresh.count
                os.utime(folder)
                self._cache.shrink(self._clip)
        finally:
            self._fresh.close()

    def counts(self) -> dict[str, float]:
        """Faces and encodings that were there, and encodings added."""
        return {"faces": self._known, "encodings": len(self._records), "added": self._kept}


def _name(text: str) -> str:
    return hashlib.blake2b(f"{FORMAT} {text}".encode(), digest_size=8).hexdigest()


def _write_faces(path: Path, faces: Mapping[int, Face | None]) -> None:
    places = sorted(faces)
    rows = np.full((len(places), 4 + 10 + 6 + 1), np.nan)
    for row, place in zip(rows, places, strict=True):
        face = faces[place]
        if face is not None:
            row[:] = np.concatenate(
                [face.box, face.points.ravel(), face.landmarks.ravel(), [face.score]]
            )
    with replaced(path) as partial, partial.open("wb") as file:
        np.savez(file, places=np.array(places), rows=rows)


def _read_faces(path: Path) -> dict[int, Face | None]:
    try:
        with np.load(path) as data:
            places, rows = data["places"].astype(np.int64, casting="safe"), data["rows"]
        return {
            int(place): None if np.isnan(row).any() else _face(row)
            for place, row in zip(places, rows, strict=True)
        }
    except _DAMAGED:  # or not there: found anew
        return {}


def _face(row: np.ndarray) -> Face:
    box, points, landmarks, (score,) = np.split(row.astype(np.float64), [4, 14, 20])
    return Face(box, points.reshape(5, 2), landmarks.reshape(3, 2), float(score))


class _Records:
    """A file of encodings, read as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._data: Any = None
        self._index: dict[tuple[int, int], tuple[int, int]] = {}
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        with contextlib.suppress(*_DAMAGED):
            self._open(path)  # not there, or damaged: encoded anew

    def _open(self, path: Path) -> None:
        with path.open("rb") as file:
            check, _, text = file.readline(_MOST_HEAD).partition(b" ")
            start = file.tell()
        if int(check, 16) != zlib.crc32(text):
            return  # its records would be taken for other frames'
        head = json.loads(text)
        shape, dtype = tuple(head["shape"]), getattr(torch, head["dtype"])
        size = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=start)
        if len(data) != size * len(head["records"]):
            return
        self._data = data.reshape(-1, size)
        self._shape, self._dtype = shape, dtype
        self._index = {
            (source, batch): (row, check)
            for row, (source, batch, check) in enumerate(head["records"])
        }

    def __len__(self) -> int:
        return len(self._index)

    @property
    def form(self) -> tuple[tuple[int, ...], torch.dtype]:
        return self._shape, self._dtype

    def read(self, source: int, batch: int) -> Tensor | None:
        row, check = self._index.get((source, batch), (-1, 0))
        if row < 0:
            return None
        data = np.array(self._data[row])
        if zlib.crc32(data.tobytes()) != check:
            return None
        return torch.from_numpy(data).view(self._dtype).reshape(self._shape)

    def items(self) -> list[tuple[int, int, bytes]]:
        return [
            (source, batch, self._data[row].tobytes())
            for (source, batch), (row, check) in self._index.items()
            if zlib.crc32(self._data[row].tobytes()) == check
        ]


class _FreshRecords:
    """Encodings of this run, in an unnamed file until it has ended well."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._file: IO[bytes] | None = None
        self._heads: list[tuple[int, int, int]] = []
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32

    @property
    def count(self) -> int:
        return len(self._heads)

    def add(self, source: int, batch: int, encoding: Tensor) -> None:
        data = _bytes(encoding)
        if (self.count + 1) * len(data) > self._limit:
            return  # more than all clips together may take
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115, see close()
                self._shape, self._dtype = tuple(encoding.shape), encoding.dtype
            self._file.write(data)
        except OSError:  # a full disk, a folder that is read-only: the run goes on without
            self._limit = 0
            self._heads.clear()
            return
        self._heads.append((source, batch, zlib.crc32(data)))

    def merge(self, old: _Records, path: Path) -> None:
        """Write the old records of the same form and these into a new file."""
        assert self._file is not None
        kept = old.items() if old.form == (self._shape, self._dtype) else []
        new = {(source, batch) for source, batch, _ in self._heads}
        kept = [item for item in kept if item[:2] not in new]
        heads = [(source, batch, zlib.crc32(data)) for source, batch, data in kept]
        head = {
            "shape": self._shape,
            "dtype": str(self._dtype).removeprefix("torch."),
            "records": heads + self._heads,
        }
        text = json.dumps(head).encode() + b"\n"
        with replaced(path) as partial, partial.open("wb") as file:
            file.write(b"%08x " % zlib.crc32(text) + text)
            for _, _, data in kept:
                file.write(data)
            self._file.seek(0)
            shutil.copyfileobj(self._file, file)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
