"""``lsync cache``: show and clear what is kept of clips."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Show, or clear, what `lsync sync --clip-cache` keeps of clips."""
    from lsync_compile.runtime.clip_cache import ClipCache
    from lsync_compile.runtime.memory import readable

    kept = ClipCache()
    entries = kept.entries()
    total = sum(entry.bytes for entry in entries)
    if clear:
        kept.clear()
    if as_json:
        clips = [
            {"key": entry.key, "bytes": entry.bytes, "unused_seconds": round(entry.age)}
            for entry in entries
        ]
        answer = {"folder": str(kept.folder), "clips": clips, "bytes": total, "cleared": clear}
        typer.echo(json.dumps(answer, indent=2))
        return
    for entry in reversed(entries):
        typer.echo(f"{entry.key}  {readable(entry.bytes):>10}  {_ago(entry.age)}")
    what = "cleared" if clear else "kept"
    noun = "clip" if len(entries) == 1 else "clips"
    typer.echo(f"{kept.folder}: {len(entries)} {noun}, {readable(total)} {what}")


def _ago(seconds: float) -> str:
    """How long a clip has not been used, in words."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"used {count} {unit}{'s' if count > 1 else ''} ago"
    return "used just now"
