"""How fast is a whole job, file to file, and does its memory grow with the length of the clip?

    python benchmarks/pipeline.py --clip CLIP.mp4 --sound SPEECH.wav     # full size, on a GPU
    python benchmarks/pipeline.py --settings path exact --lengths 10 60 --seconds 500 --clip ...
    python benchmarks/pipeline.py --settings exact+few_steps=10+steps=20 --with lowering=eager ...
    python benchmarks/pipeline.py --model mini --lengths 2 --with steps=2   # any machine, a check

The full-size model has the shapes of LatentSync 1.6 (UNet, Stable Diffusion's VAE, Whisper tiny)
and random weights: its mouths mean nothing (and cost the video encoder more than real ones), its
speed does. The clip and its faces are real.

A setting is a preset or one of the names in ``NAMED``, with ``+name=value`` for each option that is
to differ; ``steps`` and ``guidance`` are the arguments of the call. For each, a job of a few chunks
compiles and captures (``warm_up``, with the graphs found in Inductor's cache), then a job is timed.
The shortest length is measured for all settings, then the next. The sound is repeated to the
length, the clip is played back and forth; jobs are whole chunks, because a shorter last one would
be compiled on its own.

A row holds frames a second from the call to the finished file (``frames_per_s``) and after the
first chunk (``steady_frames_per_s``); the median milliseconds a chunk of each stage, which
lengthen each other where they overlap on one device; what the networks alone come to, as the sum
of theirs; host memory in use, its peak and its mean over each quarter of the job; the peak device
memory; graphs compiled after the warm-up, which should be none. Beside the results, each job leaves
its timeline as a Chrome trace and a picture (SVG).
"""

from __future__ import annotations

import argparse
import ast
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, STAGE2_512, merge_results, recorded
from memory import SAMPLE, quarters
from trace_picture import draw
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import lsync_compile
from lsync_compile.bench.networks import random_unet, random_vae
from lsync_compile.bench.sizes import SD_VAE
from lsync_compile.errors import LsyncError
from lsync_compile.media.audio import load_audio
from lsync_compile.models.pipeline import LatentSyncPipeline
from lsync_compile.models.scheduler import default_scheduler
from lsync_compile.models.whisper import WhisperAudioEncoder
from lsync_compile.options import PRESETS, Options, resolve_options

NAMED: dict[str, str] = {
    "path": "exact+temporal_start=path+temporal_strength=0.25+lip_attention=True+crop_decode=True",
    "dpm": "exact+steps=12+solver=dpmpp_2m+deep_cache=True+deep_cache_interval=4"
    "+lip_attention=True+crop_decode=True",
}
# OpenAI's tiny Whisper, 8.2 M parameters in its encoder.
WHISPER_TINY = {
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}
_NAMES = {spec.name for spec in fields(Options) if spec.metadata["choices"]}
CALL = {"steps": ("num_inference_steps", 20), "guidance": ("guidance_scale", 1.5)}
KEY = ("model", "setting", "clip", "length_s")
NETWORKS = ("encode", "denoise", "decode")
CHUNK, FPS, RATE = 16, 25, 16000


