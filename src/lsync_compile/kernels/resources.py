"""What a kernel needs of a GPU's multiprocessor, found without one.

Triton compiles for a GPU that is not there, and its package carries the disassembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lsync_compile.kernels.launch import OPTIONS, Config, Launch, TensorDescriptor

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}


@dataclass(frozen=True)
class Multiprocessor:
    """What one has, by the CUDA programming guide's table of compute capabilities.

    Attributes:
        threads: resident at once.
        programs: resident at once.
        shared: bytes of shared memory; a program has 1024 of them for the system.
    """

    threads: int
    programs: int
    shared: int


# By compute capability, ten times: T4 and RTX 20; A100; RTX 30 and A10; RTX 40, L4 and L40S; H100
# and H200; RTX 50.
MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 * 1024),
    80: Multiprocessor(2048, 32, 164 * 1024),
    86: Multiprocessor(1536, 16, 100 * 1024),
    89: Multiprocessor(1536, 24, 100 * 1024),
    90: Multiprocessor(2048, 32, 228 * 1024),
    120: Multiprocessor(1536, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel.

    Attributes:
        capability: what it was compiled for, one of `MULTIPROCESSORS`.
        registers: 32-bit registers a thread.
        spills: instructions that load or store a thread's local memory.
        shared: bytes of shared memory a program.
        threads: threads a program.
        sass: the machine code as text.
    """

    capability: int
    registers: int
    spills: int
    shared: int
    threads: int
    sass: str

    @property
    def programs(self) -> int:
        """How many programs one multiprocessor holds at once; 0 if one does not fit."""
        holds = MULTIPROCESSORS[self.capability]
        # Registers are given out to warps in units of 256.
        registers = -(-self.registers * 32 // 256) * 256 * (self.threads // 32)
        limits = [holds.threads // self.threads, 65536 // registers, holds.programs]
        if self.shared:
            limits.append(holds.shared // (self.shared + 1024))
        return min(limits)


def compile_for(launch: Launch, config: Config, capability: int = 90) -> Resources:
    """Compile one recorded launch in one configuration.

    Arguments are specialised as at run time: integers equal to 1 become constants, and pointers
    and integers are told to be multiples of 16 where they are.

    Args:
        launch: of a kernel, with its arguments.
        config: which of its configurations.
        capability: compute capability, ten times; one of `MULTIPROCESSORS`.

    Raises:
        TritonError: the kernel needs what that GPU has not.
    """
    jitted = launch.kernel.jitted
    arguments: dict[str, Any] = {**launch.arguments, **config.blocks}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for parameter in jitted.params:
        value = arguments[parameter.name]
        place = (parameter.num,)
        kind, aligned = ("constexpr", False) if parameter.is_constexpr else _specialise(value)
        if kind == "constexpr":
            constants[place] = value
        elif aligned:
            attributes[place] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    compiled = triton.compile(
        ASTSource(jitted, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages, **OPTIONS},
    )
    usage, sass = _disassemble(compiled.asm["cubin"])
    match = re.search(r"REG:(\d+)", usage)
    assert match is not None, usage
    return Resources(
        capability=capability,
        registers=int(match.group(1)),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=compiled.metadata.shared,
        threads=32 * config.warps,
        sass=sass,
    )


def _specialise(value: Any) -> tuple[str, bool]:
    """Type of an argument in Triton's signatures, and whether it is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        # A meta tensor has no address: its offset tells whether a view is aligned.
        return _POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, TensorDescriptor):
        block = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}[{block}]>", False
    if isinstance(value, float):
        return "fp32", False
    if value is None or isinstance(value, bool) or value == 1:
        return "constexpr", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a cubin."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def ask(option: str) -> str:
            command = [tool, option, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603

        return ask("-res-usage"), ask("-sass")
