"""Bags of instance features from every layout in use.

A bag is a slide, a patient or a photograph; its instances are rows of features `[N, F]`, with coordinates
where the file has them. Read: ACMIL's h5 (a group a slide), CLAM's h5 and pt, TRIDENT's h5, STAMP's h5,
tables with a row an instance, and our packed layout, which is memory-mapped.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from sklearn.model_selection import StratifiedGroupKFold

from polyhead.errors import BadSample, UserError, nearest, reason
from polyhead.safe import read_tensor
from polyhead.sources import SPLIT_NAMES, existing

FEATURE_KEYS = ("features", "feat", "feats", "patch_embeddings")
BAG_COLUMNS = ("bag", "slide_id", "slide", "bag_id", "sequence")
LABEL_COLUMNS = ("label", "class", "target")
GROUP_COLUMNS = ("patient", "case_id", "patient_id", "group")
SPLIT_COLUMNS = ("split", "set")


@dataclass(frozen=True)
class Instances:
    """What a bag holds.

    Attributes:
        features: `[N, F]`, float16 or float32; may be a memory map.
        coords: `[N, 2]` int64, level-0 top-left corners, or None.
        meta: plain values that the file says of itself (patch size, encoder, ...).
    """

    features: np.ndarray
    coords: np.ndarray | None
    meta: dict[str, Any]


@dataclass
class Bag:
    """One bag, read when it is asked for.

    Attributes:
        id: its name.
        read: gives its instances. Raises BadSample.
        label, group, split: None where nothing says them; `group` is the patient.
        mirrored: of an image, gives its instances as seen in mirror 0 to 3 (none, left-right, up-down, both), in
            the order of the image itself.
    """

    id: str
    read: Callable[[], Instances]
    label: str | None = None
    group: str | None = None
    split: str | None = None
    mirrored: Callable[[int], Instances] | None = None


# ---- feature files


def _plain(value: Any) -> Any:
    """An attribute of an h5 file as a plain value."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _from_group(group: Any, name: str) -> Instances:
    key = next((k for k in FEATURE_KEYS if k in group), None)
    if key is None:
        raise BadSample(f"{name} has no features: one of {', '.join(FEATURE_KEYS)} is needed")
    features = group[key][()]
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]
    coords = group["coords"][()].astype(np.int64) if "coords" in group else None
    meta = {k: _plain(v) for k, v in group.attrs.items()}
    for part in (key, "coords"):
        if part in group:
            meta |= {k: _plain(v) for k, v in group[part].attrs.items()}
    return checked(features, coords, meta, name)


def checked(features: np.ndarray, coords: np.ndarray | None, meta: dict[str, Any], name: str) -> Instances:
    """Instances whose shapes and values hold. Raises BadSample."""
    if features.ndim != 2:
        raise BadSample(f"{name}: features of shape {list(features.shape)}, [instances, width] is needed")
    if len(features) == 0:
        raise BadSample(f"{name} has no instances")
    if coords is not None and coords.shape != (len(features), 2):
        raise BadSample(f"{name}: {len(features)} instances and coordinates of shape {list(coords.shape)}")
    if features.dtype not in (np.float16, np.float32):
        features = features.astype(np.float32)
    # The sum is quick and only suspects: finite numbers may overflow it
    if not np.isfinite(features.sum(dtype=np.float32)) and not np.isfinite(features).all():
        row, column = np.argwhere(~np.isfinite(features))[0]
        raise BadSample(f"{name}: feature {column} of instance {row} is {features[row, column]}")
    return Instances(features, coords, meta)


def read_h5(path: Path, group: str | None = None) -> Instances:
    """One slide's file, or one group of a file with several. Raises BadSample."""
    import h5py
    import hdf5plugin  # noqa: F401 - registers the compression filters that such files use

    name = path.name if group is None else group
    try:
        with h5py.File(path, "r") as file:
            return _from_group(file if group is None else file[group], name)
    except BadSample:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise BadSample(f"{name} is damaged: {reason(error)}") from error


def _read_pt(path: Path) -> Instances:
    try:
        return checked(read_tensor(path).numpy(), None, {}, path.name)
    except UserError as error:
        raise BadSample(error.message) from error


