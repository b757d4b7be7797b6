"""SpectFormer: the gate's two forms and its resizing, both architectures at any size, token labelling, exports."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polyhead.errors import UserError
from tests.vision._exports import exported, largest_difference
from vision.spectformer import HierarchicalSpectFormer, VanillaSpectFormer, spectformer
from vision.spectformer_layers import Attention, ClassAttention
from vision.spectral_gate import SpectralGate, resize_filter
from vision.token_label import TokenLabelLoss, mix, mix_box, random_box

GRIDS = [(14, 14), (5, 5), (4, 7), (7, 4), (1, 3), (6, 2)]


def tiny(**options: Any) -> VanillaSpectFormer:
    return VanillaSpectFormer(
        **dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4, alpha=2, num_classes=5) | options
    ).eval()


def tiny_stages(**options: Any) -> HierarchicalSpectFormer:
    small = dict(img_size=64, stem_hidden_dim=8, embed_dims=(8, 16, 24, 32), num_heads=(1, 1, 2, 2))
    model = HierarchicalSpectFormer(
        **small | dict(mlp_ratios=(2, 2, 2, 2), depths=(1, 1, 1, 1), num_classes=5) | options
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return model.eval()


# ---- gate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_gate_is_a_circular_convolution_in_either_form(grid: tuple[int, int]) -> None:
    gate = SpectralGate(3, grid).double()
    nn.init.normal_(gate.complex_weight)
    x = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.double)
    image, kernel = x.unflatten(1, grid), gate.kernel()
    expected = torch.zeros_like(image)
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected += kernel[row, column] * image.roll((row, column), (1, 2))
    for backend in ("fft", "matmul"):
        gate.backend = backend
        assert torch.allclose(gate(x), expected.flatten(1, 2), atol=1e-12)


@pytest.mark.parametrize("backend", ["fft", "matmul"])
@pytest.mark.parametrize("at", [(4, 5), (3, 6)])
def test_gradients_of_the_gate(backend: str, at: tuple[int, int]) -> None:
    """On its own grid, and on another one through the resized weight."""
    gate = SpectralGate(2, (4, 5), backend).double()
    x = torch.randn(1, at[0] * at[1], 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(gate, {"complex_weight": weight}, (x, at)),
        (x, gate.complex_weight),
    )


@pytest.mark.parametrize("layer", [Attention(8, 2, joint=True), Attention(8, 2, joint=False), ClassAttention(8, 2)])
def test_gradients_of_the_attentions(layer: nn.Module) -> None:
    layer = layer.double()
    x = torch.randn(1, 5, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)


def test_auto_trains_with_the_fft_and_infers_with_what_is_faster() -> None:
    small, large = SpectralGate(2, (14, 14)), SpectralGate(2, (56, 56))
    assert not small.by_matmul((14, 14)) and not large.by_matmul((56, 56))
    assert small.eval().by_matmul((14, 14)) and not large.eval().by_matmul((56, 56))
    # What counts is the grid that runs
    assert not small.by_matmul((56, 56)) and large.by_matmul((14, 14))
    x = torch.randn(2, 56 * 56, 2)
    forms = [SpectralGate(2, (14, 14), form).eval() for form in ("fft", "matmul")]
    forms[1].load_state_dict(forms[0].state_dict())
    assert torch.allclose(forms[0](x, (56, 56)), forms[1](x, (56, 56)), atol=1e-6)
    with pytest.raises(UserError, match="backend='dct'"):
        SpectralGate(2, (4, 4), "dct")


def test_gate_stays_in_float32() -> None:
    gate = SpectralGate(4, (8, 8))
    x = torch.randn(2, 64, 4)
    expected = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = gate(x.bfloat16())
    assert out.dtype == torch.float32
    assert torch.allclose(out, gate(x.bfloat16().float()))
    half = copy.deepcopy(gate).half()
    for backend in ("fft", "matmul"):
        half.backend = backend
        got = half(x.half())
        assert got.dtype == torch.float16
        assert torch.allclose(got.float(), expected, atol=2e-3)


def test_gate_survives_channels_last_and_moves() -> None:
    """`.to(channels_last)` permutes 4-D parameters, and constants must follow the weight's type."""
    gate = SpectralGate(4, (8, 6)).eval()
    x = torch.randn(2, 48, 4)
    expected = gate(x)
    gate.to(memory_format=torch.channels_last)
    gate.freeze()
    assert torch.equal(gate(x), expected) and gate.complex_weight.is_contiguous()
    assert torch.allclose(copy.deepcopy(gate).double()(x.double()).float(), expected, atol=1e-6)
    with torch.device("meta"):
        other = SpectralGate(4, (8, 6)).eval()
    other.to_empty(device="cpu").load_state_dict(gate.state_dict())
    assert torch.equal(other(x), expected)


