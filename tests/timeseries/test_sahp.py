"""SAHP: causality, likelihood, quadrature, bounds and sampling, which the fixtures cannot see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints.converters.sahp import to_polyhead, to_published
from polyhead.errors import UserError
from tests import parity
from timeseries.event_likelihood import points, terms, waiting
from timeseries.event_sampling import _Walk, continued, next_events
from timeseries.excitation import _dense, scan
from timeseries.hawkes import ExponentialHawkes, Span, simulate
from timeseries.sahp import SAHP, Block, States

FORMS: list[dict[str, object]] = [
    {"rates": 3},
    {"rates": 0},
    {"rates": 2, "score": "exp_softmax"},
    {"variant": "easytpp", "norm": True, "layers": 2},
]


def network(types: int = 3, **options: object) -> SAHP:
    torch.manual_seed(1)
    given_ = {"d_model": 16, "heads": 4, "layers": 3, "dropout": 0.0, "attention_dropout": 0.0, **options}
    made = SAHP(types, **given_).eval()  # type: ignore[arg-type]
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def rows(lengths: tuple[int, ...], types: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps, types and lengths of sequences with BOS."""
    rng = torch.Generator().manual_seed(seed)
    size = max(lengths) + 1
    dt = torch.rand(len(lengths), size, generator=rng) * 2
    kinds = torch.randint(0, types, (len(lengths), size), generator=rng)
    length = torch.tensor(lengths) + 1
    dt[:, 0], kinds[:, 0] = 0, types
    beyond = torch.arange(size) >= length[:, None]
    return dt.masked_fill(beyond, 0), kinds.masked_fill(beyond, types), length


def curve(model: SAHP, dt: Tensor, kinds: Tensor) -> Tensor:
    """Intensities a little after every row."""
    return model.intensity(model(dt, kinds), torch.tensor([0.0, 0.3, 2.0]).expand(*dt.shape, 3))


@pytest.mark.parametrize("options", FORMS)
def test_no_event_changes_an_intensity_before_it(options: dict[str, object]) -> None:
    model = network(**options)
    dt, kinds, _ = rows((50,))
    before = curve(model, dt, kinds)
    for row in (1, 20, 40, 50):
        other, later = kinds.clone(), dt.clone()
        other[0, row] = (other[0, row] + 1) % 3
        later[0, row] += 0.7
        for changed in (curve(model, dt, other), curve(model, later, kinds)):
            assert torch.equal(changed[:, :row], before[:, :row])
            assert not torch.allclose(changed[:, row], before[:, row])


@pytest.mark.parametrize("options", FORMS)
def test_what_is_known_after_the_last_event_does_not_depend_on_what_follows(options: dict[str, object]) -> None:
    model = network(**options)
    dt, kinds, _ = rows((45,))
    whole = curve(model, dt, kinds)
    for n in (1, 5, 33):
        cut = curve(model, dt[:, : n + 1], kinds[:, : n + 1])
        assert torch.allclose(cut, whole[:, : n + 1], atol=1e-5)


@pytest.mark.parametrize("options", FORMS)
def test_padding_changes_nothing(options: dict[str, object]) -> None:
    model = network(**options)
    dt, kinds, length = rows((40, 3, 17))
    together = curve(model, dt, kinds)
    for b, n in enumerate(length.tolist()):
        alone = curve(model, dt[b : b + 1, :n], kinds[b : b + 1, :n])
        assert torch.allclose(alone[0], together[b, :n], atol=1e-5)


def test_scores_far_beyond_what_exp_holds_stay_finite() -> None:
    model = network(score="exp_softmax")
    block = model.blocks[0]
    assert isinstance(block, Block)
    block.attention.qkv.weight.data *= 60
    dt, kinds, _ = rows((40,))
    states = model(dt, kinds)
    loss = terms(model, states, dt, kinds.clamp(max=2)).nll
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_tiles_of_queries_are_the_whole_matrix() -> None:
    model = network(score="exp_softmax")
    dt, kinds, _ = rows((90, 61))
    weights: list[Tensor] = []
    assert torch.allclose(model.hidden(dt, kinds), model.hidden(dt, kinds, weights=weights), atol=1e-5)
    assert len(weights) == model.layers
    assert torch.allclose(weights[0].sum(-1), torch.ones(2, 4, 91))
    assert not weights[0].triu(1).any()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 3), st.integers(0, 10_000))
