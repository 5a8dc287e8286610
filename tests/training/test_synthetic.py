"""Synthetic faces repeat for a seed, differ between people, and move where they should."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from training.features import Motion
from training.synthetic import FaceSampler, Identity


def still(opening: list[float], people: int, width: float = 0.0, blink: float = 0.0) -> Motion:
    """Heads that keep still but for the mouth."""
    frames = len(opening)
    pose = torch.zeros(people, frames, 6)
    pose[..., 3] = 1
    return Motion(
        torch.tensor(opening).expand(people, frames),
        torch.full((people, frames), width),
        torch.full((people, frames), blink),
        torch.zeros(people, frames, 2),
        pose,
    )


@pytest.fixture(scope="module")
def people() -> Identity:
    drawn = FaceSampler(seed=5).identity(3)
    drawn.values["sensor"] = torch.zeros(3)
    return drawn


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference of a row over people, channels and columns: (256,)."""
    return (a.int() - b.int()).abs().amax(dim=(0, 1, 3))


def test_same_seed_same_pictures() -> None:
    def frames(seed: int) -> Tensor:
        faces = FaceSampler(seed)
        drawn = faces.identity(2)
        return faces.render(drawn, faces.motion(torch.rand(2, 2) * 0, torch.zeros(2, 2)))

    first = frames(1)
    assert first.shape == (2, 2, 3, 256, 256)
    assert first.dtype == torch.uint8
    assert torch.equal(first, frames(1))
    assert not torch.equal(first, frames(2))


def test_people_differ(people: Identity) -> None:
    frames = FaceSampler().render(people, still([0.0], 3))[:, 0].float()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (frames[i] - frames[j]).abs().mean() > 8


def test_opening_moves_the_mouth_and_nothing_above(people: Identity) -> None:
    frames = FaceSampler().render(people, still([0.0, 0.8], 3))
    changed = difference(frames[:, 0], frames[:, 1])
    # The mask that LatentSync redraws starts at 37 % of the height.
    assert changed[:95].max() == 0
    assert changed[150:200].max() > 60


def test_width_changes_the_mouth(people: Identity) -> None:
    round_, wide = (FaceSampler().render(people, still([0.3], 3, width=w)) for w in (-1.0, 1.0))
    changed = difference(round_[:, 0], wide[:, 0])
    assert changed[:95].max() == 0
    assert changed[140:190].max() > 40


def test_blinks_move_the_eyes_only(people: Identity) -> None:
    awake, shut = (FaceSampler().render(people, still([0.3], 3, blink=b)) for b in (0.0, 1.0))
    changed = difference(awake[:, 0], shut[:, 0])
    assert changed[50:100].max() > 40
    assert changed[120:].max() == 0


def test_one_person_looks_the_same_in_any_batch(people: Identity) -> None:
    motion = still([0.4], 3)
    together = FaceSampler().render(people, motion)
    values = {name: value[1:2] for name, value in people.values.items()}
    one = Identity(values, people.behind[1:2], people.face[1:2], people.over[1:2])
    part = {f.name: getattr(motion, f.name)[1:2] for f in dataclasses.fields(motion)}
    alone = FaceSampler().render(one, Motion(**part))
    assert (alone[0].int() - together[1].int()).abs().max() <= 1
