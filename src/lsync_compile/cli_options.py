"""Options and exit codes that several commands have, each written once."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from lsync_compile.devices import DType
from lsync_compile.loading import usual_lowering

UNFINISHED = 75  # exit code EX_TEMPFAIL: the same call goes on


class Lowering(str, Enum):
    """What runs a compiled graph."""

    inductor = "inductor"
    eager = "eager"


def lowering_on(device: Any, chosen: Lowering | None) -> str:
    """The lowering that a command was given, or the usual one."""
    return usual_lowering(device) if chosen is None else chosen.value


class Detector(str, Enum):
    """What finds the face."""

    mtcnn = "mtcnn"
    insightface = "insightface"


Checkpoint = Annotated[
    str,
    typer.Option(help="'mini' (bundled) or the folder of a LatentSync 1.5/1.6 checkpoint."),
]
Resolution = Annotated[
    int | None,
    typer.Option(help="Side of the face in pixels, for checkpoints in which nothing says so."),
]
LoweringName = Annotated[
    Lowering | None,
    typer.Option(help="inductor compiles (default on a GPU), eager runs the rewritten graph."),
]
DetectorName = Annotated[Detector, typer.Option(help="Finds the face.")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; the first GPU if any.")]
NumberFormat = Annotated[
    DType | None, typer.Option(help="float16 on a GPU and float32 on a CPU by default.")
]
ChunkFrames = Annotated[int, typer.Option(min=1, help="Frames a chunk.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
