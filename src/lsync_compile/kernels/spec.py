"""How a kernel is declared: its specification and the registry.

The registry is the one list of kernels. The table in the documentation and the guard test that
asks for tests, a benchmark and a section of every kernel are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lsync_compile.kernels.launch import OLDEST, capability, supports


@dataclass(frozen=True)
class Tolerance:
    """How far a kernel may be from exact.

    Attributes:
        relative: bound of ``|out - exact| / |exact|``, 2-norms over the whole tensor, with
            ``exact`` the reference in float64 on the same inputs.
        reason: where the error comes from.
    """

    relative: float
    reason: str


@dataclass(frozen=True)
class KernelSpec:
    """The declaration of a kernel.

    Attributes:
        name: the kernel's file, op, test and benchmark have the same.
        summary: one phrase for the table in the documentation.
        op: the public function, registered as ``torch.ops.lsync.<name>``.
        kernel: host function that launches the kernels, with the op's arguments.
        reference: the same in plain torch, with the op's arguments.
        source: paper or code that defines the operation.
        tolerances: supported dtypes.
        capability: compute capability that it needs of an NVIDIA GPU.
    """

    name: str
    summary: str
    op: Callable[..., Tensor | tuple[Tensor, ...]]
    kernel: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    source: str
    tolerances: Mapping[torch.dtype, Tolerance]
    capability: tuple[int, int] = OLDEST

    def lacks(self, device: torch.device) -> str:
        """What a GPU lacks for the kernel; empty where nothing, and for other devices."""
        if device.type != "cuda" or supports(device, self.capability):
            return ""
        needed, has = (".".join(map(str, c)) for c in (self.capability, capability(device)))
        return f"{self.name} needs a GPU of compute capability {needed}, this one has {has}"


_REGISTRY: dict[str, KernelSpec] = {}


def register(spec: KernelSpec) -> KernelSpec:
    """Add a kernel to the registry.

    Raises:
        ValueError: for a name that is taken.
    """
    if spec.name in _REGISTRY:
        raise ValueError(f"kernel {spec.name!r} is registered twice")
    _REGISTRY[spec.name] = spec
    return spec


def registered() -> dict[str, KernelSpec]:
    """Name to specification, for all kernels of the package."""
    import lsync_compile.kernels  # noqa: F401  its import registers them

    return dict(_REGISTRY)


def kernels_table() -> str:
    """The kernels as a Markdown table, for the documentation."""
    lines = ["| op | what it does | source | relative error |", "| --- | --- | --- | --- |"]
    for spec in registered().values():
        errors = ", ".join(
            f"{str(dtype).removeprefix('torch.')} {tolerance.relative:g}"
            for dtype, tolerance in spec.tolerances.items()
        )
        lines.append(f"| `lsync::{spec.name}` | {spec.summary} | {spec.source} | {errors} |")
    return "\n".join(lines) + "\n"
