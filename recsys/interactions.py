"""The data module of interaction logs: who took what, in which order, and what came next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn import functional as F

from polyhead.catalogue import Catalogue
from polyhead.data import DataModule, Samples, Split, Unreadable
from polyhead.errors import UserError
from recsys.histories import Histories, padded, transitions
from recsys.logs import Log, LogFormat, core, read_log

# How many newest items a model sees where nobody says: enough for all but one user in twenty, within these
SHORT, LONG = 50, 200
SMALL_BATCH = 16


def threads(seed: int = 0, users: int = 1500, items: int = 100) -> Log:
    """The embedded sample: histories in which two threads alternate.

    Every item has three successors, taken with probability 0.7, 0.2 and 0.1. The next event follows either the last
    item or the one before it, with equal probability, and once in twenty times it is any item. Who looks at the last
    item alone misses half of it.
    """
    rng = np.random.default_rng(seed)
    successors = rng.integers(0, items, (items, 3))
    lengths = rng.integers(6, 24, users)
    width = int(lengths.max())
    taken = np.empty((users, width), dtype=np.int32)
    taken[:, :2] = rng.integers(0, items, (users, 2))
    for place in range(2, width):
        source = np.where(rng.random(users) < 0.5, taken[:, place - 1], taken[:, place - 2])
        follow = successors[source, rng.choice(3, users, p=[0.7, 0.2, 0.1])]
        taken[:, place] = np.where(rng.random(users) < 0.05, rng.integers(0, items, users), follow)
    there = np.arange(width) < lengths[:, None]
    user = np.repeat(np.arange(users, dtype=np.int32), lengths)
    names = [f"user-{n:04d}" for n in range(users)]
    return Log(names, [f"item-{n:03d}" for n in range(items)], user, taken[there], None)


class TrainSamples:
    """Training histories a batch at a time: the encoder's input, its targets, and what the teacher knows.

    Args:
        train: histories of known items, cut to the newest that the model sees.
        ids: users.
        counts: transitions, `[N, N]`.
    """

    def __init__(self, train: Histories, ids: Sequence[str], counts: csr_matrix) -> None:
        rows = np.flatnonzero(train.lengths > 1)
        self.train = train.pieces(np.zeros_like(train.lengths), train.lengths)
        self.rows, self.ids = rows, [ids[int(r)] for r in rows]
        self.counts, self.items = counts, counts.shape[0]
        self.lengths = train.lengths[rows] - 1
        self.top = np.maximum(counts.max(1).toarray().ravel(), 1) if counts.nnz else np.ones(self.items)

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        return self.load_batch([index], epoch)

    def load_batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        """Histories ascend in length, so that short ones can be encoded by themselves.

        `history [B, T]`; `place [R]` (into B x T) and `target [R]` of the positions that have a next item, `head
        [R]` the items there; `edge_row`, `edge_item`, `edge_share [M]`: what followed each head and how often, as
        a share of the most frequent.
        """
        chosen = np.asarray(indices)[np.argsort(self.lengths[np.asarray(indices)], kind="stable")]
        width = int(self.lengths[chosen].max())
        whole = padded(self.train, width + 1, self.items, self.rows[chosen])
        history, following = whole[:, :-1], whole[:, 1:]
        there = history < self.items
        heads = history[there]
        first, stop = self.counts.indptr[heads], self.counts.indptr[heads + 1]
        many = (stop - first).astype(np.int64)
        row = np.repeat(np.arange(len(heads)), many)
        edge = np.arange(len(row)) + np.repeat(first - np.cumsum(many) + many, many)
        share = self.counts.data[edge] / self.top[heads][row]
        arrays = {
            "history": history, "place": np.flatnonzero(there), "target": following[there], "head": heads,
            "edge_row": row, "edge_item": self.counts.indices[edge].astype(np.int64),
            "edge_share": share.astype(np.float32),
        }  # fmt: skip
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        return {"id": [self.ids[i] for i in chosen], **tensors, "errors": []}


class Questions:
    """Histories whose next item is asked for, a batch at a time.

    Args:
        histories: known items only.
        ids: a name each.
        items: N, which is padding.
        target: the next item of each, -1 for one the model does not know; None in prediction.
    """

    def __init__(self, histories: Histories, ids: list[str], items: int, target: np.ndarray | None) -> None:
        self.histories, self.ids, self.items, self.target = histories, ids, items, target
        self.lengths = histories.lengths

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        return self.load_batch([index], epoch)

    def load_batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        """`history [B, W]` as wide as the longest and, where it is known, `target [B]`."""
        rows = np.asarray(indices)
        width = max(1, int(self.lengths[rows].max(initial=0)))
        batch: dict[str, Any] = {
            "id": [self.ids[i] for i in indices],
            "history": torch.from_numpy(padded(self.histories, width, self.items, rows)),
            "errors": [],
        }
        if self.target is not None:
            batch["target"] = torch.from_numpy(self.target[rows].astype(np.int64))
        return batch


class Interactions(DataModule):
    """Interaction logs, split by user or by time.

    Args:
        root: a table (Parquet, CSV, TSV, RecBole's .inter), a zip or a folder with one; None is the embedded sample,
            histories in which two threads alternate.
        name: which table of several; a pattern such as `part-*` reads all that fit.
        user_column, item_column, time_column: columns; by usual names if None. The items may be a list a row.
        separator: of a text table; found in its first line if None.
        list_separator: between the items of a text table with a list a row.
        order: `time`, or `rows`: events as they stand in the table.
        duplicates: `drop` or `keep` events with the user, item and time of another.
        kcore: leave out users and items with fewer events, until none is left that has; 0 keeps all.
        split: `leave_one_out` (a user's last event is the test, the one before it validation) or `time` (a user's
            first event in the last stretch of time, and in the one before it).
        val_fraction, test_fraction: shares of all events in these stretches.
        max_len: how many of a history's newest items the model sees; 50 or, where histories are longer, up to 200
            if None.
        time_span: transitions count over so many places.
        seen: the history whose items are not recommended again in evaluation: `window`, cut as published, or `all`.
        max_positions: a batch has about so many training positions at most, so that long histories make smaller
            batches.
        min_steps: an epoch has so many batches at least, of 16 users or more, so that few users make smaller batches.
        items: the catalogue, as text; from the log if None.
        transitions: how many pairs of items the model keeps; counted if None.
        extend: a model whose catalogue comes first, the log's new items after it; `--init_from` sets it.
        batch_size: users a batch.
        num_workers, seed, on_error: see `polyhead.data.DataModule`; `skip` leaves out rows without a user, an item
            or a time.
    """

    def __init__(
        self, root: str | None = None, name: str | None = None, user_column: str | None = None,
        item_column: str | None = None, time_column: str | None = None, separator: str | None = None,
        list_separator: str | None = None, order: Literal["time", "rows"] = "time",
        duplicates: Literal["drop", "keep"] = "drop", kcore: int = 0,
        split: Literal["leave_one_out", "time"] = "leave_one_out", val_fraction: float = 0.1,
        test_fraction: float = 0.1, max_len: int | None = None, time_span: int = 1,
        seen: Literal["window", "all"] = "window", max_positions: int = 4096, min_steps: int = 40,
        items: str | None = None, transitions: int | None = None, extend: str | None = None,
        batch_size: int = 256, num_workers: int = 0, seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:  # fmt: skip
        super().__init__(root, batch_size, num_workers, seed, on_error)
        least = {"kcore": 0, "time_span": 1, "max_positions": 1, "min_steps": 1, "max_len": 2}
        for argument, value in {"kcore": kcore, "time_span": time_span, "max_positions": max_positions,
                                "min_steps": min_steps, "max_len": max_len}.items():  # fmt: skip
            if value is not None and value < least[argument]:
                raise UserError(f"data.{argument} is {value}: at least {least[argument]} is needed")
        if min(val_fraction, test_fraction) <= 0 or val_fraction + test_fraction >= 1:
            raise UserError(f"data.val_fraction {val_fraction:g} and data.test_fraction {test_fraction:g}: two shares "
                            "above 0 that leave something for training are needed")  # fmt: skip
        columns = {"user": user_column, "item": item_column, "time": time_column}
        self.format = LogFormat(columns, separator, list_separator, order, duplicates, on_error == "skip")
        self.name, self.kcore, self.split = name, kcore, split
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.max_len, self.time_span, self.seen = max_len, time_span, seen
        self.max_positions, self.min_steps = max_positions, min_steps
        self.items, self.transitions, self.extend = items, transitions, extend

    # Reading

    @cached_property
    def everything(self) -> Log:
        """The log as it is, for prediction."""
        return threads() if self.root is None else read_log(self.root, self.name, self.format)

    @cached_property
    def log(self) -> Log:
        """The log with the k-core's events only."""
        log = self.everything
        if not self.kcore:
            return log
        keep = core(log.user, log.item, self.kcore)
        if not keep.any():
            raise UserError(f"data.kcore {self.kcore} leaves no events of {self.root or 'the embedded sample'}")
        return _filtered(log, keep)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The model's items: given, or those of the log, behind those of the model it extends."""
        if self.items is not None:
            return Catalogue.unpack(self.items)
        if self.extend is not None:
            return self._extended().extended(self.log.items)
        return Catalogue(self.log.items)

    def _extended(self) -> Catalogue:
        from polyhead import bundle

        saved = bundle.read(str(self.extend)).data.get("init_args", {})
        if not saved.get("items"):
            raise UserError(f"{self.extend} has no catalogue of items that could be extended")
        self.max_len = self.max_len or saved.get("max_len")
        return Catalogue.unpack(saved["items"])

    @cached_property
    def histories(self) -> Histories:
        """Everybody's events; -1 where the catalogue lacks the item."""
        return self._histories(self.log)

    def _histories(self, log: Log) -> Histories:
        starts = np.concatenate([[0], np.cumsum(np.bincount(log.user, minlength=len(log.users)))])
        return Histories(starts, self.catalogue.numbers_of(log.items)[log.item])

    def ids(self) -> list[str]:
        return [str(u) for u in self.log.users]

    # Splitting

    def _ends(self) -> dict[str, np.ndarray]:
        """For each user where training ends, and where the validation and the test event stand (-1: none)."""
        log, total = self.log, self.histories.lengths
        if self.split == "leave_one_out":
            enough = total >= 3
            return {"train": np.where(enough, total - 2, total), "val": np.where(enough, total - 2, -1),
                    "test": np.where(enough, total - 1, -1)}  # fmt: skip
        if log.time is None:
            raise UserError("data.split time needs times, and these events have none: use leave_one_out")
        shares = [1 - self.val_fraction - self.test_fraction, 1 - self.test_fraction]
        bounds = np.quantile(log.time, shares, method="lower")
        upto = [np.bincount(log.user[log.time <= b], minlength=len(total)) for b in bounds]
        return {"train": upto[0], "val": np.where(upto[1] > upto[0], upto[0], -1),
                "test": np.where(total > upto[1], upto[1], -1)}  # fmt: skip

    @cached_property
    def whole_train(self) -> Histories:
        """Training histories, unknown items left out."""
        end = self._ends()["train"]
        return self.histories.pieces(np.zeros_like(end), end).known()

    @cached_property
    def train(self) -> Histories:
        """Training histories, cut to the newest items that a model sees."""
        part = self.whole_train
        if self.max_len is None:
            longest = float(np.quantile(part.lengths, 0.95)) if len(part.lengths) else 0.0
            self.max_len = SHORT if longest <= SHORT else int(min(LONG, -(-longest // SHORT) * SHORT))
        return part.newest(self.max_len)

    @cached_property
    def counts(self) -> csr_matrix:
        """Transition counts of the training histories."""
        return transitions(self.train, len(self.catalogue), self.time_span)

    def popularity(self) -> np.ndarray:
        """How often each item occurs in training."""
        return np.bincount(self.train.items, minlength=len(self.catalogue))

    def questions(self, split: Split) -> Questions:
        """The histories of a split and what came next; in prediction whole histories."""
        size = len(self.catalogue)
        if split == "predict":
            everybody = [str(u) for u in self.everything.users]
            return Questions(self._histories(self.everything).known(), everybody, size, None)
        histories = self.histories
        ends = self._ends()
        place = ends[split]
        rows = np.flatnonzero(place >= 0)
        place = place[rows]
        begin = np.zeros_like(place)
        if self.seen == "window":
            # As published: training items that were cut off may be recommended again
            begin = np.maximum(np.minimum(ends["train"][rows], place) - self._seen(), 0)
        target = histories.items[histories.starts[:-1][rows] + place]
        asked = histories.pieces(begin, place, rows)
        names = self.ids()
        return Questions(asked.known(), [names[r] for r in rows], size, target)

    def _seen(self) -> int:
        """How many of the newest items a model sees; found with the training part."""
        self.train  # noqa: B018
        assert self.max_len is not None
        return self.max_len

    # The frame

    def facts(self) -> dict[str, Any]:
        if self.items is None or self.transitions is None or self.max_len is None:
            self.transitions = int(self.counts.nnz)
            self.items = self.catalogue.pack()
        return {"items": self.items, "transitions": self.transitions, "max_len": self.max_len, "extend": None}

    def prepare(self, stage: str) -> None:
        where = self.root or "the embedded sample"
        if stage == "predict":
            # Prediction goes on without what cannot be used, and says so
            self.format.skip = True
            self._tell_lost(self.everything)
            self._tell_unknown(self.everything)
            return
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            if not len(self.samples(split)):  # type: ignore[arg-type]
                need = "two events of a user before its last two" if split == "train" else "a user with three events"
                need = need if self.split == "leave_one_out" else f"events in the {split} stretch"
                raise UserError(f"{where} has nothing for the {split} part: {need} at least is needed")
        if stage != "fit":
            self._tell_unknown(self.log)

    def _tell_unknown(self, log: Log) -> None:
        unknown = self.catalogue.numbers_of(log.items) < 0
        if unknown.any():
            print(f"{int(unknown[log.item].sum()):,} of {len(log.item):,} events are of {int(unknown.sum()):,} items "
                  "that the model does not know: left out", file=sys.stderr)  # fmt: skip

    def _tell_lost(self, log: Log) -> None:
        """What of a log is no event."""
        if log.incomplete:
            print(f"{log.incomplete:,} rows lack a user, an item or a time: left out", file=sys.stderr)
        if log.duplicates and self.format.duplicates == "drop":
            print(f"{log.duplicates:,} events have the user, item and time of another: left out", file=sys.stderr)

    def dataset(self, split: Split) -> Samples:
        if split == "train":
            return TrainSamples(self.train, self.ids(), self.counts)
        return self.questions(split)

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        """Histories as lists of item ids, the oldest first."""
        known = self.catalogue
        numbers = []
        for item in items:
            if isinstance(item, str) or not hasattr(item, "__iter__"):
                raise UserError(f"a history is a list of item ids, the oldest first, not {item!r}")
            numbers.append(known.numbers_of(item))
        unknown = sum(int((n < 0).sum()) for n in numbers)
        if unknown:
            print(f"{unknown:,} items that the model does not know: left out", file=sys.stderr)
        starts = np.concatenate([[0], np.cumsum([len(n) for n in numbers])]).astype(np.int64)
        histories = Histories(starts, np.concatenate([*numbers, np.empty(0, np.int32)]))
        return Questions(histories.known(), [f"input-{n}" for n in range(len(items))], len(known), None)

    def collate(self, items: Any) -> dict[str, Any]:
        """A batch is made whole by its samples; single ones are joined."""
        if isinstance(items, dict):
            return items
        good = [item for item in items if not isinstance(item, Unreadable)]
        wide = max((i["history"].shape[1] for i in good), default=0)
        padding = len(self.catalogue)
        batch: dict[str, Any] = {"id": [name for i in good for name in i["id"]], "errors": []}
        if good:
            histories = [F.pad(i["history"], (wide - i["history"].shape[1], 0), value=padding)
                         for i in good]  # fmt: skip
            batch["history"] = torch.cat(histories)
        return batch

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            # From pinned memory the copy does not wait for what the GPU is doing
            return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        return batch

    def batches(self, samples: Samples, split: Split, epoch: int) -> list[list[int]]:
        """As many users as fit; the last batch is kept, however small."""
        order = self.order(samples, split, epoch)
        size = self.batch_size
        if split == "train" and len(order):
            mean = float(samples.lengths.mean())  # type: ignore[attr-defined]
            few = max(SMALL_BATCH, -(-len(order) // self.min_steps))
            size = max(1, min(size, few, int(self.max_positions / mean)))
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]

    def order(self, samples: Samples, split: Split, epoch: int) -> np.ndarray:
        """Short histories first where nothing is trained: a batch is as wide as its longest."""
        order = super().order(samples, split, epoch)
        if split == "train":
            return order
        return order[np.argsort(samples.lengths[order], kind="stable")]  # type: ignore[attr-defined]

    # Telling

    def plan(self) -> dict[str, str]:
        train: Any = self.samples("train")
        told = {"train": f"{len(train):,} users, {int(train.lengths.sum()):,} positions",
                "val": f"{len(self.samples('val')):,} users",
                "items": f"{len(self.catalogue):,}, the newest {self.max_len} of a history"}  # fmt: skip
        log = self.log
        if log.duplicates or log.incomplete:
            what = "left out" if self.format.duplicates == "drop" else "kept"
            told["log"] = f"{log.duplicates:,} duplicate events {what}, {log.incomplete:,} incomplete rows left out"
        return told

    def summary(self) -> dict[str, Any]:
        log, histories = self.log, self.histories
        lengths = histories.lengths
        distinct = len(np.unique(log.user.astype(np.int64) * len(log.items) + log.item))
        told: dict[str, Any] = {
            "users": len(log.users), "items": len(log.items), "events": len(log.item),
            "events a user": f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):g}",
            "repeated items": f"{len(log.item) - distinct} events repeat an item of their user's: kept",
            "duplicates": f"{log.duplicates} events with the user, item and time of another: "
            + ("left out" if self.format.duplicates == "drop" else "kept"),
            "incomplete rows": log.incomplete,
        }  # fmt: skip
        popular = self.popularity()
        for split in ("val", "test"):
            target = self.questions(split).target
            assert target is not None
            never = int(((target < 0) | (popular[target] == 0)).sum())
            told[split] = f"{len(target)} users, the targets of {never} never occur in training"
        return told


def _filtered(log: Log, keep: np.ndarray) -> Log:
    """The events to keep, users and items renumbered."""
    user, own_users = np.unique(log.user[keep], return_inverse=True)
    item, own_items = np.unique(log.item[keep], return_inverse=True)
    return replace(
        log,
        users=[log.users[u] for u in user],
        items=[log.items[i] for i in item],
        user=own_users.astype(np.int32),
        item=own_items.astype(np.int32),
        time=None if log.time is None else log.time[keep],
    )
