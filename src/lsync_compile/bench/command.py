"""Measures the rows of the benchmark one by one, and files each as it comes."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lsync_compile.bench import rows as rowing
from lsync_compile.bench.engines import Networks
from lsync_compile.bench.networks import arithmetic_ceiling, random_unet, random_vae
from lsync_compile.bench.quality import Judge, load_recording, record
from lsync_compile.bench.results import Results, Section
from lsync_compile.bench.rows import Row
from lsync_compile.bench.sizes import SD_VAE, SMALL_UNET, SMALL_VAE, STAGE2_512
from lsync_compile.bench.speed import count_work, measure_rows
from lsync_compile.bench.timing import machine, measure
from lsync_compile.models.checkpoint import load_unet, load_vae, resolve_checkpoint

PIXELS = {"full": 512, "mini": 256, "small": 128}
MEASURES = ("speed", "quality", "waterfall", "end-to-end")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        results: the JSON file.
        device: where.
        dtype: of the networks.
        size: ``full`` for LatentSync 1.6 with random weights, ``mini`` for the bundled model,
            ``small`` for a check of the command.
        recording: faces and sound for the quality; recorded there from the clip if missing.
        clip, audio: to record.
        frames: a chunk.
        runs: chunks timed.
        measures: of :data:`MEASURES`.
        names: beginnings of the names of rows; all if empty.
        configurations: files whose options are rows too.
        all_frames: of the recording.
        steps: of the plain run, in place of 20 for a check of the command.
        seconds: start nothing that would take longer; None has no limit.
        again: measure what is on file too.
    """

    results: Path
    device: torch.device
    dtype: torch.dtype
    size: str
    recording: Path
    clip: Path
    audio: Path | None = None
    frames: int = 16
    runs: int = 5
    measures: tuple[str, ...] = ("speed", "quality")
    names: tuple[str, ...] = ()
    configurations: tuple[Path, ...] = ()
    all_frames: int = 48
    steps: int = 20
    seconds: float | None = None
    again: bool = False
    started: float = field(default_factory=time.perf_counter)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def lowering(self) -> str:
        """Inductor's C++ takes minutes on a CPU and says nothing of a GPU."""
        return "inductor" if self.on_gpu else "eager"

    def rows(self, matched: tuple[int, ...] = ()) -> list[Row]:
        """What is compared, of what was asked for by name.

        Args:
            matched: further numbers of steps for Inductor.
        """
        fewer = rowing.inductor(tuple(dict.fromkeys([*rowing.FEW_STEPS, *matched])))
        rows = [
            *rowing.originals(),
            *rowing.ours(list(self.configurations), self.lowering),
            *fewer,
            *rowing.others(),
        ]
        if not self.on_gpu:
            rows = [row.on_a_cpu() for row in rows]
        return [row for row in rows if not self.names or self._asked_for(row.name, rows)]

    def _asked_for(self, name: str, rows: list[Row]) -> bool:
        """Whether a row is one that was named, or begins like a name that no row has."""
        whole = {row.name for row in rows}.intersection(self.names)
        return name in whole or name.startswith(tuple(set(self.names) - whole))


class OutOfTime(Exception):  # noqa: N818  no error: the same call goes on
    """The next piece would not be done in time."""


