"""The whole search: the unoptimised run, the walk, and the confirmation of its choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lsync_compile.tune.kept import KeptTrials
from lsync_compile.tune.measuring import Bench
from lsync_compile.tune.search import Budget, Group, Measured, Trial, choose, in_order, walk


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        unoptimised: the run that all are compared with.
        trials: all that were made, in their order.
        chosen: one of them.
        confirmed: what it was on the frames held out; None without such frames or time.
        refused: those that would have been chosen but fell below the floor there, by name.
        complete: whether nothing was left out for want of time.
    """

    unoptimised: Measured
    trials: list[Trial]
    chosen: Trial
    confirmed: Measured | None = None
    refused: dict[str, Measured] = field(default_factory=dict)
    complete: bool = True


def tune_on(
    bench: Bench,
    kept: KeptTrials,
    *,
    min_psnr: float,
    tolerance: float,
    budget: Budget,
    tried: Sequence[Group],
) -> Tuned:
    """Search on a bench.

    Args:
        bench: measures.
        kept: what was measured before, and where the rest is filed.
        min_psnr: the floor in dB, on the frames chosen by and on those held out.
        tolerance: see :func:`lsync_compile.tune.search.choose`.
        budget: of time.
        tried: groups of candidates.
    """
    unoptimised = kept.once("unoptimised", lambda name, options: bench.unoptimised())("", {})
    measure = kept.once("tuned", bench.measure)
    rule = {"min_psnr": min_psnr, "tolerance": tolerance}
    trials = list(walk(measure, **rule, budget=budget, tried=tried))
    chosen = choose(trials, **rule)
    if budget.ran_out or not bench.held_out:
        return Tuned(unoptimised, trials, chosen, complete=not budget.ran_out)
    confirm = budget.timed(kept.once("held out", bench.confirm))
    confirmed, refused = None, dict[str, Measured]()
    for trial in in_order(trials, **rule):
        if not budget.allows():
            return Tuned(unoptimised, trials, trial, None, refused, complete=False)
        chosen, confirmed = trial, confirm(trial.name, trial.options)
        if confirmed.psnr >= min_psnr:
            break
        refused[trial.name] = confirmed
    refused.pop(chosen.name, None)
    return Tuned(unoptimised, trials, chosen, confirmed, refused)