def test_resized_filters() -> None:
    weight = torch.randn(14, 8, 3, 2)
    assert resize_filter(weight, (14, 14)) is weight
    for grid in ((20, 21), (15, 28), (14, 17)):
        up = resize_filter(weight, grid, "spectrum")
        assert up.shape == (grid[0], grid[1] // 2 + 1, 3, 2)
        assert torch.equal(resize_filter(up, (14, 14), "spectrum"), weight)
    # the published stretch is exact on what is linear in both axes, so a round trip gives that back
    rows, columns = torch.linspace(-1, 1, 14), torch.linspace(0, 2, 8)
    smooth = (rows[:, None] + columns)[..., None, None].expand(14, 8, 3, 2).contiguous()
    back = resize_filter(resize_filter(smooth, (28, 28)), (14, 14))
    assert torch.allclose(back[2:-2, 2:-2], smooth[2:-2, 2:-2], atol=2e-2)
    with pytest.raises(UserError, match="'nearest'"):
        resize_filter(weight, (3, 3), "nearest")


# ---- networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "labelled"),
    [("spectformer_t", 9_158_376, 0), ("spectformer_xs", 20_028_520, 0), ("spectformer_s", 32_449_768, 0),
     ("spectformer_b", 57_159_656, 0), ("spectformer_h_s", 21_777_928, 22_226_928),
     ("spectformer_h_b", 32_539_880, 33_052_880), ("spectformer_h_l", 54_162_792, 54_675_792)],
)  # fmt: skip
def test_published_sizes(name: str, count: int, labelled: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in spectformer(name).parameters()) == count
        if labelled:
            assert sum(p.numel() for p in spectformer(name, token_label=True).parameters()) == labelled


