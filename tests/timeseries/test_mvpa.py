"""MVPA: the blocks against the formula, in value and gradient; what a token may and may not see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timeseries.mvpa import Scores, attend, attend_dense, attend_last, block_steps, dense_weights


def scores(batch: int, groups: int, repeat: int, steps: int, channels: int, dim: int = 4, seed: int = 0) -> Scores:
    source = torch.Generator().manual_seed(seed)
    rows = repeat * channels
    shapes = [(steps, rows, dim), (steps * channels, dim), (steps * channels, dim), (steps, rows, steps),
              (steps, rows, channels)]  # fmt: skip
    made = [torch.randn(batch, groups, *s, generator=source, dtype=torch.float64) for s in shapes]
    return Scores(*(m.requires_grad_() for m in made))


def gradients(out: Tensor, inputs: Scores) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    found = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [g if g is not None else torch.zeros_like(s) for g, s in zip(found, inputs, strict=True)]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 26), st.integers(1, 9), st.integers(0, 12),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_blocks_give_the_formula(
    batch: int, groups: int, repeat: int, steps: int, channels: int, window: int, content: bool, seed: int
) -> None:
    s = scores(batch, groups, repeat, steps, channels, seed=seed)
    ours, dense = attend(s, window, content), attend_dense(s, window, content)
    assert torch.allclose(ours, dense, atol=1e-12)
    for got, expected in zip(gradients(ours, s), gradients(dense, s), strict=True):
        assert torch.allclose(got, expected, atol=1e-11)
    last = s._replace(q=s.q[:, :, -1:], time=s.time[:, :, -1:], chan=s.chan[:, :, -1:])
    assert torch.allclose(attend_last(last, content), dense[:, :, -1:], atol=1e-12)


def test_large_scores_do_not_overflow() -> None:
    s = scores(1, 1, 1, 20, 3)
    large = Scores(s.q * 40, s.k, s.v, s.time * 60, s.chan * 60)
    assert torch.allclose(attend(large, 4), attend_dense(large, 4), atol=1e-10)


def test_every_step_is_in_one_block_and_the_last_alone_where_it_sees_more() -> None:
    for steps in (1, 5, 11, 12, 40):
        for rows in (1, 8, 200):
            ranges = block_steps(steps, rows, window=10)
            assert [t for a, b in ranges for t in range(a, b)] == list(range(steps))
            assert steps <= 11 or ranges[-1] == (steps - 1, steps)


def test_content_beyond_the_window_counts_for_the_last_step_alone() -> None:
    s = scores(1, 1, 1, 16, 2)
    changed = s._replace(k=s.k.detach().clone())
    changed.k[:, :, :2] += 3.0  # the first segment
    before, after = attend(s, window=3), attend(changed, window=3)
    same = (before == after).all(-1)[0, 0].all(-1)
    assert same.tolist() == [t not in (0, 1, 2, 3, 15) for t in range(16)]


def test_far_keys_still_count_through_time_and_channel() -> None:
    weights = dense_weights(scores(1, 1, 1, 16, 2), window=3)
    assert bool((weights[0, 0, 14, :, :10] > 0).all())


def test_the_future_is_not_seen() -> None:
    s = scores(2, 1, 2, 9, 3)
    changed = s._replace(k=s.k.detach().clone(), v=s.v.detach().clone())
    for x in (changed.k, changed.v):
        x[:, :, 6 * 3 :] += 5.0
    before, after = attend(s, 10), attend(changed, 10)
    assert torch.equal(before[:, :, :6], after[:, :, :6]) and not torch.equal(before[:, :, 6:], after[:, :, 6:])


def test_dropout_is_drawn_again_in_the_backward_pass() -> None:
    s = Scores(*(x.detach() for x in scores(1, 1, 1, 7, 2, dim=2)))

    def fixed(*parts: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(Scores(*parts), 2, True, 0.4)

    assert torch.autograd.gradcheck(fixed, tuple(x.clone().requires_grad_() for x in s))


def test_dropout_keeps_the_mean() -> None:
    s = Scores(*(x.detach() for x in scores(1, 1, 1, 6, 2)))
    torch.manual_seed(0)
    many = torch.stack([attend(s, 10, True, 0.3) for _ in range(600)]).mean(0)
    assert torch.allclose(many, attend(s, 10), atol=0.15)


@pytest.mark.parametrize("steps", [64, 128])
def test_what_is_kept_grows_with_the_tokens_not_their_square(steps: int) -> None:
    channels, dim = 8, 4
    saved: list[int] = []
    s = scores(1, 1, 1, steps, channels, dim)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attend(s, 10)
    tokens = steps * channels
    assert sum(saved) <= tokens * (steps + channels + 6 * dim)
