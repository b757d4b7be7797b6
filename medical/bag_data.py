"""The data module of bags: features from files, or from images through a frozen encoder."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from medical.bags import (
    BAG_COLUMNS,
    Bag,
    Instances,
    apply_labels,
    apply_splits,
    checked,
    draw_folds,
    find_bags,
    named_folds,
    pick_column,
    read_table,
    table_columns,
)
from medical.image_bags import image_folders
from medical.tiles import TileEncoder
from polyhead.data import DataModule, Samples, Split, Unreadable, collate, generator
from polyhead.errors import BadSample, UserError, reason
from polyhead.sources import IMAGE_SUFFIXES, existing, find
from polyhead.splits import assign_splits, class_key


def planted_bags(seed: int = 0, count: int = 240, width: int = 16) -> list[Bag]:
    """The embedded sample: a bag is positive when it holds 1 to 3 key instances among 20 to 60 ordinary ones.

    Key instances are shifted along a fixed direction by 3 standard deviations; `meta["key"]` lists them.
    """
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    direction *= 3 / np.linalg.norm(direction)
    bags = []
    for index in range(count):
        size = int(rng.integers(20, 61))
        features = rng.normal(size=(size, width))
        positive = index % 2 == 1
        key = np.sort(rng.choice(size, int(rng.integers(1, 4)), replace=False)) if positive else np.array([], int)
        features[key] += direction
        got = Instances(features.astype(np.float32), None, {"key": key.tolist()})
        split = "train" if index < count // 2 else "val" if index < count * 3 // 4 else "test"
        bags.append(Bag(f"bag-{index:04d}", lambda got=got: got, str(int(positive)), None, split))  # type: ignore[misc]
    return bags


VAL_FRACTION = 0.15


class BagSamples:
    """Bags as samples: `features` `[N, F]` as they are stored, `label`, and `instance_label` `[N]` where known.

    Args:
        bags: in order.
        numbers: class name -> number; None leaves labels out.
        width: F that the model takes.
        most: at most so many instances, drawn anew every epoch; 0 is all.
        noise: standard deviations `[F]` of noise on the features, or None.
        seed: of these.
        mirror: images are seen in a mirror drawn anew every epoch.
    """

    def __init__(
        self,
        bags: list[Bag],
        numbers: dict[str, int] | None,
        width: int,
        most: int = 0,
        noise: np.ndarray | None = None,
        seed: int = 0,
        mirror: bool = False,
    ) -> None:
        self.bags, self.numbers, self.width, self.mirror = bags, numbers, width, mirror
        self.ids = [bag.id for bag in bags]
        self.most, self.noise, self.seed = most, noise, seed

    def __len__(self) -> int:
        return len(self.bags)

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        bag = self.bags[index]
        source = generator(self.seed, epoch, index)
        if self.mirror and bag.mirrored is not None:
            got = bag.mirrored(int(torch.randint(4, (1,), generator=source)))
        else:
            got = bag.read()
        if got.features.shape[1] != self.width:
            found = got.features.shape[1]
            raise BadSample(f"{found} features an instance, the model takes {self.width}: of another encoder?")
        rows: Any = slice(None)
        if self.most and len(got.features) > self.most:
            rows = torch.randperm(len(got.features), generator=source)[: self.most].sort().values.numpy()
        with warnings.catch_warnings():
            # A read-only memory map stays one: a large bag is read where it is used
            warnings.simplefilter("ignore")
            features = torch.from_numpy(got.features[rows])
        if self.noise is not None:
            drawn = torch.randn(features.shape, generator=source)
            features = features.float() + torch.from_numpy(self.noise) * drawn
        sample: dict[str, Any] = {"id": bag.id, "features": features}
        if self.numbers is not None and bag.label is not None:
            sample["label"] = torch.tensor(self.numbers[bag.label])
            sample["group"] = bag.group or bag.id
        if "key" in got.meta:
            truth = np.zeros(len(got.features), dtype=np.int64)
            truth[got.meta["key"]] = 1
            sample["instance_label"] = torch.from_numpy(truth[rows])
        return sample


def _array(item: Any, name: str) -> Instances:
    """Features `[N, F]` that were given. Raises BadSample."""
    try:
        values = np.asarray(item, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise BadSample(f"{name} holds no numbers: {reason(error)}") from error
    return checked(values, None, {}, name)


class BagData(DataModule):
    """Bags of instances: feature files, tables, packed features, or images cut into tiles by an encoder.

    Args:
        root: features (`.h5`, `.pt`, a table, a folder of them, a packed folder) or images; None is the
            embedded sample of bags with planted key instances.
        name: which archive or table of a folder with several.
        labels: a table with a row a bag: its name, label, patient, split.
        splits: a split file of CLAM, whose columns train, val and test list bags.
        encoder: for images: `encoder:efficientnet_lite0` or a timm name; None reads features.
        instances: for images: `tiles` cuts each image, `images` takes a folder of images as a bag; `auto` does the
            latter when the table of labels names folders.
        tile: for images: side of a tile in pixels.
        boxes: for images: a table of boxes (bag, xmin, ymin, xmax, ymax) that makes a tile positive; how
            well attention finds them is reported.
        box_kind: only boxes whose `cell` or `kind` column says this.
        max_instances: in training, at most so many instances a bag, drawn anew every epoch; 0 is all.
        noise: standard deviation of noise on standardised features in training.
        mirror: in training, images are encoded in four mirrors, of which each epoch sees one.
        standardise: scale features by their mean and deviation over the training bags.
        mean, deviation: of the features; found from the training bags when None.
        classes: class names in order; None takes those of the training part, sorted.
        folds, fold: cross-validation by patient: of so many drawn folds this one is the test part, and all others
            train, less what `val_fraction` asks for.
        fold_column: a table's own folds, whole numbers, in place of drawn ones.
        val_fraction: share of a validation part that the data do not name; None is 0.15, and in cross-validation 0,
            where each bag counts.
        test_fraction: share of a test part that the data do not name.
        bag_column, label_column, group_column, split_column: columns; by usual names if None.
        feature_columns: of a table with a row an instance; all other columns of numbers if None.
        batch_size, num_workers, seed, on_error: see `polyhead.data.DataModule`.
    """

    def __init__(
        self, root: str | None = None, name: str | None = None, labels: str | None = None,
        splits: str | None = None, encoder: str | None = None,
        instances: Literal["auto", "tiles", "images"] = "auto", tile: int = 80, boxes: str | None = None,
        box_kind: str | None = None, max_instances: int = 0, noise: float = 0.0, mirror: bool = False,
        standardise: bool = True, mean: list[float] | None = None, deviation: list[float] | None = None,
        classes: list[str] | None = None, folds: int = 0, fold: int = 0, fold_column: str | None = None,
        val_fraction: float | None = None, test_fraction: float = 0.15, bag_column: str | None = None,
        label_column: str | None = None, group_column: str | None = None, split_column: str | None = None,
        feature_columns: list[str] | None = None, batch_size: int = 1, num_workers: int = 0, seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:  # fmt: skip
        super().__init__(root, batch_size, num_workers, seed, on_error)
        for given in (labels, splits, boxes):
            if given is not None:
                existing(given)
        self.splits = splits
        self.name, self.labels, self.encoder_name, self.tile = name, labels, encoder, tile
        self.boxes, self.box_kind, self.instances = boxes, box_kind, instances
        self.max_instances, self.noise, self.standardise = max_instances, noise, standardise
        self.mirror = mirror
        self.mean, self.deviation = mean, deviation
        self.classes = list(classes) if classes is not None else None
        self.folds, self.fold, self.fold_column = folds, fold, fold_column
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.columns = {"bag": bag_column, "label": label_column, "group": group_column, "split": split_column,
                        "fold": fold_column}  # fmt: skip
        self.feature_columns = feature_columns
        self._bags: list[Bag] | None = None
        self._parts: dict[str, np.ndarray] = {}
        self._encoder: TileEncoder | None = None
        self._width: int | None = None

    # Finding

    def _own_encoder(self, truth: dict[str, np.ndarray] | None) -> TileEncoder:
        # Built when images are read, not with this module: a restored model's settings come before its data
        if self._encoder is None:
            assert self.encoder_name is not None
            self._encoder = TileEncoder(self.encoder_name, self.tile, truth)
        return self._encoder

    def _table(self) -> Path | None:
        """The table of labels: as given, or `labels.csv`, `bags.csv` or `split.csv` in the root."""
        if self.labels is not None:
            return Path(self.labels)
        if self.root is None or not Path(self.root).is_dir():
            return None
        beside = {p.stem: p for p in sorted(Path(self.root).glob("*.csv"))}
        return next((beside[n] for n in ("labels", "bags", "split") if n in beside), None)

    def _folder_bags(self, everything: bool) -> list[Bag] | None:
        """Bags of instance images: of every folder that the table of labels names, or of every folder."""
        table = self._table()
        if self.instances == "tiles" or (self.instances == "auto" and table is None):
            return None
        names = None
        if everything and self.instances == "images":
            table = None
        if table is not None:
            rows = read_table(table)
            column = pick_column(rows, self.columns["bag"], BAG_COLUMNS, "bag", self.instances == "images", table)
            names = {str(v) for v in rows[column].to_pylist()} if column is not None else set()
        assert self.root is not None
        # As for prediction: the table's rows are bags and not files, and are applied below
        found = find(self.root, self.name, everything=True)
        images = [e for e in found if Path(e.id).suffix.lower() in IMAGE_SUFFIXES]
        folders = image_folders(images, names)
        if not folders:
            if self.instances == "images":
                raise UserError(f"{self.root} has no folders of instance images that {table or 'a table'} names")
            return None
        self.instances = "images"
        encoder = self._own_encoder(None)
        bags = [Bag(name, partial(encoder.read_images, name, where)) for name, where in folders.items()]
        return bags if table is None else apply_labels(bags, table, self.columns)

    def _image_bags(self, everything: bool) -> list[Bag]:
        assert self.root is not None
        # A table that was given speaks of all images; one beside them is found with them
        given = Path(self.labels) if self.labels is not None and not everything else None
        entries = find(self.root, self.name, everything=everything or given is not None,
                       label_column=self.columns["label"], group_column=self.columns["group"],
                       split_column=self.columns["split"], path_column=self.columns["bag"])  # fmt: skip
        encoder = self._own_encoder(self._truth())
        reads = [partial(encoder.read, e.id, e.location) for e in entries]
        if given is not None:
            bags = [Bag(e.id, r, mirrored=r) for e, r in zip(entries, reads, strict=True)
                    if Path(e.id).suffix.lower() in IMAGE_SUFFIXES]  # fmt: skip
            return apply_labels(bags, given, self.columns)
        return [Bag(e.id, r, e.label, e.group, e.split, r) for e, r in zip(entries, reads, strict=True)]

    def _named_features(self) -> list[str] | None:
        """The columns of features of a table, by which a later one is read too."""
        path = Path(str(self.root))
        if self.feature_columns is None and self.mean is None and path.suffix in (".csv", ".tsv", ".parquet"):
            self.feature_columns = table_columns(path, self.columns, None)[2]
        return self.feature_columns

    def _truth(self) -> dict[str, np.ndarray] | None:
        """Boxes `[n, 4]` (xmin, ymin, xmax, ymax) of every image that has some."""
        path = Path(self.boxes) if self.boxes else None
        if path is None and self.root is not None and Path(self.root).is_dir():
            beside = Path(self.root) / "boxes.csv"
            path = beside if beside.is_file() else None
        if path is None:
            return None
        table = read_table(path)
        kind = next((c for c in ("cell", "kind") if c in table.column_names), None)
        found: dict[str, list[list[float]]] = {}
        needed = ("bag", "xmin", "ymin", "xmax", "ymax")
        absent = [c for c in needed if c not in table.column_names]
        if absent:
            raise UserError(f"{path.name} has no column {absent[0]!r}: boxes need {', '.join(needed)} (--data.boxes)")
        for row in table.to_pylist():
            if self.box_kind is None or kind is None or row[kind] == self.box_kind:
                found.setdefault(str(row["bag"]), []).append([row[k] for k in ("xmin", "ymin", "xmax", "ymax")])
        return {name: np.array(boxes, dtype=np.float64) for name, boxes in found.items()}

    def bags(self, everything: bool = False) -> list[Bag]:
        """All bags; for prediction also those without a label."""
        if self._bags is not None and not everything:
            return self._bags
        if self.root is None:
            bags = planted_bags()
        elif self.encoder_name is not None:
            bags = self._folder_bags(everything) or self._image_bags(everything)
        else:
            bags = find_bags(self.root, self.columns, self._named_features())
            table = self._table()
            # A table of labels says nothing of bags that are to be predicted
            if table is not None and not everything:
                bags = apply_labels(bags, table, self.columns)
        if self.splits is not None and not everything:
            bags = apply_splits(bags, Path(self.splits))
        if not everything:
            self._bags = bags
        return bags

    def parts(self) -> dict[str, np.ndarray]:
        """`train`, `val` and `test` as indices into `bags()`."""
        if self._parts:
            return self._parts
        bags = self.bags()
        blank = [b.id for b in bags if b.label is None]
        if blank:
            raise UserError(f"bag {blank[0]} has no label ({len(blank)} of {len(bags)}): give --data.labels TABLE")
        labels = [str(b.label) for b in bags]
        groups = [b.group or b.id for b in bags]
        splits = [b.split for b in bags]
        folded = bool(self.folds or self.fold_column)
        if folded:
            splits = list(self._fold_splits())
        share = self.val_fraction
        if share is None:
            share = 0.0 if folded else VAL_FRACTION
        own = groups if any(b.group for b in bags) else None
        self._parts = assign_splits(splits, labels, own, share, self.test_fraction, self.seed)
        if self.classes is None:
            source = self._parts["train"]
            if folded or not len(source):
                source = np.arange(len(bags))
            self.classes = sorted({labels[i] for i in source}, key=class_key)
        return self._parts

    def _folds(self) -> list[int]:
        """The fold of each of `bags()`."""
        bags = self.bags()
        if self.fold_column is None:
            return draw_folds([str(b.label) for b in bags], [b.group or b.id for b in bags], self.folds, self.seed)
        table = self._table() or Path(str(self.root))
        if self.root is None or not table.is_file():
            raise UserError(f"data.fold_column {self.fold_column!r} needs a table of bags: give --data.labels TABLE")
        return named_folds(bags, table, self.fold_column, self.columns["bag"])

    def fold_numbers(self) -> list[int]:
        return sorted(set(self._folds())) if self.folds or self.fold_column else []

    def _fold_splits(self) -> list[str]:
        where = self._folds()
        if self.fold not in where:
            known = sorted(set(where))
            raise UserError(f"data.fold is {self.fold}: there are folds {known[0]} to {known[-1]}")
        return ["test" if fold == self.fold else "train" for fold in where]

    def prepare(self, stage: str) -> None:
        if stage == "predict":
            return
        parts = self.parts()
        assert self.classes is not None
        for part in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            if not len(parts[part]) and (stage, part) != ("fit", "val"):
                raise UserError(f"{self.root or 'the embedded sample'} has no {part} part")
            unknown = {str(self.bags()[i].label) for i in parts[part]} - set(self.classes)
            if unknown:
                known = ", ".join(self.classes)
                raise UserError(f"the {part} part has a class {min(unknown)!r} that is none of: {known}")

    # Serving

    def _measure(self) -> None:
        """Width, mean and deviation of the features, over the training bags."""
        if self.mean is not None:
            self._width = len(self.mean)
            return
        total = square = np.zeros(())
        count = 0
        indices = self.parts()["train"]
        slow = self.encoder_name is not None
        for index in tqdm(indices, "encode", leave=False, delay=2, disable=not slow):
            try:
                features = np.asarray(self.bags()[index].read().features, dtype=np.float64)
            except BadSample as error:
                if self.on_error == "raise":
                    raise UserError(f"cannot read {self.bags()[index].id}: {error}") from error
                continue
            if not np.isfinite(features.sum()):
                raise UserError(f"bag {self.bags()[index].id} holds a number that is not finite: pack or mend it anew")
            total, square = total + features.sum(0), square + (features**2).sum(0)
            count += len(features)
        if not count:
            raise UserError("no training bag can be read")
        mean = total / count
        deviation = np.sqrt(np.maximum(square / count - mean**2, 0))
        # What does not vary within the precision of its values is constant, whatever its unit
        deviation[deviation <= 1e-6 * np.abs(mean)] = 1.0
        self._width = len(mean)
        if not self.standardise:
            mean, deviation = np.zeros_like(mean), np.ones_like(mean)
        digits = [6 + max(0, math.ceil(-math.log10(d))) for d in deviation]
        self.mean = [round(float(v), d) for v, d in zip(mean, digits, strict=True)]
        self.deviation = [round(float(v), d) for v, d in zip(deviation, digits, strict=True)]

    def facts(self) -> dict[str, Any]:
        if self.classes is None:
            self.parts()
        self._measure()
        return {"classes": self.classes, "mean": self.mean, "deviation": self.deviation, "instances": self.instances,
                "feature_columns": self.feature_columns}  # fmt: skip

    def _features(self) -> int:
        self._measure()
        assert self._width is not None
        return self._width

    def dataset(self, split: Split) -> Samples:
        if split == "predict":
            return BagSamples(self.bags(everything=True), None, self._features())
        bags = [self.bags()[i] for i in self.parts()[split]]
        numbers = {name: number for number, name in enumerate(self.classes or [])}
        if split != "train":
            return BagSamples(bags, numbers, self._features())
        width = self._features()
        noise = self.noise * np.array(self.deviation, dtype=np.float32) if self.noise else None
        return BagSamples(bags, numbers, width, self.max_instances, noise, self.seed, self.mirror)

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        """Feature arrays `[N, F]`, feature files, or (with an encoder) images, as in prediction."""
        bags: list[Bag] = []
        for index, item in enumerate(items):
            if isinstance(item, (np.ndarray, Tensor)) and item.ndim == 2:
                bags.append(Bag(f"input-{index}", partial(_array, item, f"input-{index}")))
            elif self.encoder_name is not None:
                name = str(item) if isinstance(item, (str, Path)) else f"input-{index}"
                read = partial(self._own_encoder(None).read_raw, name, item)
                bags.append(Bag(name, read))
            else:
                bags += find_bags(str(item), self.columns, self.feature_columns)
        return BagSamples(bags, None, self._features())

    def collate(self, items: list[dict[str, Any] | Unreadable]) -> dict[str, Any]:
        """Bags of unequal sizes are padded; `present` `[B, N]` says which instances are there."""
        good = [item for item in items if isinstance(item, dict)]
        if len(items) == 1 and good:
            (item,) = good
            single = {k: v[None] for k, v in item.items() if isinstance(v, Tensor)}
            present = torch.ones(1, len(item["features"]), dtype=torch.bool)
            names: dict[str, Any] = {k: [item[k]] for k in ("id", "group") if k in item}
            return {**names, **single, "present": present, "errors": []}
        longest = max((len(item["features"]) for item in good), default=0)
        padded: list[dict[str, Any] | Unreadable] = [i for i in items if isinstance(i, Unreadable)]
        for item in good:
            count = len(item["features"])
            short = longest - count
            new = {**item, "features": torch.nn.functional.pad(item["features"], (0, 0, 0, short))}
            new["present"] = torch.arange(longest) < count
            if "instance_label" in item:
                new["instance_label"] = torch.nn.functional.pad(item["instance_label"], (0, short), value=-1)
            padded.append(new)
        return collate(padded)

    # Telling

    def class_counts(self) -> list[int]:
        counts = Counter(str(self.bags()[i].label) for i in self.parts()["train"])
        return [counts[c] for c in self.classes or []]

    def summary(self) -> dict[str, Any]:
        bags = self.bags()
        result: dict[str, Any] = {"bags": len(bags)}
        if self.feature_columns:
            shown = self.feature_columns[:4] + ["..."] * (len(self.feature_columns) > 4)
            result["features"] = f"{len(self.feature_columns)} columns: {', '.join(shown)}"
        if all(b.label is not None for b in bags):
            for part, indices in self.parts().items():
                counts = Counter(str(bags[i].label) for i in indices)
                result[part] = {c: counts[c] for c in sorted(counts, key=class_key)}
        return result

    def check(self) -> list[tuple[str, str]]:
        failed = []
        for bag in tqdm(self.bags(), "read", leave=False, delay=2):
            try:
                bag.read()
            except BadSample as error:
                failed.append((bag.id, str(error)))
        return failed
