"""MEDUSA: the properties that a faithful implementation has, since nothing was published to compare with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medical.medusa import MEDUSA, Body, area_matrix, global_view, preset, resize
from medical.variants import PARAMETERS, PRESETS, list_variants
from polyhead.errors import UserError
from polyhead.folding import fold_batch_norms


def medusa(seed: int = 0, **options: Any) -> MEDUSA:
    torch.manual_seed(seed)
    return MEDUSA(**{"num_classes": 3, "backbone": "resnet18", "base": 4, **options})


def pair(batch: int = 2, x: tuple[int, int] = (96, 96), g: tuple[int, int] = (64, 64)) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *x, generator=source), torch.randn(batch, 1, *g, generator=source)


# Size


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "cxr3" in n else ()) for n in PRESETS])
def test_presets_have_the_stated_budget(name: str) -> None:
    stated = {"medusa_cxr3": (29.26, 29.10), "medusa_r50": (28.09, 6.14), "medusa_r18": (15.66, 9.70)}[name]
    options = preset(name)
    side = options.pop("global_size")
    network = MEDUSA(2, **options).eval()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        network(torch.zeros(1, 3, options["image_size"], options["image_size"]), torch.zeros(1, 1, side, side))
    parameters = sum(p.numel() for p in network.parameters())
    assert parameters == PARAMETERS[name] == list_variants()[name]["parameters"]
    assert parameters / 1e6 == pytest.approx(stated[0], rel=1e-3)
    assert counted.get_total_flops() / 2e9 == pytest.approx(stated[1], rel=5e-3)
    heads = sum(p.numel() for p in network.heads.parameters())
    assert sum(p.numel() for p in network.body.parameters()) >= 10 * heads  # type: ignore[union-attr]


def test_ablations_have_the_stated_sizes_and_the_same_backbone() -> None:
    stated = {"none": 23.51, "isolated": 23.67, "global": 29.10, "full": 29.26}
    keys = {}
    for attention, millions in stated.items():
        with torch.device("meta"):
            network = MEDUSA(2, "resnet50", base=27, attention=attention)  # type: ignore[arg-type]
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)
        keys[attention] = {k for k in network.state_dict() if k.startswith(("backbone.", "fc."))}
    assert len({frozenset(k) for k in keys.values()}) == 1


# Shapes and views


@pytest.mark.parametrize(("x", "g"), [((96, 96), (64, 64)), ((64, 128), (50, 33)), ((97, 65), (128, 48))])
def test_maps_have_the_sizes_of_their_stages(x: tuple[int, int], g: tuple[int, int]) -> None:
    network = medusa().eval()
    with torch.no_grad():
        output = network(*pair(2, x, g))
        plain = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4))(pair(2, x, g)[0])
    assert output.logits.shape == (2, 3)
    assert output.global_map is not None and output.global_map.shape == (2, 1, *g)
    assert [a.shape for a in output.gates] == [(2, 1, *f.shape[-2:]) for f in plain]


def test_a_constant_image_and_half_precision_give_gates_between_0_and_1() -> None:
    network = medusa().eval()
    constant = torch.full((1, 3, 96, 96), 0.3)
    g = global_view(constant, 64)
    assert float(g.abs().max()) < 1e-3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for a in (network(constant, g), network(*pair())):
            assert torch.isfinite(a.logits).all()
            assert all(bool(((m >= 0) & (m <= 1)).all()) for m in a.gates)


def test_the_global_view_is_standardised_and_bounded() -> None:
    image = torch.rand(3, 3, 70, 90)
    image[2] = 0
    image[2, :, 3, 3] = 1
    g = global_view(image, 64)
    assert g.shape == (3, 1, 64, 64)
    assert g[:2].mean((-2, -1)).abs().max() < 1e-5 and (g[:2].std((-2, -1), correction=0) - 1).abs().max() < 1e-3
    assert g.max() <= 10


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70))
def test_resizing_keeps_the_mean_when_it_shrinks_and_commutes_with_flips(a: int, b: int, c: int, d: int) -> None:
    # Places between pixels are rounded: float32 leaves 1e-5 now and then
    q = torch.randn(2, 3, a, b, dtype=torch.float64)
    small = resize(q, (c, d))
    assert small.shape == (2, 3, c, d)
    assert torch.allclose(resize(q.flip(-1), (c, d)), small.flip(-1), atol=1e-10)
    assert torch.allclose(resize(q.flip(-2), (c, d)), small.flip(-2), atol=1e-10)
    if c <= a and d <= b:
        assert torch.allclose(small.mean((-2, -1)), q.mean((-2, -1)), atol=1e-10)
    if a % c == 0 and b % d == 0:
        pooled = torch.nn.functional.avg_pool2d(q, (a // c, b // d))
        assert torch.allclose(small, pooled, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 90), st.integers(1, 90))
def test_area_matrices_sum_to_one_and_share_every_pixel_equally(n: int, m: int) -> None:
    m = min(m, n - 1)
    matrix = area_matrix(n, m).double()
    assert torch.allclose(matrix.sum(1), torch.ones(m).double(), atol=1e-5)
    assert torch.allclose(matrix.sum(0), torch.full((n,), m / n).double(), atol=1e-5)
    assert torch.equal(matrix.flip(0, 1), matrix)


# One body for all scales


def test_the_body_runs_once_and_its_size_does_not_depend_on_the_heads() -> None:
    network, fewer = medusa().eval(), medusa(attention_stages=[2])
    assert sum(isinstance(m, Body) for m in network.modules()) == 1
    calls: list[int] = []
    assert network.body is not None and fewer.body is not None
    network.body.register_forward_hook(lambda *a: calls.append(1))
    network(*pair())
    assert len(calls) == 1
    sizes = [sum(p.numel() for p in n.body.parameters()) for n in (network, fewer)]  # type: ignore[union-attr]
    assert sizes[0] == sizes[1] and list(fewer.heads) == ["2"]


def gradients(network: MEDUSA, value: Tensor) -> float:
    assert network.body is not None
    found = torch.autograd.grad(value, list(network.body.parameters()), retain_graph=True, allow_unused=True)
    return sum(float(g.abs().sum()) for g in found if g is not None)


def test_every_scale_and_the_loss_reach_the_body() -> None:
    network = medusa().train()
    output = network(*pair())
    for gate in output.gates:
        assert gradients(network, gate.sum()) > 0
    for stage in (1, 2, 3, 4):
        alone = medusa(attention_stages=[stage]).train()
        assert gradients(alone, nn.functional.cross_entropy(alone(*pair()).logits, torch.tensor([0, 1]))) > 0


def test_gates_see_the_global_and_the_local_view() -> None:
    network = medusa().eval()
    x, g = pair()
    with torch.no_grad():
        base = network(x, g)
        other_g = network(x, g + torch.randn(g.shape))
        other_x = network(x + torch.randn(x.shape), g)
    assert all(float((a - b).abs().max()) > 1e-6 for a, b in zip(base.gates, other_g.gates, strict=True))
    assert all(float((a - b).abs().max()) > 1e-6 for a, b in zip(base.gates, other_x.gates, strict=True))
    assert base.global_map is not None and other_x.global_map is not None
    assert torch.equal(base.global_map, other_x.global_map)


def force(network: MEDUSA, bias: float, stages: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    for stage in stages:
        nn.init.constant_(network.heads[str(stage)].gate.bias, bias)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(("gate", "bias"), [("mul", 1e4), ("residual", -1e4)])
def test_open_gates_are_the_plain_backbone(gate: str, bias: float) -> None:
    network = medusa(gate=gate).eval()
    plain = medusa(attention="none").eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if k.startswith(("backbone.", "fc."))})
    force(network, bias)
    with torch.no_grad():
        assert torch.allclose(network(*pair()).logits, plain(*pair()).logits, atol=1e-5)


def test_a_closed_last_gate_leaves_the_bias_of_the_classifier() -> None:
    network = medusa().eval()
    nn.init.normal_(network.fc.bias)
    force(network, -1e4, (4,))
    with torch.no_grad():
        assert torch.allclose(network(*pair()).logits, network.fc.bias.expand(2, -1), atol=1e-6)


def test_global_attention_gates_with_the_bodys_map_alone() -> None:
    network = medusa(attention="global").train()
    with torch.no_grad():
        output = network(*pair(8))
    assert output.global_map is not None
    for gate in output.gates:
        assert torch.allclose(gate, resize(output.global_map, tuple(gate.shape[-2:])).sigmoid())
        assert float(gate.mean()) > 0.75


def support(network: MEDUSA, of: str) -> int:
    """Width in pixels of what a central cell of the first gate sees in `x` or `g`."""
    seen = None
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)
        views = {"x": torch.randn(1, 3, 224, 224, generator=source), "g": torch.randn(1, 1, 256, 256, generator=source)}
        views[of].requires_grad_(True)
        gate = network(views["x"], views["g"]).gates[0]
        gate[0, 0, gate.shape[-2] // 2, gate.shape[-1] // 2].backward()
        columns = views[of].grad.abs().sum((0, 1, 2)) > 0  # type: ignore[union-attr]
        seen = columns if seen is None else seen | columns
    assert seen is not None
    where = seen.nonzero().flatten()
    return int(where[-1] - where[0]) + 1


def test_the_first_gate_sees_most_of_the_global_view_and_little_of_the_local_one() -> None:
    network = medusa(base=8).eval()
    assert support(network, "g") > 200
    assert support(network, "x") < 70


def test_mirrored_views_give_mirrored_gates_when_the_kernels_are_symmetric() -> None:
    network = medusa().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)
        x, g = pair(1, (225, 225), (128, 128))
        both, base = network(x.flip(-1), g.flip(-1)), network(x, g)
        global_only = network(x, g.flip(-1))
    for a, b, c in zip(both.gates, base.gates, global_only.gates, strict=True):
        assert torch.allclose(a, b.flip(-1), atol=5e-5)
        assert float((c - b.flip(-1)).abs().max()) > 1e-4


def test_a_batch_is_its_images_and_evaluation_repeats_itself() -> None:
    network = medusa().eval()
    x, g = pair(3)
    with torch.no_grad():
        whole = network(x, g)
        single = torch.cat([network(x[i : i + 1], g[i : i + 1]).logits for i in range(3)])
        assert torch.equal(network(x, g).logits, whole.logits)
    assert torch.allclose(single, whole.logits, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_look_at_a_blob(seed: int) -> None:
    torch.manual_seed(seed)
    options = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "zero_init_last": False}
    network = MEDUSA(2, "resnet18", base=4, backbone_options=options)

    def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
        coarse = 0.25 * torch.rand(count, 1, 12, 12)
        image = nn.functional.interpolate(coarse, (48, 48), mode="bilinear") + 0.15 * torch.rand(count, 1, 48, 48)
        label = (torch.rand(count) < 0.5).long()
        centre = torch.rand(count, 2) * 32 + 8
        axis = torch.arange(48.0)
        distance = (axis[None, :, None] - centre[:, :1, None]) ** 2 + (axis[None, None] - centre[:, 1:, None]) ** 2
        blob = (-distance / 32).exp()[:, None]
        return image + 0.9 * blob * label.view(-1, 1, 1, 1), label, blob

    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-4)
    for _ in range(60):
        image, label, _ = draw(8)
        x = image.expand(-1, 3, -1, -1)
        loss = nn.functional.cross_entropy(network(x, global_view(x, 48)).logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, label, blob = draw(64)
    x = image.expand(-1, 3, -1, -1)
    with torch.no_grad():
        output = network.eval()(x, global_view(x, 48))
    gate = output.gates[0][label == 1]
    inside = resize((blob[label == 1] > 0.3).float(), tuple(gate.shape[-2:]))
    mean_inside = (gate * inside).sum() / inside.sum()
    mean_outside = (gate * (1 - inside)).sum() / (1 - inside).sum()
    assert mean_inside - mean_outside > 0.01
    assert (output.logits.argmax(1) == label).float().mean() > 0.9


# Backbones


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "regnety_002", "swin_s3_tiny_224", "efficientnet_lite0"])
def test_ungated_stages_are_the_backbone_itself(name: str) -> None:
    side = 224 if name.startswith("swin") else 64
    network = medusa(backbone=name, attention="none", image_size=side).eval()
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        replayed = network.forward_features(x, None)[0]
        if name == "efficientnet_lite0":
            expected = network.backbone.forward_features(x)  # type: ignore[operator]
        else:
            expected = network.backbone(x)[-1]
            expected = expected.permute(0, 3, 1, 2) if name.startswith("swin") else expected
    assert torch.equal(replayed, expected)


def test_what_cannot_be_cut_or_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="the stages of mobilenetv3_small_050 cannot be run one by one"):
        medusa(backbone="mobilenetv3_small_050")
    with pytest.raises(UserError, match="has the stages 1 to 4"):
        medusa(attention_stages=[5])
    with pytest.raises(UserError, match="one gate for all channels"):
        medusa(attention="global", channel_attention=True)
    with pytest.raises(UserError, match="32 x 32 pixels are needed"):
        medusa().eval()(*pair(1, (96, 96), (31, 64)))
    with pytest.raises(UserError, match="unknown MEDUSA variant"):
        preset("medusa_r81")


def test_channel_attention_has_a_gate_for_every_channel() -> None:
    output = medusa(channel_attention=True, attention_stages=[1, 4]).eval()(*pair())
    assert [a.shape[1] for a in output.gates] == [64, 512]


# Folding


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "regnety_002"])
def test_folded_norms_change_nothing(name: str) -> None:
    network = medusa(backbone=name)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(*pair(4))
        network.eval()
        folded = fold_batch_norms(network, lambda n: n(*pair(1)))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        want, got = network(*pair()), folded(*pair())
    assert torch.allclose(got.logits, want.logits, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got.gates, want.gates, strict=True))


def test_a_norm_that_follows_no_convolution_stays() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norms(network, lambda n: n(torch.zeros(1, 3, 2, 2)))
    assert isinstance(folded[2], nn.BatchNorm2d)  # type: ignore[index]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_norm_beside_another_use_of_its_convolution_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            nn.init.uniform_(self.norm.weight, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    network, x = Twice().eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert torch.allclose(fold_batch_norms(network, lambda n: n(x))(x), network(x), atol=1e-6)


def test_predicting_before_training_is_harmless() -> None:
    network = medusa()
    with torch.inference_mode():
        network.eval()(*pair(1, (96, 96), (72, 72)))
    network.train()(*pair(2, (96, 96), (72, 72))).logits.sum().backward()
