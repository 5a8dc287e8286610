"""The mean of a run's weights and of those it began from.

    python -m training.average --before START --after OUT --share 0.5 --out AVERAGED

A run that goes on with other data moves between two habits: here, from drawing the mouth that the
chin shows to drawing the one that is heard. Its weights and those it began from lie in one basin,
so that their mean works and has some of both (Wortsman et al. 2022, *Model soups*;
Ilharco et al. 2022, *Patching open-vocabulary models by interpolating weights*). ``--share`` is
that of the later run; `training.evaluate` says which is best.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = ("unet.safetensors", "audio.safetensors")


def average(before: dict[str, Tensor], after: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """``(1 - share) * before + share * after``, in float32, rounded to the dtype of ``before``.

    Raises:
        ValueError: the two do not have the same names and shapes.
    """
    if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}:
        raise ValueError("the two runs do not have weights of the same names and shapes")
    return {
        name: torch.lerp(value.float(), after[name].float(), share).to(value.dtype)
        for name, value in before.items()
    }


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--before", type=Path, required=True, help="what --after was started from")
    p.add_argument("--after", type=Path, required=True, help="the later run's --out")
    p.add_argument("--share", type=float, default=0.5, help="of the later run, 0 to 1")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(arguments)
    if not 0 <= args.share <= 1:
        p.error("--share is a number from 0 to 1")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in WEIGHTS:
        mean = average(load_file(args.before / name), load_file(args.after / name), args.share)
        save_file(mean, args.out / name)
        shutil.copyfile(
            args.after / f"{Path(name).stem}.json", args.out / f"{Path(name).stem}.json"
        )
    run = json.loads((args.after / "train_unet.json").read_text())
    (args.out / "train_unet.json").write_text(json.dumps(run | {"averaged": args.share}) + "\n")


if __name__ == "__main__":
    main()
