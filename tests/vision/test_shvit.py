"""SHViT: what the paper says of it, its deployed form and exports, and timm's network of the same weights."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from checkpoints.converters.shvit import to_polyhead
from polyhead.errors import UserError
from vision.shvit import SHSA, VARIANTS, Block, SHViT, shvit

TINY: dict[str, Any] = dict(
    embed_dim=(16, 24, 40), partial_dim=(4, 7, 12), qk_dim=(8, 4, 6), depth=(1, 2, 1), num_classes=5
)
ATOL = 2e-5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def trained(model: nn.Module) -> Any:
    """The model in eval mode with statistics and scales that are not those of the start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.4, 1.2)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def tiny(**changes: Any) -> SHViT:
    return trained(SHViT(**{**TINY, **changes}))


def largest(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1)).item()


# ---- the paper's modules -----------------------------------------------------------------------------------


def test_attention_is_the_sum_of_the_definition() -> None:
    """A position at a time, from section 3.2, with nothing of the module's own code but its weights."""
    d, p, r = 10, 4, 3
    module = trained(SHSA(d, p, r))
    x = torch.randn(2, d, 3, 2)
    part = module.pre_norm(x[:, :p])
    mean, var = x[:, :p].mean((1, 2, 3)), x[:, :p].var((1, 2, 3), correction=0)
    by_hand = (x[:, :p] - mean[:, None, None, None]) / (var + 1e-5).sqrt()[:, None, None, None]
    by_hand = by_hand * module.pre_norm.weight[:, None, None] + module.pre_norm.bias[:, None, None]
    assert torch.allclose(part, by_hand, atol=1e-5)
    qkv = module.qkv(by_hand).flatten(2).detach()
    y = torch.zeros(2, p, 6)
    for b in range(2):
        for n in range(6):
            scores = [float(qkv[b, :r, n] @ qkv[b, r : 2 * r, m]) / math.sqrt(r) for m in range(6)]
            weights = [math.exp(s) for s in scores]
            for m in range(6):
                y[b, :, n] += weights[m] / sum(weights) * qkv[b, 2 * r :, m]
    mixed = F.relu(torch.cat([y, x[:, p:].flatten(2)], dim=1)).view(2, d, 3, 2)
    assert torch.allclose(module(x), module.proj[1](mixed), atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_attention_gradients(train: bool) -> None:
    module = trained(SHSA(6, 3, 2)).double().train(train)
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters), atol=1e-7)


@pytest.mark.parametrize("kind", ["i", "s"])
def test_a_fresh_block_is_the_identity(kind: str) -> None:
    block = Block(8, 3, 4, kind)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("size", "sides"), [((224, 224), (14, 7, 4)), ((33, 47), (3, 2, 1)), ((1, 1), (1, 1, 1))])
def test_maps_of_every_stage(size: tuple[int, int], sides: tuple[int, ...]) -> None:
    model = tiny()
    x = torch.randn(2, 3, *size)
    for network in (model, model.to_deploy()):
        maps = network.forward_intermediates(x)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info] == [16, 24, 40]
        assert [m.shape[3] for m in maps] == list(sides)
        assert [info["reduction"] for info in model.feature_info] == [16, 32, 64]
        assert torch.equal(network.forward_features(x), maps[-1])
        assert torch.allclose(network.forward_head(maps[-1], pre_logits=True), maps[-1].mean((2, 3)))


def test_s1_has_the_published_maps_and_gate_widths() -> None:
    with torch.device("meta"):
        maps = shvit("shvit_s1").forward_intermediates(torch.empty(1, 3, 224, 224))
        s2 = shvit("shvit_s2").state_dict()
    assert [tuple(m.shape[1:]) for m in maps] == [(128, 14, 14), (224, 7, 7), (320, 4, 4)]
    assert s2["blocks3.1.se.fc1.weight"].shape[0] == 312  # 308 rounded to a multiple of 8


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("num_classes", [0, 7])
def test_channels_and_classes(in_chans: int, num_classes: int) -> None:
    model = tiny(in_chans=in_chans, num_classes=num_classes)
    x = torch.randn(2, in_chans, 40, 40)
    out = model(x)
    assert out.shape == (2, num_classes or model.num_features)
    assert largest(model.to_deploy()(x), out) < ATOL


def test_distillation_pairs_and_averages() -> None:
    model = tiny(distillation=True)
    x = torch.randn(3, 3, 48, 48)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    mean = (model.head(pooled) + model.head_dist(pooled)) / 2
    assert not torch.allclose(model.head(pooled), model.head_dist(pooled), atol=1e-2)
    assert torch.allclose(model(x), mean, atol=1e-6)
    logits, logits_dist = model.train()(x)
    assert logits.shape == logits_dist.shape == (3, 5)
    first, second = model.get_classifier()
    assert first is model.head.l and second is model.head_dist.l


