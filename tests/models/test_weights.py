"""Weight files: formats, damage, and modules that are built without a second copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lsync_compile.errors import CheckpointError
from lsync_compile.models.weights import build, describe_misfit, read_archive, read_state_dict

STATE = {"weight": torch.arange(12.0).view(3, 4), "bias": torch.ones(3)}


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 / 0",)


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[n], STATE[n]) for n in STATE)


def test_all_formats_give_the_same_weights(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "bare.pt")
    torch.save({"state_dict": STATE, "global_step": 5}, tmp_path / "nested.pt")
    prefixed = {f"module.{name}": value for name, value in STATE.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "prefixed.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "file.safetensors")
    for path in tmp_path.iterdir():
        assert same(read_state_dict(path)), path.name


@pytest.mark.parametrize("name", ["weights.pt", "old.pt", "weights.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_files_are_named(tmp_path: Path, name: str, share: float) -> None:
    path, state = tmp_path / name, {"weight": torch.randn(200, 100)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=name != "old.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read.*truncated") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_weight_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        read_archive(path)
    path.write_text("<!DOCTYPE html>")  # a download that went wrong
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_archive(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dictionary"):
        read_archive(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_state_dict(path)
    torch.save({"state_dict": {"step": 3}}, path)
    with pytest.raises(CheckpointError, match="entry 'step' is a int"):
        read_state_dict(path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": RunsCode()}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state_dict(path)


def test_misfits_are_counted_and_the_first_is_named() -> None:
    expected = {name: torch.zeros(2) for name in ("a", "b", "c")}
    assert describe_misfit(expected, expected) is None
    found = {name: torch.zeros(2) for name in ("b", "x", "y")}
    misfit = describe_misfit(expected, found)
    assert misfit is not None
    assert "2 missing (first: a)" in misfit
    assert "2 unexpected (first: x)" in misfit
    misfit = describe_misfit(expected, expected | {"b": torch.zeros(2, 3), "c": torch.zeros(1)})
    assert misfit is not None
    assert misfit.startswith("b is (2, 3) in the file but (2,) by the configuration (2 such")


def test_build_uses_the_files_own_memory_and_converts_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save(STATE, path)
    state = read_state_dict(path)
    module = build(lambda: nn.Linear(4, 3), state, dtype=torch.float32, source=path)
    assert module.weight.data_ptr() == state["weight"].data_ptr()
    assert not module.training
    assert module.weight.requires_grad
    halved = build(lambda: nn.Linear(4, 3), state, dtype=torch.float16, source=path)
    assert halved.weight.dtype == torch.float16
    with pytest.raises(CheckpointError, match=r"file\.pt: weight is \(3, 4\).*\(3, 5\).*; do this"):
        build(
            lambda: nn.Linear(5, 3),
            state,
            dtype=torch.float32,
            source=path,
            hint=lambda misfit: "; do this",
        )
