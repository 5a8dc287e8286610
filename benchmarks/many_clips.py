"""How many clips a second do workers on one device, two devices or more get through?

    python benchmarks/many_clips.py                                   # small networks, on a CPU
    python benchmarks/many_clips.py --model mini --devices cuda:0 cuda:0,cuda:1 --clips 64 \
        --preset balanced --lowering inductor --steps 20 --chunk 16

Cuts short clips of several lengths out of one (a chunk of frames, two, three, and so on again) and
syncs them with ``jobs.workers.Spread``, the machinery of ``lsync sync --jobs``, once for each of
``--devices``. A row has the whole time, models loaded and graphs compiled included, and the rate
between the moment at which each worker has done a clip and the moment at which the first has no
further one. With ``--seconds`` nothing is begun that would end later, by the rows so far, and rows
on file are not measured again: the same call goes on.

Workers on one CPU share its cores, so there a row of two workers shows what spreading costs, not
what a second device gains. Seconds are those of the clock and depend on what else the machine does
(``load`` says how many processes wanted a core at the beginning); processor seconds do so little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, merge_results, recorded
from memory import SAMPLE
from soak import cut, small_pipeline

from lsync_compile.jobs import JobOutcome, ListedJob, SyncSettings
from lsync_compile.jobs.workers import Spread

KEY = ("model", "preset", "lowering", "steps", "chunk", "clips", "devices", "threads")


def save_small(folder: Path) -> str:
    """Random small networks as a checkpoint that workers can load; its folder."""
    pipe = small_pipeline(torch.device("cpu"), torch.float32)
    pipe.unet.save_config(folder)
    (folder / "config.json").rename(folder / "unet.json")
    pipe.unet.save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "unet.safetensors")
    pipe.vae.save_pretrained(folder / "vae")
    pipe.audio_encoder.save_pretrained(folder)
    about = {"version": 1, "resolution": pipe.resolution, "mask": None}
    (folder / "mini.json").write_text(json.dumps(about))
    return str(folder)


class Times:
    """When what happened, in seconds from the beginning."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.given: float | None = None
        self.done: list[float] = []
        self.warm: int | None = None  # clips done when each worker has done one
        self.last_given: int | None = None  # clips done when the first worker had no further one

    def now(self) -> float:
        return time.perf_counter() - self.began

    def tell(self, outcome: JobOutcome) -> None:
        if outcome.state != "done":
            raise SystemExit(f"{outcome.output}: {outcome.state} {outcome.error}")
        self.done.append(self.now())

    def show(self, spread: Spread) -> None:
        if self.given is None and any(state.steps[0] for state in spread.workers):
            self.given = self.now()
        if self.warm is None and all(state.jobs for state in spread.workers):
            self.warm = len(self.done)
        waiting = any(state.doing == "waiting" for state in spread.workers)
        if self.warm is not None and self.last_given is None and waiting:
            self.last_given = len(self.done)

    @property
    def steady(self) -> float | None:
        """Clips/s while all workers have something to do; None with too few clips."""
        first, last = self.warm or 0, self.last_given or len(self.done)
        if first < 1 or last - first < 2:
            return None
        return (last - first) / (self.done[last - 1] - self.done[first - 1])


def measure(settings: SyncSettings, clips: list[Path], count: int, devices: str) -> dict[str, Any]:
    """Sync so many clips in turns on some devices."""
    with tempfile.TemporaryDirectory() as name:
        jobs = [
            ListedJob(line, clips[line % len(clips)], None, Path(name) / f"{line}.mp4")
            for line in range(count)
        ]
        load, spent, times = os.getloadavg()[0], processor_seconds(), Times()
        spread = Spread(
            jobs, settings.prepare, devices.split(","), tell=times.tell, show=times.show
        )
        outcomes = spread.run()
        seconds = times.now()
    return {
        "seconds": round(seconds, 2),
        "seconds_until_the_first_step": round(times.given or 0.0, 2),
        "clips_per_second": round(count / seconds, 3),
        "steady_clips_per_second": None if times.steady is None else round(times.steady, 3),
        "frames": sum(each.frames for each in outcomes),
        "median_seconds_a_clip": round(statistics.median(each.seconds for each in outcomes), 3),
        "clips_by_worker": [state.jobs for state in spread.workers],
        "processor_seconds": round(processor_seconds() - spent, 1),
        "load": round(load, 1),
    }


def processor_seconds() -> float:
    """What the workers that have ended took of the cores, loading included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpus = torch.cuda.device_count()
    usual = ["cuda:0", ",".join(f"cuda:{index}" for index in range(gpus))] if gpus else []
    parser.add_argument("--model", default="mini" if gpus else "small", help="small, mini, folder")
    parser.add_argument("--devices", nargs="+", default=usual or ["cpu", "cpu,cpu"])
    parser.add_argument("--preset", default="exact", help="none runs the plain pipeline")
    parser.add_argument("--lowering", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--kinds", type=int, default=6, help="different clips")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=4, help="frames")
    parser.add_argument("--seconds", type=float, help="begin nothing that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS / "many_clips.json")
    arguments = parser.parse_args()
    question, began, longest = __doc__.splitlines()[0], time.monotonic(), 0.0
    device = torch.device(arguments.devices[0].split(",")[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small").mkdir()
        small = arguments.model == "small"
        plain = arguments.preset == "none"
        settings = SyncSettings(
            checkpoint=save_small(folder / "small") if small else arguments.model,
            options=None if plain else {"preset": arguments.preset, "lowering": arguments.lowering},
            arguments={"num_inference_steps": arguments.steps, "num_frames": arguments.chunk},
        )
        speech = SAMPLE / "speech.wav"
        clips = cut(SAMPLE / "talking.mp4", speech, arguments.kinds, folder, arguments.chunk)
        for devices in dict.fromkeys(arguments.devices):
            about = {
                "model": arguments.model,
                "preset": arguments.preset,
                "lowering": "none" if plain else arguments.lowering,
                "steps": arguments.steps,
                "chunk": arguments.chunk,
                "clips": arguments.clips,
                "devices": devices,
                "threads": os.environ.get("OMP_NUM_THREADS", "shared"),
            }
            if [about[name] for name in KEY] in recorded(arguments.out, question, device, KEY):
                print(f"{devices}: on file")
                continue
            left = (arguments.seconds or float("inf")) - (time.monotonic() - began)
            if longest > left:
                raise SystemExit(f"out of time before {devices}; the same call goes on")
            begin = time.monotonic()
            row = {**about, **measure(settings, clips, arguments.clips, devices)}
            longest = max(longest, time.monotonic() - begin)
            print(json.dumps(row))
            merge_results(arguments.out, question, device, [row], KEY)


if __name__ == "__main__":
    main()
