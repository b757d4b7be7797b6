"""Ranks and metrics against counting by hand; simple methods against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.histories import Histories, padded, transitions
from recsys.ranking import evaluate, item_knn, markov, popularity, rank, ranking_metrics, without_seen


def flat(lists: list[list[int]]) -> Histories:
    starts = np.concatenate([[0], np.cumsum([len(v) for v in lists])]).astype(np.int64)
    return Histories(starts, np.array([i for v in lists for i in v], dtype=np.int32))


def by_hand(scores: np.ndarray, target: int, k: int) -> tuple[float, float, float]:
    """The mean of hit, NDCG and reciprocal rank over every order of the items with equal scores."""
    equal = [i for i in range(len(scores)) if scores[i] == scores[target]]
    before = sum(s > scores[target] for s in scores)
    places = [before + order.index(target) + 1 for order in itertools.permutations(equal)]
    return (
        float(np.mean([p <= k for p in places])),
        float(np.mean([1 / math.log2(p + 1) if p <= k else 0 for p in places])),
        float(np.mean([1 / p for p in places])),
    )


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=8), st.integers(1, 8), st.data()
)
@settings(max_examples=60, deadline=None)
def test_metrics_are_fair_to_ties(rows: list[list[int]], k: int, data: st.DataObject) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    target = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows))))
    metrics = ranking_metrics([k])
    before, equal = rank(scores, target)
    metrics.update(before[:1], equal[:1], 6)
    if len(rows) > 1:
        metrics.update(before[1:], equal[1:], 6)
    expected = np.mean([by_hand(s.numpy(), int(t), k) for s, t in zip(scores, target, strict=True)], axis=0)
    got = [float(metrics[name].compute()) for name in (f"hr_{k}", f"ndcg_{k}", "mrr")]
    assert got == pytest.approx(expected.tolist(), abs=1e-6)


def test_metrics_agree_with_another_implementation() -> None:
    """scikit-learn's NDCG of one relevant item, and sorting, on 500 users."""
    from sklearn.metrics import ndcg_score

    drawn = torch.Generator().manual_seed(0)
    scores, target = torch.randn(500, 300, generator=drawn), torch.randint(0, 300, (500,), generator=drawn)
    metrics = ranking_metrics([1, 5, 20])
    metrics.update(*rank(scores, target), 300)
    truth = torch.nn.functional.one_hot(target, 300)
    order = scores.argsort(1, descending=True)
    places = (order == target[:, None]).nonzero()[:, 1] + 1
    for k in (1, 5, 20):
        if k > 1:
            assert float(metrics[f"ndcg_{k}"].compute()) == pytest.approx(ndcg_score(truth, scores, k=k), abs=1e-6)
        assert float(metrics[f"hr_{k}"].compute()) == pytest.approx(float((places <= k).float().mean()), abs=1e-6)
    assert float(metrics["mrr"].compute()) == pytest.approx(float((1 / places).mean()), abs=1e-6)


def test_what_is_seen_or_unknown_is_a_miss_everywhere() -> None:
    scores = without_seen(torch.arange(12.0).view(2, 6), torch.tensor([[5, 6], [0, 1]]))
    assert scores[0, 5] == -torch.inf and scores[0, 4] == 4 and bool((scores[1, :2] == -torch.inf).all())
    before, equal = rank(scores, torch.tensor([5, -1]))
    metrics = ranking_metrics([6, 100])
    metrics.update(before, equal, 6)
    assert all(float(m.compute()) == 0 for m in metrics.values())


def test_histories_are_cut_and_padded() -> None:
    lists = [[1, 2, 3, 4], [], [7], [5, -1, 6]]
    histories = flat(lists)
    assert padded(histories, 3, 9).tolist() == [[2, 3, 4], [9, 9, 9], [9, 9, 7], [5, -1, 6]]
    assert padded(histories, 2, 9, np.array([3, 0])).tolist() == [[-1, 6], [3, 4]]
    assert histories.newest(2).items.tolist() == [3, 4, 7, -1, 6]
    known = histories.known()
    assert known.lengths.tolist() == [4, 0, 1, 2] and known.items.tolist() == [1, 2, 3, 4, 7, 5, 6]
    part = histories.pieces(np.array([1, 0]), np.array([3, 2]), np.array([0, 3]))
    assert part.items.tolist() == [2, 3, 5, -1]


@given(st.lists(st.lists(st.integers(0, 5), max_size=7), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_transitions_are_counted_within_a_history(lists: list[list[int]], span: int) -> None:
    expected = np.zeros((6, 6), dtype=np.int64)
    for items in lists:
        for place, item in enumerate(items):
            for other in items[place + 1 : place + 1 + span]:
                expected[item, other] += 1
    assert np.array_equal(transitions(flat(lists), 6, span).toarray(), expected)


def test_simple_methods_follow_their_definitions() -> None:
    train = flat([[0, 1, 2], [0, 1, 3], [4, 1], [0]])
    asked, rows = flat([[0], [4, 1], []]), np.arange(3)
    counts = transitions(train, 5)
    assert popularity(train, 5)(asked, rows)[0].tolist() == [3, 3, 1, 1, 1]
    followed = markov(counts, train, 5)(asked, rows)
    assert followed[0].argmax() == 1 and followed[1].round().tolist()[2:4] == [1, 1]
    assert followed[2].argmax() in (0, 1)
    near = item_knn(train, 5)(asked, rows)
    assert near[0, 1] == pytest.approx(2 / 3) and near[0, 0] == 0 and near[2].sum() == 0
    result = evaluate(markov(counts, train, 5), asked, np.array([1, 2, 0]), 5, [1], True)
    assert result["hr_1"] == pytest.approx((1 + 0.5 + 0.5) / 3)