# ---- conventions -------------------------------------------------------------------------------------------


def test_reset_classifier_is_timms() -> None:
    ours, theirs = shvit("shvit_s1").bfloat16().eval(), timm.create_model("shvit_s1").bfloat16().eval()
    for classes in (3, 0, 5):
        for model in (ours, theirs):
            model.reset_classifier(classes)
            assert model.num_classes == classes
        assert {k: (v.shape, v.dtype) for k, v in ours.head.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.head.state_dict().items()
        }
        assert type(ours.head) is nn.Identity if classes == 0 else ours.get_classifier().out_features == classes
        assert not any(m.training for m in ours.modules())
        assert not any(p.abs().sum() for n, p in ours.head.named_parameters() if n == "l.bias")
        x = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
        assert ours(x).shape == theirs(x).shape == (2, classes or 320)


def test_decay_and_layers_cover_every_parameter() -> None:
    model = tiny()
    skipped = model.no_weight_decay()
    assert all((name in skipped) == (p.ndim <= 1) for name, p in model.named_parameters())
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert len({g["lr_scale"] for g in groups}) == 1 + 1 + 5 + 4 + 1  # stem, parts of the stages, head


def test_attention_maps_on_request() -> None:
    model = tiny(types=("i", "s", "s"))
    x = torch.randn(2, 3, 128, 96)
    before = model(x)
    maps = model.attention_maps(x)
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        "blocks2.3": (2, 12, 12),
        "blocks2.4": (2, 12, 12),
        "blocks3.3": (2, 4, 4),
    }
    block = model.get_submodule("blocks2.3")
    inside: Any = block.mixer.m
    entering = block.conv(model.blocks2[:3](model.blocks1(model.patch_embed(x))))  # type: ignore[operator,index]
    assert torch.allclose(maps["blocks2.3"], inside.attention(entering)[0])
    assert all(torch.allclose(a.sum(-1), torch.ones(())) and not a.requires_grad for a in maps.values())
    assert torch.equal(model(x), before)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert tiny(types=("i", "i", "i")).attention_maps(x) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(depth=(1, 2)), "depth has 2"),
        (dict(types=("i", "s", "x")), "'x'"),
        (dict(partial_dim=(4, 25, 12)), "partial_dim 25"),
        (dict(embed_dim=(4, 24, 40)), "not 4"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SHViT(**{**TINY, **changes})


def test_wrong_names_and_images_are_named() -> None:
    with pytest.raises(UserError, match="shvit_s5.*shvit_s1") as caught:
        shvit("shvit_s5")
    assert "shvit_s4" in caught.value.hints
    model = tiny()
    for network in (model, model.to_deploy()):
        with pytest.raises(UserError, match="3, H, W"):
            network(torch.zeros(1, 1, 32, 32))
        with pytest.raises(UserError, match="3, H, W"):
            network(torch.zeros(3, 32, 32))


# ---- weights -----------------------------------------------------------------------------------------------


def test_state_dict_round_trip() -> None:
    model, x = tiny(distillation=True), torch.randn(2, 3, 40, 56)
    other = SHViT(**TINY, distillation=True).eval()
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_timm_with_the_same_weights(name: str) -> None:
    theirs = trained(timm.create_model(name, num_classes=11))
    state, config = to_polyhead(theirs.state_dict())
    assert config == {"name": name, "num_classes": 11, "in_chans": 3, "distillation": False}
    ours = shvit(**config).eval()
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 96, 80)
    assert largest(ours(x), theirs(x)) < ATOL
    intermediates = theirs.forward_intermediates(x, intermediates_only=True)
    for a, b in zip(ours.forward_intermediates(x), intermediates, strict=True):
        assert largest(a, b) < ATOL


# ---- the deployed form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [("i", "s", "s"), ("s", "i", "s"), ("s", "s", "i"), ("i", "i", "i")])
@pytest.mark.parametrize("distillation", [False, True])
def test_folding_is_exact(types: tuple[str, ...], distillation: bool) -> None:
    model = tiny(types=types, distillation=distillation).double()
    folded = model.to_deploy()
    for shape in ((2, 3, 70, 90), (1, 3, 17, 16), (3, 3, 1, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        assert largest(folded(x), model(x)) < 1e-12
        for a, b in zip(folded.forward_intermediates(x), model.forward_intermediates(x), strict=True):
            assert a.shape == b.shape and largest(a, b) < 1e-12
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d | nn.GroupNorm) for m in folded.modules())


