"""The order of samples and what happens to those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.data import BatchOrder, Unreadable, collate, generator
from polyhead.errors import UserError
from tests.toy import ToyData, Vectors


class Named:
    def __init__(self, count: int) -> None:
        self.ids: Sequence[str] = [f"s{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        return {"id": self.ids[index], "epoch": torch.tensor(epoch)}


def batches(order: BatchOrder) -> list[list[int]]:
    return [[index for _, index in batch] for batch in order]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 20), st.integers(0, 5), st.integers(0, 3), st.integers(1, 4))
def test_an_epoch_is_divided_among_ranks(count: int, size: int, seed: int, epoch: int, world: int) -> None:
    module, samples = ToyData(batch_size=size, seed=seed), Named(count)
    shares = [batches(BatchOrder(module, samples, "train", epoch, rank, world)) for rank in range(world)]
    assert len({len(s) for s in shares}) == 1, "ranks that disagree on the number of batches wait for each other"
    seen = [i for share in shares for batch in share for i in batch]
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(count))
    lost = count - len(seen)
    assert lost < size * world or (count < size and world > 1)
    assert all(len(batch) == size for share in shares for batch in share) or count < size
    for split in ("val", "test", "predict"):
        whole = [batches(BatchOrder(module, samples, split, epoch, rank, world)) for rank in range(world)]  # type: ignore[arg-type]
        assert sorted(i for share in whole for batch in share for i in batch) == list(range(count))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    samples = Named(50)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return batches(BatchOrder(ToyData(seed=seed), samples, "train", epoch))

    assert order(1, 2) == order(1, 2)
    assert len({str(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6
    later = BatchOrder(ToyData(seed=1), samples, "train", 0)
    later.set_epoch(2)
    assert batches(later) == order(1, 2)
    assert {epoch for batch in later for epoch, _ in batch} == {2}
    assert BatchOrder(ToyData(seed=1), samples, "val", 0).sampler is not None
    assert batches(BatchOrder(ToyData(seed=9), samples, "val", 7)) == batches(BatchOrder(ToyData(), samples, "val"))


def test_a_resumed_prediction_leaves_out_what_is_done() -> None:
    module = ToyData(batch_size=4)
    module.done = {f"s{i}" for i in range(0, 10, 2)}
    order = BatchOrder(module, Named(10), "predict")
    assert batches(order) == [[1, 3, 5, 7], [9]] and len(order) == 2
    assert batches(BatchOrder(module, Named(10), "test")) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_randomness_belongs_to_the_sample() -> None:
    def draw(*key: int) -> float:
        return float(torch.rand((), generator=generator(*key)))

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(*key) for key in np.ndindex(3, 3, 3)}) == 27


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_leave_the_global_generators_alone(workers: int) -> None:
    module = ToyData(num_workers=workers)
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    first = [b["x"] for b in module.train_dataloader()]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    again = [b["x"] for b in ToyData(num_workers=2 - workers).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_told_apart(workers: int) -> None:
    class Data(ToyData):
        def dataset(self, split: Any) -> Any:
            return Vectors(20, 0, 3, bad=4)

    strict = Data(num_workers=workers)
    batch = next(iter(strict.val_dataloader()))
    assert [e.id for e in batch["errors"]] == ["v3-00000", "v3-00004"] and len(batch["id"]) == len(batch["x"]) == 6
    with pytest.raises(UserError, match="cannot read v3-00000: planted") as raised:
        strict.on_before_batch_transfer(batch, 0)
    assert raised.value.hints == ["mend or remove it, or leave such samples out with --data.on_error skip"]
    lenient = Data(on_error="skip")
    for batch in lenient.val_dataloader():
        lenient.on_before_batch_transfer(batch, 0)
    assert lenient.skipped == 5


def test_a_batch_of_nothing_but_errors_is_a_batch() -> None:
    batch = collate([Unreadable("a", "empty"), Unreadable("b", "cut")])
    assert batch == {"id": [], "errors": [("a", "empty"), ("b", "cut")]}


@pytest.mark.parametrize(("option", "value"), [("batch_size", 0), ("num_workers", -1)])
def test_numbers_that_make_no_sense(option: str, value: int) -> None:
    with pytest.raises(UserError, match=f"data.{option} is {value}: "):
        ToyData(**{option: value})  # type: ignore[arg-type]
