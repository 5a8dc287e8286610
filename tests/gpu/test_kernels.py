"""The kernels on a GPU, at the sizes that LatentSync has."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from lsync_compile.kernels import (
    add_layer_norm,
    feed_forward,
    geglu,
    group_norm_silu,
    layer_norm,
    linear_geglu,
    registered,
    residual_moments,
    temporal_attention,
)
from lsync_compile.kernels.accuracy import error, largest_error, poisoned_memory
from lsync_compile.kernels.launch import Kernel
from lsync_compile.kernels.lip_tables import encode_region

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch sees none", allow_module_level=True)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# The package's attribute of that name is the op.
attention = importlib.import_module("lsync_compile.kernels.spatial_attention")
products = importlib.import_module("lsync_compile.kernels.linear_geglu")
eight_bits = importlib.import_module("lsync_compile.kernels.fp8_linear")
enlarged = importlib.import_module("lsync_compile.kernels.upsample_conv")
LEVELS = ((64, 320), (32, 640), (16, 1280), (8, 1280))
BATCH, FRAMES = 2, 16


@pytest.fixture
def draw():
    """A function that draws normal numbers of a shape and dtype on the GPU."""
    generator = torch.Generator(CUDA).manual_seed(0)

    def normal(*shape, dtype=torch.float16):
        return torch.randn(shape, generator=generator, device=CUDA).to(dtype)

    return normal


@pytest.fixture(autouse=True)
def freed():
    """Leave no large tensors to the next test."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def untuned(monkeypatch):
    """Kernels run in their first configuration that fits, with none compiled to compare it."""
    every = Kernel.candidates
    monkeypatch.setattr(Kernel, "candidates", lambda self, arguments: every(self, arguments)[:1])


def judge(name, *args):
    spec = registered()[name]
    assert error(spec, *args) <= spec.tolerances[args[0].dtype].relative


# At LatentSync's sizes, in the configurations that the autotuner chooses.


@pytest.mark.parametrize(("side", "width"), LEVELS)
def test_temporal_attention(draw, side, width):
    q, k, v = draw(BATCH * FRAMES, side * side, 3 * width).chunk(3, dim=2)
    judge("temporal_attention", q, k, v, FRAMES, 8, None)
    judge("temporal_attention", *(x.contiguous() for x in (q, k, v)), FRAMES, 8, None)


@pytest.mark.parametrize(("side", "width"), LEVELS)
def test_spatial_attention(draw, side, width):
    q, k, v = draw(BATCH * FRAMES, side * side, 3 * width).chunk(3, dim=2)
    judge("spatial_attention", q, k, v, 8, None)
    judge("spatial_attention", *(x.contiguous() for x in (q, k, v)), 8, 0.1)
    k, v = draw(BATCH * FRAMES, 50, 2 * width).chunk(2, dim=2)
    judge("spatial_attention", q, k, v, 8, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_spatial_attention_of_other_dtypes_and_heads(draw, dtype):
    for heads, dim in ((8, 40), (3, 7), (1, 512)):
        q, k, v = draw(2, 300, 3 * heads * dim, dtype=dtype).chunk(3, dim=2)
        judge("spatial_attention", q, k, v, heads, None)


def test_spatial_attention_takes_the_fastest_and_remembers(draw):
    q, k, v = (x.view(2, 256, 4, 40).transpose(1, 2) for x in draw(3, 2, 256, 160))
    names = attention.usable(q, k, v)
    assert {"flash", "lsync"} <= set(names)
    attention._chosen.clear()
    name = attention.choice(q, k, v)
    assert name in names
    assert attention._chosen.names() == [name]
    for name in names:
        out = attention.KERNELS[name](q, k, v, None)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_spatial_attention_of_the_vae(draw, dtype):
    """One head of 512 channels over 64x64 tokens: the product kernel beside torch's."""
    q, k, v = draw(4, 4096, 3 * 512, dtype=dtype).chunk(3, dim=2)
    judge("spatial_attention", q, k, v, 1, None)
    heads = [x.unflatten(2, (1, -1)).transpose(1, 2) for x in (q, k, v)]
    assert "products" in attention.usable(*heads)
    exact = attention.spatial_attention_reference(q.double(), k.double(), v.double(), 1)
    out = attention.KERNELS["products"](*heads, None).transpose(1, 2).flatten(2)
    bound = registered()["spatial_attention"].tolerances[dtype].relative
    assert (out.double() - exact).norm() <= bound * exact.norm()


def test_spatial_attention_is_captured_without_timing(draw):
    q, k, v = draw(3, 2, 128, 320)
    expected = torch.ops.lsync.spatial_attention(q, k, v, 8)
    attention._chosen.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.lsync.spatial_attention(q, k, v, 8)
    assert not attention._chosen.names()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("side", "width"), LEVELS)