def _h5_bags(path: Path) -> list[Bag]:
    """One file with a group a slide, or one slide."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            groups = [k for k, v in file.items() if isinstance(v, h5py.Group)]
            labels = {k: _plain(file[k].attrs["label"]) for k in groups if "label" in file[k].attrs}
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if not groups:
        return [Bag(path.stem, lambda: read_h5(path))]
    return [
        Bag(k, lambda k=k: read_h5(path, k), None if k not in labels else str(labels[k]))  # type: ignore[misc]
        for k in sorted(groups)
    ]


def _file_bags(folder: Path) -> list[Bag]:
    """A file a slide, in the folder or in the one place below it where such files are."""
    for place in (folder, folder / "h5_files", folder / "pt_files"):
        found = sorted(place.glob("*.h5"))
        if len(found) == 1 and place == folder:
            return _h5_bags(found[0])
        if found:
            return [Bag(p.stem, lambda p=p: read_h5(p)) for p in found]  # type: ignore[misc]
        found = sorted(place.glob("*.pt"))
        if found:
            return [Bag(p.stem, lambda p=p: _read_pt(p)) for p in found]  # type: ignore[misc]
    below = sorted({p.parent for p in folder.rglob("*.h5")} | {p.parent for p in folder.rglob("*.pt")})
    if len(below) > 1:
        shown = ", ".join(str(p.relative_to(folder)) for p in below[:4])
        raise UserError(f"{folder} holds features in several folders ({shown}): name one as --data.root")
    return _file_bags(below[0]) if below else []


# ---- tables


def read_table(path: Path) -> pa.Table:
    """A CSV, TSV or Parquet file. Raises UserError."""
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        table = pacsv.read_csv(path, parse_options=pacsv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ","))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read the table {path}: {reason(error)}") from error
    foreign = [f.name for f in table.schema if pa.types.is_binary(f.type)]
    if foreign:
        raise UserError(f"{path.name}: column {foreign[0]!r} is not UTF-8 text: save the table as UTF-8")
    return table


def pick_column(
    table: pa.Table, given: str | None, usual: Sequence[str], role: str, needed: bool, where: Path
) -> str | None:
    """The column of a role: as given, else by a usual name. Raises UserError when a needed one is missing."""
    names = table.column_names
    if given is not None:
        if given not in names:
            near = nearest(given, names)
            raise UserError(f"{where.name} has no column {given!r} (--data.{role}_column)",
                            [f"did you mean {near[0]}?"] if near else [f"it has: {', '.join(names[:12])}"])  # fmt: skip
        return given
    found = next((u for u in usual if u in names), None)
    if found is None and needed:
        raise UserError(f"{where.name} has no {role} column: name it with --data.{role}_column",
                        [f"it has: {', '.join(names[:12])}"])  # fmt: skip
    return found


def pick_roles(table: pa.Table, columns: dict[str, str | None], where: Path) -> dict[str, str | None]:
    """The columns of bag, label, group and split. Raises UserError when there is none of bags."""
    usual = {"bag": BAG_COLUMNS, "label": LABEL_COLUMNS, "group": GROUP_COLUMNS, "split": SPLIT_COLUMNS}
    return {role: pick_column(table, columns[role], u, role, role == "bag", where) for role, u in usual.items()}


def _text(value: Any) -> str | None:
    """A cell as text; None where it is blank."""
    return None if value is None else str(value).strip() or None


def feature_columns(
    table: pa.Table, path: Path, taken: Collection[str | None], known: Sequence[str] | None
) -> list[str]:
    """The columns that are features: those known by name, else all columns of numbers that nothing else takes.

    Raises:
        UserError: a known one is missing or none is found, or text stands among the numbers of one.
    """
    names = [f.name for f in table.schema if f.name not in taken and not f.name.lower().startswith("instance")]
    for name in names if known is None else known:
        if name not in table.column_names:
            near = nearest(name, names)
            hints = [f"did you mean {near[0]}?"] if near else [f"it has: {', '.join(names[:12])}"]
            raise UserError(f"{path.name} has no column {name!r}, which the model was trained on", hints)
        kind = table.schema.field(name).type
        if path.suffix != ".parquet" and pa.types.is_string(kind):
            cells = [c for c in map(_text, table[name].to_pylist()) if c is not None]
            odd = next((c for c in cells if not _is_number(c)), None)
            if odd is not None and sum(_is_number(c.replace(",", ".")) for c in cells) > len(cells) / 2:
                raise UserError(f"{path.name}: column {name!r} holds {odd!r} among its numbers: mend or remove it")
    if known is not None:
        return list(known)
    plain = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    found = [n for n in names if any(test(table.schema.field(n).type) for test in plain)]
    if not found:
        raise UserError(f"{path.name} has no columns of numbers to take as features")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rows(values: np.ndarray, names: Sequence[str], where: Sequence[int], path: Path) -> Instances:
    """The instances of a table's rows `where`. Raises BadSample."""
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        found = f"row {where[row] + 1} below the head, column {names[column]}"
        raise BadSample(f"{path.name}, {found}: {values[row, column]} is no finite number")
    return Instances(values, None, {})


