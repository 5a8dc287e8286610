"""torch.compile(pipeline, backend="lsync"): the object back, its modules compiled, undoable."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading

import pytest
import torch
from captures import Attention, Pipeline, picture
from torch import nn
from torch._dynamo.utils import counters

import lsync_compile
from lsync_compile import hook
from lsync_compile.compiled import CompiledPipeline
from lsync_compile.errors import OptionError

EAGER = {"lowering": "eager"}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def compiled_by_torch(pipeline: object, **options: object) -> CompiledPipeline:
    return torch.compile(pipeline, backend="lsync", options={**EAGER, **options})


# The object that comes back


def test_the_proxy_is_the_pipeline_in_all_but_the_call() -> None:
    pipeline = Pipeline()
    fast = compiled_by_torch(pipeline)
    assert type(fast) is CompiledPipeline
    assert isinstance(fast, Pipeline)
    assert fast.unet is pipeline.unet
    assert fast.device == torch.device("cpu")
    assert fast.components["vae"] is pipeline.vae
    assert "lsync" in dir(fast)
    assert "components" in dir(fast)
    assert "Pipeline" in repr(fast)
    fast.extra = 3
    assert pipeline.extra == 3
    del fast.extra
    assert not hasattr(pipeline, "extra")
    assert not hasattr(pipeline, "_is_torch_compile")  # torch's mark stays on the proxy


def test_to_moves_in_place_and_returns_the_proxy() -> None:
    pipeline = Pipeline()
    fast = compiled_by_torch(pipeline)
    assert fast.to(torch.float64) is fast
    assert next(pipeline.unet.parameters()).dtype is torch.float64
    assert fast(picture().double()).dtype is torch.float64


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_is_a_plain_pipeline(clone) -> None:
    fast = compiled_by_torch(Pipeline())
    expected = fast(picture())
    for original in (fast, fast.lsync._original):
        plain = clone(original)
        assert type(plain) is Pipeline
        assert plain.unet._compiled_call_impl is None
        assert torch.equal(plain(picture()), expected)
        assert compiled_by_torch(plain) is not fast


# What it computes


def test_eager_lowering_gives_the_same_bits_and_undo_the_same_object() -> None:
    pipeline = Pipeline()
    expected = pipeline(picture())
    fast = compiled_by_torch(pipeline)
    assert torch.equal(fast(picture()), expected)
    assert fast.lsync.report().counters["calls"] == 5  # encode, three steps, decode
    assert fast.lsync.undo() is pipeline
    modules = (pipeline.unet, pipeline.vae.encoder, pipeline.vae.decoder)
    assert all(module._compiled_call_impl is None for module in modules)
    assert torch.equal(pipeline(picture()), expected)
    calls = fast.lsync.report().counters["calls"]
    assert torch.equal(fast(picture()), expected)  # the proxy runs plain from now on
    assert fast.lsync.report().counters["calls"] == calls


def test_a_second_run_and_other_step_counts_compile_nothing() -> None:
    fast = compiled_by_torch(Pipeline())
    fast(picture(), steps=3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        graphs = counters["stats"]["unique_graphs"]
        fast(picture(), steps=3)
        fast(picture(), steps=7)
        assert counters["stats"]["unique_graphs"] == graphs == 3
    report = fast.lsync.report()
    assert report.counters["recompiles"] == report.counters["breaks"] == 0
    assert not counters["graph_break"]


def test_other_shapes_are_variants_each_specialised() -> None:
    fast = compiled_by_torch(Pipeline())
    for side in (8, 6, 4, 8):
        fast(picture(side=side), steps=1)
    report = fast.lsync.report()
    assert [graph.kind for graph in report.graphs if graph.target == "unet"] == [
        "first",
        "variant",
        "variant",
    ]
    assert not any("Sym" in graph.inputs for graph in report.graphs)
    assert report.counters["recompiles"] == 0


def test_more_shapes_than_dynamos_limit() -> None:
    fast = compiled_by_torch(Pipeline(), compile_vae=False)
    for side in range(2, 14):
        fast(picture(side=side), steps=1)
    assert fast.lsync.report().counters == {
        **fast.lsync.report().counters,
        "graphs": 12,
        "calls": 12,
    }


def test_host_code_stays_out_of_graphs() -> None:
    fast = compiled_by_torch(Pipeline())
    fast(picture())
    assert fast.scheduler.history == [1000, 667, 334]
    assert {graph.target for graph in fast.lsync.report().graphs} == {
        "unet",
        "vae.encoder",
        "vae.decoder",
    }


def test_the_vae_can_be_left_out() -> None:
    fast = compiled_by_torch(Pipeline(), compile_vae=False)
    fast(picture())
    assert {graph.target for graph in fast.lsync.report().graphs} == {"unet"}


def test_inside_a_larger_graph_the_module_is_traced_as_it_is() -> None:
    fast = compiled_by_torch(Pipeline())
    latents, timestep = torch.randn(1, 4, 4, 4), torch.tensor(5)
    with torch.no_grad():
        expected = fast.unet(latents, timestep) * 2
        calls = fast.lsync.report().counters["calls"]
        larger = torch.compile(lambda x, t: fast.unet(x, t) * 2, backend="eager", fullgraph=True)
        assert torch.equal(larger(latents, timestep), expected)
    assert fast.lsync.report().counters["calls"] == calls


def test_forward_hooks_still_run() -> None:
    fast = compiled_by_torch(Pipeline())
    handle = fast.unet.register_forward_hook(lambda module, args, result: result + 1)
    with_hook = fast(picture())
    handle.remove()
    assert not torch.equal(fast(picture()), with_hook)


def test_fullgraph_and_dynamic_reach_the_modules() -> None:
    class Breaking(Attention):
        def forward(self, sample, timestep):
            torch._dynamo.graph_break()
            return super().forward(sample, timestep)

    pipeline = Pipeline()
    pipeline.unet = Breaking().eval()
    fast = torch.compile(pipeline, backend="lsync", options=EAGER, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        fast(picture())
    loose = torch.compile(fast, backend="lsync", options=EAGER, dynamic=True)
    assert loose is fast
    loose(picture())
    loose(picture(side=6))
    report = loose.lsync.report()
    assert any("SymInt" in graph.inputs for graph in report.graphs)


# Never twice


def test_the_same_options_give_the_same_object() -> None:
    pipeline = Pipeline()
    fast = compiled_by_torch(pipeline)
    fast(picture())
    call = pipeline.unet._compiled_call_impl
    assert compiled_by_torch(pipeline) is fast
    assert compiled_by_torch(fast) is fast
    assert lsync_compile.compile(pipeline, **EAGER) is fast
    assert pipeline.unet._compiled_call_impl is call
    assert fast.lsync.report().counters["graphs"] == 3


def test_options_that_need_no_rebuild_keep_what_is_compiled() -> None:
    fast = compiled_by_torch(Pipeline())
    fast(picture())
    assert compiled_by_torch(fast, strict=True) is fast
    assert fast.lsync.options.strict
    fast(picture())
    assert fast.lsync.report().counters["graphs"] == 3


def test_other_options_replace_what_is_compiled() -> None:
    pipeline = Pipeline()
    fast = compiled_by_torch(pipeline)
    fast(picture())
    call = pipeline.unet._compiled_call_impl
    assert compiled_by_torch(pipeline, share_repeated=False) is fast
    assert pipeline.unet._compiled_call_impl is not call
    assert fast.lsync.report().graphs == []
    fast(picture())
    outcomes = {done.name: done.outcome for done in fast.lsync.report().graphs[1].passes}
    assert outcomes["share_repeated"] == "off"


def test_compiling_after_undo_starts_anew() -> None:
    pipeline = Pipeline()
    fast = compiled_by_torch(pipeline)
    fast.lsync.undo()
    again = compiled_by_torch(pipeline)
    assert again is not fast
    assert again.lsync.undo() is pipeline


def test_an_exchanged_module_is_compiled_at_the_next_run() -> None:
    fast = compiled_by_torch(Pipeline())
    fast(picture())
    old, fast.unet = fast.unet, Attention().eval()
    plain = Pipeline()
    plain.unet = copy.deepcopy(fast.unet)
    assert torch.equal(fast(picture()), plain(picture()))
    assert old._compiled_call_impl is None
    assert fast.unet._compiled_call_impl is not None


# Refused, with what to do


def test_options_are_checked_before_anything_is_compiled() -> None:
    pipeline = Pipeline()
    with pytest.raises(OptionError, match="did you mean 'lowering'"):
        torch.compile(pipeline, backend="lsync", options={"lowerin": "eager"})
    with pytest.raises(OptionError, match="did you mean 'turbo'"):
        torch.compile(pipeline, backend="lsync", mode="turbi")
    assert pipeline.unet._compiled_call_impl is None


def test_the_users_options_stay_as_they_are() -> None:
    options = {"lowering": "eager", "strict": None}
    torch.compile(Pipeline(), backend="lsync", options=options)
    assert options == {"lowering": "eager", "strict": None}


def test_mode_names_a_preset() -> None:
    assert torch.compile(Pipeline(), backend="lsync", mode="turbo").lsync.options.preset == "turbo"
    assert torch.compile(Pipeline(), backend="lsync").lsync.options.preset == "balanced"


class DeepCacheSDHelper:
    """As in the DeepCache package: the UNet's forward becomes a closure of the helper."""

    def enable(self, pipeline: Pipeline) -> None:
        forward = pipeline.unet.forward

        def wrapped_forward(*args, **kwargs):
            return forward(*args, **kwargs)

        self.plain = forward
        pipeline.unet.forward = wrapped_forward

    def disable(self, pipeline: Pipeline) -> None:
        pipeline.unet.forward = self.plain


