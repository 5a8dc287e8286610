"""What a kernel needs of an H100's multiprocessor, found without one.

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
class Resources:
    """Of one compiled kernel.

    Attributes:
        registers: 32-bit registers a thread.
        spills: instructions that load or store a thread's local memory.
        shared: bytes of shared memory a program.
        threads: threads a program.
        sass: the machine code as text.
    """

    registers: int
    spills: int
    shared: int
    threads: int
    sass: str

    @property
    def programs(self) -> int:
        """How many programs one multiprocessor of an H100 holds at once."""
        # Registers are given out to warps in units of 256.
        registers = -(-self.registers * 32 // 256) * 256 * (self.threads // 32)
        limits = [2048 // self.threads, 65536 // registers, 32]
        if self.shared:
            limits.append(227 * 1024 // (self.shared + 1024))
        return min(limits)


def compile_sm90(launch: Launch, config: Config) -> Resources:
    """Compile one recorded launch in one configuration for compute capability 9.0.

    Arguments are specialised as at run time: integers equal to 1 become constants, and pointers
    and integers are told to be multiples of 16 where they are.
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
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.warps, "num_stages": config.stages, **OPTIONS},
    )
    usage, sass = _disassemble(compiled.asm["cubin"])
    match = re.search(r"REG:(\d+)", usage)
    assert match is not None, usage
    return Resources(
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