def table_columns(
    path: Path, columns: dict[str, str | None], known: Sequence[str] | None
) -> tuple[pa.Table, dict[str, str | None], list[str]]:
    """A table with a row an instance, its columns by role, and those of its features. Raises UserError."""
    table = read_table(path)
    roles = pick_roles(table, columns, path)
    # What numbers or names an instance or a part is no feature
    return table, roles, feature_columns(table, path, {"fold", columns.get("fold"), *roles.values()}, known)


def _table_bags(path: Path, columns: dict[str, str | None], known: Sequence[str] | None) -> list[Bag]:
    """A row an instance: bag, label and features in columns."""
    table, roles, features = table_columns(path, columns, known)
    try:
        values = np.stack([table[c].to_numpy(zero_copy_only=False).astype(np.float32) for c in features], 1)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path.name}: a column of features is no column of numbers: {reason(error)}") from error
    order: dict[str, list[int]] = {}
    for index, name in enumerate(map(_text, table[roles["bag"]].to_pylist())):
        if name is None:
            raise UserError(f"{path.name}: row {index + 1} below the head names no bag (column {roles['bag']})")
        order.setdefault(name, []).append(index)
    said = {role: table[c].to_pylist() if c else None for role, c in roles.items() if role != "bag"}
    bags = []
    for name, rows in order.items():
        first: dict[str, str | None] = {}
        for role, cells in said.items():
            own = {_text(cells[i]) for i in rows} if cells else {None}
            if len(own) > 1:
                shown = " and ".join(sorted(str(v) for v in own)[:2])
                raise UserError(f"{path.name}: the rows of bag {name} say {shown} in column {roles[role]!r}")
            first[role] = own.pop()
        if first["split"] is not None:
            first["split"] = split_name(first["split"], path)
        bags.append(Bag(name, partial(_rows, values[rows], features, rows, path), **first))  # type: ignore[arg-type]
    return bags


def find_bags(root: str | Path, columns: dict[str, str | None], features: Sequence[str] | None = None) -> list[Bag]:
    """All bags under a root of any layout, of a table with the `features` that are named.

    Raises:
        UserError: there are none, or as the layout says.
    """
    path = existing(str(root))
    if path.is_file():
        bags = _h5_bags(path) if path.suffix in (".h5", ".hdf5") else _table_bags(path, columns, features)
    elif (path / "packed.json").is_file():
        from medical.packed import packed_bags

        bags = packed_bags(path)
    else:
        bags = _file_bags(path)
    if not bags:
        raise UserError(f"no bags in {path}: features as .h5 or .pt files, a table, or a packed folder are read")
    return bags


def apply_labels(bags: list[Bag], path: Path, columns: dict[str, str | None]) -> list[Bag]:
    """Labels, patients and splits from a table with a row a slide. Bags that it does not name are left out."""
    table = read_table(path)
    names = pick_roles(table, columns, path)
    used = [names[role] for role in ("label", "group", "split")]
    rows: dict[str, dict[str, Any]] = {}
    for row in table.to_pylist():
        name = _text(row[names["bag"]])
        if name is not None and [rows.setdefault(name, row)[c] for c in used if c] != [row[c] for c in used if c]:
            raise UserError(f"{path.name} has two rows of bag {name} that say different things")
    known = [(bag, row) for bag in bags if (row := named(rows, bag.id)) is not None]
    if not known:
        hint = f"a bag is called {bags[0].id}, a row {next(iter(rows), '-')}"
        raise UserError(f"{path.name} names none of the {len(bags)} bags", [hint])
    for bag, row in known:
        for role in ("label", "group", "split"):
            column = names[role]
            said = _text(row[column]) if column is not None else None
            if said is not None:
                setattr(bag, role, split_name(said, path) if role == "split" else said)
    return [bag for bag, _ in known]


