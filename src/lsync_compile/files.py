"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_name(path: Path) -> Path:
    """A hidden name beside a file for its unfinished content, with the suffix and this process."""
    return path.with_name(f".{_start(path)}.{os.getpid()}-{uuid.uuid4().hex[:8]}{path.suffix}")


def _start(path: Path) -> str:
    """The name without its suffix, as far as there is room for more: names have 255 bytes."""
    return os.fsencode(path.stem)[:200].decode(errors="ignore")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write to; what was written takes the file's place when the block ends well.

    Otherwise it is removed, and a file that was there before stays as it was.

    Raises:
        OSError: it cannot take the place.
    """
    partial = partial_name(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(path: Path, process: int) -> None:
    """Remove the unfinished content that a process left beside a file when it was killed."""
    pattern = f".{glob.escape(_start(path))}.{process}-*{glob.escape(path.suffix)}"
    for partial in path.parent.glob(pattern):
        partial.unlink(missing_ok=True)
