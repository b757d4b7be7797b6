"""The base of every data module: seeds, order, loaders, and what happens to samples that cannot be read."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import Sampler, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from polyhead.errors import BadSample, UserError
from polyhead.sources import existing

Split = Literal["train", "val", "test", "predict"]
STAGE_SPLIT: dict[str, Split] = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


# What lies between the epoch numbers of a sample's first and second draw in one epoch
REPEAT = 1_000_003


def _epochs_done(trainer: Any) -> int:
    return trainer.fit_loop.epoch_progress.current.processed


class Unreadable(NamedTuple):
    """A sample that could not be read, and why."""

    id: str
    reason: str


class Samples(Protocol):
    """What a data module serves: samples by index, named without reading them."""

    @property
    def ids(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        """One sample with its `id`. Raises BadSample when it cannot be read."""
        ...

    # Samples that are quicker read together also have `load_batch(indices, epoch)`, which gives a whole batch


def generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The source of all randomness of one sample in one epoch, independent of workers and of order."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), a function of the data module's seed and the epoch alone.

    Args:
        module: asked for `batches(samples, split, epoch)`.
        epoch: the first epoch to serve. Lightning sets later ones through `set_epoch`.
        rank, world: this process takes every `world`-th batch; in training all take equally many.
    """

    def __init__(
        self, module: DataModule, samples: Samples, split: Split, epoch: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.module, self.samples, self.split = module, samples, split
        self.epoch, self.rank, self.world = epoch, rank, world

    @property
    def sampler(self) -> BatchOrder:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _all(self) -> list[list[int]]:
        """The batches of all processes."""
        batches = self.module.batches(self.samples, self.split, self.epoch)
        if self.split == "train" and self.world > 1:
            batches = batches[: len(batches) // self.world * self.world]
        return batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        seen: Counter[int] = Counter()
        for number, batch in enumerate(self._all()):
            keys = []
            for index in map(int, batch):
                # A sample that comes again in an epoch is another draw of its augmentation
                keys.append((epoch + REPEAT * seen[index], index))
                seen[index] += 1
            if number % self.world == self.rank:
                yield keys

    def __len__(self) -> int:
        return len(self._all()[self.rank :: self.world])


class _Reader(torch.utils.data.Dataset):
    """Map-style view of `Samples` whose key is (epoch, index) and whose failures are values."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        if hasattr(samples, "load_batch"):
            self.__getitems__ = lambda keys: samples.load_batch([index for _, index in keys], keys[0][0])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | Unreadable:
        epoch, index = key
        try:
            return self.samples.load(index, epoch)
        except BadSample as error:
            return Unreadable(self.samples.ids[index], str(error))


def collate(items: list[dict[str, Any] | Unreadable]) -> dict[str, Any]:
    """Stack samples into a batch: tensors stacked, `id` a list, `errors` the unreadable ones."""
    good = [item for item in items if isinstance(item, dict)]
    batch: dict[str, Any] = default_collate(good) if good else {"id": []}
    batch["errors"] = [item for item in items if isinstance(item, Unreadable)]
    return batch


class DataModule(LightningDataModule):
    """Base of the data modules.

    A subclass says what is there (`prepare`), serves it (`dataset`, `raw_dataset`), and names what the data
    decide about the model (`facts`). Order and augmentation depend on the seed, the epoch and the sample,
    never on workers or on how often a run was interrupted.

    Args:
        root: the data: a folder, an archive or a table; None is the embedded sample.
        batch_size: samples a batch (and a process, with several).
        num_workers: loader processes; 0 reads in the main process.
        seed: for splits, order and augmentation.
        on_error: what training and evaluation do with a sample that cannot be read. Prediction always goes
            on and writes it to the errors table.
    """

    def __init__(
        self, root: str | None = None, batch_size: int = 64, num_workers: int = 0, seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:  # fmt: skip
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}: at least 1 is needed")
        if num_workers < 0:
            raise UserError(f"data.num_workers is {num_workers}: 0 or more is needed")
        if root is not None:
            existing(root)
        self.root, self.batch_size, self.num_workers = root, batch_size, num_workers
        self.seed, self.on_error = seed, on_error
        self.skipped = 0
        self.done: set[str] = set()
        self._prepared: set[str] = set()
        self._samples: dict[str, Samples] = {}

    # What a subclass implements

    def prepare(self, stage: str) -> None:
        """Find and split the samples for `fit`, `validate`, `test` or `predict`. Raises UserError."""
        raise NotImplementedError

    def dataset(self, split: Split) -> Samples:
        raise NotImplementedError

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        """Raw inputs (paths, arrays, ...) as the samples that prediction would see."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the data decide about the model, plain values; each is also an argument of this class."""
        return {}

    def plan(self) -> dict[str, str]:
        """Lines for the plan printed before a fit."""
        counts = {split: len(self.samples(split)) for split in ("train", "val")}
        return {split: f"{count:,} samples" if count else "none" for split, count in counts.items()}

    def fold_numbers(self) -> list[int]:
        """The values that its argument `fold` takes in a cross-validation; none where these data have no folds."""
        return []

    def check(self) -> list[tuple[str, str]]:
        """Read everything; the id of what cannot be read, and why."""
        return []

    def summary(self) -> dict[str, Any]:
        """Counts for `polyhead doctor`."""
        return {}

    def collate(self, items: list[dict[str, Any] | Unreadable]) -> dict[str, Any]:
        """Samples into a batch; for samples of unequal sizes a subclass pads."""
        return collate(items)

    def batches(self, samples: Samples, split: Split, epoch: int) -> list[list[int]]:
        """The indices of every batch of an epoch: shuffled and complete batches in training, else in order."""
        order = self.order(samples, split, epoch)
        size = self.batch_size
        batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        # A last batch of one breaks batch statistics; small sets keep their only batch
        if split == "train" and len(batches) > 1 and len(batches[-1]) < size:
            batches.pop()
        return batches

    def order(self, samples: Samples, split: Split, epoch: int) -> np.ndarray:
        """The indices of an epoch in order. Prediction leaves out what a resumed run has done."""
        if split == "train":
            return np.random.default_rng([self.seed, epoch]).permutation(len(samples))
        if split == "predict" and self.done:
            return np.array([i for i, name in enumerate(samples.ids) if name not in self.done], dtype=np.int64)
        return np.arange(len(samples))

    # Lightning

    def setup(self, stage: str) -> None:
        if stage not in self._prepared:
            self.prepare(stage)
            self._prepared.add(stage)

    def samples(self, split: Split) -> Samples:
        if split not in self._samples:
            self._samples[split] = self.dataset(split)
        return self._samples[split]

    def loader(self, samples: Samples, split: Split, epoch: int = 0) -> StatefulDataLoader:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        # A loader with a generator of its own leaves the global one, which training state depends on, alone
        return StatefulDataLoader(
            _Reader(samples),
            batch_sampler=BatchOrder(self, samples, split, epoch, rank, world),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(self.seed),
            persistent_workers=self.num_workers > 0 and split in ("train", "val"),
            # Open archives and decoded caches are not picklable in general; forked workers inherit them
            multiprocessing_context="fork" if self.num_workers and sys.platform == "linux" else None,
        )

    def train_dataloader(self) -> StatefulDataLoader:
        # On resume Lightning tells the epoch only after the loader exists
        epoch = _epochs_done(self.trainer) if self.trainer is not None else 0
        return self.loader(self.samples("train"), "train", epoch)

    def val_dataloader(self) -> StatefulDataLoader:
        return self.loader(self.samples("val"), "val")

    def test_dataloader(self) -> StatefulDataLoader:
        return self.loader(self.samples("test"), "test")

    def predict_dataloader(self) -> StatefulDataLoader:
        return self.loader(self.samples("predict"), "predict")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        errors: list[Unreadable] = batch["errors"]
        predicting = self.trainer is not None and self.trainer.predicting
        if errors and not predicting:
            if self.on_error == "raise":
                first = errors[0]
                raise UserError(
                    f"cannot read {first.id}: {first.reason}",
                    ["mend or remove it, or leave such samples out with --data.on_error skip"],
                )
            self.skipped += len(errors)
        return batch

    def steps_per_epoch(self) -> int:
        """Training batches of one process in an epoch, the trainer's limit taken into account."""
        trainer = self.trainer
        world = trainer.world_size if trainer is not None else 1
        batches = len(BatchOrder(self, self.samples("train"), "train", 0, 0, world))
        limit = trainer.limit_train_batches if trainer is not None else 1.0
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