@pytest.mark.parametrize("build", [tiny, tiny_stages])
def test_one_set_of_weights_at_other_sizes(build: Any) -> None:
    model = build()
    own = 32 if build is tiny else 64
    for size in ((own, own), (64, 96), (75, 50)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            maps = model.forward_intermediates(x)
            assert torch.isfinite(model(x)).all()
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        assert [tuple(m.shape[2:]) for m in maps] == [
            tuple(-(-n // info["reduction"]) for n in size) for info in model.feature_info
        ]
        # resizing for good is the same as at every call
        fixed = copy.deepcopy(model)
        fixed.set_input_size(size)
        assert torch.allclose(fixed(x), model(x), atol=1e-5)


@pytest.mark.parametrize("build", [tiny, tiny_stages])
def test_weights_of_another_size_load(build: Any) -> None:
    """Transfer to another image size, and back: the frequencies survive the round trip exactly."""
    model = build()
    larger = build(img_size=(96, 128), num_classes=3)
    state = {k: v for k, v in model.state_dict().items() if "head" not in k}
    missing = larger.load_state_dict(larger.resize_state(state, "spectrum"), strict=False)
    assert all("head" in key for key in missing.missing_keys) and not missing.unexpected_keys
    x = torch.randn(1, 3, 96, 128)
    expected = copy.deepcopy(model)
    expected.set_input_size((96, 128), "spectrum")
    assert torch.allclose(larger.forward_features(x), expected.forward_features(x), atol=1e-6)
    back = model.resize_state(larger.state_dict(), "spectrum")
    gates = [k for k in back if k.endswith("complex_weight")]
    assert gates and all(torch.equal(back[k], model.state_dict()[k]) for k in gates)


def test_vanilla_spectral_block_has_one_residual() -> None:
    model = tiny()
    block = model.blocks[0]
    x = torch.randn(2, 16, 24)
    expected = x + block.mlp(block.norm2(block.filter(block.norm1(x))))
    assert torch.allclose(block(x, (4, 4)), expected, atol=1e-6)


def test_attention_maps_and_heads() -> None:
    model = tiny()
    x = torch.randn(2, 3, 48, 32)
    maps = model.attention_maps(x)
    assert {n: tuple(m.shape) for n, m in maps.items()} == {"blocks.2.attn": (2, 6, 4)}
    assert torch.allclose(maps["blocks.2.attn"].sum((1, 2)), torch.ones(2))
    staged = tiny_stages()
    maps = staged.attention_maps(torch.randn(2, 3, 64, 96))
    assert maps["post_network.0.attn"].shape == (2, 2, 3) and maps["block3.0.attn"].shape == (2, 4, 6)
    for network in (model, staged):
        pooled = network.forward_head(network.forward_features(x), pre_logits=True)
        assert pooled.shape == (2, network.num_features)
        network.reset_classifier(3)
        assert network(x).shape == (2, 3)
        network.reset_classifier(0)
        assert torch.equal(network(x), pooled)


@pytest.mark.parametrize("build", [tiny, tiny_stages])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(build: Any, dtype: torch.dtype) -> None:
    model = build(token_label=False) if build is tiny_stages else build()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.isfinite(copy.deepcopy(model).to(dtype)(x.to(dtype))).all()
    model.train()
    with torch.autocast("cpu", dtype):
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("build", [tiny, tiny_stages])
def test_compiles_in_one_graph(build: Any) -> None:
    model, x = build(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("build", [tiny, tiny_stages])
def test_deployed_and_eager_agree(build: Any) -> None:
    """Also in several parts, in another memory order, and after a copy of the deployed network."""
    model = build()
    deployed = model.to_deploy()
    x = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(deployed(x), expected, atol=1e-5)
        assert torch.allclose(deployed(x.to(memory_format=torch.channels_last)), expected, atol=1e-5)
        assert torch.allclose(copy.deepcopy(deployed)(x), expected, atol=1e-5)
        assert torch.allclose(pickle.loads(pickle.dumps(deployed))(x), expected, atol=1e-5)
        assert torch.allclose(deployed.double()(x.double()).float(), expected, atol=1e-5)
    with torch.enable_grad():
        x.requires_grad_()
        deployed.float()(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: spectformer("spectformer_m"), "no variant 'spectformer_m'"),
        (lambda: tiny()(torch.zeros(1, 3, 7, 32)), "at least 8 x 8 px, got 7 x 32"),
        (lambda: tiny_stages()(torch.zeros(1, 3, 31, 64)), "at least 32 x 32 px, got 31 x 64"),
        (lambda: tiny()(torch.zeros(1, 4, 32, 32)), "[B, 3, H, W], got [1, 4, 32, 32]"),
        (lambda: tiny()(torch.zeros(3, 32, 32)), "[B, 3, H, W], got [3, 32, 32]"),
        (lambda: tiny_stages().train()(torch.zeros(3, 64, 64)), "got [3, 64, 64]"),
        (lambda: tiny(num_heads=5), "24 channels cannot be split into 5 heads"),
        (lambda: tiny(img_size=4), "smaller than a patch"),
    ],
)
def test_mistakes_are_one_line(act: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        act()
    assert message in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("form", ["torchscript", "pt2", "onnx"])
@pytest.mark.parametrize("build", [tiny, tiny_stages])
def test_exports_of_dynamic_batch(form: str, build: Any, tmp_path: Path) -> None:
    """Gates export as matrix products, trained with the FFT or not."""
    model = build()
    for gate in model.gates().values():
        gate.backend = "fft"
    deployed = copy.deepcopy(model).to_deploy()
    for gate in deployed.gates().values():
        gate.backend = "auto"
    size = 32 if build is tiny else 64
    run = exported(deployed, torch.randn(2, 3, size, size), form, False, tmp_path)
    assert largest_difference(model, run, [(1, 3, size, size), (5, 3, size, size)]) < 1e-4
    if form == "onnx":
        import onnx

        kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
        assert "MatMul" in kinds and "DFT" not in kinds


# ---- token labels ------------------------------------------------------------------------------------------


def test_mixing_swaps_the_box_with_the_reversed_batch() -> None:
    x = torch.arange(2 * 8 * 8).float().view(2, 8, 8, 1)
    mixed = mix(x, (1, 0, 3, 2), scale=2)
    assert torch.equal(mixed[0, 2:6, :4], x[1, 2:6, :4])
    assert torch.equal(mixed[0, :2], x[0, :2]) and torch.equal(mixed[0, 2:, 4:], x[0, 2:, 4:])
    assert torch.equal(mix(mixed, (1, 0, 3, 2), scale=2), x)
    assert mix_box(1.0, 3, 3, (7, 7)) == (3, 3, 3, 3)
    assert mix_box(0.0, 3, 0, (7, 7)) == (0, 0, 6, 3)
    torch.manual_seed(1)
    boxes = [random_box((7, 5)) for _ in range(50)]
    assert all(0 <= b[0] <= b[2] <= 7 and 0 <= b[1] <= b[3] <= 5 for b in boxes) and len(set(boxes)) > 10


def test_token_label_training_and_loss() -> None:
    model = tiny_stages(token_label=True).train()
    x = torch.randn(4, 3, 64, 64)
    logits, tokens, box = model(x)
    assert logits.shape == (4, 5) and tokens.shape == (4, 4, 5) and len(box) == 4
    labels = torch.tensor([0, 1, 2, 3])
    soft = F.one_hot(labels, 5).float()
    full = torch.cat([soft[..., None], soft[..., None], soft[..., None].expand(-1, -1, 4)], dim=2)
    loss = TokenLabelLoss()
    for output in ((logits, tokens, (0, 0, 0, 0)), (logits, tokens, (0, 0, 1, 2))):
        value = loss(output, labels)
        assert torch.allclose(value, loss(output, soft)) and torch.allclose(value, loss(output, full))
    share = 0.5  # the last box holds two of four tokens
    image = share * soft + share * soft.flip(0)
    dense = F.cross_entropy(tokens.flatten(0, 1), soft.repeat_interleave(4, 0))
    assert torch.allclose(value, F.cross_entropy(logits, image) + 0.5 * dense)
    value.backward()
    assert model.aux_head.weight.grad is not None
    with pytest.raises(UserError, match="token labels must be"):
        loss((logits, tokens, box), torch.zeros(4, 6))


def test_token_logits_raise_the_evaluation_logits() -> None:
    model = tiny_stages(token_label=True)
    x = torch.randn(2, 3, 64, 64)
    y = model.forward_features(x)
    expected = model.head(y[:, 0]) + 0.5 * model.aux_head(y[:, 1:]).max(1).values
    assert torch.allclose(model(x), expected)
    plain = tiny_stages(token_label=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.allclose(plain(x), model.head(y[:, 0]), atol=1e-6)
    assert plain.train()(x).shape == (2, 5)
