"""Bags in one memory-mapped file: a cohort or a slide, float16 or float32, with coordinates and what is known of it.

`features.npy` `[instances, F]`, `coords.npy` `[instances, 2]` int64 (-1 without), `index.parquet` (id, start, count,
label, group, split, meta as JSON), `packed.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from medical.bags import Bag, Instances, apply_labels, find_bags
from polyhead.errors import BadSample, UserError
from polyhead.files import atomic_write, write_text
from polyhead.predictions import PredictionWriter
from polyhead.sources import existing


class _Rows:
    """Appends rows to a .npy file whose length is known at the end."""

    def __init__(self, file: Any, dtype: np.dtype) -> None:
        self.file, self.dtype, self.count, self.width = file, dtype, 0, 0

    def _header(self) -> None:
        shape = (self.count, self.width)
        facts = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        # NumPy leaves room for the first axis to grow, so that the header keeps its length
        np.lib.format.write_array_header_1_0(self.file, facts)

    def append(self, rows: np.ndarray) -> None:
        if not self.count:
            self.width = rows.shape[1]
            self._header()
        self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())
        self.count += len(rows)

    def finish(self) -> None:
        self.file.seek(0)
        self._header()


@contextmanager
def _rows(path: Path, dtype: str) -> Iterator[_Rows]:
    with atomic_write(path) as temporary, open(temporary, "w+b") as file:
        rows = _Rows(file, np.dtype(dtype))
        yield rows
        if rows.count:
            rows.finish()


def _check_range(features: np.ndarray, dtype: np.dtype) -> None:
    """Raise BadSample where a number is beyond the stored type, which would make it infinite."""
    limit = float(np.finfo(dtype).max)
    largest = float(np.abs(features).max())
    if largest > limit:
        raise BadSample(f"a feature of {largest:g} is beyond the {limit:g} of {dtype}: --dtype float32 holds it")


def pack(bags: Sequence[Bag], folder: Path, dtype: Literal["float16", "float32"] = "float16") -> list[tuple[str, str]]:
    """Write bags into a folder, one in memory at a time; what cannot be read is left out.

    Returns:
        The id of each bag that was left out, and why.

    Raises:
        UserError: no bag can be read.
    """
    index: list[dict[str, Any]] = []
    failed: list[tuple[str, str]] = []
    with _rows(folder / "features.npy", dtype) as features, _rows(folder / "coords.npy", "int64") as coords:
        for bag in tqdm(bags, "pack", leave=False, delay=2):
            try:
                got = bag.read()
                _check_range(got.features, features.dtype)
                if features.count and got.features.shape[1] != features.width:
                    raise BadSample(f"{got.features.shape[1]} features an instance, the first bag has {features.width}")
            except BadSample as error:
                failed.append((bag.id, str(error)))
                continue
            index.append({"id": bag.id, "start": features.count, "count": len(got.features), "label": bag.label,
                          "group": bag.group, "split": bag.split, "meta": json.dumps(got.meta)})  # fmt: skip
            features.append(got.features)
            coords.append(got.coords if got.coords is not None else np.full((len(got.features), 2), -1))
        if not index:
            raise UserError("none of the bags could be read: nothing to pack", [f"{n}: {r}" for n, r in failed[:3]])
        total = features.count
    with atomic_write(folder / "index.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(index), temporary)
    write_text(folder / "packed.json", json.dumps({"layout": "polyhead bags", "bags": len(index), "instances": total}))
    return failed


def packed_bags(folder: Path) -> list[Bag]:
    """The bags of a packed folder, memory-mapped."""
    features = np.load(folder / "features.npy", mmap_mode="r")
    coords = np.load(folder / "coords.npy", mmap_mode="r")

    def read(row: dict[str, Any]) -> Instances:
        part = slice(row["start"], row["start"] + row["count"])
        where = coords[part]
        return Instances(features[part], None if (where < 0).any() else np.asarray(where), json.loads(row["meta"]))

    rows = pq.read_table(folder / "index.parquet").to_pylist()
    return [
        Bag(r["id"], lambda r=r: read(r), r["label"], r["group"], r["split"])  # type: ignore[misc]
        for r in rows
    ]


def pack_command(
    features: str,
    output: str,
    labels: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    overwrite: bool = False,
    strict: bool = False,
    bag_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    split_column: str | None = None,
) -> None:
    """Convert bags of features (ACMIL, CLAM, TRIDENT, STAMP, a table) into one memory-mapped folder.

    Args:
        features: a file or a folder of them.
        output: the folder to write, which `--data.root` then takes; errors.parquet says what was left out, and why.
        labels: a table with a row a bag, whose label, patient and split are kept too.
        dtype: of the features.
        overwrite: replace what is packed in the folder.
        strict: exit with status 2 when a bag was left out.
        bag_column, label_column, group_column, split_column: of the tables, where they are not known by their names.
    """
    folder = Path(output)
    if (folder / "packed.json").exists() and not overwrite:
        raise UserError(f"{folder} is packed already: give another --output, or --overwrite true")
    columns = {"bag": bag_column, "label": label_column, "group": group_column, "split": split_column}
    bags = find_bags(features, columns)
    if labels is not None:
        bags = apply_labels(bags, existing(labels), columns)
    failed = pack(bags, folder, dtype)
    (folder / "errors.parquet").unlink(missing_ok=True)
    with PredictionWriter(folder) as errors:
        for name, why in failed:
            errors.add_error(name, why)
            print(f"left out {name} of {features}: {why}", file=sys.stderr)
    print(f"{len(bags) - len(failed)} bags in {folder}; next: polyhead fit --config medical/acmil --data.root {folder}",
          file=sys.stderr)  # fmt: skip
    if failed and strict:
        raise UserError(f"{len(failed)} bags were left out: {folder / 'errors.parquet'} says why")