@pytest.mark.parametrize(
    "changes",
    [
        dict(embed_dim=(16,), partial_dim=(16,), qk_dim=(4,), depth=(2,), types=("s",)),
        dict(
            embed_dim=(8, 8, 16, 24),
            partial_dim=(2, 3, 16, 5),
            qk_dim=(1, 2, 3, 4),
            depth=(0, 1, 1, 2),
            types="isss",
        ),
    ],
)
def test_other_numbers_of_stages(changes: dict[str, Any]) -> None:
    model = tiny(**changes).double()
    x = torch.randn(2, 3, 130, 66, dtype=torch.float64)
    assert len(model.forward_intermediates(x)) == len(changes["depth"])
    assert largest(model.to_deploy()(x), model(x)) < 1e-12


def test_deploying_copies_and_keeps_the_rest() -> None:
    model = tiny(distillation=True).train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    folded = model.to_deploy()
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training and not folded.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    nn.init.zeros_(model.head.l.weight)  # type: ignore[union-attr,arg-type]
    assert folded.head.weight.abs().min() > 0  # type: ignore[union-attr,operator]
    assert not any(p.requires_grad for p in folded.parameters()) and all(p.requires_grad for p in model.parameters())
    again = copy.deepcopy(folded)
    again.load_state_dict({k: v.contiguous() for k, v in folded.state_dict().items()})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), folded(x))


def test_deployed_input_gradient() -> None:
    model, x = tiny(types=("s", "s", "s")), torch.randn(2, 3, 65, 70, requires_grad=True)
    gradients = [torch.autograd.grad(m(x)[:, 1].sum(), x)[0] for m in (model, model.to_deploy())]
    assert gradients[0].abs().max() > 0
    assert (gradients[1] - gradients[0]).abs().max() < 1e-3 * gradients[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = tiny(types=("s", "s", "s")), torch.randn(2, 3, 64, 96)
    expected = model(x)
    half = copy.deepcopy(model).to(dtype)
    for network in (half, half.to_deploy()):
        assert {p.dtype for p in network.parameters()} == {dtype}
        out = network(x.to(dtype))
        assert out.dtype == dtype and largest(out.float(), expected) < 0.05
    with torch.autocast("cpu", dtype):
        assert largest(model(x).float(), expected) < 0.05


def test_channels_last_input_changes_nothing() -> None:
    model, x = tiny(), torch.randn(2, 3, 64, 48)
    for network in (model, model.to_deploy()):
        assert largest(network(x.to(memory_format=torch.channels_last)), network(x)) < ATOL


# ---- exports: one artefact, any batch, any size that leaves 2 x 2 positions on the last map ---------------

SHAPES = [(1, 3, 33, 66), (3, 3, 128, 70)]
DYNAMIC = ({i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)},)


@pytest.fixture(params=["network", "deployed"])
def pair(request: pytest.FixtureRequest) -> tuple[SHViT, nn.Module]:
    model = tiny(embed_dim=(16, 24), partial_dim=(4, 7), qk_dim=(8, 4), depth=(1, 1), types=("s", "s"))
    return model, model if request.param == "network" else model.to_deploy()


def agree(exported: Any, model: SHViT) -> None:
    for shape in SHAPES:
        x = torch.randn(shape)
        assert largest(exported(x), model(x)) < ATOL, shape


def test_torch_export(pair: tuple[SHViT, nn.Module]) -> None:
    model, network = pair
    program = torch.export.export(network, (torch.randn(2, 3, 96, 160),), dynamic_shapes=DYNAMIC)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    agree(torch.export.load(buffer).module(), model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript(pair: tuple[SHViT, nn.Module]) -> None:
    model, network = pair
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, torch.randn(2, 3, 96, 160)), buffer)
    buffer.seek(0)
    agree(torch.jit.load(buffer), model)


def test_onnx(pair: tuple[SHViT, nn.Module]) -> None:
    import onnxruntime

    model, network = pair
    program = torch.onnx.export(
        network, (torch.randn(2, 3, 96, 160),), dynamo=True, dynamic_shapes=DYNAMIC, verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (name,) = [i.name for i in session.get_inputs()]
    agree(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model)


def test_no_graph_breaks(pair: tuple[SHViT, nn.Module]) -> None:
    model, network = pair
    x = torch.randn(2, 3, 96, 160)
    torch._dynamo.reset()
    with torch.no_grad():
        assert largest(torch.compile(network, fullgraph=True, backend="eager")(x), model(x)) < ATOL
