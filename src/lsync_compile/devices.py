"""The device and the number format that a command runs with."""

from __future__ import annotations

from enum import Enum
from typing import Any

from lsync_compile.cores import fit_threads
from lsync_compile.errors import OptionError


class DType(str, Enum):
    """Number format of the UNet and the VAE."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def choose_device(name: str | None) -> Any:
    """The torch device for ``--device``; the first GPU, else the CPU, for None.

    Fits this process's threads to its cores, whatever the device: faces and video are a CPU's.
    """
    import torch

    fit_threads()
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise OptionError(f"--device {name}: no such device; use cuda, cuda:N or cpu") from error
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and device.index):
        raise OptionError(f"--device {name}: cannot run this; use cuda, cuda:N or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise OptionError(f"--device {name}: the last GPU here is cuda:{count - 1}")
    return device


def choose_devices(names: str | None) -> list[str]:
    """The names in ``--devices``, one a worker.

    Args:
        names: separated by commas, each as for :func:`choose_device`; the same one may come again.
            "auto" and None are all GPUs, or else the CPU.

    Raises:
        OptionError: one is no device of this machine.
    """
    import torch

    if names is None or names.strip() == "auto":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    given = [name.strip() for name in names.split(",")]
    if not all(given):
        raise OptionError(f"--devices {names}: expected auto or names such as cuda:0,cuda:1")
    return [str(choose_device(name)) for name in given]


def choose_dtype(dtype: DType | None, device: Any) -> Any:
    """The torch dtype for ``--dtype``; half precision on a GPU, float32 on a CPU for None."""
    import torch

    default = DType.float16 if device.type == "cuda" else DType.float32
    return getattr(torch, (dtype or default).value)


def peak_device_mib(device: Any) -> float | None:
    """The most device memory that torch held in this process so far; None on a CPU."""
    import torch

    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_reserved(device) / 2**20, 1)
