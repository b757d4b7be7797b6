"""The network: wavelets, heads, anchors, adapters, sizes; published layouts; the generative objective."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints.converters import mvpformer as converter
from polyhead.errors import UserError
from timeseries.generative import contrastive_logits, draw_negatives
from timeseries.mvpformer import DB4, MVPA, VARIANTS, EnergyEncoder, MVPFormer, WaveEncoder, band_sizes, levels

SMALL = {"length": 64, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 24, "dropout": 0.0, "init": 0.2}
PUBLISHED = {"mvpformer_s": 73_596_210 - 9_216 - 7_680, "mvpformer_m": 1_239_146_546 - 49_152 - 7_680}


def network(**options: object) -> MVPFormer:
    torch.manual_seed(0)
    made = MVPFormer(**{**SMALL, **options}).eval()  # type: ignore[arg-type]
    for p in made.parameters():
        if not bool(p.any()):
            p.data.normal_(std=0.1)
    return made


def windows(batch: int = 2, steps: int = 13, channels: int = 5, length: int = 64, seed: int = 1) -> Tensor:
    return 50 * torch.randn(batch, steps, channels, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [14, 33, 208, 643, 2560])
def test_the_transform_is_the_formula(length: int) -> None:
    """Sheet 2.1: a[i] = sum_k lo[k] s[(2i + 1 - k) mod n], d likewise, then on a."""
    x = np.random.default_rng(length).normal(size=length)
    low = np.array(DB4)
    high = np.array([(-1) ** (k + 1) * low[7 - k] for k in range(8)])
    bands, row = [], x
    for _ in range(levels(length)):
        n = len(row)
        index = (2 * np.arange((n + 7) // 2)[:, None] + 1 - np.arange(8)) % n
        bands.append(row[index] @ high)
        row = row[index] @ low
    expected = np.concatenate([row, *reversed(bands)])
    got = WaveEncoder(length, 2).coefficients(torch.from_numpy(x)[None]).numpy()[0]
    assert [len(row), *(len(b) for b in reversed(bands))] == band_sizes(length)
    assert np.abs(got - expected).max() < 1e-5
    energies = EnergyEncoder(length, 2).energies(torch.from_numpy(x)[None])[0]
    assert np.allclose(energies, np.log([np.mean(b**2) + 0.01 for b in [row, *reversed(bands)]]), atol=1e-4)


def test_no_gradient_reaches_the_signal_and_silence_gives_zero() -> None:
    encoder = WaveEncoder(64, 8)
    x = torch.randn(3, 64, requires_grad=True)
    encoder(x).sum().backward()
    assert x.grad is None and encoder.ln.weight.grad is not None
    assert torch.equal(encoder(torch.zeros(1, 64)), torch.zeros(1, 8))


@pytest.mark.parametrize("head", ["mean", "channel"])
@pytest.mark.parametrize("anchor", ["end", "zero"])
def test_the_last_block_without_other_queries_gives_the_same(head: str, anchor: str) -> None:
    model = network(head=head, anchor=anchor)
    embeddings = model.embed(windows())
    with torch.no_grad():
        whole = model.mvpformer(embeddings)[:, -1:]
        assert torch.allclose(model.mvpformer(embeddings, last=True), whole, atol=1e-5)


@pytest.mark.parametrize("head", ["mean", "channel"])
def test_any_number_of_channels_and_their_mirror_image(head: str) -> None:
    model = network(head=head, anchor="zero", n_channels=4, n_positions=6)
    with torch.no_grad():
        for channels in (1, 2, 7, 30):
            x = windows(channels=channels)
            out = model(x)
            assert out.logits.shape == (2, 2) and out.channels.shape == (2, channels, 2)
            mirrored = model(x.flip(2))
            # Distances between channels stay as they were
            assert torch.allclose(mirrored.logits, out.logits, atol=1e-5)
            assert torch.allclose(mirrored.channels, out.channels.flip(1), atol=1e-5)


def test_the_published_anchor_has_as_many_rows_as_it_has() -> None:
    model = network(anchor="end", n_channels=4, n_positions=13)
    model(windows(channels=4))
    with pytest.raises(UserError, match="5 channels in a window"):
        model(windows(channels=5))
    with pytest.raises(UserError, match="14 segments"):
        model(windows(steps=14, channels=4))


def test_the_chosen_channel_is_the_second_most_suspicious() -> None:
    model = network(head="channel", rank=2)
    with torch.no_grad():
        out = model(windows())
        margin = out.channels[..., 1] - out.channels[..., 0]
        second = margin.sort(1, descending=True).indices[:, 1]
        assert torch.equal(out.logits, out.channels[torch.arange(2), second])
        assert torch.equal(model(windows(channels=1)).logits, model(windows(channels=1)).channels[:, 0])


def test_tracing_and_eager_agree() -> None:
    model = network(head="channel", anchor="zero").requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: tuple(model(x)), windows(), check_trace=False)
        for x in (windows(), windows(batch=3, steps=16, channels=9), windows(1, 4, 2)):
            for got, expected in zip(traced(x), model(x), strict=True):
                assert torch.allclose(got, expected, atol=1e-5)


def test_half_precision_trains() -> None:
    for head in ("mean", "named"):
        model = network(head=head, channels=5).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(windows()).logits
        logits.float().square().sum().backward()
        expected = network(head=head, channels=5)(windows()).logits
        assert torch.allclose(logits.float(), expected, atol=0.1)
        grads = [p.grad for p in model.mvpformer.h.parameters()]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)


def test_adapters_begin_without_effect_and_are_merged_once() -> None:
    model = network()
    x = windows()
    with torch.no_grad():
        before = model(x).logits
        model.adapt(rank=2)
        assert torch.equal(model(x).logits, before)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n in dict(model.named_parameters()) if ".lora_" in n or n.startswith("head.")}
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
        changed = model(x).logits
        assert not torch.allclose(changed, before)
        # Saved in eval mode and loaded again: nothing is merged on the way
        again = network()
        again.adapt(rank=2)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(x).logits, changed)
        merged = copy.deepcopy(model)
        merged.merge()
        assert torch.allclose(merged(x).logits, changed, atol=1e-5)
        assert not any("lora" in n for n in merged.state_dict())
        merged.merge()
        assert torch.allclose(merged(x).logits, changed, atol=1e-5)


def test_structured_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = MVPA(8, 2, 1, dropout=0.3, structured=True)
    layer.c_proj.weight.data = torch.eye(8)
    x, positions = torch.randn(1, 5, 3, 8), torch.randn(5, 8)
    index = torch.zeros(3, 3, dtype=torch.long)
    with torch.no_grad():
        whole = layer.eval()(x, positions, positions, index)
        many = torch.stack([layer.train()(x, positions, positions, index) for _ in range(1500)]).mean(0)
    assert torch.allclose(many, whole, atol=0.2)


def test_published_sizes() -> None:
    for name, count in PUBLISHED.items():
        with torch.device("meta"):
            made = MVPFormer(**VARIANTS[name])
        assert sum(p.numel() for p in made.parameters()) == count


def test_published_layouts_become_ours() -> None:
    model = network(n_positions=20, n_channels=8)
    ours = model.state_dict()
    official = {f"module.model.{k}": v for k, v in ours.items()}
    official |= {"module.model.mvpformer.h.0.ln_2.weight": torch.ones(16), "seizure_embeddings": torch.zeros(3, 64)}
    old = {k.replace("mvpformer.", "genie."): v for k, v in ours.items()}
    theirs = {}
    for key, value in ours.items():
        key = key.replace("mvpformer.h.", "blocks.").replace("mvpformer.", "").replace("encoder.", "patch_embed.")
        theirs[key.replace("head.head.", "final_layer.")] = value
    for layout in (official, old, theirs, {"state_dict": ours}):
        state, config = converter.to_polyhead(layout, heads=4)
        assert state.keys() == ours.keys() and all(torch.equal(v, ours[k]) for k, v in state.items())
        assert (config["heads"], config["kv_heads"], config["inner"], config["num_classes"]) == (4, 2, 24, 2)
    with pytest.raises(UserError, match="'head.extra'"):
        converter.to_polyhead({**ours, "head.extra": torch.zeros(1)}, heads=4)
    with pytest.raises(UserError, match="number of heads"):
        converter.to_polyhead(ours)


def test_negatives_are_all_others_and_never_oneself() -> None:
    drawn = draw_negatives(2, 3, 2, 400, torch.Generator().manual_seed(0)).view(12, 400)
    for own, row in enumerate(drawn):
        assert set(row.tolist()) == set(range(12)) - {own}


def test_a_negative_equal_to_the_truth_does_not_count() -> None:
    embeddings = torch.randn(1, 3, 1, 4, requires_grad=True)
    twin = embeddings.detach().clone()
    index = torch.tensor([0, 1, 1, 2, 0, 2]).view(1, 3, 1, 2)
    logits = contrastive_logits(twin, embeddings, index, 0.1)
    assert logits.shape == (2, 3) and logits[0, 1] == -torch.inf and logits[1, 2] == -torch.inf
    logits.masked_fill(logits == -torch.inf, 0).sum().backward()
    assert embeddings.grad is not None and not bool(embeddings.grad[:, 0].any())
