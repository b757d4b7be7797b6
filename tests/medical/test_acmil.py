"""ACMIL: what the fixtures cannot see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medical.acmil import ACMIL, MASKED, bag_attention, diversity, draw_mask, losses, neg_entropy
from polyhead.errors import UserError

ARCHS = ("ga", "mha")


def small(arch: str, **options: object) -> ACMIL:
    torch.manual_seed(0)
    model = ACMIL(12, 16, 3, **{"n_token": 3, "arch": arch, "gate": 8, **options})  # type: ignore[arg-type]
    if arch == "mha":
        torch.nn.init.normal_(model.q)
    return model


def test_the_layer_norms_have_the_published_epsilon() -> None:
    norms = [m for m in small("mha").modules() if isinstance(m, torch.nn.LayerNorm)]
    assert [n.eps for n in norms] == [1e-6] * 4


CASES = [(10, 0.6, 6), (3, 0.6, 1), (7, 0.5, 3), (10, 0.0, 0), (4, 1.0, 4)]


@pytest.mark.parametrize(("top", "share", "masked"), CASES)
def test_stkim_masks_a_truncated_share_of_the_largest(top: int, share: float, masked: int) -> None:
    logits = torch.randn(8, 3, 40)
    mask = draw_mask(logits, top, share)
    assert (mask.sum(-1) == masked).all()
    largest = torch.zeros_like(mask).scatter(-1, logits.topk(top).indices, True)
    assert not (mask & ~largest).any()


@pytest.mark.parametrize("arch", ARCHS)
def test_masking_is_for_training_alone(arch: str) -> None:
    x = torch.randn(1, 30, 12)
    model = small(arch)
    assert (model.eval()(x).attention_logits > MASKED).all()
    masked = model.train()(x).attention_logits == MASKED
    assert (masked.sum(-1) == 6).all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("count", "chunk"), [(1, 4), (37, 8), (64, 64), (65, 64)])
def test_a_streamed_bag_gives_the_same(arch: str, count: int, chunk: int) -> None:
    model = small(arch).eval()
    x = torch.randn(count, 12) * 3
    with torch.no_grad():
        whole = model(x)
    streamed = model.stream(x.numpy(), chunk)
    for one, other in zip(whole, streamed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    half = model.stream(x.half().numpy(), chunk)
    torch.testing.assert_close(half.slide_logits, whole.slide_logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("arch", ARCHS)
@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_padding_does_not_reach_a_bag(arch: str, counts: list[int]) -> None:
    model = small(arch).eval()
    bags = [torch.randn(n, 12) for n in counts]
    longest = max(counts)
    padded = torch.stack([torch.nn.functional.pad(b, (0, 0, 0, longest - len(b)), value=5.0) for b in bags])
    present = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
    with torch.no_grad():
        together = model(padded, present)
        for index, bag in enumerate(bags):
            alone = model(bag)
            torch.testing.assert_close(together.slide_logits[index], alone.slide_logits[0], rtol=1e-5, atol=1e-6)
            attention = bag_attention(together)[index]
            assert (attention[len(bag) :] == 0).all()
            torch.testing.assert_close(attention[: len(bag)], bag_attention(alone)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_order_of_instances_does_not_matter(arch: str) -> None:
    model = small(arch).eval()
    x, order = torch.randn(20, 12), torch.randperm(20)
    with torch.no_grad():
        one, other = model(x), model(x[order])
    torch.testing.assert_close(one.slide_logits, other.slide_logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bag_attention(one)[:, order], bag_attention(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_in_double_precision(arch: str) -> None:
    model = small(arch, n_token=2, n_masked_patch=0).double()
    x = torch.randn(1, 5, 12, dtype=torch.float64, requires_grad=True)
    # Attention logits are float32 by design; their rounding bounds what a difference quotient can see
    assert torch.autograd.gradcheck(lambda v: model.eval()(v).bag_feature, (x,), eps=1e-3, atol=1e-3, rtol=1e-2)


def test_diversity_equals_the_sum_over_pairs() -> None:
    logits = torch.randn(2, 8, 4, 25)
    rows = logits.softmax(-1)
    pairs = [
        torch.nn.functional.cosine_similarity(rows[:, :, i], rows[:, :, j], dim=-1).mean()
        for i in range(4) for j in range(i + 1, 4)
    ]  # fmt: skip
    torch.testing.assert_close(diversity(logits), torch.stack(pairs).mean())
    assert float(diversity(logits[:, :, :1])) == 0


def test_one_branch_has_no_branch_loss_and_aem_adds_entropy() -> None:
    model = small("ga", n_token=1, n_masked_patch=0)
    output = model(torch.randn(1, 9, 12))
    parts = losses(output, torch.tensor([1]))
    assert float(parts["branch"]) == 0 == float(parts["diversity"])
    with_entropy = losses(output, torch.tensor([1]), aem=0.1)
    gap = float(with_entropy["loss"] - parts["loss"])
    assert gap == pytest.approx(0.1 * float(neg_entropy(output.attention_logits)), rel=1e-5)
    assert -math.log(9) <= float(neg_entropy(output.attention_logits)) <= 0


@pytest.mark.parametrize("arch", ARCHS)
def test_half_precision_training_masks_without_overflow(arch: str) -> None:
    model = small(arch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(1, 30, 12))
        loss = losses(output, torch.tensor([0]))["loss"]
    assert output.attention_logits.dtype == torch.float32
    assert torch.isfinite(loss)


def test_all_masked_is_uniform() -> None:
    model = small("ga", n_masked_patch=50, mask_drop=1.0).train()
    output = model(torch.randn(1, 7, 12))
    torch.testing.assert_close(bag_attention(output), torch.full((1, 7), 1 / 7))
    assert float(diversity(output.attention_logits)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("features", "count"),
    [((384, 128), (82_821, 84_369, 149_380, 416_140)), ((1024, 512), (657_797, 662_417, 2_104_836, 6_317_580))],
)
def test_parameter_counts_of_the_paper_s_settings(features: tuple[int, int], count: tuple[int, ...]) -> None:
    got = [
        sum(p.numel() for p in ACMIL(*features, 2, k, arch).parameters())  # type: ignore[arg-type]
        for arch in ARCHS for k in (1, 5)
    ]  # fmt: skip
    assert tuple(got) == count


def test_mistakes_are_named() -> None:
    model = small("ga")
    for x, says in ((torch.zeros(4, 5), "instances"), (torch.zeros(0, 12), "without instances")):
        with pytest.raises(UserError, match=says):
            model(x)
    with pytest.raises(UserError, match="multiple of 8"):
        ACMIL(8, 12, arch="mha")
    assert np.isfinite(model(torch.zeros(1, 12)).slide_logits.detach().numpy()).all()
