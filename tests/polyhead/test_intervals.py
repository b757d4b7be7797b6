"""Bootstrap intervals: the weighted results are scikit-learn's, and groups come and go together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from polyhead.intervals import bootstrap_weights, classification_results, intervals
from polyhead.metrics import classification_metrics


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(8, 60))
def test_results_of_repeated_samples_are_those_of_scikit_learn(seed: int, classes: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    label = np.r_[np.arange(classes), rng.integers(0, classes, count)]
    # Rounded, so that there are ties
    probabilities = np.round(rng.dirichlet(np.ones(classes), len(label)), 1)
    weight = rng.integers(0, 3, len(label))
    weight[:classes] = 1
    rows = np.repeat(np.arange(len(label)), weight)
    got = {k: float(v[0]) for k, v in classification_results(label, probabilities, weight[None].astype(float)).items()}
    true, scores = label[rows], probabilities[rows]
    predicted = scores.argmax(1)
    assert got["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert got["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
    assert got["f1_macro"] == pytest.approx(f1_score(true, predicted, average="macro"))
    areas = [roc_auc_score(true == k, scores[:, k]) for k in range(classes)]
    assert got["auroc"] == pytest.approx(np.mean(areas))
    assert got["sensitivity.1"] == pytest.approx(recall_score(true == 1, predicted == 1))
    if (predicted == 1).any():
        assert got["ppv.1"] == pytest.approx(precision_score(true == 1, predicted == 1))


def test_groups_are_drawn_whole_and_as_many_as_there_are() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    weight = bootstrap_weights(groups, 200, 0)
    assert (weight[:, 0] == weight[:, 2]).all() and (weight[:, 0] == weight[:, 5]).all()
    assert (weight[:, 1] == weight[:, 4]).all()
    assert (weight[:, [0, 1, 3]].sum(1) == 3).all()


def test_an_interval_holds_the_result_and_widens_with_fewer_groups() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    noise = rng.normal(size=400)
    score = 1 / (1 + np.exp(-(label - 0.5 + noise)))
    probabilities = np.stack([1 - score, score], 1)
    alone = intervals(label, probabilities, np.arange(400))
    grouped = intervals(label, probabilities, np.arange(400) // 40)
    low, high = alone["auroc"]
    assert low < roc_auc_score(label, score) < high and 0.03 < high - low < 0.15
    assert alone == intervals(label, probabilities, np.arange(400))
    assert set(grouped) == set(alone)


def test_a_draw_with_one_class_has_no_area_and_does_not_spoil_the_interval() -> None:
    label = np.array([0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    low, high = intervals(label, probabilities, [0, 1, 2])["auroc"]
    assert low == high == 1.0


def test_a_class_without_samples_takes_nothing_away() -> None:
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6], [0.4, 0.5, 0.1]])
    label = torch.tensor([0, 1, 0, 1])
    metrics = classification_metrics(3)
    metrics.update(probabilities, label)
    got = {k: v for k, v in metrics.compute().items() if v.numel() == 1}
    areas = [roc_auc_score(label == k, probabilities[:, k]) for k in (0, 1)]
    assert float(got["auroc"]) == pytest.approx(np.mean(areas))
    assert float(got["balanced_accuracy"]) == pytest.approx(0.75)
    alone = classification_metrics(3)
    alone.update(probabilities[:1], label[:1])
    assert float(alone.compute()["auroc"]) == 0 and float(alone.compute()["balanced_accuracy"]) == 1
