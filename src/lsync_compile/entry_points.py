"""Which passes other installed distributions enter; read from their metadata, nothing is imported.

A distribution enters each of its passes in the group ``lsync_compile.passes``::

    [project.entry-points."lsync_compile.passes"]
    reshape_once = "lsync_reshape_once:ReshapeOnce"
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from importlib.metadata import EntryPoint

GROUP = "lsync_compile.passes"


@functools.cache
def entered() -> Mapping[str, tuple[EntryPoint, ...]]:
    """Name to entry points, in the order of names; more than one where distributions disagree."""
    found: dict[str, dict[tuple[str, str], EntryPoint]] = {}
    for each in importlib.metadata.entry_points(group=GROUP):
        # A distribution that lies on the path twice is listed twice.
        found.setdefault(each.name, {}).setdefault((distribution_of(each), each.value), each)
    return {name: tuple(found[name].values()) for name in sorted(found)}


def distribution_of(each: EntryPoint) -> str:
    """Name and version of the distribution that an entry point belongs to."""
    dist = each.dist
    return "an unnamed distribution" if dist is None else f"{dist.name} {dist.version}"
