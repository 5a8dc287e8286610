"""What the benchmarks measure with: exact values, kinds of kernels, files that grow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import largest_error, merge_results, recorded, relative_error
from exact_values import in_float64, sliced_attention
from kernel_time import kernel_times, kind_of
from torch import nn
from unet_step import Steps, random_inputs

from lsync_compile.kernels.launch import Kernel
from lsync_compile.kernels.spec import registered
from lsync_compile.models.config import LATENTSYNC_UNET
from lsync_compile.runtime import context

CPU = torch.device("cpu")


def test_attention_in_slices_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exact_values.SCORES", 2 * 3 * 5 * 7)  # two of the batch at a time
    query, key, value = (torch.randn(5, 3, n, 4).double() for n in (5, 7, 7))
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    plain = F.scaled_dot_product_attention
    with sliced_attention():
        assert F.scaled_dot_product_attention is not plain
        found = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    assert F.scaled_dot_product_attention is plain
    torch.testing.assert_close(found, expected)


def test_exact_values_are_of_the_rounded_weights() -> None:
    layer = nn.Linear(64, 64).half().requires_grad_(False)
    x = torch.randn(8, 64).half()
    exact = in_float64(layer, lambda module, given: module(given), x)
    assert exact.dtype == torch.float64
    assert layer.weight.dtype == torch.float16
    by_hand = x.double() @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(exact, by_hand)
    assert 0 < relative_error(layer(x), exact) < 1e-3
    assert largest_error(layer(x), exact) == (layer(x).double() - exact).abs().max()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float>", "layout"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNN", "matmul"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x64x64_stage4", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention", "attention"),
        ("triton_red_fused_native_group_norm_3", "norm"),
        ("triton_poi_fused_add_silu_7", "pointwise"),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda", "copy"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("something_new", "other"),
    ],
)  # fmt: skip
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_own_kernels_have_kinds() -> None:
    registered()  # imports them all
    kinds = {
        value.name: kind_of(value.name)
        for name, module in list(sys.modules.items())
        if name.startswith("lsync_compile.kernels.")
        for value in vars(module).values()
        if isinstance(value, Kernel)
    }
    assert kinds.keys() >= {"geglu", "temporal_attention"}
    assert "other" not in kinds.values(), kinds


def test_a_profile_adds_up() -> None:
    x = torch.randn(64, 64)
    profile = kernel_times(lambda: torch.addmm(x, x, x).clone(), CPU, calls=2)
    assert profile["milliseconds"]["matmul"] > 0
    assert profile["total"] == pytest.approx(sum(profile["milliseconds"].values()), abs=1e-3)
    assert profile["top"][0]["ms"] >= profile["top"][-1]["ms"]


def test_rows_are_merged_by_key_and_strangers_dropped(tmp_path: Path) -> None:
    path, key = tmp_path / "rows.json", ("variant", "size")
    merge_results(path, "How?", CPU, [{"variant": "a", "size": 1, "ms": 5}], key)
    later = [{"variant": "a", "size": 1, "ms": 4}, {"variant": "a", "size": 2, "ms": 9}]
    merge_results(path, "How?", CPU, later[:1], key)
    merge_results(path, "How?", CPU, later[1:], key)
    assert json.loads(path.read_text())["rows"] == later
    assert recorded(path, "How?", CPU, key) == [["a", 1], ["a", 2]]
    assert recorded(path, "Why?", CPU, key) == []
    content = json.loads(path.read_text())
    content["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    assert recorded(path, "How?", CPU, key) == []


def test_steps_stand_where_a_run_has_them() -> None:
    config = {**LATENTSYNC_UNET, "sample_size": 2}
    inputs = random_inputs(config, 2, 2, CPU, torch.float32)
    seen: list[context.StepContext] = []

    class Output:
        sample = torch.zeros(1)

    def unet(**arguments: torch.Tensor) -> Output:
        place = context.current()
        assert place is not None
        assert place.timestep == float(arguments["timestep"])
        seen.append(place)
        return Output()

    steps = Steps(unet, inputs, 3)
    steps(0)
    steps.chunk()
    steps()
    steps(0)
    steps.chunk()
    assert [(place.chunk, place.step) for place in seen] == [
        (0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2),
    ]  # fmt: skip
    # What is vouched for is true.
    assert seen[0].vouched == {"guidance", "null_audio", "constant_channels"}
    assert torch.equal(*inputs["sample"].chunk(2))
    assert not inputs["encoder_hidden_states"][:2].any()
    assert inputs["encoder_hidden_states"][2:].any()
