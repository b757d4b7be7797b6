"""HaloNet: the attention layer's maths and limits, timm's weights, inputs of any size, exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import UserError
from tests.vision._exports import exported, largest_difference
from vision.halo_attention import HaloAttention
from vision.halonet import VARIANTS, HaloNet, halonet

LAYERS: list[dict[str, Any]] = [
    dict(dim=4, dim_out=8, num_heads=2, block_size=3, halo_size=1),
    dict(dim=8, num_heads=2, block_size=4, halo_size=1, stride=2),
    dict(dim=8, num_heads=2, block_size=3, halo_size=2, stride=2, qkv_bias=True, scale_pos_embed=True),
    dict(dim=8, num_heads=2, block_size=2, halo_size=0, mask_padding=True),
    dict(dim=8, num_heads=2, block_size=4, halo_size=1, stride=2, geometric_rel_pos=True),
]
PUBLISHED = ["halonet26t", "sehalonet33ts", "halonet50ts", "eca_halonext26ts", "haloregnetz_b", "halonet_h1"]


def randomised(model: nn.Module) -> nn.Module:
    """All parameters and statistics drawn anew, so that no scale is zero as at the start."""
    for name, p in model.state_dict().items():
        if name.endswith("running_var") or (p.ndim == 1 and name.endswith("weight")):
            p.uniform_(0.5, 1.5)
        elif p.is_floating_point():
            p.normal_(0, 0.1 if p.ndim == 1 else 0.05)
    return model.eval()


def by_hand(layer: HaloAttention, x: Tensor) -> Tensor:
    """The layer pixel by pixel, from the formulas, for one image whose sides may be anything."""
    b, h, w, qs = layer.block, layer.halo, layer.window, layer.query_stride
    q, kv = F.conv2d(x, layer.q.weight, layer.q.bias), F.conv2d(x, layer.kv.weight, layer.kv.bias)
    height, width = x.shape[2:]
    out = x.new_zeros(1, layer.num_heads * layer.dim_v, -(-height // qs), -(-width // qs))
    step = qs if int(layer.pos_embed.rows[0, 0] - layer.pos_embed.rows[-1, 0]) > layer.queries - 1 else 1
    for head in range(layer.num_heads):
        dk, dv = layer.dim_k, layer.dim_v
        keys = kv[0, head * (dk + dv) : head * (dk + dv) + dk]
        values = kv[0, head * (dk + dv) + dk : (head + 1) * (dk + dv)]
        for row in range(out.shape[2]):
            for column in range(out.shape[3]):
                query = q[0, head * dk : (head + 1) * dk, row * qs, column * qs]
                top, left = row * qs // b * b - h, column * qs // b * b - h
                y, x_at = row % layer.queries, column % layer.queries
                logits, found = [], []
                for u in range(w):
                    for v in range(w):
                        at = top + u, left + v
                        inside = 0 <= at[0] < height and 0 <= at[1] < width
                        if layer.mask_padding and not inside:
                            continue
                        position = query @ layer.pos_embed.height_rel[w - 1 + u - y * step]
                        position = position + query @ layer.pos_embed.width_rel[w - 1 + v - x_at * step]
                        position = position * (layer.scale if layer.scale_pos_embed else 1)
                        zero = torch.zeros_like(keys[:, 0, 0])
                        key = keys[:, at[0], at[1]] if inside else zero
                        logits.append(layer.scale * query @ key + position)
                        found.append(values[:, at[0], at[1]] if inside else x.new_zeros(dv))
                weights = torch.stack(logits).softmax(0)
                out[0, head * dv : (head + 1) * dv, row, column] = weights @ torch.stack(found)
    return F.avg_pool2d(out, 2, 2, ceil_mode=True) if layer.pool else out


@pytest.mark.parametrize("options", LAYERS)
def test_layer_follows_the_formulas_on_any_size(options: dict[str, Any]) -> None:
    layer = HaloAttention(**options).double()
    x = torch.randn(1, options["dim"], 7, 5, dtype=torch.double)
    expected = by_hand(layer, x)
    assert torch.allclose(layer(x), expected, atol=1e-12)  # with the gradient at hand
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-12)
        assert torch.allclose(layer.maps(x)["out"], expected, atol=1e-12)


@pytest.mark.parametrize("options", LAYERS)
def test_gradients(options: dict[str, Any]) -> None:
    layer = HaloAttention(**options).double()
    x = torch.randn(2, options["dim"], 5, 4, dtype=torch.double, requires_grad=True)
    parameters = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters), fast_mode=True)


def test_padding_is_masked_only_on_request() -> None:
    plain = HaloAttention(8, num_heads=2, block_size=4, halo_size=2)
    masked = HaloAttention(8, num_heads=2, block_size=4, halo_size=2, mask_padding=True)
    masked.load_state_dict(plain.state_dict())
    # with values of one everywhere the output says how much weight the real keys have
    for layer in (plain, masked):
        layer.kv = nn.Conv2d(8, 16, 1)
        nn.init.zeros_(layer.kv.weight)
        nn.init.ones_(layer.kv.bias)
    x = torch.randn(1, 8, 6, 9)
    assert torch.allclose(masked(x), torch.ones(()), atol=1e-6)
    assert plain(x).mean() < 0.9


def test_blocks_do_not_see_beyond_their_halo() -> None:
    layer = HaloAttention(8, num_heads=2, block_size=4, halo_size=1)
    x = torch.randn(1, 8, 12, 12)
    moved = x.clone()
    moved[:, :, 9:] += 1
    assert torch.equal(layer(x)[:, :, :8], layer(moved)[:, :, :8])
    moved = x.clone()
    moved[:, :, 8] += 1
    assert not torch.allclose(layer(x)[:, :, 4:8], layer(moved)[:, :, 4:8])


@pytest.mark.parametrize("name", PUBLISHED)
def test_timm_weights_give_timm_outputs(name: str) -> None:
    torch.manual_seed(0)
    theirs = randomised(timm.create_model(name))
    ours = halonet(name).eval()
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    size = theirs.default_cfg["input_size"][-1]
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = theirs(x)
        assert torch.allclose(ours(x), expected, atol=1e-5 * float(expected.abs().max()))
        assert torch.allclose(ours.to_deploy()(x), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "count"),
    [("halonet_h0", 5_502_248), ("halonet_h1_paper", 8_101_352), ("halonet_h2", 9_405_608),
     ("halonet_h3", 11_842_792), ("halonet_h4", 19_103_464), ("halonet_h5", 30_718_952),
     ("halonet_h6", 43_458_280), ("halonet_h7", 67_434_728)],
)  # fmt: skip
def test_paper_table(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in halonet(name).parameters()) == count


@pytest.mark.parametrize("size", [(32, 32), (97, 131), (224, 256)])
@pytest.mark.parametrize("name", ["halonet_xs", "haloregnetz_b"])
def test_sizes_that_are_no_multiple_of_the_block(name: str, size: tuple[int, int]) -> None:
    model = randomised(halonet(name, num_classes=3))
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        assert torch.isfinite(model(x)).all()
        assert torch.equal(maps[-1], model.forward_features(x))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    expected = [tuple(-(-n // info["reduction"]) for n in size) for info in model.feature_info]
    assert [tuple(m.shape[2:]) for m in maps] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    model = halonet("halonet_xs", num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.isfinite(copy.deepcopy(model).to(dtype)(x.to(dtype))).all()
    with torch.autocast("cpu", dtype):
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_operator_compiles_in_one_graph() -> None:
    layer = HaloAttention(8, num_heads=2, block_size=4, halo_size=1).eval()
    x = torch.randn(2, 8, 10, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_memory_order() -> None:
    model = randomised(halonet("halonet_xs", num_classes=3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = model.forward_features(x.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(out, model.forward_features(x), atol=1e-4)


def test_reset_classifier_and_pre_logits() -> None:
    model = halonet("halonet_xs", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    features = model.forward_features(x)
    model.reset_classifier(7)
    assert model(x).shape == (1, 7) and model.num_classes == 7
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.allclose(model.get_classifier()(pooled), model(x))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)


def test_attention_received_adds_up() -> None:
    model = halonet("halonet_xs", num_classes=3, self_attn_kwargs=dict(
        block_size=4, halo_size=2, num_heads=4, mask_padding=True)).eval()  # fmt: skip
    maps = model.attention_maps(torch.randn(2, 3, 96, 128))
    assert {n: tuple(m.shape) for n, m in maps.items()} == {
        "stages.2.1.self_attn": (2, 6, 8), "stages.3.0.self_attn": (2, 6, 8),
    }  # fmt: skip
    # without weight on padding, every query hands out one unit; the strided layer has a quarter of the queries
    rows, columns = 2 * 4, 2 * 4  # padded queries of 6 x 8 pixels in blocks of 4
    assert torch.allclose(maps["stages.2.1.self_attn"].sum((1, 2)), torch.tensor(float(rows * columns)))


def test_preset_is_small() -> None:
    assert sum(p.numel() for p in halonet("halonet_xs", num_classes=5).parameters()) < 0.5e6


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: halonet("halonet62t"), "no variant 'halonet62t'"),
        (lambda: halonet("halonet_xs")(torch.zeros(1, 3, 31, 64)), "at least 32 x 32 px, got 31 x 64"),
        (lambda: halonet("halonet_xs")(torch.zeros(1, 1, 64, 64)), "takes images [B, 3, H, W], got [1, 1, 64, 64]"),
        (lambda: halonet("halonet_xs", stem_type="5x5"), "stem_type='5x5'"),
        (lambda: HaloAttention(10, num_heads=4), "10 channels cannot be split into 4 heads"),
        (lambda: HaloAttention(8, block_size=0), "block 0 and halo 3"),
        (lambda: HaloAttention(8, halo_size=-3), "block 8 and halo -3"),
    ],
)
def test_mistakes_are_one_line(act: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        act()
    assert message in error.value.message and "\n" not in error.value.message


def test_unknown_variant_names_near_ones() -> None:
    with pytest.raises(UserError) as error:
        halonet("halonet62t")
    assert error.value.hints[0] in VARIANTS


@pytest.mark.parametrize("form", ["torchscript", "pt2", "onnx"])
def test_exports_of_dynamic_size(form: str, tmp_path: Path) -> None:
    model = randomised(halonet("halonet_xs", num_classes=5))
    assert isinstance(model, HaloNet) and model.dynamic_size
    deployed = model.to_deploy()
    run = exported(deployed, torch.randn(2, 3, 128, 136), form, True, tmp_path)
    assert largest_difference(model, run, [(3, 3, 128, 136), (1, 3, 97, 165), (2, 3, 224, 130)]) < 1e-4
