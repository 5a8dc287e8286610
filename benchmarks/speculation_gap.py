"""Does the gap that speculation checks tell how wrong a speculated start is?

    python benchmarks/speculation_gap.py [--frames 2] [--seconds 150]

Pairs of pieces of the recorded chunks (``tests/fixtures``, the bundled model): B is started from A
in the middle of 20 steps and compared with B's own way. A row has the gap between the two guesses,
the true error of the kept one at the start (both in standard deviations of clean latents) and the
difference of the final latents. ``chosen`` marks the pairs that ``speculate_tolerance`` was chosen
with; the others say whether it holds. Pairs of one clip and speaker are all there are.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from common import RESULTS, merge_results, recorded
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fixtures import load_chunks, recorded_job

from lsync_compile.models.conditions import Conditions, Prepared
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.synthesis import ChunkSynthesizer
from lsync_compile.runtime.batching import Lane
from lsync_compile.runtime.timesteps import levels

QUESTION = __doc__.splitlines()[0]
KEY = ("pair", "frames", "start")
STEPS = 20
# Chunk and first frame of A and of B, what is done to B's conditions, and whether the tolerance was
# chosen with the pair.
PAIRS = {
    "next frames": (("full", 0), ("full", 3), "", True),
    "other part": (("full", 0), ("tail", 0), "", True),
    "mirrored, inverted": (("full", 0), ("tail", 0), "inverted", True),
    "later frames": (("full", 6), ("full", 11), "", False),
    "backwards": (("tail", 2), ("full", 2), "", False),
    "mirrored": (("full", 6), ("full", 11), "mirrored", False),
    "other sound": (("full", 6), ("full", 11), "silent", False),
    "shifted picture": (("full", 6), ("full", 11), "shifted", False),
}


def mean(latents: Tensor) -> Tensor:
    return latents.float().mean(dim=2, keepdim=True)


def rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def main() -> None:
    """Measure the pairs that are not on file."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--frames", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=150, help="start no pair after these")
    parser.add_argument("--out", type=Path, default=RESULTS / "speculation_gap.json")
    arguments, begin = parser.parse_args(), time.monotonic()
    device, frames = torch.device("cpu"), arguments.frames
    pipeline = LatentSyncPipeline.from_pretrained("mini")
    job = recorded_job(pipeline, frames, steps=STEPS, seed=0)
    chunks = {chunk.name: chunk for chunk in load_chunks()}
    run = ChunkSynthesizer(pipeline.vae, pipeline.unet, pipeline.scheduler, job, device)

    def lane(number: int, place: tuple[str, int], change: str) -> Lane:
        chunk, piece = chunks[place[0]], slice(place[1], place[1] + frames)
        fixed, audio = chunk.fixed[:, :, piece], chunk.audio[piece]
        if change in ("mirrored", "inverted"):
            sign = -1 if change == "inverted" else 1
            fixed = torch.cat([fixed[:, :1], sign * fixed[:, 1:].flip(-1)], dim=1)
        elif change == "shifted":
            fixed = torch.cat([fixed[:, :1], fixed[:, 1:].roll(3, dims=-1)], dim=1)
        elif change == "silent":
            audio = torch.zeros_like(audio)
        given = Conditions(torch.cat([torch.zeros_like(audio), audio]), torch.cat([fixed, fixed]))
        faces, noise = Prepared(torch.zeros(frames, 3, 8, 8), []), chunks["full"].noise
        walk = run.pace.begin(number, faces, fixed[:, -4:], noise, run.scheduler, {})
        return Lane(walk, given, run.scheduler, faces)

    def whole(one: Lane) -> tuple[list[Tensor], list[Tensor]]:
        predict, ways, noises = run._shared_calls([one]), [one.walk.latents], []
        for step in range(STEPS):
            noises += predict(step, [ways[-1]])
            ways.append(one.walk.step(step, noises[-1], ways[-1]))
        return ways, noises

    done = recorded(arguments.out, QUESTION, device, KEY)
    for pair, (first, second, change, chosen) in PAIRS.items():
        if [pair, frames, STEPS // 2] in done:
            continue
        if time.monotonic() - begin > arguments.seconds:
            raise SystemExit("out of seconds; the same call again goes on from here")
        ours, own = lane(0, first, ""), lane(1, second, change)
        with torch.no_grad():
            (a, noise_a), (b, noise_b) = whole(ours), whole(own)
            ladder, predict = levels(run.scheduler), run._shared_calls([own])

            def ahead(since: int, at: Tensor, noise: Tensor, to: int) -> Tensor:
                there = ladder[since].jump(mean(a[since]), mean(noise_a[since]), ladder[to])  # noqa: B023
                return ladder[since].jump(at, noise, ladder[to]) + mean(a[to]) - there  # noqa: B023

            start, middle = STEPS // 2, STEPS // 4
            guess, halfway = ahead(0, b[0], noise_b[0], start), ahead(0, b[0], noise_b[0], middle)
            (noise,) = predict(middle, [halfway])
            kept = latents = ahead(middle, halfway, noise, start)
            for step in range(start, STEPS):
                (noise,) = predict(step, [latents])
                latents = own.walk.step(step, noise, latents)
        signal = ladder[start].signal
        row = {
            "pair": pair,
            "frames": frames,
            "start": start,
            "chosen": chosen,
            "gap": round(rms(kept - guess) / signal, 4),
            "true_error": round(rms(kept - b[start]) / signal, 4),
            "final_difference": round(rms(latents - b[-1]), 4),
        }
        merge_results(arguments.out, QUESTION, device, [row], KEY)
        print(row, flush=True)


if __name__ == "__main__":
    main()
