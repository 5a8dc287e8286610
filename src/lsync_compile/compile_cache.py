"""What compiling learns and keeps on disk, beside Inductor's and Triton's own caches.

Small files of JSON in a folder of Inductor's cache: they go where ``TORCHINDUCTOR_CACHE_DIR`` says,
are deleted with it, and ``torch._inductor.config.force_disable_caches`` switches them off too.
Nothing in them is executed. A file that cannot be read or written costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lsync_compile.errors import MediaError
from lsync_compile.files import write_whole

log = logging.getLogger(__name__)


def folder() -> Path | None:
    """Where the files lie; None where torch is told to keep nothing."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if config.force_disable_caches else Path(cache_dir()) / "lsync"


def digest(parts: Iterable[object]) -> str:
    """A name for what was learnt about these, told apart by their ``repr``."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def read(kind: str, name: str) -> Any:
    """What was kept under a name; None where nothing was, or nothing that can be read."""
    base = folder()
    if base is None:
        return None
    path = base / kind / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.info("%s: not used: %s", path, error)
        return None


def write(kind: str, name: str, value: Any) -> None:
    """Keep a value of dicts, lists, texts and numbers for other processes."""
    base = folder()
    if base is None:
        return
    try:
        write_whole(base / kind / f"{name}.json", json.dumps(value), make_folder=True)
    except MediaError as error:
        log.info("not kept: %s", error)
