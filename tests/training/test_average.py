from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.average import WEIGHTS, average, main


def weights(seed: int, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(3, 5, generator=generator).to(dtype), "b": torch.ones(2)}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mean_is_that_of_float64_rounded_once(share: float) -> None:
    before, after = weights(0), weights(1)
    mean = average(before, after, share)
    for name, value in mean.items():
        exact = (1 - share) * before[name].double() + share * after[name].double()
        assert value.dtype == before[name].dtype
        assert (value.double() - exact).abs().max() <= 2**-10 * exact.abs().max()


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="same names and shapes"):
        average(weights(0), {"a.weight": torch.zeros(3, 5)}, 0.5)


def test_a_folder_is_written_that_says_how(tmp_path: Path) -> None:
    for seed, folder in enumerate(("before", "after")):
        (tmp_path / folder).mkdir()
        for name in WEIGHTS:
            save_file(weights(seed), tmp_path / folder / name)
            (tmp_path / folder / f"{Path(name).stem}.json").write_text("{}")
    (tmp_path / "after" / "train_unet.json").write_text('{"steps": 3}')
    out = tmp_path / "out"
    main([
        "--before", str(tmp_path / "before"), "--after", str(tmp_path / "after"),
        "--share", "0.25", "--out", str(out),
    ])  # fmt: skip
    assert json.loads((out / "train_unet.json").read_text()) == {"steps": 3, "averaged": 0.25}
    mean = average(weights(0), weights(1), 0.25)
    assert torch.equal(load_file(out / "unet.safetensors")["a.weight"], mean["a.weight"])