def test_deepcache_is_refused_before_and_after_compiling() -> None:
    pipeline, helper = Pipeline(), DeepCacheSDHelper()
    helper.enable(pipeline)
    with pytest.raises(OptionError, match=r"DeepCacheSDHelper.*helper.disable\(\)"):
        compiled_by_torch(pipeline)
    helper.disable(pipeline)
    fast = compiled_by_torch(pipeline)
    fast(picture())
    helper.enable(pipeline)
    with pytest.raises(OptionError, match="DeepCacheSDHelper"):
        fast(picture())


def test_a_module_that_others_compiled_is_refused() -> None:
    pipeline = Pipeline()
    pipeline.unet.compile(backend="eager")
    with pytest.raises(OptionError, match="unet is compiled already by another backend"):
        compiled_by_torch(pipeline)
    assert pipeline.vae.encoder._compiled_call_impl is None
    wrapped = Pipeline()
    wrapped.unet = torch.compile(wrapped.unet, backend="eager")
    with pytest.raises(OptionError, match=r"unet is compiled already by torch\.compile"):
        compiled_by_torch(wrapped)


def test_two_pipelines_cannot_share_a_compiled_module() -> None:
    first, second = Pipeline(), Pipeline()
    second.unet = first.unet
    fast = compiled_by_torch(first)
    with pytest.raises(OptionError, match=r"another pipeline: call .lsync.undo\(\)"):
        compiled_by_torch(second)
    fast.lsync.undo()
    assert torch.equal(compiled_by_torch(second)(picture()), first(picture()))


