"""Files of options: what ``lsync tune`` writes, and ``lsync sync --config`` and ``bench`` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsync_compile.errors import MediaError, OptionError
from lsync_compile.files import replaced
from lsync_compile.options import resolve_options


def read_configuration(path: Path) -> dict[str, Any]:
    """Options from a file ``{"options": {...}}``; what else is in it is for people.

    Raises:
        OptionError: the file cannot be read, is no such object, or names unknown options.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OptionError(f"{path}: is no JSON: {error}") from error
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise OptionError(f'{path}: expected {{"options": {{...}}}} as `lsync tune` writes it')
    try:
        resolve_options(options=options)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
    return options


def write_configuration(path: Path, options: Mapping[str, Any], **about: Any) -> None:
    """Write options and what is known of them; an existing file is replaced by a whole one only.

    Raises:
        MediaError: the folder is missing or cannot be written to.
    """
    text = json.dumps({"options": dict(options), **about}, indent=2, allow_nan=False) + "\n"
    try:
        with replaced(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MediaError(f"{path}: cannot be written: {error.strerror}") from error
