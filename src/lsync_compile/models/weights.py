"""Read weight files and put them into modules, with errors that say what does not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lsync_compile.errors import CheckpointError, LsyncError

M = TypeVar("M", bound=nn.Module)

# What torch and safetensors raise for files that are truncated, damaged or something else.
_UNREADABLE = (
    *(RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError),
    *(TypeError, AttributeError, IndexError, MemoryError, OverflowError, AssertionError),
)
# What the constructors of torch's and others' modules raise for values that make no sense.
_UNBUILDABLE = (
    *(TypeError, ValueError, AttributeError, LookupError, RuntimeError, ArithmeticError),
    *(AssertionError, MemoryError, OSError),
)
_MOST_LAYERS = 64  # of a block; more would be no network but a file that went wrong
_COUNTS_LAYERS = ("layers", "layers_per_block", "num_transformer_block", "encoder_layers")


def read_archive(path: Path) -> dict[str, Any]:
    """Read a ``.safetensors`` file, or a dictionary saved with ``torch.save``, onto the CPU.

    Tensors are mapped from the file where its format allows it, so that reading takes no memory
    until they are used. No code in the file is run (``weights_only``).

    Raises:
        CheckpointError: the file is missing, truncated, damaged or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with path.open("rb") as stream:
            mappable = stream.read(4) == b"PK\x03\x04"  # a zip archive: torch 1.6 and later
        archive = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except (SafetensorError, *_UNREADABLE) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{path}: cannot be read, it may be truncated or damaged; download it again ({reason})"
        ) from error
    if not isinstance(archive, dict):
        raise CheckpointError(f"{path}: holds a {type(archive).__name__}, not a dictionary")
    return archive


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read named weights; a dictionary may hold them under ``state_dict``.

    A ``module.`` in front of every name (left by distributed training) is dropped.

    Raises:
        CheckpointError: as `read_archive`, or there are no weights.
    """
    archive = read_archive(path)
    state = check_weights(archive.get("state_dict", archive), path)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def check_weights(state: object, path: Path) -> dict[str, Tensor]:
    """The same; refuses what is no dictionary of names and tensors, or an empty one.

    Raises:
        CheckpointError: names the file, and the first entry that is none.
    """
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds no weights")
    for name, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, no tensor")
    return state


def describe_misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """One clause on how the names and shapes of ``state`` differ from ``expected``, or none."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing (first: {missing[0]})")
        if unexpected:
            parts.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
        return "entries do not fit: " + ", ".join(parts)
    wrong = [name for name in expected if expected[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        return (
            f"{name} is {tuple(state[name].shape)} in the file "
            f"but {tuple(expected[name].shape)} by the configuration ({len(wrong)} such entries)"
        )
    kinds = ((name, state[name].dtype) for name in expected if expected[name].is_floating_point())
    for name, dtype in kinds:
        if not dtype.is_floating_point:
            return f"{name} holds {str(dtype).removeprefix('torch.')} and no floating-point numbers"
    return None


@contextmanager
def configured_by(source: Path) -> Iterator[None]:
    """For a block that makes a module as a file says: what goes wrong is the file's fault.

    Raises:
        CheckpointError: names the file.
    """
    try:
        yield
    except CheckpointError:
        raise
    except _UNBUILDABLE as error:
        reason = " ".join(str(error).split())[:200]
        kind = "" if isinstance(error, LsyncError) else f"{type(error).__name__}: "
        raise CheckpointError(
            f"{source}: no network can be made of this configuration ({kind}{reason})"
        ) from error


def check_layers(config: Mapping[str, Any], source: Path) -> None:
    """Refuse a configuration that would keep the machine busy making layers.

    Raises:
        CheckpointError: names the file and the key.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_layers(value, source)
        for count in value if isinstance(value, list) else [value]:
            if key in _COUNTS_LAYERS and isinstance(count, (int, float)) and count > _MOST_LAYERS:
                raise CheckpointError(f"{source}: {key}={value!r} is more than {_MOST_LAYERS}")


def build(
    make: Callable[[], M],
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    source: Path,
    config: Path | None = None,
    hint: Callable[[str], str] = lambda misfit: "",
) -> M:
    """Make a module without allocating its weights, then give it those of ``state``.

    Args:
        make: builds the module; called with the meta device as default.
        state: exactly the module's parameters and buffers.
        dtype: what floating-point weights are converted to.
        source: file that ``state`` was read from, for error messages.
        config: file that says what to make; ``source`` by default.
        hint: from the misfit to a clause on what to do about it.

    Returns:
        The module in evaluation mode.

    Raises:
        CheckpointError: names or shapes do not fit, there is no such module, or a weight is no
            number, or none in ``dtype``.
    """
    with configured_by(config or source), torch.device("meta"):
        module = make()
    misfit = describe_misfit(module.state_dict(), state)
    if misfit is not None:
        raise CheckpointError(f"{source}: {misfit}{hint(misfit)}")
    converted = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in state.items()
    }
    for name, value in converted.items():
        if not _is_finite(value):
            raise CheckpointError(
                f"{source}: {name} holds values that are infinite or no numbers as {dtype}; the "
                "file is damaged, or its training went wrong"
            )
    module.load_state_dict(converted, assign=True)
    return module.eval()


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point() or not value.numel():
        return True
    # One pass; a value that is no number is both the least and the greatest.
    return all(bool(torch.isfinite(bound)) for bound in value.aminmax())
