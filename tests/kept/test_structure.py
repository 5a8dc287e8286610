"""A module's result taken apart and put together again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from lsync_compile.kept.state import UnknownError
from lsync_compile.kept.structure import Rebuild, structure
from lsync_compile.models.unet import UNet3DConditionOutput

ONE, TWO = torch.zeros(1), torch.ones(2)


REFUSED = ["unknown tensor", "class", "key", "set", "object"]


@dataclass
class Foreign:
    sample: torch.Tensor


@pytest.mark.parametrize(
    "value",
    [
        ONE,
        (TWO, ONE),
        [TWO, (ONE, None, 3, "text", True)],
        {"a": ONE, "b": [0.5]},
        UNet3DConditionOutput(sample=TWO),
        (DecoderOutput(sample=ONE), TWO),
    ],
    ids=str,
)
def test_a_result_is_made_again(value: Any) -> None:
    kept = json.loads(json.dumps(structure(value, [ONE, TWO])))
    again = Rebuild(kept, 2)([ONE, TWO])
    assert type(again) is type(value)
    assert identities(again) == identities(value)


def identities(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, (list, tuple)):
        return type(value), [identities(part) for part in value]
    if isinstance(value, dict) and type(value) is dict:
        return {key: identities(part) for key, part in value.items()}
    return identities(dict(vars(value))) if hasattr(value, "sample") else value


@pytest.mark.parametrize(
    "value", [torch.zeros(1), Foreign(ONE), {1: ONE}, {ONE}, object()], ids=REFUSED
)
def test_what_cannot_be_made_again_is_refused(value: Any) -> None:
    with pytest.raises(UnknownError):
        structure(value, [ONE, TWO])


@pytest.mark.parametrize(
    "kept",
    [
        ["thing", 1],
        ["tensor", 2],
        ["tensor", -1],
        ["constant", [1]],
        ["class", "subprocess", "Popen", {}],
        ["class", "torch.nn", "Linear", {}],
        ["class", "lsync_compile.models.unet", "UNet3DConditionModel", {}],
        ["class", "lsync_compile.models.unet", "gone", {}],
        ["list", [["class", "os", "system", {}]]],
    ],
    ids=str,
)
def test_a_file_cannot_name_other_classes(kept: Any) -> None:
    with pytest.raises(UnknownError):
        Rebuild(kept, 2)