class Budget:
    """Stops before a piece of work that takes as long as the longest so far."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._longest = 0.0

    def spend(self, what: str, work: Callable[[], Any]) -> Any:
        """Do a piece of work.

        Raises:
            OutOfTime: it would not be done in time.
        """
        begin, limit = time.perf_counter(), self._plan.seconds
        if limit is not None and begin - self._plan.started + self._longest > limit:
            raise OutOfTime(what)
        result = work()
        self._longest = max(self._longest, time.perf_counter() - begin)
        return result


def run(plan: Plan, tell: Tell = lambda text: None) -> tuple[Results, str]:
    """Measure what is missing.

    Returns:
        All results, and the row before which time was up (empty where nothing is left).

    Raises:
        LsyncError: a clip, a recording or a configuration cannot be used.
    """
    results, budget = Results(plan.results), Budget(plan)
    matched: tuple[int, ...] = ()
    try:
        if "speed" in plan.measures:
            matched = measure_speed(plan, results, budget, tell)
        else:
            matched = matching_on_file(results)
        if "quality" in plan.measures:
            measure_quality(plan, results, budget, tell, matched)
        if "waterfall" in plan.measures:
            measure_waterfall(plan, results, budget, tell)
        if "end-to-end" in plan.measures:
            measure_end_to_end(plan, results, budget, tell)
    except OutOfTime as late:
        return results, str(late)
    return results, ""


def measure_speed(plan: Plan, results: Results, budget: Budget, tell: Tell) -> tuple[int, ...]:
    """Time the rows that are not on file.

    Returns:
        The numbers of steps with which Inductor takes as long as our approximate rows.
    """
    section, about = _section(plan, results, "speed")
    made: list[Networks] = []
    tried: set[str] = set()
    for matched in (False, True):  # the second time with what the first found
        counts = matching_steps(section) if matched else ()
        rows = [row for row in missing(plan, section, plan.rows(counts)) if row.name not in tried]
        tried.update(row.name for row in rows)
        if rows and not made:
            made.append(make_networks(plan))
            if "work" not in section.content:
                work = count_work(made[0], plan.frames)
                section.content["work"] = {**work, "ceilings": ceilings(plan)}
        for _, group in itertools.groupby(rows, lambda row: (row.engine, repr(row.options))):
            _time(plan, list(group), made[0], section, about, budget, tell)
    return matching_steps(section)


def matching_steps(section: Section) -> tuple[int, ...]:
    """Steps of Inductor that take as long as a chunk of ours, for each approximate row of ours."""
    by_name = {row["row"]: row for row in section.rows if "frames_per_s" in row}
    base = by_name.get("Inductor")
    if base is None:
        return ()
    around = base["encode_ms"] + base["decode_ms"]
    found = []
    for row in by_name.values():
        if row["engine"] == rowing.LSYNC and not row["exact"] and row["row"] != rowing.PACKAGE:
            steps = round((row["chunk_ms"]["p50"] - around) / base["unet_step_ms"])
            if 1 <= steps < 20:
                found.append(steps)
    return tuple(sorted(set(found), reverse=True))


def matching_on_file(results: Results) -> tuple[int, ...]:
    """:func:`matching_steps` of full-size runs on any machine, so that quality stands beside speed.

    Quality is of one model whatever was timed, so the sections' other settings do not matter.
    """
    timed = [
        content
        for content in results.sections
        if content["kind"] == "speed" and content["setting"]["size"] == "full"
    ]
    steps = {count for content in timed for count in matching_steps(Section(results, content))}
    return tuple(sorted(steps, reverse=True))


def _time(
    plan: Plan,
    rows: list[Row],
    networks: Networks,
    section: Section,
    about: dict[str, str],
    budget: Budget,
    tell: Tell,
) -> None:
    """Time rows of one engine."""
    reason = rowing.why_not(rows[0], plan.on_gpu)
    if reason:
        for row in rows:
            section.add({**row.to_dict(), "not_measured": reason}, about)
            tell(f"{row.name}: not measured, {reason}")
        return
    measured = measure_rows(rows, networks, frames=plan.frames, runs=plan.runs, steps=plan.steps)
    try:
        for expected in rows:
            row, found = budget.spend(expected.name, functools.partial(next, measured))
            section.add({**row.to_dict(), **found}, about)
            refused = found.get("refused")
            tell(refused or f"{row.name}: {found['frames_per_s']:.2f} frames/s")
    finally:
        measured.close()  # undoes what was compiled


def measure_quality(
    plan: Plan, results: Results, budget: Budget, tell: Tell, matched: tuple[int, ...]
) -> None:
    """Judge the rows that are not on file on the bundled model."""
    setting = {
        "clip": plan.clip.name,
        "all_frames": plan.all_frames,
        "frames": plan.frames,
        "steps": plan.steps,
        "dtype": _name(plan.dtype),
    }
    about = machine(plan.device)
    section = results.section("quality", setting, about)
    rows = [
        row
        for row in missing(plan, section, plan.rows(matched))
        if row.engine not in (rowing.TENSORRT, rowing.AUTOTUNED)  # Inductor's, but for rounding
    ]
    if not rows:
        return
    if importlib.util.find_spec("cv2") is None:
        tell("quality: not measured, the measures need OpenCV; another machine may go on with it")
        return
    if plan.recording.exists():
        recording = load_recording(plan.recording)
    else:
        tell(f"recording {plan.all_frames} frames of {plan.clip.name}")
        recording = record(plan.clip, plan.audio, plan.all_frames, plan.recording)
    judge = Judge(recording, plan.device, plan.dtype, frames=plan.frames, steps=plan.steps)
    budget.spend("the reference", lambda: judge.reference)
    if "floors" not in section.content:
        section.content["floors"] = budget.spend("the noise floor", judge.floors)
    for row in rows:
        found = budget.spend(row.name, functools.partial(judge.judge, row))
        section.add({**row.to_dict(), **found}, about)
        psnr = found["mouth_psnr"]
        tell(f"{row.name}: {'equal' if psnr is None else f'{psnr:.2f} dB'}")


def measure_waterfall(plan: Plan, results: Results, budget: Budget, tell: Tell) -> None:
    """Time a UNet step with each exact optimisation added to those before it."""
    section, about = _section(plan, results, "waterfall")
    rows = list(missing(plan, section, rowing.waterfall(plan.on_gpu)))
    networks = make_networks(plan) if rows else None
    for row in rows:
        assert networks is not None
        _time(plan, [row], networks, section, about, budget, tell)


def measure_end_to_end(plan: Plan, results: Results, budget: Budget, tell: Tell) -> None:
    """Time whole jobs of the original, Inductor and ours, with the timeline of each of ours."""
    # PyAV and OpenCV are needed for this alone.
    from lsync_compile.bench.end_to_end import measure_job

    section, about = _section(
        plan, results, "end to end", clip=plan.clip.name, all_frames=plan.all_frames
    )
    wanted = [row for row in plan.rows() if row.engine != rowing.TENSORRT and row.steps == 20]
    rows = list(missing(plan, section, wanted))
    networks = make_networks(plan) if rows else None
    for row in rows:
        assert networks is not None
        reason = rowing.why_not(row, plan.on_gpu)
        if reason:
            section.add({**row.to_dict(), "not_measured": reason}, about)
            continue
        plain = re.sub(r"[^A-Za-z0-9]+", "-", row.name)
        trace = plan.results.with_name(f"timeline-{plain}.json")
        job = functools.partial(
            measure_job,
            row,
            networks,
            plan.clip,
            plan.audio,
            frames=plan.frames,
            all_frames=plan.all_frames,
            steps=plan.steps,
            trace=trace,
        )
        found = budget.spend(row.name, job)
        section.add({**row.to_dict(), **found}, about)
        tell(f"{row.name}, end to end: {found['frames_per_s']:.2f} frames/s")


def missing(plan: Plan, section: Section, rows: list[Row]) -> Iterator[Row]:
    """Rows that have no figures yet."""
    for row in rows:
        if plan.again or section.find(row.to_dict()) is None:
            yield row


def make_networks(plan: Plan) -> Networks:
    """UNet and VAE of the size that was asked for."""
    if plan.size == "mini":
        checkpoint = resolve_checkpoint("mini")
        unet = load_unet(checkpoint.unet_file, checkpoint.unet_config, dtype=plan.dtype)
        vae = load_vae(checkpoint, dtype=plan.dtype)
        for module in (unet, vae):
            module.to(plan.device).eval().requires_grad_(False)
        return Networks(unet, vae)
    small = plan.size == "small"
    unet_config = {**SMALL_UNET, "layers_per_block": 1} if small else STAGE2_512
    vae_config = {**SMALL_VAE, "layers_per_block": 1} if small else SD_VAE
    made = random_unet(unet_config, plan.device)
    vae = random_vae({**vae_config, "scaling_factor": 0.18215}, plan.device, plan.dtype)
    return Networks(torch.nn.Module.to(made, plan.dtype), vae)


def ceilings(plan: Plan) -> dict[str, float]:
    """What the device does at most: a large matrix product, and a copy (read plus written)."""
    flops = arithmetic_ceiling(plan.device, plan.dtype, 8192 if plan.on_gpu else 512)
    block = torch.empty(2**28 if plan.on_gpu else 2**22, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(block)
    copying = measure(lambda: target.copy_(block), plan.device)
    return {
        "tflop_per_s": round(flops / 1e12, 4),
        "gb_per_s": round(2 * block.numel() / (copying.p50 * 1e6), 2),
    }


def _section(
    plan: Plan, results: Results, kind: str, **more: Any
) -> tuple[Section, dict[str, str]]:
    setting = {
        **more,
        "size": plan.size,
        "pixels": PIXELS[plan.size],
        "frames": plan.frames,
        "dtype": _name(plan.dtype),
        "steps": plan.steps,
    }
    about = machine(plan.device)
    return results.section(kind, setting, about), about


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
