"""The data module of labelled pictures that domains build on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from polyhead.data import DataModule, Samples, Split
from polyhead.decoding import MAX_PIXELS
from polyhead.errors import BadSample, UserError, nearest
from polyhead.pictures import MARGIN, Arrays, Augment, Budget, Files, Pictures, Raw, Resize, Square, Transform, shrink
from polyhead.sources import IMAGE_SUFFIXES, Entry, Location, find
from polyhead.splits import assign_splits, class_key

COLUMN_ROLES = ("path", "label", "split", "group")


class Embedded(NamedTuple):
    """A sample set that needs no files; `pixels` is uint8 `[N, H, W]` or `[N, H, W, 3]`."""

    ids: list[str]
    pixels: np.ndarray
    labels: list[str]
    splits: list[str]


def balanced_order(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of an epoch of `count` draws in which classes take turns, in random order each turn.

    A class goes through all its samples before one comes again.
    """
    classes = np.unique(labels)
    turns = -(-count // len(classes))
    columns = []
    for name in classes:
        own = np.flatnonzero(labels == name)
        rounds = [rng.permutation(own) for _ in range(-(-turns // len(own)))]
        columns.append(np.concatenate(rounds)[:turns])
    return rng.permuted(np.stack(columns, 1), axis=1).reshape(-1)[:count]


def repeats(labels: np.ndarray) -> np.ndarray:
    """Indices in which each of a class of share f stands max(1, ceil(sqrt(0.15 / f))) times (APViT's training)."""
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    times = np.ceil(np.maximum(1, np.sqrt(0.15 * len(labels) / counts))).astype(int)
    return np.repeat(np.arange(len(labels)), times[numbers])


class PictureData(DataModule):
    """Pictures with one label each, from a folder, a zip, a list or a table (`polyhead.sources.find`).

    Samples are `image` uint8 `[3, S, S]` and `label`; prediction leaves `label` out unless every picture has
    a known one. Parts that the data name (`train`, `val`, `test`) are kept; a missing validation part is cut
    from the training part, and all three are cut where none is named (to evaluate on all of a set, give
    `test_fraction` 1 and `val_fraction` 0). What a model was trained on is never its test.

    Args:
        root: folder, zip, list, table or one picture; None is the embedded sample.
        name: which archive or table of a folder with several.
        image_size: side of the model's input, S, in pixels.
        crop_fraction: evaluation keeps this share of the shorter side.
        resize: how evaluation makes a square: `crop`, `squash` or `pad`.
        scale: in training, range of the share of the area that a random crop keeps; null takes evaluation's.
        ratio: range of its aspect ratio.
        flip: probability of mirroring; None is 0.5, and 0 on an embedded sample where that would be wrong.
        flip_vertical: probability of turning upside down.
        policy: `trivial` (TrivialAugmentWide), `rand` (RandAugment) or `none`.
        colour: strength of random brightness, contrast and saturation.
        erase: probability of blackening a random rectangle.
        classes: class names in order; None takes those of the training part, sorted.
        val_fraction, test_fraction: shares of parts that the data do not name.
        path_column, label_column, split_column, group_column: columns of a table; by usual names if None.
            Pictures of one group (a patient) are cut into one part.
        balance: `classes` draws every class equally often in training, the rare ones repeatedly; an epoch stays
            as long as it was. `repeat` takes pictures of a class of share f ceil(sqrt(0.15 / f)) times an epoch.
        min_epoch_size: an epoch of a smaller training part goes through it several times, to so many samples.
        cache: `ram` keeps training pictures decoded, the shorter side at 1.15 S at most, so that small crops
            come from that; `none` decodes them anew, in full, every time.
        cache_limit_mb: how much each process of a training keeps.
        max_pixels: larger pictures are bad samples.
        batch_size, num_workers, seed, on_error: see `polyhead.data.DataModule`.
    """

    embedded_flip = 0.5
    suffixes: frozenset[str] = IMAGE_SUFFIXES
    # Whether a file with none of them is a picture all the same
    known: Callable[[Location], bool] | None = None

    def __init__(
        self, root: str | None = None, name: str | None = None, image_size: int = 224,
        crop_fraction: float = 1.0, resize: Resize = "crop", scale: tuple[float, float] | None = (0.35, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3), flip: float | None = None, flip_vertical: float = 0.0,
        policy: Literal["none", "trivial", "rand"] = "none", colour: float = 0.0, erase: float = 0.0,
        classes: list[str] | None = None, val_fraction: float = 0.15, test_fraction: float = 0.15,
        path_column: str | None = None, label_column: str | None = None, split_column: str | None = None,
        group_column: str | None = None, balance: Literal["none", "classes", "repeat"] = "none",
        min_epoch_size: int = 0, cache: Literal["ram", "none"] = "ram", cache_limit_mb: int = 2048,
        max_pixels: int = MAX_PIXELS, batch_size: int = 64, num_workers: int = 0, seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:  # fmt: skip
        super().__init__(root, batch_size, num_workers, seed, on_error)
        if image_size < 1:
            raise UserError(f"data.image_size is {image_size}: at least 1 is needed")
        if not 0 < crop_fraction <= 1:
            raise UserError(f"data.crop_fraction is {crop_fraction:g}: it must be above 0 and at most 1")
        if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"data.scale is {list(scale)}: 0 < low <= high <= 1 is needed")
        if not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"data.ratio is {list(ratio)}: 0 < low <= high is needed")
        shares = {"flip": flip or 0.0, "flip_vertical": flip_vertical, "erase": erase,
                  "val_fraction": val_fraction, "test_fraction": test_fraction}  # fmt: skip
        for option, value in shares.items():
            if not 0 <= value <= 1:
                raise UserError(f"data.{option} is {value:g}: it must be between 0 and 1")
        if colour < 0:
            raise UserError(f"data.colour is {colour:g}: it must be 0 or more")
        self.name, self.image_size = name, image_size
        self.square = Square(image_size, crop_fraction, resize)
        if flip is None:
            flip = 0.5 if root is not None else self.embedded_flip
        self.augment: Transform = Augment(self.square, scale, ratio, flip, flip_vertical, policy, colour, erase)
        self.classes = list(classes) if classes is not None else None
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        given = (path_column, label_column, split_column, group_column)
        self.columns: dict[str, Any] = {
            f"{role}_column": column for role, column in zip(COLUMN_ROLES, given, strict=True)
        }
        self.min_epoch_size = min_epoch_size
        self.balance, self.cache, self.max_pixels = balance, cache, max_pixels
        self.ignored: list[str] = []
        self._budget = Budget(cache_limit_mb * 2**20) if cache == "ram" else None
        self._entries: list[Entry] | None = None
        self._parts: dict[str, np.ndarray] = {}
        self._embedded: Embedded | None = None
        self._everything: list[Entry] = []
        self._fitting = False

    # What a subclass implements

    def embedded(self) -> Embedded:
        """The sample set for `root=None`."""
        raise UserError(f"{type(self).__name__} has no embedded sample: give --data.root")

    def find(self, everything: bool) -> list[Entry]:
        """What is under the root: for prediction `everything`, else what training and evaluation may use."""
        assert self.root is not None
        if everything:
            return find(self.root, self.name, everything=True, **self.columns)
        return find(self.root, self.name, suffixes=self.suffixes, known=self.known, ignored=self.ignored,
                    **self.columns)  # fmt: skip

    def fetch(self, entries: Sequence[Entry], target: int) -> Callable[[int], Image.Image]:
        """Index -> RGB picture, of which the shorter side need not exceed `target`; raises BadSample."""
        return Files([e.location for e in entries], target, self.max_pixels)

    # Finding and dividing

    def _from_embedded(self) -> list[Entry]:
        options = [k for k, v in {"name": self.name, **self.columns}.items() if v is not None]
        if options:
            raise UserError(f"data.{options[0]} needs data.root: there is none in the embedded sample")
        self._embedded = self._embedded or self.embedded()
        ids, _, labels, splits = self._embedded
        # The location's path is the picture's place in `pixels`
        rows = enumerate(zip(ids, labels, splits, strict=True))
        return [Entry(id, label, split, None, Location(str(i))) for i, (id, label, split) in rows]

    def entries(self) -> list[Entry]:
        """All pictures that training and evaluation may use."""
        if self._entries is None:
            if self.root is None:
                self._entries = self._from_embedded()
            else:
                self._entries = self.find(everything=False)
        return self._entries

    def parts(self) -> dict[str, np.ndarray]:
        """`train`, `val` and `test` as indices into `entries()`; resolves `classes` if they are not given."""
        if self._parts:
            return self._parts
        entries = self.entries()
        bad = [e for e in entries if e.location.problem]
        if bad and self.on_error == "raise":
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise UserError(
                f"cannot read {bad[0].id}{more}: {bad[0].location.problem}",
                ["mend or remove it, or leave such samples out with --data.on_error skip"],
            )
        good = [i for i, e in enumerate(entries) if not e.location.problem]
        splits = [entries[i].split for i in good]
        used = [i for i, s in zip(good, splits, strict=True) if s is not None] if any(splits) else good
        blank = [entries[i].id for i in used if entries[i].label is None]
        if blank:
            raise UserError(
                f"{blank[0]} has no class ({len(blank)} of {len(used)} in {self.root})",
                ["a class is the folder of a picture, or the label column of a table (--data.label_column)"],
            )
        labels = [entries[i].label for i in used]
        groups = [entries[i].group for i in used] if any(entries[i].group for i in used) else None
        splits = [entries[i].split for i in used]
        # What a published list or a file's own header calls a patient may be a number of many sources
        named = self.columns["group_column"] is not None
        cut = assign_splits(splits, labels, groups, self.val_fraction, self.test_fraction, self.seed, named)
        where = np.array(used, dtype=np.int64)
        self._parts = {name: where[indices] for name, indices in cut.items()}
        if self.classes is None:
            source = self._parts["train"] if len(self._parts["train"]) else where
            self.classes = sorted({str(entries[i].label) for i in source}, key=class_key)
        return self._parts

    def _labels_of(self, part: str) -> set[str]:
        entries = self.entries()
        return {str(entries[i].label) for i in self.parts()[part]}

    def prepare(self, stage: str) -> None:
        if stage == "predict":
            if self.root is None:
                self._everything = self._from_embedded()
            else:
                self._everything = self.find(everything=True)
            return
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        parts = self.parts()
        assert self.classes is not None
        for part in needed:
            if not len(parts[part]):
                there = ", ".join(f"{name} ({len(p)})" for name, p in parts.items() if len(p))
                fix = "raise" if part in ("train", "val") else "name one in the data, or raise"
                option = "data.val_fraction" if part != "test" else "data.test_fraction where no parts are named"
                raise UserError(f"{self._where()} has no {part} part, only {there}: {fix} {option}")
            unknown = sorted(self._labels_of(part) - set(self.classes), key=class_key)
            if unknown:
                known = ", ".join(self.classes[:12]) + (", ..." if len(self.classes) > 12 else "")
                raise UserError(
                    f"the {part} part of {self._where()} has a class {unknown[0]!r} that is none of: {known}",
                    [f"perhaps {n}" for n in nearest(unknown[0], self.classes, 1)],
                )
        if stage == "fit":
            self._fitting = True
            for part in needed:
                missing = [c for c in self.classes if c not in self._labels_of(part)]
                if missing:
                    raise UserError(
                        f"class {missing[0]!r} is missing from the {part} part of {self._where()}"
                        + (f" (and {len(missing) - 1} more are)" if len(missing) > 1 else "")
                        + ": every class must be there in training and in validation"
                    )

    def _where(self) -> str:
        return str(self.root) if self.root is not None else "the embedded sample"

    # Serving

    def dataset(self, split: Split) -> Samples:
        ready = self.square
        if split == "predict":
            entries, labels = self._everything, None
            numbers = self._numbers()
            known = [e for e in entries if not e.location.problem]
            if known and all(e.label in numbers for e in known):
                labels = np.array([numbers.get(e.label or "", -1) for e in entries], dtype=np.int64)
            return Pictures([e.id for e in entries], self._fetch(entries, self.square.needed), ready, labels)
        everything = self.entries()
        entries = [everything[i] for i in self.parts()[split]]
        ids = [e.id for e in entries]
        numbers = self._numbers()
        labels = np.array([numbers[str(e.label)] for e in entries], dtype=np.int64)
        budget = self._budget if self._fitting else None
        if split != "train":
            budget = budget if split == "val" else None
            fetch = self._fetch(entries, self.square.needed)
            groups = [e.group or e.id for e in entries] if any(e.group for e in entries) else None
            samples = Pictures(ids, fetch, ready, labels, budget=budget, groups=groups)
        else:
            side = round(MARGIN * max(self.image_size, self.square.needed))
            keep = self.cache == "ram"
            fetch = self._fetch(entries, side if keep else 2 * self.image_size)
            shrunk = partial(shrink, side=side) if keep else None
            samples = Pictures(ids, fetch, shrunk, labels, self.augment, self.seed, budget)
        if self.num_workers:
            samples.remember()
        return samples

    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes or [])}

    def _fetch(self, entries: Sequence[Entry], target: int) -> Callable[[int], Image.Image]:
        if self.root is None:
            assert self._embedded is not None
            return Arrays(self._embedded.pixels[[int(e.location.path) for e in entries]])
        return self.fetch(entries, target)

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        """Paths, bytes, Pillow images, uint8 arrays `[H, W, 3]` and tensors `[3, H, W]`, as in prediction."""
        raw = Raw(items, self.square.needed, self.max_pixels)
        return Pictures(raw.ids(), raw, self.square)

    def order(self, samples: Samples, split: Split, epoch: int) -> np.ndarray:
        if split != "train" or (self.balance == "none" and self.min_epoch_size <= len(samples)):
            return super().order(samples, split, epoch)
        labels = np.array([str(self.entries()[i].label) for i in self.parts()["train"]])
        rng = np.random.default_rng([self.seed, epoch])
        if self.balance == "classes":
            return balanced_order(labels, max(len(labels), self.min_epoch_size), rng)
        drawn = repeats(labels) if self.balance == "repeat" else np.arange(len(labels))
        return drawn[balanced_order(np.zeros(len(drawn)), max(len(drawn), self.min_epoch_size), rng)]

    # Telling

    def facts(self) -> dict[str, Any]:
        if self.classes is None:
            self.parts()
        return {"classes": self.classes}

    def class_counts(self) -> list[int]:
        """Training pictures of each class, in class order."""
        entries = self.entries()
        counts = Counter(str(entries[i].label) for i in self.parts()["train"])
        return [counts[c] for c in self.classes or []]

    def _left_out(self) -> dict[str, int]:
        used = sum(len(p) for p in self.parts().values())
        out = {"without a part or unreadable": len(self.entries()) - used, "not pictures": len(self.ignored)}
        return {what: n for what, n in out.items() if n}

    def plan(self) -> dict[str, str]:
        lines = super().plan()
        left = self._left_out()
        return {**lines, "left out": ", ".join(f"{n} {what}" for what, n in left.items())} if left else lines

    def summary(self) -> dict[str, Any]:
        """Pictures per class and part; for pictures without classes only their number."""
        entries = self.entries()
        if not any(e.label for e in entries):
            return {"pictures": len(entries), "classes": "none"}
        parts = self.parts()
        result: dict[str, Any] = {"pictures": len(entries), "classes": len(self.classes or [])}
        for name, indices in parts.items():
            counts = Counter(str(entries[i].label) for i in indices)
            result[name] = {c: counts[c] for c in sorted(counts, key=class_key)}
        left = self._left_out()
        return {**result, "left out": left} if left else result

    def check(self) -> list[tuple[str, str]]:
        """Read and decode every picture; the (id, reason) of those that fail. Shows progress."""
        entries = self.entries()
        if self.root is None:
            return []

        fetch = self.fetch(entries, 2**20)

        def reason_of(index: int) -> str | None:
            try:
                fetch(index)
            except BadSample as error:
                return str(error)
            return None

        with ThreadPoolExecutor(4) as pool:
            results = pool.map(reason_of, range(len(entries)))
            reasons = list(tqdm(results, f"check {Path(self.root).name}", len(entries)))
        return [(e.id, r) for e, r in zip(entries, reasons, strict=True) if r is not None]