def test_the_scan_is_the_sum_over_history(length: int, rates: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    left = torch.rand(2, length, 2, generator=rng, dtype=torch.float64)
    dt = torch.rand(2, length, generator=rng, dtype=torch.float64) * 5
    rate = torch.rand(rates, generator=rng, dtype=torch.float64) * 10
    assert torch.allclose(scan(left, dt, rate), _dense(left, dt, rate), atol=1e-10)


def exponential(mu: np.ndarray, alpha: np.ndarray, beta: float) -> SAHP:
    """SAHP as the exponential Hawkes process: a constant cell, gates at 1, one kernel."""
    model = SAHP(len(mu), 8, 2, 1, 0.0, 0.0, rates=1).double().eval()
    assert model.excitation is not None
    with torch.no_grad():
        head = model.cell.head  # type: ignore[union-attr]
        head.weight.zero_()
        head.bias.copy_(torch.from_numpy(np.log(np.expm1(mu))))
        model.excitation.log_rate.fill_(math.log(beta))
        model.excitation.raw.copy_(torch.from_numpy(np.log(np.expm1(alpha * beta)))[..., None])
    return model


def span_rows(span: Span, kinds: int) -> tuple[Tensor, ...]:
    """Double-precision rows of a sequence from 0: gaps before, types, intervals after, what ends them."""
    before = np.diff(span.times, prepend=span.start)
    arrays = (
        np.r_[0, before],
        np.r_[kinds, span.types],
        np.r_[before, span.end - span.times[-1]],
        np.r_[span.types, -1],
    )
    return tuple(torch.from_numpy(a)[None] for a in arrays)


def closed_form(span: Span, mu: np.ndarray, alpha: np.ndarray, beta: float) -> float:
    """The negative log likelihood of one sequence, event by event."""
    total = mu.sum() * span.end
    for i, (t, k) in enumerate(zip(span.times, span.types, strict=True)):
        past = np.exp(-beta * (t - span.times[:i])) * beta * alpha[k, span.types[:i]]
        total -= np.log(mu[k] + past.sum())
        total += alpha[:, k].sum() * (1 - np.exp(-beta * (span.end - t)))
    return float(total)


MU, ALPHA, BETA = np.array([0.3, 0.2]), np.array([[0.3, 0.1], [0.4, 0.2]]), 1.7


def test_the_likelihood_is_that_of_the_exponential_hawkes_process() -> None:
    model = exponential(MU, ALPHA, BETA)
    for times, types in simulate(MU, ALPHA, BETA, 40.0, 5, seed=3):
        span = Span(times, types, 0.0, 40.0, False)
        dt, kinds, gap, target = span_rows(span, 2)
        got = terms(model, model(dt, kinds), gap, target, 8).nll
        assert got.item() == pytest.approx(closed_form(span, MU, ALPHA, BETA), rel=1e-10)
        fitted = ExponentialHawkes(2)
        fitted.mu_, fitted.alpha_, fitted.decay_ = MU, ALPHA, BETA
        scores = fitted.score([span])
        assert float(scores.compensator.sum() - scores.log_type.sum()) == pytest.approx(got.item(), rel=1e-10)


def test_the_quadrature_agrees_with_a_fine_one_and_monte_carlo_with_both() -> None:
    model = network(rates=2).double()
    dt, kinds, _ = rows((60, 60))
    dt = dt.double() * torch.tensor([[1.0], [40.0]], dtype=torch.float64)
    states = model(dt, kinds)
    gap, target = dt.roll(-1, 1), torch.full_like(kinds, -1)
    fine = terms(model, states, gap, target, 400).compensator
    for count, limit in ((8, 0.01), (32, 1e-5)):
        assert float(((terms(model, states, gap, target, count).compensator - fine) / (1 + fine)).abs().max()) < limit
    torch.manual_seed(0)
    drawn = torch.stack([terms(model, states, gap, target, 20, "monte_carlo").compensator.sum() for _ in range(40)])
    error = float(drawn.std()) / math.sqrt(len(drawn))
    assert abs(float(drawn.mean() - fine.sum())) < 4 * error


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1e6), st.integers(1, 40))
def test_weights_of_the_quadrature_add_up_to_the_interval(gap: float, count: int) -> None:
    length = torch.tensor([gap], dtype=torch.float64)
    for rule in ("monte_carlo", "even", "quadrature") + (("trapezoid",) if count > 1 else ()):
        u, weights = points(length, count, rule)  # type: ignore[arg-type]
        assert bool((u >= 0).all()) and bool((u <= gap * (1 + 1e-9)).all())
        if rule != "quadrature":
            assert float(weights.sum()) == pytest.approx(gap, rel=1e-9, abs=1e-12)
    u, weights = points(length, 40)
    assert float(weights.sum()) == pytest.approx(gap, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("options", FORMS)
def test_no_later_intensity_is_above_the_bound(options: dict[str, object]) -> None:
    model = network(**options)
    dt, kinds, _ = rows((30, 30))
    states = model(dt, kinds)
    for begin in (0.0, 0.4, 3.0):
        bound = model.bound(states, torch.full(dt.shape, begin))
        later = begin + torch.linspace(0, 50, 400)
        assert bool((model.intensity(states, later.expand(*dt.shape, -1)) <= bound[:, :, None] * (1 + 1e-5)).all())


def test_the_next_event_s_distribution_is_the_survival_function_s() -> None:
    model = exponential(np.array([0.5, 1.0]), np.full((2, 2), 1e-9), 1.0)
    states = model(torch.zeros(3, 1, dtype=torch.float64), torch.full((3, 1), 2)).rows((slice(None), 0))
    found = waiting(model, states, (0.05, 0.5, 0.95))
    # A Poisson process of rate 1.5
    assert torch.allclose(found.mean, torch.full((3,), 1 / 1.5, dtype=torch.float64), rtol=1e-3)
    wanted = -torch.log(torch.tensor([0.95, 0.5, 0.05], dtype=torch.float64)) / 1.5
    assert torch.allclose(found.quantiles, wanted.expand(3, 3), rtol=3e-3)
    assert torch.allclose(found.types, torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64).expand(3, 2), atol=1e-4)


