"""How a pass is declared: its specification, its base class and the registry.

The registry is the one list of passes. The order, the off switches, the names of dumps, the cache
key, the table in the documentation and the guard test that asks for a test, an option and a page
section of every pass are all made from it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, TypeVar

from torch.fx import GraphModule

from lsync_compile.options import OPTION_NAMES, Options
from lsync_compile.runtime.region import MouthRegion
from lsync_compile.sources import module_uuid


class Phase(IntEnum):
    """Phases run in this order, whatever ``after`` says inside each."""

    CLEAN = 0  # exact and local: what later passes need not see
    SPECIALISE = 1  # what holds only while the runtime vouches for it
    REWRITE = 2  # the optimisations
    FINISH = 3  # what depends on the final graph


@dataclass(frozen=True)
class PassSpec:
    """The declaration of a pass.

    Attributes:
        name: the pass's file, option and test have the same.
        phase: when it runs.
        summary: one sentence for the table in the documentation.
        option: the boolean field of :class:`Options` that switches it; the name where left out.
        after: passes of the same phase that must run before it.
        before: the same that must run after it; for passes of other distributions, which those
            of the package cannot name.
        targets: targets it applies to ("unet", "vae.encoder", …); empty for all graphs.
        exact: whether the rewritten graph gives the same bits under eager lowering.
        source: paper or code that the idea is from; empty for common knowledge.
    """

    name: str
    phase: Phase
    summary: str
    option: str = ""
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    exact: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "option", self.option or self.name)


@dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the graph: never the pipeline.

    Attributes:
        options: the options of the compiled object.
        target: the role of the graph, "unet", "vae.encoder", "vae.decoder", "module", "function".
        vouched: what the runtime vouches for, keys of ``lsync_compile.runtime.context.VOUCHES``.
            The rewritten graph is run only while it does.
        region: the part of the picture that matters, likewise; None where nobody says.
    """

    options: Options
    target: str
    vouched: frozenset[str] = frozenset()
    region: MouthRegion | None = None


class Pass:
    """Base class: a pass only finds places and rewrites them.

    Timing, counting, dumping, dead-code elimination, lint and recompilation are the manager's.
    """

    spec: ClassVar[PassSpec]

    def veto(self, gm: GraphModule, context: PassContext) -> str:
        """Why this graph must not be touched; the empty string where it may be."""
        return ""

    def rewrite(self, gm: GraphModule, context: PassContext) -> int:
        """Change ``gm.graph`` in place and return how many places were rewritten."""
        raise NotImplementedError


PassClass = TypeVar("PassClass", bound=type[Pass])
_REGISTRY: dict[str, type[Pass]] = {}


def register(cls: PassClass) -> PassClass:
    """Class decorator that adds a pass of the package to the registry.

    Those of other distributions are found through entry points, see docs/extending.md.

    Raises:
        ValueError: for a name that is taken, an option that does not exist, or with ``before``.
    """
    spec = cls.spec
    if spec.name in _REGISTRY:
        raise ValueError(f"pass {spec.name!r} is registered twice")
    if spec.option not in OPTION_NAMES:
        raise ValueError(f"pass {spec.name!r} names option {spec.option!r}, which does not exist")
    if spec.before:
        raise ValueError(f"pass {spec.name!r} has `before`; name it in the others' `after`")
    _REGISTRY[spec.name] = cls
    return cls


def registered() -> dict[str, type[Pass]]:
    """Name to class, for all passes of the package."""
    import lsync_compile.passes  # noqa: F401  its import registers them

    return dict(_REGISTRY)


def passes_table() -> str:
    """The passes in running order as a Markdown table, for the documentation."""
    from lsync_compile.passes.manager import ordered

    lines = ["| pass | phase | option | exact | what it does |", "| --- | --- | --- | --- | --- |"]
    for cls in ordered(registered().values()):
        spec = cls.spec
        source = f" ({spec.source})" if spec.source else ""
        lines.append(
            f"| `{spec.name}` | {spec.phase.name.lower()} | `{spec.option}` | "
            f"{'yes' if spec.exact else 'no'} | {spec.summary}{source} |"
        )
    return "\n".join(lines) + "\n"


def source_uuid(cls: type[Pass]) -> str:
    """Hash of the sources of the pass's module and of every module it uses of its package and ours.

    A changed helper changes it, which a hash of the class alone would miss.
    """
    return module_uuid(sys.modules[cls.__module__])
