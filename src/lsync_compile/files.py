"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lsync_compile.errors import MediaError


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


def write_whole(path: Path, text: str, *, make_folder: bool = False) -> None:
    """Write a file of text that appears whole or not at all; it is UTF-8.

    Raises:
        MediaError: the folder is missing and not to be made, or cannot be written to.
    """
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MediaError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes that ask the same out of the block; a hidden file beside it stays.

    On Windows nobody is kept out.

    Raises:
        OSError: the file of the lock cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.with_name(f".{_start(path)}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, or the process ends
        yield


def remove_partials(path: Path, process: int) -> None:
    """Remove the unfinished content that a process left beside a file when it was killed."""
    pattern = f".{glob.escape(_start(path))}.{process}-*{glob.escape(path.suffix)}"
    for partial in path.parent.glob(pattern):
        partial.unlink(missing_ok=True)
