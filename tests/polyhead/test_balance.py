"""How often pictures of each class come in an epoch."""

from math import ceil, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.picture_data import balanced_order, repeats
from vision.faces import FaceData


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 200))
def test_classes_take_turns(sizes: list[int], count: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    order = balanced_order(labels, count, np.random.default_rng(0))
    assert len(order) == count
    drawn = np.bincount(labels[order], minlength=len(sizes))
    assert drawn.max() - drawn.min() <= 1
    for number, size in enumerate(sizes):
        times = np.bincount(order[labels[order] == number], minlength=len(labels))[labels == number]
        assert times.max() - times.min() <= 1, f"one of {size} pictures came again before the others"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=8))
def test_rare_classes_are_repeated_as_published(sizes: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    times = np.bincount(repeats(labels), minlength=len(labels))
    for number, size in enumerate(sizes):
        assert set(times[labels == number].tolist()) == {max(1, ceil(sqrt(0.15 * sum(sizes) / size)))}


@pytest.mark.parametrize("balance", ["none", "classes", "repeat"])
def test_an_epoch_is_at_least_so_long(balance: str) -> None:
    data = FaceData(balance=balance, min_epoch_size=500, batch_size=20)  # type: ignore[arg-type]
    data.prepare("fit")
    samples = data.dataset("train")
    order, again = data.order(samples, "train", 0), data.order(samples, "train", 1)
    assert len(order) == len(again) == 500
    assert set(order) == set(range(len(samples)))
    assert not np.array_equal(order, again)
    assert np.array_equal(order, data.order(samples, "train", 0))
