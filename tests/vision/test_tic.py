"""TiC: the window operator in every form, the published block, shifts and pooling, any resolution, exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyhead.errors import UserError
from tests.vision._exports import exported, largest_difference
from vision.tic import MSAConvAttention, MSAConvBlock, TiC, tic
from vision.window_attention import attend_simply, window_attention


def inputs(size: tuple[int, int], channels: int = 6, pool: int = 1, batch: int = 2) -> list[Tensor]:
    pooled = tuple(-(-n // pool) for n in size)
    shapes = [(batch, *size, channels), *[(batch, *pooled, channels)] * 2]
    return [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dilation=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 6]),
    pool=st.integers(1, 2),
    tile=st.sampled_from([None, 4, 8]),
)
def test_every_form_is_the_simple_one(
    size: tuple[int, int], kernel: tuple[int, int], dilation: int, heads: int, pool: int, tile: int | None
) -> None:
    """Tiles, phases and pooling against the windows written out; forward, gradients, and without gradient."""
    q, k, v = inputs(size, pool=pool)
    out = window_attention(q, k, v, kernel, dilation, heads, pool, tile=tile)
    expected = attend_simply(q, k, v, kernel, dilation, heads, pool)[0]
    assert torch.allclose(out, expected, atol=1e-12)
    cotangent = torch.randn_like(out)
    got = torch.autograd.grad((out * cotangent).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * cotangent).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(got, wanted, strict=True))
    with torch.no_grad():
        assert torch.allclose(window_attention(q, k, v, kernel, dilation, heads, pool, tile=tile), expected)


def test_simple_form_follows_the_formula() -> None:
    q, k, v = (t.detach() for t in inputs((4, 5), channels=2, batch=1))
    out, logits, weights = attend_simply(q, k, v, (3, 3), dilation=2)
    y, x = 1, 4
    keys, values = [], []
    for i in range(3):
        for j in range(3):
            at = y + 2 * i - 2, x + 2 * j - 2
            inside = 0 <= at[0] < 4 and 0 <= at[1] < 5
            keys.append(k[0, at[0], at[1]] if inside else torch.zeros(2).double())
            values.append(v[0, at[0], at[1]] if inside else torch.zeros(2).double())
    scores = torch.stack(keys) @ q[0, y, x]
    expected = (scores * 2**-0.5).softmax(0)
    assert torch.allclose(logits[0, 0, :, y, x], scores)
    assert torch.allclose(weights[0, 0, :, y, x], expected)
    assert torch.allclose(out[0, y, x], expected @ torch.stack(values))


@pytest.mark.parametrize(("dilation", "heads", "pool"), [(1, 1, 1), (2, 1, 1), (1, 6, 1), (1, 2, 2), (2, 2, 2)])
def test_gradients(dilation: int, heads: int, pool: int) -> None:
    q, k, v = inputs((5, 4), pool=pool, batch=1)
    assert torch.autograd.gradcheck(lambda q, k, v: window_attention(q, k, v, (3, 3), dilation, heads, pool), (q, k, v))


def test_large_batches_are_worked_on_in_parts() -> None:
    q, k, v = (torch.randn(3, 64, 64, 64, requires_grad=True) for _ in range(3))
    out = window_attention(q, k, v, (7, 7))
    alone = torch.cat([window_attention(q[n : n + 1], k[n : n + 1], v[n : n + 1], (7, 7)) for n in range(3)])
    assert torch.allclose(out, alone, atol=1e-6)
    a = torch.autograd.grad(out.square().sum(), (q, k, v))
    b = torch.autograd.grad(alone.square().sum(), (q, k, v))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_dropout_is_on_the_weights_and_in_training_only() -> None:
    layer = MSAConvAttention(4, 3, dropout=0.5)
    x = torch.randn(1, 4, 6, 6)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ---- layer and block ---------------------------------------------------------------------------------------


def test_published_block() -> None:
    block = MSAConvBlock(64, 64, 3)
    assert sum(p.numel() for p in block.parameters()) == 49_344
    assert list(block.state_dict()) == ["qkv_conv.weight", "qkv_conv.bias", "mlp.weight"]
    assert sum(p.numel() for p in MSAConvBlock(64, 64, 7).parameters()) == 213_184
    x = torch.randn(1, 4, 10, 9)
    assert MSAConvBlock(4, 5, 7)(x).shape == (1, 5, 6, 5)  # padding 1 whatever the kernel
    assert MSAConvBlock(4, 5, 7, padding=None)(x).shape == (1, 5, 10, 9)
    assert MSAConvBlock(4, 5, (5, 1), stride=2, padding=(2, 0))(x).shape == (1, 5, 5, 5)


def test_switching_our_parts_off_gives_the_plain_operator() -> None:
    """Cyclic shift and inter-pooling off, one head: bit for bit the published layer."""
    plain = MSAConvAttention(6, 3, dropout=0.0)
    ours = MSAConvAttention(6, 3, dropout=0.0, heads=1, shift=0, inter_pool=1, index=3)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 7, 9)
    assert torch.equal(plain(x), ours(x))
    for options in (dict(shift=1, index=1), dict(inter_pool=2), dict(heads=2)):
        other = MSAConvAttention(6, 3, dropout=0.0, **options)  # type: ignore[arg-type]
        other.load_state_dict(plain.state_dict())
        assert not torch.allclose(plain(x), other(x), atol=1e-4)


def test_shift_rolls_keys_and_values_a_head() -> None:
    layer = MSAConvAttention(6, 3, heads=3, shift=2, index=4)
    pixels = torch.randn(1, 5, 6, 6)
    rolled = layer.roll(pixels, 2)
    assert torch.equal(rolled[..., :2], pixels[..., :2].roll((-2, -2), (1, 2)))  # direction 4 of 5
    assert torch.equal(rolled[..., 2:4], pixels[..., 2:4])  # direction 0: none
    assert torch.equal(rolled[..., 4:], pixels[..., 4:].roll((2, 2), (1, 2)))
    assert torch.equal(layer.roll(pixels, 7), layer.roll(layer.roll(pixels, 4), 3))  # longer than the map


def test_attention_received_adds_up() -> None:
    """Every query hands out one unit, less what goes beyond the border; a constant map makes it countable."""
    for options in (dict(), dict(inter_pool=2), dict(shift=1, index=1), dict(heads=2, shift=None)):
        layer = MSAConvAttention(4, 3, **options).eval()  # type: ignore[arg-type]
        pixels = torch.randn(2, 7, 6, 4)
        attn = layer.weights(pixels)["attn"]
        ones = attend_simply(
            torch.zeros(2, 7, 6, 4), torch.zeros_like(layer.inter(pixels)), torch.ones_like(layer.inter(pixels)),
            (3, 3), 1, layer.heads, layer.inter_pool,
        )[2]  # fmt: skip
        assert attn.shape == ones.shape
        received = layer.received(pixels)
        assert received.shape == (2, 7, 6) and (received >= 0).all()
        assert (received.sum((1, 2)) <= 42 + 1e-4).all() and (received.sum((1, 2)) > 20).all()


# ---- network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("tic_mini", 1_899_608), ("tic_small", 13_623_432)])
def test_sizes_of_the_variants(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in tic(name).parameters()) == count


def test_one_set_of_weights_at_any_resolution() -> None:
    model = tic("tic_mini", num_classes=4).eval()
    with torch.no_grad():
        for size in ((32, 32), (224, 224), (97, 131), (33, 320)):
            x = torch.randn(1, 3, *size)
            maps = model.forward_intermediates(x)
            assert [tuple(m.shape[2:]) for m in maps] == [
                tuple(-(-n // info["reduction"]) for n in size) for info in model.feature_info
            ]
            assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
            assert torch.isfinite(model(x)).all()


def test_dilations_and_depthwise_heads() -> None:
    model = tic(
        "tic_xs", num_classes=3, dilations=[[2], [1], [1, 3], [1]], heads=(24, 48, 96, 192), dims=(24, 48, 96, 192)
    ).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert model.stages[0].blocks[0].attn.dilation == 2  # type: ignore[union-attr,index]


def test_deployed_and_eager_agree() -> None:
    model = tic("tic_xs", num_classes=3)
    model.train()
    model(torch.randn(4, 3, 64, 64))  # batch statistics of its own
    model.eval()
    deployed = model.to_deploy()
    x = torch.randn(9, 3, 96, 80)
    with torch.no_grad():
        assert torch.allclose(model(x), deployed(x), atol=1e-5)
        assert torch.allclose(copy.deepcopy(deployed)(x), deployed(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = tic("tic_xs", num_classes=3).eval()
    with torch.no_grad():
        assert torch.isfinite(copy.deepcopy(model).to(dtype)(x.to(dtype))).all()
        assert MSAConvAttention(3, 3).to(dtype).eval()(x.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype):
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_operator_compiles_in_one_graph() -> None:
    layer = MSAConvAttention(8, 5, heads=2, shift=None, inter_pool=2, index=1).eval()
    for dynamic in (None, True):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for size in ((11, 9), (16, 20)):
            x = torch.randn(1, 8, *size)
            assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_memory_order() -> None:
    model = tic("tic_xs", num_classes=3).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = model.forward_features(x.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(out, model.forward_features(x), atol=1e-5)


def test_explanations_and_heads() -> None:
    model = tic("tic_xs", num_classes=3).eval()
    x = torch.randn(2, 3, 64, 96)
    maps = model.attention_maps(x)
    assert [tuple(m.shape) for m in maps.values()] == [(2, 16, 24), (2, 8, 12), (2, 4, 6), (2, 4, 6), (2, 2, 3)]
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(5)
    assert torch.allclose(model.get_classifier()(pooled), model(x))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: tic("tic_large"), "no variant 'tic_large'"),
        (lambda: tic("tic_xs")(torch.zeros(1, 3, 64, 16)), "at least 32 x 32 px, got 64 x 16"),
        (lambda: tic("tic_xs", in_chans=1)(torch.zeros(1, 3, 64, 64)), "[B, 1, H, W]"),
        (lambda: MSAConvAttention(6, 3, heads=4), "6 channels cannot be split into 4 heads"),
        (lambda: TiC(depths=(1, 1)), "a stage"),
        (lambda: tic("tic_xs", inter_pool=3), "inter_pool is 3"),
        (lambda: tic("tic_xs", kernel=0), "must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(act: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        act()
    assert message in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("form", ["torchscript", "pt2", "onnx"])
def test_exports_of_dynamic_size(form: str, tmp_path: Path) -> None:
    model = TiC(dims=(8, 16), depths=(1, 1), heads=(1, 2), kernel=3, num_classes=5).eval()
    run = exported(model.to_deploy(), torch.randn(2, 3, 128, 136), form, True, tmp_path)
    assert largest_difference(model, run, [(3, 3, 128, 136), (1, 3, 97, 165), (2, 3, 224, 130)]) < 1e-5
