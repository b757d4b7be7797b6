"""The classical baseline: the multivariate Hawkes process with exponential kernels, fitted and simulated.

    lambda_i(t) = mu_i + sum_j sum_{t_m < t, k_m = j} alpha_ij beta exp(-beta (t - t_m))

Hawkes (1971); fitted by the expectation-maximisation of Veen and Schoenberg (2008), beta by a search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from polyhead.errors import UserError
from timeseries.excitation import OWN_STATES, scan

# Padded positions of sequences that are worked off together
POSITIONS = 100_000
# Events on which the decay is searched
SEARCH = 20_000


class Span(NamedTuple):
    """A sequence as it is scored: types 0 to K - 1, observed from `start` to `end`; `given`: the first event is not
    scored."""

    times: np.ndarray
    types: np.ndarray
    start: float
    end: float
    given: bool


class Scores(NamedTuple):
    """Of every scored event, in order; and of every sequence.

    Attributes:
        log_type: log intensity of the event's type, `[n]`.
        log_total: of the sum over types, `[n]`.
        compensator: the integral of that sum over each sequence's span, `[S]`.
        right: whether the highest intensity was that of the event's type, `[n]`; None above 64 types.
    """

    log_type: np.ndarray
    log_total: np.ndarray
    compensator: np.ndarray
    right: np.ndarray | None


class _Features(NamedTuple):
    """What the likelihood is made of: events `[n, F]`, their types `[n]`, exposure per type `[K, F]`."""

    events: np.ndarray
    types: np.ndarray
    exposure: np.ndarray


def _padded(spans: Sequence[Span]) -> Iterator[tuple[list[Span], np.ndarray, torch.Tensor, torch.Tensor]]:
    """Sequences of like length together: them, their places, gaps and types `[B, N]` (type -1 where padded)."""
    order = sorted(range(len(spans)), key=lambda i: -len(spans[i].times))
    first = 0
    while first < len(order):
        longest = max(1, len(spans[order[first]].times))
        size = max(1, POSITIONS // longest)
        chosen = order[first : first + size]
        dt = np.zeros((len(chosen), longest))
        types = np.full((len(chosen), longest), -1)
        for row, index in enumerate(chosen):
            span = spans[index]
            n = len(span.times)
            dt[row, :n] = np.diff(span.times, prepend=span.times[:1])
            types[row, :n] = span.types
        yield [spans[i] for i in chosen], np.array(chosen), torch.from_numpy(dt), torch.from_numpy(types)
        first += size


class ExponentialHawkes:
    """Estimator in scikit-learn's manner: `fit`, `score`, attributes with a trailing underscore.

    Up to 64 types every pair has its own `alpha`. Above, each type is excited by all events alike and by its own
    kind: `alpha_ij = all_i + own_i [i = j]`.

    Args:
        types: K.
        decay: beta, or None to find it by maximum likelihood.
        iterations: of the final expectation-maximisation.

    Attributes:
        mu_: `[K]`, base rates.
        decay_: beta.
        alpha_: `[K, K]`, expected direct children of type i (row) of an event of type j; or `[K, 2]` (`all`, `own`).
    """

    mu_: np.ndarray
    alpha_: np.ndarray
    decay_: float

    def __init__(self, types: int, decay: float | None = None, iterations: int = 150) -> None:
        self.types, self.decay, self.iterations = types, decay, iterations
        self.paired = types <= OWN_STATES

    def fit(self, spans: Sequence[Span]) -> ExponentialHawkes:
        """Maximum likelihood. Raises UserError when there is nothing to fit."""
        scored = [s for s in spans if s.end > s.start]
        events = sum(len(s.times) - s.given for s in scored)
        if not scored or events < 1:
            raise UserError("no events to fit a Hawkes process to")
        length = sum(s.end - s.start for s in scored)
        self.decay_ = self.decay if self.decay is not None else self._search(scored, events / length)
        features = self._features(scored, self.decay_)
        self._maximise(features, length, self.iterations)
        return self

    def _search(self, spans: Sequence[Span], rate: float) -> float:
        """The best decay on some of the sequences: a coarse grid, then golden sections."""
        some, count = [], 0
        for index in np.random.default_rng(0).permutation(len(spans)):
            some.append(spans[index])
            count += len(spans[index].times)
            if count > SEARCH:
                break
        length = sum(s.end - s.start for s in some)
        known: dict[float, float] = {}

        def loss(log_decay: float) -> float:
            if log_decay not in known:
                features = self._features(some, float(np.exp(log_decay)))
                known[log_decay] = self._maximise(features, length, 25)
            return known[log_decay]

        grid = np.log(rate) + np.log([0.01, 0.1, 0.5, 2, 10, 100, 1000, 10000])
        best = int(np.argmin([loss(float(g)) for g in grid]))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
        golden = (np.sqrt(5) - 1) / 2
        for _ in range(8):
            left, right = high - golden * (high - low), low + golden * (high - low)
            low, high = (low, right) if loss(left) < loss(right) else (left, high)
        return float(np.exp(min(known, key=known.__getitem__)))

    def _features(self, spans: Sequence[Span], decay: float) -> _Features:
        rows, types = [], []
        exposure = np.zeros(self.types)
        length = 0.0
        for group, _, dt, kinds in _padded(spans):
            for span in group:
                length += span.end - span.start
                np.add.at(exposure, span.types, -np.expm1(-decay * (span.end - span.times)))
            before = self._before(dt, kinds, decay)
            scored = kinds >= 0
            scored[:, 0] &= torch.tensor([not s.given for s in group])
            rows.append(before[scored].numpy() * decay)
            types.append(kinds[scored].numpy())
        events = np.concatenate(rows)
        events = np.concatenate([np.ones((len(events), 1)), events], 1)
        columns = (length, *exposure) if self.paired else (length, exposure.sum())
        table = np.tile(columns, (self.types, 1))
        return _Features(events, np.concatenate(types), table if self.paired else np.c_[table, exposure])

    def _before(self, dt: torch.Tensor, kinds: torch.Tensor, decay: float) -> torch.Tensor:
        """Decayed sums just before each event: of every type `[B, N, K]`, or of all and of its own kind."""
        rate = torch.tensor([decay], dtype=torch.float64)
        if self.paired:
            left = torch.nn.functional.one_hot(kinds.clamp(min=0), self.types).double()
        else:
            left = torch.ones(*kinds.shape, 1, dtype=torch.float64)
        after = scan(left * (kinds >= 0)[..., None], dt, rate)[:, :, 0]
        before = torch.zeros_like(after)
        before[:, 1:] = after[:, :-1] * (-decay * dt[:, 1:, None]).exp()
        if self.paired:
            return before
        return torch.cat([before, self._own(dt, kinds, decay)[..., None]], -1)

    @staticmethod
    def _own(dt: torch.Tensor, kinds: torch.Tensor, decay: float) -> torch.Tensor:
        """`[B, N]`: the decayed sum over earlier events of the event's own type, one after the other."""
        times = dt.cumsum(1).numpy()
        types = kinds.numpy()
        result = np.zeros_like(times)
        for row, (clock, kind) in enumerate(zip(times, types, strict=True)):
            last: dict[int, tuple[float, float]] = {}
            for i, k in enumerate(kind.tolist()):
                if k < 0:
                    break
                when, total = last.get(k, (clock[i], 0.0))
                result[row, i] = total * np.exp(-decay * (clock[i] - when))
                last[k] = (clock[i], result[row, i] + 1)
        return torch.from_numpy(result)

    def _maximise(self, features: _Features, length: float, iterations: int) -> float:
        """Set `mu_` and `alpha_`; returns the negative log likelihood an event."""
        order = np.argsort(features.types, kind="stable")
        events, counts = features.events[order], np.bincount(features.types, minlength=self.types)
        bounds = np.r_[0, counts.cumsum()]
        exposure = np.maximum(features.exposure, 1e-12 * length)
        # Half of the events by themselves, the rest by what came before
        theta = np.full_like(exposure, 0.3 / max(1, exposure.shape[1] - 1))
        theta[:, 0] = np.maximum(counts, 0.5) / length / 2
        for _ in range(iterations):
            for k in range(self.types):
                if counts[k]:
                    own = events[bounds[k] : bounds[k + 1]]
                    theta[k] *= (own / (own @ theta[k])[:, None]).sum(0) / exposure[k]
                else:
                    theta[k] = 0.0
            # A type that the training part lacks must not be impossible elsewhere
            theta[:, 0] = np.maximum(theta[:, 0], 0.1 / length)
        self.mu_, self.alpha_ = theta[:, 0], theta[:, 1:]
        logs = sum(np.log(events[bounds[k] : bounds[k + 1]] @ theta[k]).sum() for k in range(self.types) if counts[k])
        return float((theta * features.exposure).sum() - logs) / len(events)

    def score(self, spans: Sequence[Span]) -> Scores:
        """Log intensities and compensators under the fitted process; events in the order of `spans`."""
        logs: dict[int, tuple[np.ndarray, ...]] = {}
        beta = self.decay_
        compensator = np.zeros(len(spans))
        for group, places, dt, kinds in _padded(spans):
            before = self._before(dt, kinds, beta).numpy() * beta
            for row, (span, place) in enumerate(zip(group, places.tolist(), strict=True)):
                events = slice(int(span.given), len(span.times))
                past, types = before[row][events], span.types[events]
                if self.paired:
                    rates = self.mu_ + past @ self.alpha_.T
                    chosen, total = rates[np.arange(len(types)), types], rates.sum(1)
                    right = rates.argmax(1) == types
                    children = self.alpha_.sum(0)[span.types]
                else:
                    chosen = self.mu_[types] + (past * self.alpha_[types]).sum(1)
                    children = self.alpha_[:, 0].sum() + self.alpha_[span.types, 1]
                    mine = scan(
                        torch.from_numpy(self.alpha_[span.types, 1])[None, :, None],
                        torch.from_numpy(np.diff(span.times, prepend=span.times[:1]))[None],
                        torch.tensor([beta], dtype=torch.float64),
                    ).numpy()[0, :, 0, 0]
                    gaps = np.diff(span.times)
                    own = np.r_[0, mine[:-1] * np.exp(-beta * gaps)][: len(span.times)] * beta
                    total = self.mu_.sum() + past[:, 0] * self.alpha_[:, 0].sum() + own[events]
                    right = np.zeros(len(types), dtype=bool)
                logs[place] = (np.log(chosen), np.log(total), right)
                kernels = -np.expm1(-beta * (span.end - span.times))
                compensator[place] = self.mu_.sum() * (span.end - span.start) + (children * kernels).sum()
        parts = [np.concatenate([logs[i][j] for i in range(len(spans))]) for j in range(3)]
        return Scores(parts[0], parts[1], compensator, parts[2] if self.paired else None)