def test_a_module_outlives_the_pipeline_that_compiled_it() -> None:
    first, second = Pipeline(), Pipeline()
    second.unet = first.unet
    fast = compiled_by_torch(first)
    del first, fast
    gc.collect()
    again = compiled_by_torch(second)
    again(picture())
    assert again.lsync.report().counters["calls"] == 5


def test_a_pipeline_whose_unet_is_no_module_is_refused() -> None:
    pipeline = Pipeline()
    pipeline.unet = lambda latents, timestep: latents
    with pytest.raises(OptionError, match="unet is a function, no module"):
        compiled_by_torch(pipeline)


def test_compile_refuses_what_it_cannot_compile() -> None:
    with pytest.raises(OptionError, match="takes a pipeline with unet, vae and scheduler"):
        lsync_compile.compile(3)
    with pytest.raises(OptionError, match="takes a pipeline"):
        lsync_compile.compile(Pipeline)


# Others are untouched


def test_another_backend_gets_the_pipeline_as_torch_documents() -> None:
    pipeline = Pipeline()
    wrapped = torch.compile(pipeline, backend="eager")
    assert type(wrapped) is type(lambda: None)  # what torch makes of a callable object
    assert pipeline.unet._compiled_call_impl is None


def test_disable_returns_the_object_itself() -> None:
    pipeline = Pipeline()
    assert torch.compile(pipeline, backend="lsync", disable=True) is pipeline
    assert pipeline.unet._compiled_call_impl is None


def test_a_module_is_wrapped_as_torch_documents() -> None:
    module = Pipeline().vae.encoder
    wrapped = torch.compile(module, backend="lsync", options=EAGER)
    assert isinstance(wrapped, torch._dynamo.OptimizedModule)
    assert torch.equal(wrapped(picture()), module(picture()))
    in_place = Pipeline().vae.decoder
    in_place.compile(backend="lsync", options=EAGER)
    assert in_place(torch.ones(1, 4, 2, 2)).shape == (1, 3, 2, 2)


