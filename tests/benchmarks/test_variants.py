"""The named variants: which options each stands for, and that modules are left as they were."""

from __future__ import annotations

import pytest
import torch
from captures import Attention, Vae, picture
from variants import all_variants, candidates, compiled, options_of, switches, waterfall

from lsync_compile.options import resolve_options
from lsync_compile.passes.manager import ordered
from lsync_compile.passes.spec import registered


def on(variant: str) -> list[str]:
    """Optimisations that a variant switches on, in the waterfall's order."""
    options = resolve_options(None, options_of(variant))
    return [name for name in switches() if getattr(options, name)]


def test_a_waterfall_has_every_pass_in_running_order_and_each_switch_once() -> None:
    exact = resolve_options("exact")
    passes = [cls.spec.option for cls in ordered(registered().values())]
    names = switches()
    assert len(names) == len(set(names))
    assert [name for name in names if name in passes] == [
        name for name in passes if getattr(exact, name)
    ]
    assert names[-1] in passes
    assert not {"strict", "compile_vae", "keep_captures", "face_cache"} & set(names)


def test_each_name_stands_for_its_options() -> None:
    names = switches()
    assert on("lsync") == names
    assert on("lsync none") == []
    for place, name in enumerate(names):
        assert on(f"lsync to={name}") == names[: place + 1]
        assert on(f"lsync only={name}") == [name]
        assert on(f"lsync without={name}") == [each for each in names if each != name]
    assert options_of("eager") is None
    assert options_of("lsync lowering=eager")["lowering"] == "eager"
    lowered = waterfall("to", lowering="eager")
    for eager, plain in zip(lowered, waterfall("to"), strict=True):
        assert options_of(eager) == {**options_of(plain), "lowering": "eager"}
    assert waterfall("to")[-1] in all_variants()
    for variant in all_variants():
        resolve_options(None, options_of(variant))


def test_fusions_that_are_off_are_added_to_exact() -> None:
    extra = candidates()
    assert not set(extra) & set(switches())
    for name in filter(None, ("+".join(extra), *extra)):
        variant = f"lsync with={name}"
        assert variant in all_variants()
        options = resolve_options(None, options_of(variant))
        assert [each for each in extra if getattr(options, each)] == name.split("+")
        assert on(variant) == switches()


@pytest.mark.parametrize(
    "name", ["lsyn", "lsync only=gone", "lsync with=fuse_qkv+gone", "lsync what", "lsync to", ""]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no variant"):
        options_of(name)


@pytest.mark.parametrize("variant", ["eager", "lsync lowering=eager"])
def test_networks_run_compiled_inside_the_block_only(variant: str) -> None:
    unet, vae = Attention().eval(), Vae().eval()
    sample, timestep = torch.ones(1, 4, 8, 8), torch.tensor(3)
    with torch.no_grad():
        expected = unet(sample, timestep), vae.encode(picture())
        with compiled(variant, unet, vae) as handle:
            found = unet(sample, timestep), vae.encode(picture())
            if variant != "eager":
                targets = [graph.target for graph in handle.report().graphs]
                assert targets == ["unet", "vae.encoder"]
            else:
                assert handle is None
    assert all(map(torch.equal, found, expected))
    assert all(m._compiled_call_impl is None for m in (unet, vae.encoder, vae.decoder))
