"""TransFER: what training drops, the exact shortcuts of inference, and published layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from checkpoints.converters.transfer import from_paddle, to_polyhead
from polyhead.errors import UserError
from polyhead.folding import fold_batch_norms
from vision.irse import FAMILIES, IRTrunk
from vision.transfer import (
    APViT,
    Attention,
    LocalCNNs,
    MapTokens,
    TransFER,
    create_transfer,
    draw_drop,
    kept,
    resize_positions,
)

SMALL: dict[str, Any] = {
    "units": (1, 1, 1), "widths": (8, 8, 12, 16), "ratio": 4, "width": 24, "depth": 2, "heads": 4, "image_size": 32,
}  # fmt: skip


def small(seed: int = 0, **options: Any) -> TransFER:
    torch.manual_seed(seed)
    network = TransFER(**{**SMALL, **options})
    torch.nn.init.normal_(network.head.fc.weight)
    return network


def given(batch: int = 6, maps: int = 2, channels: int = 10, side: int = 5) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, side, side, generator=source), torch.rand(
        batch, maps, side, side, generator=source
    )


def tokens_of(probability: float, maps: int = 2) -> MapTokens:
    torch.manual_seed(0)
    return MapTokens(10, 12, probability)


# Sizes


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        network, sibling = TransFER(), APViT()
        trunks = {name: sum(p.numel() for p in IRTrunk(units).parameters()) for name, units in FAMILIES.items()}
    assert sum(p.numel() for p in network.parameters()) == 65_217_869
    assert sum(p.numel() for p in network.vit.parameters()) == 47_394_816
    encoder = sum(p.numel() for n, p in sibling.named_parameters() if not n.startswith(("extractor.", "head.")))
    assert encoder == 47_592_192
    assert trunks == {"ir8": 224_064, "ir16": 1_340_864, "ir44": 17_611_968, "ir50": 30_727_360,
                      "ir100": 52_282_176, "ir152": 57_889_984}  # fmt: skip


# Dropping maps and heads


def test_evaluation_drops_nothing_and_repeats_itself() -> None:
    x, maps = given()
    outputs = [tokens_of(p).eval()(x, maps)[0] for p in (0.0, 0.6, 1.0)]
    assert all(torch.equal(outputs[0], o) for o in outputs)
    attend = Attention(24, 4, probability=1.0).eval()
    seen = torch.randn(2, 7, 24)
    assert torch.equal(attend(seen), attend(seen))


def test_at_most_one_map_of_a_sample_goes_and_survivors_are_unscaled() -> None:
    x, maps = given(64, 3)
    before = maps.clone()
    for probability, least in ((1.0, 64), (0.0, 0)):
        torch.manual_seed(0)
        drop = draw_drop(64, 3, probability)
        assert int((drop >= 0).sum()) == least
        masked = maps * kept(drop, 3)[..., None, None]
        gone = (masked == 0).flatten(2).all(-1)
        assert (gone.sum(1) == (drop >= 0)).all()
        assert torch.equal(masked[~gone], maps[~gone])
        largest = tokens_of(probability).train()(x, maps, drop)[1]
        assert bool((largest <= maps.amax(1, keepdim=True)).all())
    assert torch.equal(maps, before)


def test_draws_are_fair_and_independent() -> None:
    torch.manual_seed(3)
    count, p, choices = 20_000, 0.6, 4
    drop = draw_drop(count, choices, p)
    sigma = math.sqrt(p * (1 - p) / count)
    assert abs(float((drop >= 0).float().mean()) - p) < 4 * sigma
    share = p / choices
    for k in range(choices):
        assert abs(float((drop == k).float().mean()) - share) < 4 * math.sqrt(share * (1 - share) / count)
    assert len(drop[:50].unique()) > 2
    torch.manual_seed(3)
    assert torch.equal(drop, draw_drop(count, choices, p))


def test_blocks_draw_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def recorded(*arguments: Any) -> Tensor:
        drawn.append(draw_drop(*arguments))
        return drawn[-1]

    monkeypatch.setattr("vision.transfer.draw_drop", recorded)
    small(msad=0.5).train()(torch.randn(32, 3, 32, 32))
    assert len(drawn) == 3 and not torch.equal(drawn[1], drawn[2])


def test_the_expected_maximum_of_two_maps() -> None:
    torch.manual_seed(0)
    _, maps = given(1)
    p, count = 0.6, 20_000
    many = maps.expand(count, -1, -1, -1)
    largest = (many * kept(draw_drop(count, 2, p), 2)[..., None, None]).amax(1)
    wanted = (1 - p) * maps[0].amax(0) + p * maps[0].mean(0)
    assert torch.allclose(largest.mean(0), wanted, atol=0.02)


def test_a_single_map_dropped_leaves_the_bias_or_nothing() -> None:
    x, maps = given(4, 1)
    drop = torch.zeros(4, dtype=torch.long)
    before = tokens_of(1.0, 1).train()
    assert torch.allclose(before(x, maps, drop)[0], before.proj.bias.expand(4, 25, -1))  # type: ignore[union-attr]
    after = MapTokens(10, 12, 1.0, after=True).train()
    assert not bool(after(x, maps, drop)[0].any())


def test_a_dropped_branch_gets_no_gradient_and_only_the_largest_does() -> None:
    torch.manual_seed(0)
    branches, project = LocalCNNs(16, 2, 4), MapTokens(16, 12)
    x = torch.randn(3, 16, 5, 5)
    project(x, branches.eval()(x), torch.zeros(3, dtype=torch.long))[0].square().sum().backward()
    assert all(not bool(p.grad.any()) for p in branches.las[0].parameters() if p.grad is not None)
    assert any(bool(p.grad.any()) for p in branches.las[1].parameters() if p.grad is not None)
    _, maps = given(2, 3)
    maps.requires_grad_(True)
    maps.amax(1).sum().backward()
    assert maps.grad is not None and torch.equal(maps.grad.bool(), maps == maps.amax(1, keepdim=True))


def test_a_dropped_head_is_a_zeroed_slice_and_a_dropped_token_looks_everywhere() -> None:
    torch.manual_seed(0)
    x, head = torch.randn(3, 7, 24), torch.tensor([2, -1, 0])
    attend = Attention(24, 4, qkv_bias=True)
    q, k, v = attend._split(attend.qkv(x))
    mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(6), -1) @ v
    mixed[0, 2] = 0
    mixed[2, 0] = 0
    wanted = attend.proj(mixed.transpose(1, 2).flatten(2))
    assert torch.allclose(attend(x, head), wanted, atol=1e-6)
    legacy = Attention(24, 4, mode="token")
    legacy.load_state_dict(attend.state_dict(), strict=False)
    q, k, v = legacy._split(legacy.qkv(x) * kept(torch.tensor([1, 1, 1]), 7)[..., None])
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(6), -1)
    assert torch.allclose(weights[:, :, 1], torch.full((3, 4, 7), 1 / 7))


def test_branches_are_exchangeable_and_flips_pass_through() -> None:
    x, maps = given()
    project, drop = tokens_of(0.6), torch.tensor([0, 1, -1, 0, 1, -1])
    swapped = torch.where(drop >= 0, 1 - drop, drop)
    assert torch.allclose(project(x, maps, drop)[0], project(x, maps.flip(1), swapped)[0], atol=1e-6)
    flipped = project(x.flip(-1), maps.flip(-1), drop)[0].unflatten(1, (5, 5)).flip(2).flatten(1, 2)
    assert torch.allclose(project(x, maps, drop)[0], flipped, atol=1e-6)


def test_training_is_seeded_and_works_under_autocast() -> None:
    network, x = small().train(), torch.randn(4, 3, 32, 32)
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(network(x).logits)
    assert torch.equal(outputs[0], outputs[1]) and torch.isfinite(outputs[0]).all()
    outputs[0].float().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters() if p.grad is not None)


# Inference


def test_the_last_block_for_the_class_token_alone_is_exact() -> None:
    for bias in (False, True):
        network = small(qkv_bias=bias).eval()
        x = torch.randn(2, 17, 24)
        block = network.vit.blocks[-1]
        assert torch.allclose(block(x)[:, :1], block.first(x), atol=1e-6)  # type: ignore[operator, union-attr]


def test_folded_norms_change_nothing_and_border_norms_stay() -> None:
    network = small().train()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            network(x)
        network.eval()
        folded = fold_batch_norms(network, lambda n: n(x))
        assert torch.allclose(folded(x).logits, network(x).logits, atol=1e-5)
    left = [n for n, m in folded.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    # A unit's first norm comes before a padded convolution, where it cannot be folded
    assert left == [f"extractor.body.{i}.res_layer.0" for i in range(3)]


def test_odd_sizes_are_halved_upwards() -> None:
    trunk = IRTrunk((1, 1), (8, 8, 12)).eval()
    assert trunk(torch.zeros(1, 3, 37, 21)).shape == (1, 12, 10, 6)


def test_apvit_keeps_the_published_numbers_of_tokens() -> None:
    with torch.device("meta"):
        network = APViT().eval()
        x = torch.zeros(1, 161, 768)
        counts = []
        for block, keep in zip(network.blocks, network.keep_rates, strict=True):
            x = block(x, keep=keep)
            counts.append(x.shape[1])
    assert counts == [161, 161, 161, 161, 145, 130, 117, 105]


# Layouts


def test_the_released_layout_is_the_networks(shared: Path) -> None:
    layout = json.loads((shared / "fixtures/transfer/full_state_dict_layout.json").read_text())["keys"]
    state = from_paddle({k: np.zeros(shape, dtype=np.float32) for k, shape in layout.items()})
    with torch.device("meta"):
        own = {k: v.shape for k, v in TransFER().state_dict().items() if not k.endswith("num_batches_tracked")}
    assert {k: v.shape for k, v in state.items()} == own
    config = to_polyhead({k: np.zeros(shape, dtype=np.float32) for k, shape in layout.items()})[1]
    assert config["units"] == [3, 4, 14] and config["widths"] == [64, 64, 128, 256] and config["image_size"] == 112
    assert (config["branches"], config["ratio"], config["depth"], config["mlp_ratio"]) == (2, 16, 8, 3.0)


def test_doubled_keys_of_the_released_loader_are_one() -> None:
    state = {"a.2.weight": np.ones(3), "a.2._weight": np.ones(3), "b.1._mean": np.zeros(3)}
    assert set(from_paddle(state)) == {"a.2.weight", "b.1.running_mean"}


def test_the_trunk_of_face_evolve_and_a_timm_encoder_are_parts() -> None:
    with torch.device("meta"):
        trunk = IRTrunk((3, 4, 14, 3))
    state = {**trunk.state_dict(), "output_layer.0.weight": torch.zeros(512)}
    ours, config = to_polyhead(state)
    assert config["partial"] and config["units"] == [3, 4, 14]
    with torch.device("meta"):
        wanted = {f"extractor.{k}" for k in IRTrunk().state_dict() if not k.endswith("num_batches_tracked")}
    assert set(ours) == wanted
    vit = timm.create_model("vit_tiny_patch16_224", img_size=224)
    ours, config = to_polyhead(vit.state_dict())
    assert config["partial"] and config["width"] == 192 and config["depth"] == 12 and config["qkv_bias"]
    assert "vit.pos_embed" in ours and not any("patch_embed" in k or "head" in k for k in ours)


def test_positions_of_another_size_are_interpolated_and_come_back() -> None:
    network, larger = small(), small(image_size=64)
    state = larger.resize_state(network.state_dict())
    larger.load_state_dict(state)
    assert torch.equal(state["vit.pos_embed"][:, 0], network.vit.pos_embed[:, 0])
    smooth = torch.linspace(0, 1, 16).view(1, 16, 1).expand(1, 16, 24)
    table = torch.cat([torch.zeros(1, 1, 24), smooth], 1)
    back = resize_positions(resize_positions(table, 256), 16)
    assert torch.allclose(back[:, 1:], table[:, 1:], atol=0.05)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    for options, text in (
        ({"mad": 1.5}, "a probability from 0 to 1"),
        ({"branches": 0}, "one local CNN or more"),
        ({"heads": 5}, "no multiple of its 5 heads"),
    ):
        with pytest.raises(UserError, match=text):
            small(**options)
    with pytest.raises(UserError, match="built for a map of 4 x 4, this one has 64 pixels"):
        small().eval()(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="unknown TransFER variant 'transfr'"):
        create_transfer("transfr")
    with pytest.raises(UserError, match="not a TransFER checkpoint"):
        to_polyhead({"a": torch.zeros(1)})