def test_lip_attention(draw, side, width):
    q, k, v = draw(BATCH * FRAMES, side * side, 3 * width).chunk(3, dim=2)
    mouth = torch.zeros(64, 64, dtype=torch.bool)
    mouth[23:61, 9:55] = True
    region = encode_region(mouth)
    judge("lip_attention", q, k, v, 8, region, 1, 2, 2, 1.0, None)
    judge("lip_attention", *(x.contiguous() for x in (q, k, v)), 8, region, 0, 4, 2, 1.5, 0.1)


@pytest.mark.parametrize("way", ["op", "reference"])
def test_lip_attention_is_captured(draw, way):
    """Its tables are made in the first call and stay where they are."""
    q, k, v = draw(3, 2, 64, 320)
    settings = (8, "8:3c3c3c", 0, 2, 2, 1.0)
    call = getattr(registered()["lip_attention"], way)
    expected = call(q, k, v, *settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, k, v, *settings)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("side", "width"), [*LEVELS, (64, 960)])
def test_group_norm_silu(draw, side, width):
    x = draw(BATCH, FRAMES, side, side, width).movedim(-1, 1)
    weight, bias, shift = draw(width), draw(width), draw(BATCH, width)
    judge("group_norm_silu", x, 32, weight, bias, 1e-5, True, shift)
    frames = x.transpose(1, 2).flatten(0, 1)
    judge("group_norm_silu", frames, 32, weight, bias, 1e-6, False, None)


@pytest.mark.parametrize(("side", "width"), LEVELS)
def test_moments_measured_where_a_sum_is_written(draw, side, width):
    video, weight, bias = draw(BATCH, FRAMES, side, side, width), draw(width), draw(width)
    x, residual = video.movedim(-1, 1), draw(*video.shape).movedim(-1, 1)
    judge("residual_moments", x, residual, bias)
    frames = video.flatten(0, 1).movedim(-1, 1)
    judge("residual_moments", frames, None, None)
    _, moments = residual_moments(frames, None, None)
    judge("group_norm_from_moments", x, moments, 32, weight, bias, 1e-5, True)
    judge("group_norm_from_moments", frames, moments, 32, weight, bias, 1e-6, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("side", "width"), LEVELS)
def test_fp8_linear_in_every_way(draw, side, width, dtype):
    x, bias = draw(BATCH * FRAMES, side * side, width, dtype=dtype), draw(8 * width, dtype=dtype)
    weight = draw(8 * width, width, dtype=dtype) * width**-0.5
    arguments = x, weight, bias, *eight_bits.quantised(weight)
    wanted = (eight_bits.fp8_linear_reference(*arguments).double(),)
    bound = 6e-3  # a result of 8 bits, and codes at the border of two
    ran = 0
    for name in ("fp8", "fp8 by bfloat16"):
        try:
            out = eight_bits.KERNELS[name](x.flatten(0, 1), *arguments[1:])
        except RuntimeError:  # a version of CUDA that does not make this dtype
            continue
        assert largest_error(out.view(*x.shape[:-1], -1), wanted) <= bound
        ran += 1
    assert ran > 0
    judge("fp8_linear", *arguments)  # whichever way is faster here


@pytest.mark.parametrize(("side", "width"), LEVELS)
def test_geglu(draw, side, width):
    judge("geglu", draw(BATCH * FRAMES, side * side, 8 * width))


