"""Keys of caches that change with the code that made what is in them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

PACKAGE = "lsync_compile"


def module_uuid(start: ModuleType) -> str:
    """Hash of the sources of a module of the package and of all of its modules that it uses."""
    digest = hashlib.sha256()
    for module in sorted(_used_modules(start), key=lambda m: m.__name__):
        digest.update(module.__name__.encode())
        digest.update(_source(module).encode())
    return digest.hexdigest()


def _source(module: ModuleType) -> str:
    """A module's text; of an empty file too, where ``inspect.getsource`` has none to show."""
    return Path(str(module.__file__)).read_text(encoding="utf-8")


def _used_modules(start: ModuleType) -> set[ModuleType]:
    """``start`` and the modules of its package and ours that it reaches through global names."""
    packages = {PACKAGE, start.__name__.partition(".")[0]}
    found = {start}
    waiting = [start]
    while waiting:
        for module in _referenced(waiting.pop(), packages):
            if module not in found:
                found.add(module)
                waiting.append(module)
    return found


def _referenced(module: ModuleType, packages: Collection[str]) -> Iterator[ModuleType]:
    from lsync_compile.kernels.spec import KernelSpec  # kernels need this module for their keys

    if module.__name__ == PACKAGE:  # it holds whatever has been imported by now
        return
    for value in vars(module).values():
        # A kernel's specification is of no module's code, but the functions that it holds are.
        held = vars(value).values() if isinstance(value, KernelSpec) else ()
        for each in (value, *held):
            name = each.__name__ if isinstance(each, ModuleType) else _module_name(each)
            if name and name.partition(".")[0] in packages and name in sys.modules:
                yield sys.modules[name]


def _module_name(value: object) -> str | None:
    name = getattr(value, "__module__", None)
    return name if isinstance(name, str) else None
