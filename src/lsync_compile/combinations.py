"""Which optimisations go together.

Each is an option of its own, and most may be combined. Pairs that harm each other, or of which one
would silently do nothing, are listed here with the reason. Asked for explicitly they are refused;
where one of the two comes from a preset, it gives way, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lsync_compile.errors import OptionError

if TYPE_CHECKING:
    from lsync_compile.options import Options

Made = TypeVar("Made")


@dataclass(frozen=True)
class Exclusion:
    """Two options that do not go together.

    Attributes:
        names: of the two.
        applies: whether options have both.
        reason: why not, and what to do.
    """

    names: tuple[str, str]
    applies: Callable[[Options], bool]
    reason: str


EXCLUSIONS: tuple[Exclusion, ...] = (
    Exclusion(
        ("few_steps", "adaptive_steps"),
        lambda o: o.few_steps > 0 and o.adaptive_steps,
        "adaptive_steps says how many steps each chunk takes; few_steps would do nothing",
    ),
    Exclusion(
        ("few_steps", "temporal_start"),
        lambda o: o.few_steps > 0 and o.temporal_start != "off",
        "temporal_strength says in how many steps a chunk is denoised whose start is known, and "
        "the others need all; few_steps would do nothing",
    ),
    Exclusion(
        ("batch_chunks", "temporal_start"),
        lambda o: o.batch_chunks > 1 and o.temporal_start == "renoise",
        "with 'renoise' each chunk starts from the result of the one before and cannot share its "
        "calls; 'path' can",
    ),
    Exclusion(
        ("batch_chunks", "deep_cache_similarity"),
        lambda o: o.batch_chunks > 1 and o.deep_cache and o.deep_cache_similarity > 0,
        "chunks that share calls would compute and reuse together, by the mean of their "
        "similarities; use deep_cache_similarity=0",
    ),
    Exclusion(
        ("speculate", "batch_chunks"),
        lambda o: o.speculate and o.batch_chunks != 2,
        "a speculated chunk shares the calls of the one before; use batch_chunks=2",
    ),
    Exclusion(
        ("speculate", "deep_cache"),
        lambda o: o.speculate and o.deep_cache,
        "deep features are kept for the chunks of a call; one that joins in the middle would "
        "change those of the other",
    ),
    Exclusion(
        ("speculate", "temporal_start"),
        lambda o: o.speculate and o.temporal_start != "off",
        "both spare the steps to the same place, and temporal_start='path' takes fewer looks",
    ),
    Exclusion(
        ("speculate", "guided_steps"),
        lambda o: o.speculate and o.guided_steps > 0,
        "a chunk that joins another's calls in the middle has no step of its own in which both "
        "halves of guidance were computed",
    ),
    Exclusion(
        ("speculate", "few_steps"),
        lambda o: o.speculate and o.few_steps > 0,
        "a chunk is started by what long steps miss against all short ones of the chunk before",
    ),
    Exclusion(
        ("speculate", "adaptive_steps"),
        lambda o: o.speculate and o.adaptive_steps,
        "a chunk is started by what long steps miss against all short ones of the chunk before",
    ),
)


class CombinationError(OptionError):
    """Two options exclude each other.

    Attributes:
        exclusion: which, and why.
    """

    def __init__(self, exclusion: Exclusion) -> None:
        one, other = exclusion.names
        super().__init__(f"options {one} and {other} exclude each other: {exclusion.reason}")
        self.exclusion = exclusion


def check_combination(options: Options) -> None:
    """Refuse options that do not go together.

    Raises:
        CombinationError: names the first pair.
    """
    for exclusion in EXCLUSIONS:
        if exclusion.applies(options):
            raise CombinationError(exclusion)


class LatentSyncSpeedOptimizer:
    """Combines the optimisations of a preset with what the user says of them.

    What the user says wins. Of a preset's optimisations, those that do not go together with it are
    left out.

    Args:
        preset: option names to values.
        given: the same, of the user.

    Attributes:
        left_out: options of the preset that gave way, with the reason; filled by :meth:`combine`.
    """

    def __init__(self, preset: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self._preset = dict(preset)
        self._given = dict(given)
        self.left_out: dict[str, str] = {}

    def combine(self, make: Callable[..., Made]) -> Made:
        """Make options of all that goes together.

        Args:
            make: takes options by name, such as :class:`lsync_compile.options.Options`.

        Raises:
            OptionError: for a wrong value, and for two options of the user that exclude each other.
        """
        while True:
            try:
                return make(**{**self._preset, **self._given})
            except CombinationError as error:
                names = [
                    name
                    for name in error.exclusion.names
                    if name in self._preset and name not in self._given
                ]
                if not names:
                    raise
                del self._preset[names[0]]
                self.left_out[names[0]] = error.exclusion.reason


def exclusions_table() -> str:
    """The exclusions as a Markdown table, for the documentation."""
    lines = ["| option | with | why not |", "| --- | --- | --- |"]
    lines += [f"| `{e.names[0]}` | `{e.names[1]}` | {e.reason} |" for e in EXCLUSIONS]
    return "\n".join(lines) + "\n"
