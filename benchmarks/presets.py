"""What does each preset do to the picture and to the sync, on the bundled model?

    python benchmarks/presets.py                                   # the bundled sample
    python benchmarks/presets.py CLIP.mp4 [SPEECH.wav] --max-frames 48

Each preset, and DeepCache 3/0 as the DeepCache package does it, runs on the same inputs and noise
as the plain pipeline with 20 DDIM steps. A row holds PSNR, SSIM and flicker of the mouth region
against that run; with the clip's own sound, its PSNR against the original frames; and how the
opening of the mouth goes with the sound and with the opening in the clip that it replaces:
correlations at no offset, and the best with its offset in frames.
``lip movement`` is the standard deviation of the opening, of that in the clip.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, merge_results

from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.quality.compare import Clip, Compiler, clip_energy, judge
from lsync_compile.quality.footage import Footage
from lsync_compile.quality.runs import FPS, Setting, collect
from lsync_compile.quality.sync import Array, correlations, mouth_opening, speech_band

SAMPLE = Path(__file__).resolve().parents[1] / "src/lsync_compile/assets/sample"
REACH = 4  # frames
DEEP_CACHE = {"preset": "exact", "deep_cache": True, "deep_cache_interval": 3}
ROWS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "exact": {"preset": "exact"},
    "balanced": {"preset": "balanced"},
    "turbo": {"preset": "turbo"},
    "turbo, whole encode": {"preset": "turbo", "crop_encode": False},
    "2 steps, 1 guided": {
        "preset": "turbo",
        "crop_encode": False,
        "temporal_strength": 0.1,
    },
    "DeepCache 3/0": DEEP_CACHE,
}


def opening(footage: Footage) -> Array:
    """How far the mouth is open in aligned faces."""
    return mouth_opening(footage.clip(0, len(footage)))


def alike(one: Array, other: Array) -> dict[str, float]:
    """Correlations of two openings, or of an opening with the sound."""
    found = correlations(speech_band(one, FPS), speech_band(other, FPS), REACH)
    best = int(found.argmax())
    return {
        "correlation": round(float(found[REACH]), 3),
        "best": round(float(found[best]), 3),
        "offset": best - REACH,
    }


def decibels(value: float) -> float | str:
    """Rounded; JSON has no infinity."""
    return "equal bits" if math.isinf(value) else round(value, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path, nargs="?", default=SAMPLE / "talking.mp4")
    parser.add_argument("speech", type=Path, nargs="?", help="the clip's own by default")
    parser.add_argument("--max-frames", type=int)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=Path, default=RESULTS / "presets.json")
    arguments = parser.parse_args()
    if arguments.clip.parent == SAMPLE and arguments.speech is None:
        arguments.speech = SAMPLE / "speech.wav"
    clip, prepare = Clip(arguments.clip, arguments.speech), Compiler()
    pipeline = LatentSyncPipeline.from_pretrained("mini")
    reference: Any = None
    for name, options in ROWS.items():
        if name not in arguments.rows and name != "plain":
            continue
        setting = Setting(name, options=options and {**options, "lowering": "eager"})
        pipe: Any = prepare(pipeline, setting)
        made = collect(
            pipe, clip.video, clip.audio, setting, beside=reference,
            max_frames=arguments.max_frames,
        )  # fmt: skip
        reference = reference or made
        energy = clip_energy(clip, len(made))
        drawn, old = opening(made.synced), opening(made.faces)
        row: dict[str, Any] = {
            "clip": arguments.clip.name,
            "speech": "own" if arguments.speech is None else arguments.speech.name,
            "frames": len(made),
            "row": name,
            "with the sound": alike(drawn, energy),
            "with the old mouth": alike(drawn, old),
            "lip movement": round(float(drawn.std() / old.std()), 3),
        }
        result = judge(made, clip, energy, None if made is reference else reference)
        truth = result.against_original.get("mouth")
        if truth is not None:
            row["psnr_to_original"] = decibels(truth.psnr.value)
        if made is not reference:
            mouth = result.against_reference["mouth"]
            row |= {
                "mouth_psnr": decibels(mouth.psnr.value),
                "worst_frame_psnr": decibels(mouth.worst_psnr.value),
                "mouth_ssim": round(mouth.ssim.value, 4),
                "flicker": round(mouth.flicker.value, 3),
            }
        print(row, flush=True)
        merge_results(
            arguments.out, __doc__.splitlines()[0], torch.device("cpu"), [row],
            ("clip", "speech", "frames", "row"),
        )  # fmt: skip


if __name__ == "__main__":
    main()
