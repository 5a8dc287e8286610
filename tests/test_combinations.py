"""Options that exclude each other: refused where both are wanted, left out of a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lsync_compile import options as module
from lsync_compile.combinations import EXCLUSIONS, CombinationError, exclusions_table
from lsync_compile.errors import OptionError
from lsync_compile.options import OPTION_NAMES, PRESETS, resolve_options
from lsync_compile.report import Session

REFUSED: list[dict[str, Any]] = [
    {"few_steps": 5, "adaptive_steps": True},
    {"few_steps": 5, "temporal_start": "path"},
    {"batch_chunks": 2, "temporal_start": "renoise"},
    {"batch_chunks": 2, "deep_cache": True, "deep_cache_similarity": 0.8},
    {"speculate": True},
    {"speculate": True, "batch_chunks": 4},
    {"speculate": True, "batch_chunks": 2, "deep_cache": True},
    {"speculate": True, "batch_chunks": 2, "temporal_start": "path"},
    {"speculate": True, "batch_chunks": 2, "few_steps": 5},
    {"speculate": True, "batch_chunks": 2, "adaptive_steps": True},
    {"speculate": True, "batch_chunks": 2, "guided_steps": 1},
]
ALLOWED: list[dict[str, Any]] = [
    {"batch_chunks": 4, "temporal_start": "path", "adaptive_steps": True, "deep_cache": True},
    {"batch_chunks": 4, "few_steps": 5, "deep_cache": True},
    {"batch_chunks": 4, "deep_cache_similarity": 0.8},  # nothing is cached
    {"batch_chunks": 2, "speculate": True, "lip_attention": True},
]


@pytest.mark.parametrize("given", REFUSED)
def test_what_harms_each_other_is_refused_with_the_reason(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="exclude each other") as caught:
        resolve_options("exact", given)
    assert isinstance(caught.value, CombinationError)
    names, reason = caught.value.exclusion.names, caught.value.exclusion.reason
    assert all(name in str(caught.value) for name in (*names, reason))


def test_every_exclusion_is_tested_and_is_of_options() -> None:
    found = set()
    for given in REFUSED:
        with pytest.raises(CombinationError) as caught:
            resolve_options("exact", given)
        found.add(caught.value.exclusion)
    assert found == set(EXCLUSIONS)
    assert all(name in OPTION_NAMES for each in EXCLUSIONS for name in each.names)


@pytest.mark.parametrize("given", ALLOWED)
def test_what_goes_together_is_taken(given: dict[str, Any]) -> None:
    options = resolve_options("exact", given)
    assert all(getattr(options, name) == value for name, value in given.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_together(preset: str) -> None:
    assert not module.left_out(resolve_options(preset))


def test_a_presets_part_gives_way_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "turbo", {"few_steps": 4, "deep_cache": True, "batch_chunks": 4})
    options = resolve_options("turbo", temporal_start="renoise")
    assert (options.few_steps, options.batch_chunks, options.deep_cache) == (0, 1, True)
    notes = Session("run", options).report().notes
    assert [note.partition(";")[0] for note in notes] == [
        "preset 'turbo': left out few_steps",
        "preset 'turbo': left out batch_chunks",
    ]
    speculating = resolve_options("turbo", speculate=True, batch_chunks=2)
    assert not speculating.deep_cache
    assert len(Session("run", speculating).report().notes) == 3
    # Switched off by the user, not by another option: nothing to say.
    assert not Session("run", resolve_options("turbo", few_steps=0)).report().notes


def test_the_documentation_has_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "runtime.md"
    assert exclusions_table() in page.read_text()
