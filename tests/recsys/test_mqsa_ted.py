"""The network and its losses: properties that the recorded fixtures do not show."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import peak_memory
from recsys.mqsa_ted import MQSATED, distillation_loss, recommendation_loss, teacher, window_mean
from recsys.optim import TensorFlowAdam
from recsys.softmax import Targets, cross_entropy

ITEMS = 23


def network(**options: Any) -> MQSATED:
    torch.manual_seed(0)
    made = MQSATED(ITEMS, **{"max_len": 8, "dim": 12, "dropout": 0.0, **options})
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return made.eval()


def histories(rows: int = 5, width: int = 8, seed: int = 1) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    history = torch.randint(0, ITEMS, (rows, width), generator=drawn)
    return history.masked_fill(torch.arange(width) < (torch.arange(rows) % (width - 1))[:, None], ITEMS)


@pytest.mark.parametrize("options", [{}, {"blocks": 2, "heads": 3, "length": 4}, {"alpha": 1.0}, {"alpha": 0.0}])
def test_what_comes_later_changes_nothing(options: dict[str, Any]) -> None:
    model, history = network(**options), histories()
    changed = history.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % ITEMS
    there = history[:, :6] < ITEMS
    assert torch.equal(model(history)[:, :6][there], model(changed)[:, :6][there])
    assert not torch.allclose(model(history)[:, 6:], model(changed)[:, 6:])


def test_padding_may_be_trimmed_or_added() -> None:
    model, history = network(length=3), histories(6)
    short = history[:, -3:].clone()
    wide = F.pad(short, (5, 0), value=ITEMS)
    assert torch.allclose(model(short)[short < ITEMS], model(wide)[:, -3:][short < ITEMS], atol=1e-6)
    assert bool(model(torch.full((2, 8), ITEMS)).isfinite().all())


def test_a_window_of_everything_is_a_window_of_the_longest_history() -> None:
    history = histories()
    assert torch.equal(network(length=8)(history), network(length=50)(history))


@given(st.integers(1, 9), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_the_window_mean_is_the_mean_of_what_is_there(length: int, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    present = (torch.rand(3, 7, 1, generator=drawn) > 0.4).float()
    s = torch.randn(3, 7, 2, generator=drawn) * present
    got = window_mean(s, present, length)
    for row in range(3):
        for place in range(7):
            window = slice(max(0, place - length + 1), place + 1)
            there = present[row, window, 0] > 0
            mean = s[row, window][there].mean(0) if bool(there.any()) else torch.zeros(2)
            if length > 1 or bool(present[row, place, 0]):
                assert torch.allclose(got[row, place], mean, atol=1e-6)


def test_the_baseline_has_one_branch_and_its_scores() -> None:
    both, short = network(alpha=1.0), network(alpha=0.0)
    assert set(both.branches) == {"short"} and set(short.branches) == {"long"}
    mixed = network(alpha=0.3)
    parts = mixed.encode(histories())
    assert torch.allclose(mixed(histories()), 0.3 * parts["short"] + 0.7 * parts["long"], atol=1e-6)


def test_padding_keeps_no_gradient_and_every_norm_is_finite() -> None:
    model = network().train()
    history = histories()
    there = history < ITEMS
    model(history)[there].sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# Losses against their dense definitions, in float64


def dense_loss(hidden: Tensor, table: Tensor, wanted: Tensor, padding_class: bool, floor: bool) -> Tensor:
    scores = hidden @ table.T
    if padding_class:
        scores, wanted = F.pad(scores, (0, 1)), F.pad(wanted, (0, 1))
    logs = scores.log_softmax(1)
    return -(wanted * ((logs.exp() + 1e-24).log() if floor else logs)).sum(1).mean()


def problem(rows: int, scale: float, seed: int, share: bool) -> tuple[Tensor, Tensor, Targets]:
    drawn = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(rows, 6, generator=drawn)
    table = torch.randn(ITEMS, 6, generator=drawn)
    row = torch.arange(rows).repeat_interleave(2)
    item = torch.stack([torch.randperm(ITEMS, generator=drawn)[:2] for _ in range(rows)]).flatten()
    weight = torch.rand(2 * rows, generator=drawn)
    base = torch.rand(rows, generator=drawn) if share else torch.zeros(rows)
    total = torch.zeros(rows).index_add_(0, row, weight) + ITEMS * base
    return hidden, table, Targets(row, item, weight / total[row], base / total if share else None)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize(("padding_class", "floor", "share"), [(True, False, False), (False, True, True)])
def test_the_loss_in_chunks_is_the_dense_one(
    scale: float, chunk: int | None, padding_class: bool, floor: bool, share: bool
) -> None:
    hidden, table, targets = problem(9, scale, 3, share)
    wanted = targets.dense(9, ITEMS).double()
    leaves = [v.clone().requires_grad_() for v in (hidden, table)]
    twins = [v.double().requires_grad_() for v in (hidden, table)]
    got = cross_entropy(*leaves, targets, padding_class, floor, chunk)
    expected = dense_loss(*twins, wanted, padding_class, floor)
    (2 * got).backward()
    (2 * expected).backward()
    assert got.double().item() == pytest.approx(expected.item(), rel=2e-5)
    for a, b in zip(leaves, twins, strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad.double(), b.grad, atol=2e-5 * float(b.grad.abs().max()))


def test_a_loss_without_rows_is_zero() -> None:
    hidden, table, _ = problem(2, 1.0, 0, False)
    none = torch.zeros(0, dtype=torch.int64)
    empty = hidden[:0].requires_grad_()
    loss = cross_entropy(empty, table, Targets(none, none, torch.zeros(0)), padding_class=True)
    loss.backward()
    assert loss.item() == 0


def test_an_evaluated_loss_needs_no_gradient() -> None:
    hidden, table, targets = problem(5, 1.0, 1, False)
    with torch.no_grad():
        assert not cross_entropy(hidden, table, targets).requires_grad


def test_the_teacher_sums_to_one_and_prefers_the_most_frequent() -> None:
    row, item = torch.tensor([0, 0, 2]), torch.tensor([3, 5, 1])
    wanted = teacher(row, item, torch.tensor([1.0, 0.5, 1.0]), 3, ITEMS, 0.1).dense(3, ITEMS)
    assert torch.allclose(wanted.sum(1), torch.ones(3))
    assert torch.allclose(wanted[1], torch.full((ITEMS,), 1 / ITEMS))
    expected = torch.zeros(ITEMS)
    expected[3], expected[5] = 1.0, 0.5
    assert torch.allclose(wanted[0], (expected / 0.1).softmax(0), atol=1e-6)


MILLION = 1_000_000


def million_items(kind: str, rows: int) -> Callable[[], object]:
    """A pass of a loss and its gradient."""
    torch.set_num_threads(1)
    if kind == "recommendation":
        table, hidden = torch.zeros(MILLION, 8, requires_grad=True), torch.randn(rows, 8)
        function = lambda: recommendation_loss(hidden, table, torch.arange(rows))  # noqa: E731
    else:
        model = MQSATED(MILLION, max_len=4, dim=8, dropout=0.0).train()
        table, heads, none = model.item, torch.arange(rows), torch.zeros(0, dtype=torch.int64)
        function = lambda: distillation_loss(model, heads, none, none, torch.zeros(0))  # noqa: E731

    def run() -> None:
        table.grad = None
        function().backward()

    return run


@pytest.mark.parametrize("kind", ["recommendation", "distillation"])
def test_losses_of_a_million_items_need_little_memory(kind: str) -> None:
    """The scores of all rows would take 0.5 GB, once; the table and its gradient are 32 MB each."""
    peak = peak_memory(million_items, kind, 128, passes=1)
    if peak is None:
        pytest.skip("this kernel cannot count a peak anew")
    assert peak < 200e6, peak / 1e6


def test_dropout_reaches_the_heads_of_the_distillation() -> None:
    model = network(dropout=0.5).train()
    heads, none = torch.arange(10), torch.zeros(0, dtype=torch.int64)
    losses = {distillation_loss(model, heads, none, none, torch.zeros(0)).item() for _ in range(3)}
    assert len(losses) == 3


def test_adam_has_the_epsilon_in_its_old_place_and_goes_on_exactly() -> None:
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(5))
    optimizer = TensorFlowAdam([w], lr=1e-2, eps=1e-3)
    m = v = torch.zeros(5)
    expected = w.detach().clone()
    state: dict[str, Any] = {}
    for step in range(1, 6):
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = TensorFlowAdam([w], lr=1e-2, eps=1e-3)
            optimizer.load_state_dict(state)
        grad = torch.sin(step * torch.arange(5.0))
        w.grad = grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        rate = 1e-2 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        expected = expected - rate * m / (v.sqrt() + 1e-3)
        assert torch.allclose(w, expected, atol=1e-6)
