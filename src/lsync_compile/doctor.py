"""What `lsync doctor` looks at: whether this machine can do the job, and how fast it may be."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from lsync_compile.cores import usable_cores
from lsync_compile.errors import LsyncError
from lsync_compile.kernels.launch import OLDEST, supports

SUPPORTED_TORCH = ((2, 11), (2, 14))


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``state`` is ``"ok"``, ``"warning"`` or ``"failed"``."""

    name: str
    state: str
    detail: str

    def to_dict(self) -> dict[str, str]:
        """The finding as plain data."""
        return asdict(self)


def examine() -> list[Finding]:
    """Run every check; none of them needs the network or writes a file."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _devices,
        _codecs,
        _extras,
        _plugins,
        _model,
        _backend,
    )
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    import torch

    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    low, high = SUPPORTED_TORCH
    inside = low <= release <= high
    span = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    yield Finding(
        "torch",
        "ok" if inside else "warning",
        torch.__version__ if inside else f"{torch.__version__} is outside {span}, the tested range",
    )
    for package in ("diffusers", "transformers", "av", "triton"):
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            state = "warning" if package == "triton" else "failed"
            yield Finding(package, state, f"not installed; pip install {package}")


def _devices() -> Iterator[Finding]:
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    yield Finding("cpu", "ok", f"{cores} cores for this process, {threads} threads used")
    if not torch.cuda.is_available():
        yield Finding(
            "gpu", "warning", "none that torch can use; the CPU works, far from real time"
        )
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gigabytes = device.total_memory / 2**30
        lacking = []
        if gigabytes < 8:
            lacking.append("LatentSync 1.6 needs about 8 GiB")
        if not supports(torch.device("cuda", index)):
            lacking.append(f"older than {OLDEST[0]}.{OLDEST[1]}: no kernels of this package's own")
        found = (
            f"{device.name}, {gigabytes:.0f} GiB, compute capability {device.major}.{device.minor}"
        )
        yield Finding(f"gpu {index}", "warning" if lacking else "ok", "; ".join([found, *lacking]))


def _codecs() -> Iterator[Finding]:
    import av

    wanted: tuple[tuple[str, Literal["r", "w"], str], ...] = (
        ("libx264", "w", "writing the video"),
        ("aac", "w", "writing the sound"),
        ("h264", "r", "reading H.264"),
        ("hevc", "r", "reading H.265"),
    )
    for name, mode, use in wanted:
        try:
            av.Codec(name, mode)
            yield Finding(f"codec {name}", "ok", use)
        except av.codec.codec.UnknownCodecError:
            yield Finding(
                f"codec {name}",
                "failed",
                f"{use} is not possible; pip install --force-reinstall av",
            )


def _extras() -> Iterator[Finding]:
    extras = (("quality", "torchmetrics"), ("insightface", "insightface"), ("web", "gradio"))
    for extra, package in extras:
        try:
            yield Finding(f"extra {extra}", "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                f"extra {extra}", "warning", f'not installed; pip install "lsync-compile[{extra}]"'
            )


def _plugins() -> Iterator[Finding]:
    from lsync_compile.entry_points import entered
    from lsync_compile.passes.plugins import load

    for plugin in map(load, entered()):
        state = "warning" if plugin.problem else "ok"
        yield Finding(f"pass {plugin.name}", state, plugin.problem or f"of {plugin.distribution}")


def _model() -> Iterator[Finding]:
    from lsync_compile.models.checkpoint import load_unet, resolve_checkpoint

    try:
        checkpoint = resolve_checkpoint("mini")
        unet = load_unet(checkpoint.unet_file, checkpoint.unet_config)
    except LsyncError as error:
        yield Finding("bundled model", "failed", str(error))
        return
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    yield Finding("bundled model", "ok", f"UNet of {millions:.1f} M parameters")


def _backend() -> Iterator[Finding]:
    import torch

    class Doubler(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    known = "lsync" in torch._dynamo.list_backends(exclude_tags=())
    compiled = torch.compile(Doubler(), backend="lsync", options={"lowering": "eager"})
    right = bool(torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0)))
    yield Finding(
        "backend",
        "ok" if known and right else "failed",
        'torch.compile(..., backend="lsync") works'
        if known and right
        else "not registered; reinstall lsync-compile so that its entry point is found",
    )