def test_draws_of_the_next_event_follow_its_distribution() -> None:
    model = network()
    dt, kinds, _ = rows((12,))
    last = model(dt, kinds).rows((slice(None), -1))
    many = States(*(v.expand(20_000, *v.shape[1:]) if v is not None and v.ndim > 1 else v for v in last))
    with torch.no_grad():
        wait, drawn = next_events(model, many, torch.full((20_000,), 1e9), torch.Generator().manual_seed(0))
        found = waiting(model, last, (0.1, 0.5, 0.9))
    assert float(wait.mean()) == pytest.approx(float(found.mean), rel=0.03)
    for level, quantile in zip((0.1, 0.5, 0.9), found.quantiles[0].tolist(), strict=True):
        assert float((wait < quantile).float().mean()) == pytest.approx(level, abs=0.012)
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(share, found.types[0], atol=0.015)


@pytest.mark.parametrize("options", FORMS)
def test_a_row_at_a_time_gives_the_states_of_the_whole(options: dict[str, object]) -> None:
    model = network(**options)
    dt, kinds, length = rows((9, 4, 14))
    added = torch.tensor([[0.2, 1.5, 0.0], [0.7, 0.1, 2.2]])
    types = torch.tensor([[0, 2, 1], [1, 1, 0]])
    with torch.no_grad():
        walk = _Walk(model, dt, kinds, length, torch.tensor([0, 1, 2, 1]))
        for step in range(2):
            walk.add(added[step][[0, 1, 2, 1]], types[step][[0, 1, 2, 1]])
        got = walk.states()
        for place, b in enumerate((0, 1, 2, 1)):
            n = int(length[b])
            whole = torch.cat([dt[b, :n], added[:, b]])[None], torch.cat([kinds[b, :n], types[:, b]])[None]
            wanted = model(*whole)
            for name in ("start", "converge", "decay", "jump"):
                expected = getattr(wanted, name)
                if expected is not None:
                    assert torch.allclose(getattr(got, name)[place], expected[0, -1], atol=1e-5), name


