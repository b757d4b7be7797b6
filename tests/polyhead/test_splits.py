"""Splits are fair, disjoint, complete and repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import UserError
from polyhead.splits import assign_splits, class_key, split_indices

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def whole(parts: dict[str, np.ndarray], n: int) -> bool:
    return sorted(np.concatenate(list(parts.values())).tolist()) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=120), seed=st.integers(0, 2**31))
def test_every_sample_is_in_one_part_and_every_class_in_each(labels: list[str], seed: int) -> None:
    labels = labels + list("abc") * 3
    parts = split_indices(labels, None, SHARES, seed)
    assert whole(parts, len(labels))
    again = split_indices(labels, None, SHARES, seed)
    for name, part in parts.items():
        assert np.array_equal(part, again[name])
        assert {labels[i] for i in part} == set("abc")


def test_shares_hold_for_each_class() -> None:
    labels = ["a"] * 1000 + ["b"] * 100
    parts = split_indices(labels, None, SHARES, 0)
    for kind, total in (("a", 1000), ("b", 100)):
        for name, share in SHARES.items():
            assert abs(sum(labels[i] == kind for i in parts[name]) - share * total) <= 1


def test_another_seed_is_another_split() -> None:
    labels = ["a"] * 100
    first, second = (split_indices(labels, None, SHARES, seed)["test"] for seed in (0, 1))
    assert not np.array_equal(first, second)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30)), max_size=80), st.integers(0, 99))
def test_no_group_on_two_sides(samples: list[tuple[str, int]], seed: int) -> None:
    samples = samples + [("a", 100), ("b", 101), ("a", 102)]
    groups = [g for _, g in samples]
    parts = split_indices([label for label, _ in samples], groups, SHARES, seed)
    assert whole(parts, len(samples))
    sides = [{groups[i] for i in part} for part in parts.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert all(sides)


def test_groups_keep_classes_on_both_sides() -> None:
    labels = [c for g in range(30) for c in ("a", "a", "b" if g % 10 == 0 else "a")]
    groups = [g for g in range(30) for _ in range(3)]
    for seed in range(5):
        parts = split_indices(labels, groups, {"train": 0.7, "val": 0.3}, seed)
        assert {labels[i] for i in parts["val"]} == {labels[i] for i in parts["train"]} == {"a", "b"}


def test_a_sample_without_group_stands_alone() -> None:
    parts = split_indices(["a"] * 6, [None] * 6, {"train": 0.5, "val": 0.5}, 0)
    assert [len(p) for p in parts.values()] == [3, 3]


@pytest.mark.parametrize(
    ("labels", "groups", "shares", "words"),
    [
        (["a", "a", "a", "rare"], None, SHARES, "class rare"),
        (["a"] * 4, ["p"] * 4, SHARES, "one group"),
        (["a"] * 4, None, {"train": 0.9, "val": 0.3}, "add up to 1"),
    ],
)
def test_what_cannot_be_cut_is_said(labels: list, groups: list | None, shares: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        split_indices(labels, groups, shares, 0)


def test_given_parts_are_kept_and_validation_is_cut_from_training() -> None:
    splits: list[str | None] = ["train"] * 10 + ["test"] * 4 + [None]
    parts = assign_splits(splits, ["a", "b"] * 7 + ["a"], None, 0.2, 0.5, 0)
    assert parts["test"].tolist() == [10, 11, 12, 13]
    assert sorted([*parts["train"], *parts["val"]]) == list(range(10))
    assert len(parts["val"]) == 2


def test_no_test_part_is_made_of_a_named_training_part() -> None:
    parts = assign_splits(["train", "train", "val"], ["a"] * 3, None, 0.2, 0.2, 0)
    assert len(parts["test"]) == 0
    assert parts["val"].tolist() == [2]


def test_all_of_it_may_be_the_test() -> None:
    parts = assign_splits([None] * 5, ["a"] * 5, None, 0.0, 1.0, 0)
    assert len(parts["test"]) == 5


def test_shares_that_leave_no_training_part_are_refused() -> None:
    with pytest.raises(UserError, match="no training part"):
        assign_splits([None] * 5, ["a"] * 5, None, 0.6, 0.6, 0)


def test_numbers_are_sorted_as_numbers() -> None:
    assert sorted(["10", "9", "b", "a", "-1"], key=class_key) == ["-1", "9", "10", "a", "b"]


def test_a_group_on_two_named_sides_is_refused() -> None:
    splits, groups = ["train", "train", "val", "test"], ["a", "b", None, "b"]
    with pytest.raises(UserError, match=r"group 'b' is in train and test \(1 of 3 groups"):
        assign_splits(splits, ["x"] * 4, groups, 0.2, 0.2, 0)
    parts = assign_splits(splits, ["x"] * 4, ["a", "b", None, None], 0.2, 0.2, 0)
    assert parts["test"].tolist() == [3]