def parse_setting(text: str, more: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the compiled pipeline and arguments of its call.

    Raises:
        OptionError: an option is unknown, or its value is none of its values.
        ValueError: the text is no setting.
    """
    name, *changes = text.split("+")
    if name in NAMED:
        name, *known = NAMED[name].split("+")
        changes = [*known, *changes]
    if name not in PRESETS:
        raise ValueError(f"no setting {name!r}; there are {', '.join([*PRESETS, *NAMED])}")
    options: dict[str, Any] = {"preset": name, "strict": True}
    call = dict(CALL.values())
    for change in [*changes, *more]:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is not name=value")
        if key in CALL:
            call[CALL[key][0]] = ast.literal_eval(value)
        else:
            options[key] = value if key in _NAMES else _value(value)
    resolve_options(None, options)
    return options, call


def _value(text: str) -> Any:
    """A Python literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The full-size pipeline with random weights, or that of a checkpoint."""
    if model != "full":
        return LatentSyncPipeline.from_pretrained(model, torch_dtype=dtype, device=device)
    unet = random_unet(dict(STAGE2_512), device).to(dtype)
    vae = random_vae(dict(SD_VAE), device, dtype)
    whisper = WhisperAudioEncoder(WhisperEncoder(WhisperConfig(**WHISPER_TINY)))
    pipeline = LatentSyncPipeline(vae, whisper, unet, default_scheduler())
    return pipeline.to(device)


def repeat_sound(source: Path, seconds: float, path: Path) -> Path:
    """Write the sound again and again up to a length, 16-bit mono."""
    samples = load_audio(source)
    wanted = round(seconds * RATE)
    samples = np.tile(samples, -(-wanted // len(samples)))[:wanted]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return path


@contextmanager
def watched(every: float = 0.1) -> Iterator[list[float]]:
    """Sample this process's resident memory in MiB during the block (Linux)."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while True:
            samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
            if done.wait(every):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


class Bench:
    """One process's pipeline and the jobs it does.

    Args:
        arguments: of the command line.
        folder: for sounds, traces and output files.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder
        self.device = torch.device(arguments.device)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.pipeline = make_pipeline(arguments.model, self.device, dtype)
        self.fast: Any = None
        self.setting = ""
        self.said: dict[str, Any] = {}
        self.call: dict[str, Any] = {}
        self.warm_up: dict[str, Any] = {}
        self.trace = folder / "trace.json"

    def take(self, setting: str, options: dict[str, Any], call: dict[str, Any]) -> None:
        """Compile a setting with a short job, unless it is in force."""
        if setting == self.setting:
            return
        if self.fast is not None:
            self.pipeline, self.fast = self.fast.lsync.undo(), None
            torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.setting, self.said, self.call = "", options | call, call
        self.fast = lsync_compile.compile(self.pipeline, **options, trace=self.trace)
        chunks = self.arguments.warm_up
        begin = time.perf_counter()
        self.job(chunks * CHUNK / FPS, chunks * CHUNK)
        seconds = time.perf_counter() - begin
        graphs = self.fast.lsync.report().graphs
        pasted = sorted(end for work, _, end in self.spans() if work == "paste")
        self.warm_up = {
            "seconds": round(seconds, 1),
            "lowering_s": round(sum(graph.lowering_seconds for graph in graphs), 1),
            "from_cache": sum(graph.cache_hit for graph in graphs),
            "graphs": len(graphs),
            "chunk_s": round(pasted[-1] - pasted[-2], 3),
        }
        self.setting = setting
        print(json.dumps(self.warm_up), flush=True)

    def job(self, length: float, frames: int) -> float:
        """Sync so many frames, file to file; seconds."""
        sound = repeat_sound(self.arguments.sound, length, self.folder / "sound.wav")
        result = self.fast(
            self.arguments.clip,
            sound,
            self.folder / "out.mp4",
            num_frames=CHUNK,
            max_frames=frames,
            generator=torch.Generator(self.device).manual_seed(0),
            progress=lambda done, total: None,
            **self.call,
        )
        if result.num_frames != frames:
            raise SystemExit(f"{result.num_frames} frames came out instead of {frames}")
        return float(result.seconds)

    def spans(self) -> list[tuple[str, float, float]]:
        """Kind of work, begin and end in seconds, of the last job."""
        events = json.loads(self.trace.read_text())["traceEvents"]
        names = {each["tid"]: each["args"]["name"] for each in events if each["ph"] == "M"}
        return [
            (names[each["tid"]], each["ts"] / 1e6, (each["ts"] + each["dur"]) / 1e6)
            for each in events
            if each["ph"] == "X"
        ]

    def measure(self, length: float) -> dict[str, Any]:
        """A timed job as a row."""
        frames = whole_chunks(length)
        before = self.fast.lsync.report().counters
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with watched() as resident:
            seconds = self.job(length, frames)
        after = self.fast.lsync.report().counters
        spans = self.spans()
        stages: dict[str, list[float]] = {}
        for work, begin, end in spans:
            stages.setdefault(work, []).append(1000 * (end - begin))
        written = sorted(end for work, _, end in spans if work == "write")
        steady = (len(written) - 1) * CHUNK / (written[-1] - written[0]) if written[1:] else None
        chunk = {work: round(statistics.median(spent), 1) for work, spent in stages.items()}
        networks = sum(chunk[name] for name in NETWORKS)
        return {
            "frames": frames,
            "seconds": round(seconds, 2),
            "frames_per_s": round(frames / seconds, 2),
            "steady_frames_per_s": None if steady is None else round(steady, 2),
            "networks_frames_per_s": round(1000 * CHUNK / networks, 2),
            "stage_ms": chunk,
            "host_mib": {
                "peak": round(max(resident)),
                "by_quarter": [round(statistics.mean(part or resident)) for part in
                               quarters(resident)],
            },
            "device_mib": self._device_memory(),
            "graphs_compiled": after["graphs"] - before["graphs"],
            "recompiles": after["recompiles"] - before["recompiles"],
            "warm_up": self.warm_up,
            "options": self.said,
        }  # fmt: skip

    def _device_memory(self) -> dict[str, int] | None:
        if self.device.type != "cuda":
            return None
        return {
            "peak_in_use": round(torch.cuda.max_memory_allocated(self.device) / 2**20),
            "peak_reserved": round(torch.cuda.max_memory_reserved(self.device) / 2**20),
        }

    def keep_trace(self, name: str) -> None:
        """Write the timeline of the last job beside the results, and its picture."""
        place = self.arguments.traces
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.json").write_text(self.trace.read_text())
        written = [end for work, _, end in self.spans() if work == "write"]
        middle, shown = written[len(written) // 2], max(written) / max(1, len(written)) * 8
        trace = json.loads(self.trace.read_text())
        begin = max(0.0, middle - shown / 2)
        (place / f"{name}.svg").write_text(draw(trace, begin=begin, end=begin + shown))


def whole_chunks(length: float) -> int:
    """Frames of a job of so many seconds."""
    return max(1, int(length * FPS) // CHUNK) * CHUNK


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, default=SAMPLE / "talking.mp4")
    parser.add_argument("--sound", type=Path, default=SAMPLE / "speech.wav")
    parser.add_argument("--model", default="full", help="full (random weights), mini or a folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--settings", nargs="+", default=["path", "exact", "dpm"])
    parser.add_argument(
        "--with", nargs="+", default=[], dest="more", metavar="NAME=VALUE", help="for all settings"
    )
    parser.add_argument("--lengths", type=float, nargs="+", default=[10.0, 60.0], help="seconds")
    parser.add_argument("--warm-up", type=int, default=3, help="chunks, at least 2")
    parser.add_argument("--seconds", type=float, help="start no job that would take longer")
    parser.add_argument("--again", action="store_true", help="measure what is on file too")
    parser.add_argument("--traces", type=Path, default=Path("traces"), help="folder for timelines")
    parser.add_argument("--out", type=Path, default=RESULTS / "pipeline.json")
    arguments = parser.parse_args()
    try:
        for setting in arguments.settings:
            parse_setting(setting, arguments.more)
    except ValueError as error:  # an OptionError is one
        parser.error(str(error))
    return arguments


def command() -> str:
    """The command line, files by their names alone."""
    words = (Path(word).name if "/" in word else word for word in sys.argv[1:])
    return " ".join(["benchmarks/pipeline.py", *words])


def main() -> None:
    started = time.perf_counter()
    arguments = parse()
    question, device = __doc__.splitlines()[0], torch.device(arguments.device)
    known = [] if arguments.again else recorded(arguments.out, question, device, KEY)
    bench: Bench | None = None
    longest = 0.0  # warm-up so far

    def over(more: float) -> bool:
        left = arguments.seconds and arguments.seconds - (time.perf_counter() - started)
        return left is not None and more > left

    with tempfile.TemporaryDirectory() as name:
        for length, text in itertools.product(sorted(arguments.lengths), arguments.settings):
            setting = "+".join([text, *arguments.more])
            key = [arguments.model, setting, arguments.clip.name, length]
            if key in known:
                continue
            print(f"{length:g} s of {setting}", flush=True)
            if over(longest):
                print("out of time; run the same call again")
                return
            bench = bench or Bench(arguments, Path(name))
            try:
                begin = time.perf_counter()
                bench.take(setting, *parse_setting(text, arguments.more))
                longest = max(longest, time.perf_counter() - begin)
                if over(bench.warm_up["chunk_s"] * whole_chunks(length) / CHUNK):
                    print("out of time; run the same call again")
                    continue
                row = {
                    **dict(zip(KEY, key, strict=True)),
                    **bench.measure(length),
                    "command": command(),
                }
            except LsyncError as error:
                print(f"failed: {error}", flush=True)
                continue
            print(json.dumps(row), flush=True)
            # At once: a later job that fails must not cost what was measured.
            merge_results(arguments.out, question, device, [row], KEY)
            bench.keep_trace(f"{text.split('+')[0]}.{arguments.clip.stem}.{length:g}s")


if __name__ == "__main__":
    main()
