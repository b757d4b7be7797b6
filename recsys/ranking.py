"""Ranking over the whole catalogue, and what simple methods reach on the same targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from recsys.histories import Histories, padded


def rank(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """How many items stand before the target, and how many share its score, itself included; each `[B]`.

    Args:
        scores: `[B, N]`, -inf for what is not to be recommended.
        target: `[B]`. One that is not to be recommended, or is no item (-1), stands behind all.
    """
    wanted = scores.gather(1, target.clamp(min=0)[:, None])
    out = (target < 0) | (wanted[:, 0] == -torch.inf)
    before, equal = (scores > wanted).sum(1), (scores == wanted).sum(1)
    return torch.where(out, scores.shape[1], before), torch.where(out, 1, equal)


class RankMetric(Metric):
    """The mean over targets of a gain that depends on the place, `hr`, `ndcg` or `mrr`; fair to ties.

    Of items with the target's score any order is equally likely, and the expected gain is taken.

    Args:
        kind: hr (1 for a place up to k), ndcg (1 / log2(place + 1) up to k) or mrr (1 / place).
        k: the cut-off; None for none.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, kind: str, k: int | None = None) -> None:
        super().__init__()
        self.kind, self.k = kind, k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self._sums = torch.zeros(1, dtype=torch.float64)

    def _cumulative(self, places: int, device: torch.device) -> Tensor:
        """Gains summed over the first places, `[places + 1]`."""
        if len(self._sums) <= places:
            place = torch.arange(1, 2 * places + 1, dtype=torch.float64)
            gain = {"hr": torch.ones_like(place), "ndcg": 1 / (place + 1).log2(), "mrr": 1 / place}[self.kind]
            if self.k is not None:
                gain[self.k :] = 0
            self._sums = torch.cat([torch.zeros(1, dtype=torch.float64), gain.cumsum(0)])
        if self._sums.device != device:
            self._sums = self._sums.to(device)
        return self._sums

    def update(self, before: Tensor, equal: Tensor, places: int) -> None:
        """Take `rank`'s answers for a catalogue of `places` items."""
        sums = self._cumulative(places + 1, before.device)
        last = (before + equal).clamp(max=places + 1)
        # What stands behind all gains nothing, whatever the cut-off
        gain = torch.where(before < places, (sums[last] - sums[before]) / equal, 0)
        self.total += gain.sum()
        self.count += len(before)

    def compute(self) -> Tensor:
        return (self.total / self.count.clamp(min=1)).float()


def ranking_metrics(cutoffs: list[int]) -> MetricCollection:
    """`hr_K` and `ndcg_K` at every cut-off, and `mrr`. With one target a user, recall is the hit rate."""
    metrics: dict[str, Any] = {f"{kind}_{k}": RankMetric(kind, k) for kind in ("hr", "ndcg") for k in cutoffs}
    return MetricCollection({**metrics, "mrr": RankMetric("mrr")}, compute_groups=False)


def without_seen(scores: Tensor, history: Tensor) -> Tensor:
    """`scores [B, N]` with -inf at the items of `history [B, W]`; N in it is padding."""
    return torch.nn.functional.pad(scores, (0, 1)).scatter_(1, history, -torch.inf)[:, :-1]


# Simple methods


Scorer = Callable[[Histories, np.ndarray], np.ndarray]


def popularity(train: Histories, items: int) -> Scorer:
    """How often an item occurs in training."""
    counts = np.bincount(train.items, minlength=items).astype(np.float32)
    return lambda histories, rows: np.repeat(counts[None], len(rows), 0)


def markov(counts: csr_matrix, train: Histories, items: int) -> Scorer:
    """How often an item followed the last one in training; popularity decides between equals."""
    popular = np.bincount(train.items, minlength=items)
    small = popular / (popular.max(initial=0) + 1.0)

    def score(histories: Histories, rows: np.ndarray) -> np.ndarray:
        ends = histories.starts[1:][rows]
        last = np.where(histories.lengths[rows] > 0, histories.items[np.maximum(ends - 1, 0)], 0)
        followed = counts[last].toarray() * (histories.lengths[rows] > 0)[:, None]
        return followed + small

    return score


def item_knn(train: Histories, items: int, newest: int = 10) -> Scorer:
    """Cosine similarity of items by the users who have both, summed over the newest items of a history."""
    users = np.repeat(np.arange(len(train.lengths)), train.lengths)
    seen = csr_matrix((np.ones(len(users), np.float32), (users, train.items)), shape=(len(train.lengths), items))
    seen.data[:] = 1
    norm = np.sqrt(np.maximum(np.asarray(seen.sum(0)).ravel(), 1))
    unit = seen @ diags((1 / norm).astype(np.float32))
    near = (unit.T @ unit).tocsr()
    near.data[near.indices == np.repeat(np.arange(items), np.diff(near.indptr))] = 0

    def score(histories: Histories, rows: np.ndarray) -> np.ndarray:
        recent = padded(histories, newest, items, rows)
        there = recent < items
        owner = np.broadcast_to(np.arange(len(rows))[:, None], recent.shape)[there]
        chosen = csr_matrix((np.ones(len(owner), np.float32), (owner, recent[there])), shape=(len(rows), items))
        return (chosen @ near).toarray()

    return score


def evaluate(
    scorer: Scorer, histories: Histories, target: np.ndarray, items: int, cutoffs: list[int], filter_seen: bool,
    chunk: int = 64,
) -> dict[str, float]:  # fmt: skip
    """The metrics of a simple method on `target [U]`, what stands in `histories` left out if `filter_seen`."""
    metrics = ranking_metrics(cutoffs)
    width = max(1, int(histories.lengths.max(initial=0)))
    for start in range(0, len(target), chunk):
        rows = np.arange(start, min(start + chunk, len(target)))
        scores = torch.from_numpy(np.ascontiguousarray(scorer(histories, rows)))
        if filter_seen:
            scores = without_seen(scores, torch.from_numpy(padded(histories, width, items, rows)))
        before, equal = rank(scores, torch.from_numpy(target[rows]))
        metrics.update(before, equal, items)
    return {name: float(metric.compute()) for name, metric in metrics.items()}