def named(rows: dict[str, Any], bag: str) -> Any:
    """What a table says of a bag, which it may call by its path, its file's name, or that without its ending."""
    path = PurePath(bag)
    return next((rows[n] for n in (bag, path.name, path.stem) if n in rows), None)


def split_name(said: str, path: Path) -> str:
    """`train`, `val` or `test` for a name in use. Raises UserError for another."""
    name = SPLIT_NAMES.get(said.strip().lower())
    if name is None:
        raise UserError(f"{path.name} names a part {said!r}: train, val and test are known (--data.split_column)")
    return name


def apply_splits(bags: list[Bag], path: Path) -> list[Bag]:
    """The parts that a split file of CLAM names: columns train, val and test that list bags. Others are left out."""
    table = read_table(path)
    columns = [c for c in ("train", "val", "test") if c in table.column_names]
    if not columns:
        raise UserError(f"{path.name} has no columns train, val and test that list bags (--data.splits)")
    part = {str(v): c for c in columns for v in table[c].to_pylist() if v not in (None, "")}
    known = [b for b in bags if b.id in part]
    if not known:
        raise UserError(f"{path.name} lists none of the {len(bags)} bags", [f"a bag is called {bags[0].id}"])
    for bag in known:
        bag.split = part[bag.id]
    return known


def draw_folds(labels: Sequence[str], groups: Sequence[str], count: int, seed: int) -> list[int]:
    """The fold of each bag, 0 to `count` - 1: stratified by label, and no group in two of them. Raises UserError."""
    if count < 2:
        raise UserError(f"data.folds is {count}: 2 or more are needed")
    where = np.full(len(labels), -1)
    if max(Counter(labels).values()) >= count:
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            # A rare class is missing from some folds, which pooled results can bear
            warnings.simplefilter("ignore")
            for k, (_, test) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
                where[test] = k
    if len(set(where.tolist())) < count:
        raise UserError(f"data.folds is {count}: {len(set(groups))} bags or patients are too few for so many folds")
    return where.tolist()


def named_folds(bags: Sequence[Bag], path: Path, column: str, bag_column: str | None) -> list[int]:
    """The fold that a column of a table names for each bag.

    Raises:
        UserError: no such column, a bag without one whole number, or a patient in two folds.
    """
    table = read_table(path)
    if column not in table.column_names:
        near = nearest(column, table.column_names)
        hints = [f"did you mean {near[0]}?"] if near else [f"it has: {', '.join(table.column_names[:12])}"]
        raise UserError(f"{path} has no column {column!r} (--data.fold_column)", hints)
    bag = pick_column(table, bag_column, BAG_COLUMNS, "bag", True, path)
    said: dict[str, int] = {}
    try:
        for name, value in zip(table[bag].to_pylist(), table[column].to_pylist(), strict=True):
            fold = int(value)
            if fold != float(value):
                raise ValueError
            if said.setdefault(str(name), fold) != fold:
                raise UserError(f"{path.name}: bag {name} is in folds {said[str(name)]} and {fold} ({column})")
    except (TypeError, ValueError):
        raise UserError(f"{path.name}: column {column!r} must hold a whole number in every row") from None
    where = [named(said, b.id) for b in bags]
    missing = [b.id for b, fold in zip(bags, where, strict=True) if fold is None]
    if missing:
        raise UserError(f"{path.name} names no fold for bag {missing[0]} (and {len(missing) - 1} more)")
    folds: dict[str, int] = {}
    for b, fold in zip(bags, where, strict=True):
        if b.group is not None and folds.setdefault(b.group, fold) != fold:
            both = f"{folds[b.group]} and {fold}"
            raise UserError(f"{path.name}: patient {b.group} is in folds {both} of column {column!r}: keep each in one")
    return where