@pytest.mark.parametrize(("side", "width"), LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_linear_geglu_in_every_way(draw, side, width, dtype):
    """Each way that it chooses from, where float64 takes a corner of the result."""
    x = draw(BATCH * FRAMES * side * side, width, dtype=dtype)
    weight = draw(8 * width, width, dtype=dtype) * width**-0.5
    bias = draw(8 * width, dtype=dtype)
    names = products.usable(x, weight, bias)
    assert names == ["library", "stream", "tiles"]
    expected = products.linear_geglu_reference(x[-300:].double(), weight.double(), bias.double())
    bound = registered()["linear_geglu"].tolerances[dtype].relative
    whole = products.KERNELS["library"](x, weight, bias)
    for name in names:
        with poisoned_memory():
            out = products.KERNELS[name](x, weight, bias)
        assert largest_error(out[-300:], (expected,)) <= bound, name
        assert largest_error(out, (whole.double(),)) <= 2 * bound, name


def test_linear_geglu_takes_the_fastest_and_remembers(draw):
    x, weight, bias = draw(4096, 320), draw(2560, 320) * 320**-0.5, draw(2560)
    products._chosen.clear()
    name = products.choice(x, weight, bias)
    assert name in products.usable(x, weight, bias)
    assert products._chosen.names() == [name]
    judge("linear_geglu", x, weight, bias)
    judge("linear_geglu", x[:1000, :72], weight[:80, :72].contiguous(), None)


def test_linear_geglu_is_captured_without_timing(draw):
    x, weight = draw(2, 100, 320), draw(640, 320) * 320**-0.5
    expected = torch.ops.lsync.linear_geglu(x, weight)
    products._chosen.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.lsync.linear_geglu(x, weight)
    assert not products._chosen.names()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(("side", "width"), LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_feed_forward(draw, side, width, dtype):
    """With and without rows that are all the same; float64 takes a few frames."""
    x, residual = draw(2, 4, side * side, width, dtype=dtype)
    norm = draw(width, dtype=dtype), draw(width, dtype=dtype), 1e-5
    weight_in = draw(8 * width, width, dtype=dtype) * width**-0.5
    weight_out = draw(width, 5 * width, dtype=dtype) * (5 * width) ** -0.5
    products = weight_in, draw(8 * width, dtype=dtype), weight_out, draw(width, dtype=dtype)
    judge("feed_forward", x, residual, *norm, *products, None)
    judge("feed_forward", x[:2], residual, *norm, *products, draw(width, dtype=dtype))


@pytest.mark.parametrize(("side", "width"), LEVELS)
def test_add_layer_norm(draw, side, width):
    x, residual = draw(2, BATCH * FRAMES, side * side, width)
    weight, bias, position = draw(width), draw(width), draw(FRAMES, width)
    judge("add_layer_norm", x, residual, weight, bias, 1e-5, None)
    judge("add_layer_norm", x, residual, weight, bias, 1e-5, position)


# Elsewhere one configuration has to do: each is compiled for each dtype and size.


@pytest.mark.parametrize(("side", "width"), [(32, 640), (16, 1280), (8, 1280)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_upsample_conv_in_both_ways(draw, side, width, dtype):
    """Ten pictures, as float64 has no fast convolution."""
    x = draw(10, side, side, width, dtype=dtype).movedim(-1, 1)
    weight = draw(width, 3, 3, width, dtype=dtype).movedim(-1, 1) * (9 * width) ** -0.5
    bias = draw(width, dtype=dtype)
    phases = enlarged.phases_of(weight.float()).to(dtype)
    expected = enlarged.upsample_conv_reference(*(t.double() for t in (x, weight, bias, phases)))
    bound = registered()["upsample_conv"].tolerances[dtype].relative
    for name, call in enlarged.KERNELS.items():
        with poisoned_memory():
            out = call(x, weight, bias, phases)
        assert largest_error(out, (expected,)) <= bound, name
        assert out.is_contiguous(memory_format=torch.channels_last), name
    enlarged._chosen.clear()
    judge("upsample_conv", x, weight, bias, phases)
    assert enlarged._chosen.names()[0] in enlarged.KERNELS


@pytest.mark.parametrize(("side", "width"), LEVELS)
def test_layer_norm(draw, side, width):
    x, (weight, bias) = draw(BATCH * FRAMES, side * side, width), draw(2, width)
    for position in (None, draw(FRAMES, width)):
        judge("layer_norm", x, weight, bias, 1e-5, position)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes(draw, untuned, dtype):
    q, k, v = draw(BATCH * FRAMES, 1024, 3 * 640, dtype=dtype).chunk(3, dim=2)
    judge("temporal_attention", q, k, v, FRAMES, 8, None)
    judge("geglu", draw(BATCH * FRAMES, 1024, 8 * 640, dtype=dtype))
    x, residual = draw(2, BATCH * FRAMES, 1024, 640, dtype=dtype)
    weight, bias = draw(2, 640, dtype=dtype)
    position, shift = draw(FRAMES, 640, dtype=dtype), draw(BATCH, 640, dtype=dtype)
    judge("add_layer_norm", x, residual, weight, bias, 1e-5, position)
    judge("layer_norm", x, weight, bias, 1e-5, position)
    video = x.view(BATCH, FRAMES, 32, 32, 640).movedim(-1, 1)
    judge("group_norm_silu", video, 32, weight, bias, 1e-5, True, shift)
    small = video.transpose(1, 2).flatten(0, 1)[..., :8, :8].contiguous()
    judge("group_norm_silu", small, 32, weight, bias, 1e-6, False, None)


@pytest.mark.parametrize(
    ("frames", "dim"), [(1, 160), (5, 7), (16, 64), (17, 40), (24, 160), (32, 16)]
)
def test_temporal_attention_of_any_size(draw, untuned, frames, dim):
    q, k, v = draw(3, 2 * frames, 37, 3 * dim)
    judge("temporal_attention", q, k, v, frames, 3, None)


@pytest.mark.parametrize("layout", ["contiguous", "frames apart", "every other pixel"])
@pytest.mark.parametrize(("side", "width"), [(64, 320), (16, 1280), (17, 96)])
def test_group_norm_of_any_layout(draw, untuned, side, width, layout):
    weight, bias = draw(2, width)
    if layout == "contiguous":
        x = draw(BATCH, width, FRAMES, side, side)
    elif layout == "frames apart":
        x = draw(BATCH, FRAMES, width, side, side).transpose(1, 2)
    else:
        x = draw(BATCH, FRAMES, 2 * side, 2 * side, width).movedim(-1, 1)[..., ::2, ::2]
    assert group_norm_silu(x, 32, weight, bias).stride() == torch.empty_like(x).stride()
    judge("group_norm_silu", x, 32, weight, bias, 1e-5, True, None)
    judge("group_norm_silu", x[:, :, 0], 32, weight, bias, 1e-6, False, None)


def test_group_norm_of_a_mean_far_from_zero(draw, untuned):
    x = draw(2, 320, 16, 64, 64, dtype=torch.float32) + 1000
    weight, bias = torch.ones(320, device=CUDA), torch.zeros(320, device=CUDA)
    spec = registered()["group_norm_silu"]
    # float32 holds 1000 to 3e-5, and squares of it no digit of a variance of 1.
    assert error(spec, x, 32, weight, bias, 1e-5, False, None) <= 1e-4


def test_odd_widths(draw, untuned):
    judge("geglu", draw(5, 7, 2 * 301))
    for width in (33, 8192):
        x, residual = draw(2, 3, 5, width)
        judge("add_layer_norm", x, residual, *draw(2, width), 1e-5, draw(3, width))


def arguments(draw):
    """Small arguments of each op."""
    x, weight, bias = draw(4, 64, 8, 8), draw(64), draw(64)
    tokens = draw(4, 64, 64)
    return {
        temporal_attention: (*draw(4, 64, 3 * 64).chunk(3, dim=2), 2, 2),
        group_norm_silu: (x.to(memory_format=torch.channels_last), 4, weight, bias),
        geglu: (draw(4, 64, 2 * 64),),
        add_layer_norm: (tokens, tokens * 2, weight, bias, 1e-5, draw(2, 64)),
        layer_norm: (tokens, weight, bias, 1e-5, draw(2, 64)),
        linear_geglu: (tokens, draw(128, 64) / 8, draw(128)),
        feed_forward: (
            tokens, tokens * 2, weight, bias, 1e-5, draw(128, 64) / 8, draw(128),
            draw(32, 128) / 11, draw(32), None,
        ),
    }  # fmt: skip


def test_ops_pass_opcheck(draw):
    for op, args in arguments(draw).items():
        torch.library.opcheck(op, args)


def test_a_second_call_gives_the_same_bits(draw):
    for op, args in arguments(draw).items():
        torch.testing.assert_close(op(*args), op(*args), rtol=0, atol=0)


def test_a_choice_is_made_once(draw):
    module = importlib.import_module("lsync_compile.kernels.temporal_attention")
    args = arguments(draw)[temporal_attention]
    temporal_attention(*args)
    choices = dict(module._temporal_attention._tuner.cache)
    temporal_attention(*args)
    assert choices == module._temporal_attention._tuner.cache
    assert choices


def test_ops_replay_in_a_cuda_graph(draw):
    for op, args in arguments(draw).items():
        op(*args)  # chooses a configuration, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(*args)
        args[0].copy_(torch.randn_like(args[0]))
        graph.replay()
        torch.testing.assert_close(out, op(*args), rtol=0, atol=0)


def block(x, weight, bias):
    """All ops in one graph: (4, 64, 8, 8) channels-last -> (4, 64, 64)."""
    y = group_norm_silu(x * 2, 4, weight, bias, shift=x.mean((2, 3)))
    tokens = y.permute(0, 2, 3, 1).flatten(1, 2)
    attended = temporal_attention(tokens, tokens + 1, tokens - 1, 2, 2)
    total, normed = add_layer_norm(attended, tokens, weight, bias)
    return geglu(torch.cat([normed, normed.sin()], -1)) + total


def test_inductor_keeps_layout_and_values(draw):
    x, weight, bias = (arguments(draw)[group_norm_silu][i] for i in (0, 2, 3))
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    # Inductor keeps what it fuses in float32 where eager torch rounds to float16.
    torch.testing.assert_close(
        compiled(x, weight, bias), block(x, weight, bias), rtol=0.01, atol=0.01
    )


def test_threads_do_not_disturb_each_other(draw):
    from concurrent.futures import ThreadPoolExecutor

    args = [(draw(3, n, 128),) for n in range(1, 33)]
    expected = [geglu(*a) for a in args]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda a: geglu(*a), args))
    torch.cuda.synchronize()
    for out, wanted in itertools.zip_longest(outputs, expected):
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)
