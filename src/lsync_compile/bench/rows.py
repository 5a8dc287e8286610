"""What is compared: the ways in which a user would otherwise run LatentSync, and ours.

A row is an engine, which runs the networks, and a number of steps with a solver. Rows of one engine
stand together, so that it compiles once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsync_compile.options import PRESETS, Options, resolve_options
from lsync_compile.passes.manager import ordered
from lsync_compile.passes.spec import registered
from lsync_compile.tune.configuration import read_configuration

EAGER, LSYNC, INDUCTOR, TENSORRT = "eager", "lsync", "inductor", "tensorrt"
AUTOTUNED = "inductor max-autotune"
ORIGINAL, PACKAGE = "original, eager", "original + DeepCache 3/0"
FEW_STEPS = (10, 5)
SOLVERS = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++ 2M", "unipc": "UniPC"}
NO_OPTIMISATION = frozenset({"keep_captures", "strict", "compile_vae", "face_cache"})  # of networks


@dataclass(frozen=True)
class Row:
    """One way to run.

    Attributes:
        name: unique; what results are filed under.
        engine: what runs the networks.
        options: of :func:`lsync_compile.compile`, for the engine ``lsync``.
        steps: that the pipeline is asked for.
        solver: a key of :data:`SOLVERS`.
        exact: whether its networks may differ from the eager ones by rounding only.
        note: what a reader has to know.
    """

    name: str
    engine: str
    options: dict[str, Any] | None = None
    steps: int = 20
    solver: str = "ddim"
    exact: bool = True
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What results must agree in to be this row's."""
        return {
            "row": self.name,
            "engine": self.engine,
            "options": self.options,
            "steps": self.steps,
            "solver": self.solver,
            "exact": self.exact,
            "note": self.note,
        }

    def part_of(self, steps: int) -> int:
        """Its steps where the plain run takes so many instead of 20."""
        return max(1, round(self.steps * steps / 20))

    def on_a_cpu(self) -> Row:
        """The row where Inductor's C++, which takes minutes, would say nothing of a GPU."""
        if self.engine != INDUCTOR or self.steps == 20:
            return self
        note = "run eagerly on a CPU"
        return dataclasses.replace(self, engine=EAGER, note=f"{self.note}; {note}")


def switches() -> list[str]:
    """Boolean options that are on in ``exact`` and optimise networks, as the waterfall has them.

    What is not a pass comes first. Without CUDA graphs the host would be what takes the time from
    some row on, and a pass that joins weights would pay for that in each call where they are not
    hoisted.
    """
    exact = resolve_options("exact")
    passes = [cls.spec.option for cls in ordered(registered().values())]
    others = [spec.name for spec in dataclasses.fields(Options) if spec.name not in passes]
    return [
        name
        for name in [*others, *dict.fromkeys(passes)]
        if getattr(exact, name) is True and name not in NO_OPTIMISATION
    ]


def plain_options() -> dict[str, Any]:
    """Options with which lsync runs a graph as it was captured, operation by operation."""
    off = dict.fromkeys([*switches(), "face_cache"], False)
    return {"preset": "exact", "lowering": "eager", "kernels": "off", "strict": True, **off}


def waterfall(on_gpu: bool) -> list[Row]:
    """Every exact optimisation, each added to those before it, and on a GPU Inductor at last.

    Operations run one by one until then: a row takes seconds to compile, not minutes.
    """
    base = {"preset": "exact", "lowering": "eager", "strict": True}
    names = switches()
    options: dict[str, Any] = {**base, **dict.fromkeys(names, False)}
    rows = [Row("none", LSYNC, options)]
    for name in names:
        options = {**options, name: True}
        rows.append(Row(f"+ {name}", LSYNC, options))
    if on_gpu:
        rows.append(Row("+ Inductor", LSYNC, {**options, "lowering": "inductor"}))
    return rows


def originals() -> list[Row]:
    """What LatentSync's own scripts run."""
    deep = {"deep_cache": True, "deep_cache_interval": 3, "deep_cache_branch": 0}
    return [
        Row(ORIGINAL, EAGER),
        Row(
            PACKAGE,
            LSYNC,
            {**plain_options(), **deep},
            exact=False,
            note="the DeepCache package's schedule (uniform interval 3, branch 0, features as they "
            "are) by this package's deep_cache pass with all other passes off, run eagerly",
        ),
    ]


def ours(configurations: list[Path], lowering: str) -> list[Row]:
    """The presets, and configurations from files.

    Raises:
        OptionError: a file is no configuration.
    """
    rows = []
    for name in PRESETS:
        note = "has the settings of exact so far" if name != "exact" and not PRESETS[name] else ""
        options = {"preset": name, "lowering": lowering, "strict": True}
        rows.append(Row(name, LSYNC, options, exact=name == "exact", note=note))
    for path in configurations:
        options = {**read_configuration(path), "lowering": lowering, "strict": True}
        rows.append(Row(path.stem, LSYNC, options, exact=False, note=f"of {path.name}"))
    return rows


def inductor(steps: tuple[int, ...] = FEW_STEPS) -> list[Row]:
    """Inductor as it is, and with fewer steps of three solvers."""
    fewer = [
        Row(
            f"Inductor, {words} {count}",
            INDUCTOR,
            steps=count,
            solver=solver,
            note="the solver on the checkpoint's schedule",
        )
        for count in steps
        for solver, words in SOLVERS.items()
    ]
    return [Row("Inductor", INDUCTOR), *fewer]


def others() -> list[Row]:
    """What takes longest to compile."""
    return [
        Row(
            "Inductor, max-autotune",
            AUTOTUNED,
            note="mode max-autotune-no-cudagraphs: a step of this size is not bound by launches",
        ),
        Row("TensorRT", TENSORRT, note="torch_tensorrt's backend of torch.compile"),
    ]


def why_not(row: Row, on_gpu: bool) -> str:
    """Why a row cannot be run here; empty where it can."""
    if row.engine in (INDUCTOR, AUTOTUNED) and not on_gpu:
        return "Inductor's C++ for a CPU takes minutes to compile and says nothing of a GPU"
    if row.engine != TENSORRT:
        return ""
    if not on_gpu:
        return "TensorRT needs a GPU"
    if importlib.util.find_spec("torch_tensorrt") is None:
        return "torch_tensorrt is not installed here"
    return ""
