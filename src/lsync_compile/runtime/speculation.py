"""Start a similar chunk in the middle of its schedule, from where the chunk before it is.

All chunks of a run start from one frame of noise, and similar ones go similar ways. So while chunk
A takes all its steps, chunk B is looked at twice on the way, in calls that it shares with A, and
each time the way to the start is guessed: a long step by what B's own faces and sound say, and what
A's short steps differ from the same long step (see :mod:`.temporal`; x are latents, eps the noise
predicted in them, 0 < m < s steps):

    guess  = jump(x_0, eps_0(B), 0 to s) + error_A[0, s]
    x_m    = jump(x_0, eps_0(B), 0 to m) + error_A[0, m]
    better = jump(x_m, eps_m(B), m to s) + error_A[m, s]

B's steps from s on are taken from ``better``, in the same calls as A's. To know what B would have
had there without speculation takes s steps. What the two guesses differ by is known and stands for
the error, as in solvers that halve a step to know its error (``better`` measured half of it, see
docs/runtime.md). Where it is above the tolerance, nothing of the speculation is used, and B takes
all its steps alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lsync_compile.options import Options
from lsync_compile.report import Session
from lsync_compile.runtime.batching import Lane, Predict
from lsync_compile.runtime.temporal import Path
from lsync_compile.runtime.timesteps import ChangeMeter, Faces, Level, levels

LOOKS = 2  # steps of the second chunk that are taken before it is known whether it may start


class SpeculativeProcessor:
    """Denoises a chunk and, where that is safe, the next one in part of its steps.

    Made anew for each run.

    Args:
        options: of the compiled pipeline.
        session: counts what was kept, redone and wasted.
    """

    def __init__(self, options: Options, session: Session) -> None:
        self._skip = options.speculate_skip
        self._similarity = options.speculate_similarity
        self._tolerance = options.speculate_tolerance
        self._session = session
        self._meter = ChangeMeter(options.scene_cut)
        self._alike: set[int] = set()
        self._kept = False
        counters = ("tried", "kept", "redone", "unlike", "steps_saved", "steps_wasted")
        session.count("speculation", **dict.fromkeys(counters, 0))

    def look(self, chunk: int, faces: Faces) -> None:
        """See the faces of each chunk in turn: will it go the way of the last?"""
        change = self._meter(chunk, faces)
        similar = change is not None and not change.cut
        if change is not None and similar and 1 - change.mean**0.5 >= self._similarity:
            self._alike.add(chunk)

    def worth(self, lanes: Sequence[Lane]) -> bool:
        """Whether the second of two lanes is to be started from the first."""
        if len(lanes) != 2 or lanes[0].shares != lanes[1].shares:
            return False
        first, second = (lane.walk for lane in lanes)
        if second.chunk != first.chunk + 1 or self.start(len(first.timesteps)) <= LOOKS:
            return False
        alike = second.chunk in self._alike
        self._session.count("speculation", unlike=int(not alike))
        return alike

    def account(self) -> None:
        """At the end of a run: say in the report where nothing came of it."""
        if not self._kept:
            self._session.note(
                "speculate did nothing in a run: no second chunk of a pair was like the first and "
                "passed the check"
            )

    def start(self, steps: int) -> int:
        """The step from which a chunk of so many steps is denoised."""
        return round(self._skip * steps)

    def run(
        self,
        lanes: Sequence[Lane],
        calls: Callable[[Sequence[Lane]], Predict],
        advance: Callable[[int], None],
    ) -> list[Tensor]:
        """Denoise two lanes.

        Args:
            lanes: for which :meth:`worth` holds.
            calls: gives the UNet's calls for some lanes.
            advance: told how many steps of both are done.

        Returns:
            Clean latents (1, 4, f, h, w): of both, or of the first alone where the second has to be
            denoised in all its steps.
        """
        first, second = (lane.walk for lane in lanes)
        steps = len(first.timesteps)
        start = self.start(steps)
        middle = start // 2
        together, alone = calls(lanes), calls(lanes[:1])
        ladder = levels(lanes[0].scheduler)
        path, kept = Path(ladder), False
        ours, theirs = first.latents, second.latents
        looks: list[tuple[int, Tensor, Tensor]] = []
        for step in range(steps):
            if step == middle:
                theirs = self._ahead(looks[0], middle, ladder, path, ours)
            if step == start:
                guess, theirs = (self._ahead(look, start, ladder, path, ours) for look in looks)
                kept = self._agree(guess, theirs, start, ladder[start])
            if kept or step in (0, middle):
                noise, other = together(step, [ours, theirs])
            else:
                (noise,) = alone(step, [ours])
            if step in (0, middle):
                looks.append((step, theirs, other))
            path.record(ours, noise)
            ours = first.step(step, noise, ours)
            if kept:
                theirs = second.step(step, other, theirs)
            advance((step + 1) * (2 if kept else 1))
        return [ours, theirs] if kept else [ours]

    def _ahead(
        self,
        look: tuple[int, Tensor, Tensor],
        step: int,
        ladder: list[Level],
        path: Path,
        ours: Tensor,
    ) -> Tensor:
        """The second chunk's latents before ``step``, from one look at it.

        Args:
            look: the step, the latents and the noise predicted in them.
            path: of the first chunk up to ``step``.
            ours: the first chunk's latents before ``step``.
        """
        since, latents, noise = look
        there = path.levels[since].jump(path.latents[since], path.predicted[since], ladder[step])
        error = ours.float().mean(dim=2, keepdim=True) - there
        guess = ladder[since].jump(latents.float(), noise.float(), ladder[step]) + error
        return guess.to(latents.dtype)

    def _agree(self, guess: Tensor, better: Tensor, start: int, level: Level) -> bool:
        """The check; reads one number from the device."""
        gap = (better.float() - guess.float()).square().mean().sqrt().item() / level.signal
        kept = gap <= self._tolerance
        self._session.most("speculation", largest_gap=round(gap, 4))
        self._kept |= kept
        self._session.count(
            "speculation",
            tried=1,
            kept=int(kept),
            redone=int(not kept),
            steps_saved=start - LOOKS if kept else 0,
            steps_wasted=0 if kept else LOOKS,
        )
        return kept