def test_futures_stop_at_the_horizon_and_come_again_with_the_seed() -> None:
    model = network()
    dt, kinds, length = rows((6, 3))

    def draw(seed: int) -> tuple[np.ndarray, ...]:
        owner = torch.tensor([0, 0, 1, 1, 1])
        got = continued(model, dt, kinds, length, owner, torch.full((5,), 3.0), torch.Generator().manual_seed(seed))
        return got.owner, got.times, got.types

    first, again, other = draw(1), draw(1), draw(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first[1]) != len(other[1]) or not np.array_equal(first[1], other[1])
    assert (first[1] > 0).all() and (first[1] <= 3).all()
    cut = continued(model, dt, kinds, length, torch.tensor([0]), torch.tensor([1e6]), None, most=7)
    assert len(cut.times) == 7 and cut.cut.tolist() == [0]


def test_the_baseline_finds_what_the_data_were_drawn_from() -> None:
    spans = [Span(t, k, 0.0, 60.0, False) for t, k in simulate(MU, ALPHA, BETA, 60.0, 300, seed=1)]
    fitted = ExponentialHawkes(2).fit(spans)
    assert fitted.decay_ == pytest.approx(BETA, rel=0.12)
    assert np.allclose(fitted.mu_, MU, rtol=0.1) and np.allclose(fitted.alpha_, ALPHA, atol=0.05)


def test_many_types_share_their_kernels() -> None:
    kinds = 80
    rng = np.random.default_rng(0)
    spans = []
    for _ in range(60):
        times = np.sort(rng.uniform(0, 30, 40))
        spans.append(Span(times, rng.integers(0, kinds, 40), 0.0, 30.0, False))
    fitted = ExponentialHawkes(kinds).fit(spans)
    scores = fitted.score(spans)
    assert fitted.alpha_.shape == (kinds, 2) and np.isfinite(scores.compensator).all() and scores.right is None
    poisson = -math.log(40 / 30 / kinds) + 1
    assert (scores.compensator.sum() - scores.log_type.sum()) / len(scores.log_type) <= poisson + 1e-6
    # The total is the sum over types: brute force on one sequence
    span, beta = spans[0], fitted.decay_
    at = 25
    age = np.exp(-beta * (span.times[at] - span.times[:at])) * beta
    own = sum(a * fitted.alpha_[k, 1] for a, k in zip(age, span.types[:at], strict=True))
    wanted = fitted.mu_.sum() + fitted.alpha_[:, 0].sum() * age.sum() + own
    assert float(scores.log_total[at]) == pytest.approx(math.log(wanted), rel=1e-9)


def test_a_process_that_explodes_is_refused() -> None:
    with pytest.raises(UserError, match="explodes"):
        simulate([0.1], [[1.1]], 1.0, 10.0, 1)


def test_published_names_go_both_ways() -> None:
    for options in ({"score": "exp_softmax"}, {"variant": "easytpp", "norm": True, "layers": 2}):
        model = network(**options)
        variant = "easytpp" if "variant" in options else "sahp"
        theirs = to_published(model.state_dict(), variant, model.layers, model.norm is not None)
        ours, config = to_polyhead(
            {**theirs, **({"position_emb.position": torch.zeros(9, 1)} if variant == "sahp" else {})}
        )
        assert ours.keys() == model.state_dict().keys() and config["types"] == 3 and config["variant"] == variant
        assert all(torch.equal(v, ours[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="no_such"):
        to_polyhead({**theirs, "no_such": torch.zeros(1)})
    with pytest.raises(UserError, match="missing"):
        to_polyhead({k: v for k, v in theirs.items() if k != "mu.0.weight"})


@pytest.mark.parametrize("sizes", [(0, 16, 4), (3, 15, 3), (3, 16, 5)])
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UserError):
        SAHP(*sizes)


def test_the_adapter_agrees_with_every_fixture(shared: Path) -> None:
    checks = list(parity.run(shared / "fixtures/sahp"))
    assert len(checks) > 300 and not [c for c in checks if not c.passed]