def test_a_module_with_the_attributes_of_a_pipeline_is_a_module() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = self.vae = self.scheduler = nn.Identity()

        def forward(self, x):
            return self.unet(x) + 1

    wrapped = torch.compile(Whole(), backend="lsync", options=EAGER)
    assert isinstance(wrapped, torch._dynamo.OptimizedModule)
    assert wrapped(torch.zeros(1)).item() == 1


def test_functions_and_the_decorator_form() -> None:
    @torch.compile(backend="lsync", options=EAGER)
    def double(x):
        return x * 2

    assert double(torch.ones(2)).tolist() == [2, 2]
    fast = torch.compile(backend="lsync", options=EAGER)(Pipeline())
    assert type(fast) is CompiledPipeline


# compile() without the hook, and without what the hook hooks


def test_compile_gives_modules_and_functions_a_report() -> None:
    module = Attention().eval()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(3))
    with torch.no_grad():
        expected = module(*inputs)
        fast = lsync_compile.compile(module, **EAGER)
        assert torch.equal(fast(*inputs), expected)
        report = fast.lsync.report()
        assert (report.counters["graphs"], report.options["preset"]) == (1, "exact")
        assert fast.lsync.undo() is module
        assert not hasattr(module, "lsync")
        again = lsync_compile.compile(fast, **EAGER)
        assert again.lsync.undo() is module

    function = lsync_compile.compile(lambda x: x + 1, mode="exact", **EAGER)
    assert function(torch.zeros(1)).item() == 1
    assert function.lsync.report().counters["calls"] == 1


def test_installing_twice_wraps_once() -> None:
    from torch._dynamo.eval_frame import _TorchDynamoContext

    before = _TorchDynamoContext.__call__
    assert hook.installed()
    assert hook.install()
    assert _TorchDynamoContext.__call__ is before


def test_without_the_hooks_target_compile_still_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hook, "_context_class", lambda: None)
    with caplog.at_level(logging.WARNING, "lsync_compile"):
        assert not hook.install()
        assert not hook.installed()
    assert "use lsync_compile.compile(pipeline)" in caplog.text
    pipeline = Pipeline()
    fast = lsync_compile.compile(pipeline, **EAGER)
    assert type(fast) is CompiledPipeline
    assert torch.equal(fast(picture()), Pipeline()(picture()))


def test_two_pipelines_in_two_threads_keep_their_own_reports() -> None:
    results: dict[int, tuple] = {}

    # Built here: seeding and drawing weights in two threads would mix their random numbers.
    pipelines = {seed: Pipeline(seed) for seed in (1, 2)}

    def work(seed: int, side: int) -> None:
        fast = compiled_by_torch(pipelines[seed])
        outcome = [fast(picture(side=side), steps=seed + 1) for _ in range(3)]
        results[seed] = (outcome, fast.lsync.report())

    threads = [threading.Thread(target=work, args=(seed, 4 + 2 * seed)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        outcome, report = results[seed]
        expected = Pipeline(seed)(picture(side=4 + 2 * seed), steps=seed + 1)
        assert all(torch.equal(result, expected) for result in outcome)
        assert report.counters["calls"] == 3 * (seed + 1 + 2)
        side = 4 + 2 * seed
        assert all(f"{side}x{side}" in graph.inputs for graph in report.graphs)


def test_diffusers_stable_diffusion() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=1
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4),
        text_encoder=CLIPTextModel(text),
        tokenizer=None,
        unet=UNet(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = torch.randn(1, 7, 32)

    def run(pipe: StableDiffusionPipeline, steps: int) -> torch.Tensor:
        return pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=-prompt,
            num_inference_steps=steps,
            height=16,
            width=16,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    expected = run(pipeline, 2), run(pipeline, 3)
    fast = compiled_by_torch(pipeline, guidance_prefix=False)  # which rounds otherwise
    assert isinstance(fast, StableDiffusionPipeline)
    assert fast.device == torch.device("cpu")
    assert torch.equal(run(fast, 2), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(run(fast, 3), expected[1])
    counted = fast.lsync.report().counters
    assert (counted["graphs"], counted["breaks"], counted["recompiles"]) == (2, 0, 0)
    assert torch.equal(run(fast.lsync.undo(), 2), expected[0])