def simulate(
    mu: ArrayLike, alpha: ArrayLike, beta: ArrayLike, window: float, count: int, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Exact sequences on [0, window] with nothing before, by clusters: immigrants, then generation by generation.

    Args:
        mu: `[K]`.
        alpha: `[K, K]`, row affected, column triggering; its spectral radius must be below 1.
        beta: a number or `[K, K]`.
        window: end of observation.
        count: how many sequences.
        seed: of everything.

    Returns:
        Times and types of each.
    """
    mu, alpha = np.asarray(mu, dtype=np.float64), np.asarray(alpha, dtype=np.float64)
    beta = np.broadcast_to(np.asarray(beta, dtype=np.float64), alpha.shape)
    if max(abs(np.linalg.eigvals(alpha))) >= 1:
        raise UserError("the process explodes: the spectral radius of alpha is 1 or more")
    rng = np.random.default_rng(seed)
    number = rng.poisson(np.tile(mu * window, (count, 1)))
    types = np.concatenate([np.repeat(np.arange(len(mu)), row) for row in number])
    owner = np.repeat(np.arange(count), number.sum(1))
    times = rng.uniform(0, window, len(types))
    generations = [(owner, times, types)]
    while len(times):
        children = [rng.poisson(alpha[i, types]) for i in range(len(mu))]
        parents = np.concatenate([np.repeat(np.arange(len(times)), c) for c in children])
        kinds = np.repeat(np.arange(len(mu)), [c.sum() for c in children])
        born = times[parents] + rng.exponential(1, len(parents)) / beta[kinds, types[parents]]
        kept = born < window
        owner, times, types = owner[parents][kept], born[kept], kinds[kept]
        generations.append((owner, times, types))
    owner, times, types = (np.concatenate([g[i] for g in generations]) for i in range(3))
    order = np.lexsort((times, owner))
    cuts = np.searchsorted(owner[order], np.arange(count + 1))
    return [(times[order][a:b], types[order][a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
