"""Event sequences from files: tables, npz, Neural-Hawkes pickles, EasyTPP JSON; and what is wrong with them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from polyhead.errors import BadSample, UserError, nearest, reason
from polyhead.sources import SPLIT_NAMES, Location, existing, read_bytes
from timeseries.event_pickles import read_plain

SUFFIXES = (".parquet", ".csv", ".tsv", ".npz", ".pkl", ".pickle", ".json", ".jsonl")
# Role -> the usual names of its column, in order
COLUMNS: dict[str, tuple[str, ...]] = {
    "sequence": ("sequence", "seq", "seq_id", "seq_idx", "sequence_id", "id", "user", "user_id", "case", "case_id"),
    "time": ("time", "timestamp", "t", "times", "time_since_start", "datetime", "date"),
    "type": ("type", "mark", "event", "event_type", "type_event", "types", "label", "kind", "activity"),
    "end": ("end", "window", "t_end", "end_time", "tmax", "window_end"),
    "split": ("split", "subset", "part"),
}
# Tables of names that lie beside sequences: the type, then what people call it
NAME_TABLES = ("marks", "types", "event_types", "labels")


class Events(NamedTuple):
    """One sequence.

    Attributes:
        id: its name.
        times: `[n]` float64, in the data's unit, in order; ties keep the order of the file.
        types: `[n]`, type names.
        end: the end of observation, where the data say it.
        split: `train`, `val`, `test`, where the data say it.
        problem: why it cannot be used.
    """

    id: str
    times: np.ndarray
    types: np.ndarray
    end: float | None = None
    split: str | None = None
    problem: str | None = None


@dataclass
class Reading:
    """What files hold.

    Attributes:
        sequences: in the order of the files.
        count: how many types there are, where the data say it.
        names: type -> what people call it.
        notes: facts a person may want to know.
    """

    sequences: list[Events] = field(default_factory=list)
    count: int | None = None
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def checked(name: str, times: Any, types: Any, end: Any = None, split: str | None = None, sort: bool = False) -> Events:
    """A sequence whose times hold; what is wrong with it becomes its `problem`.

    Ties are allowed (a gap of 0). Times that go back are sorted where rows have no order of their own (`sort`),
    and are a problem elsewhere.
    """
    try:
        times = np.asarray(times, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        return Events(name, np.zeros(0), np.zeros(0, dtype=object), None, split, "a time is no number")
    types = np.asarray(types).reshape(-1)
    last = None if end is None or (isinstance(end, float) and np.isnan(end)) else float(end)
    problem = None
    if len(types) != len(times):
        problem = f"{len(times)} times and {len(types)} types"
    elif not np.isfinite(times).all():
        problem = f"the time of event {int(np.argmin(np.isfinite(times))) + 1} is not a number"
    else:
        if sort and (np.diff(times) < 0).any():
            order = np.argsort(times, kind="stable")
            times, types = times[order], types[order]
        back = np.flatnonzero(np.diff(times) < 0)
        if len(back):
            at = int(back[0])
            problem = f"times go back at event {at + 2}: {times[at + 1]:g} after {times[at]:g}"
        elif last is not None and not np.isfinite(last):
            problem = "the end of its window is not a number"
        elif last is not None and len(times) and last < times[-1]:
            problem = f"its window ends at {last:g}, before its last event at {times[-1]:g}"
    return Events(name, times, np.array([_label(v) for v in types.tolist()], dtype=object), last, split, problem)


def _label(value: Any) -> str | None:
    """A type as text; None where there is none."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() or None


def read(root: str | Path, name: str | None = None, columns: Mapping[str, str | None] | None = None) -> Reading:
    """All sequences under `root`.

    Args:
        root: a file, a folder of them or a zip. Files are `.parquet`, `.csv`, `.tsv`, `.npz`, `.pkl`, `.json`,
            `.jsonl`; `train`, `val`/`dev`/`validation` and `test` in a file's name are its part.
        name: which set of a folder that holds several (`hawkes2d` of `hawkes2d_train.npz` ...), or which file.
        columns: role (`sequence`, `time`, `type`, `end`, `split`) -> a table's column; None goes by usual names.

    Raises:
        UserError: nothing there, more than one set it could mean, or a file that cannot be read.
    """
    given = {role: (columns or {}).get(role) for role in COLUMNS}
    path = existing(root)
    members = {m: v for m, v in _members(path).items() if m.lower().endswith(SUFFIXES)}
    if not members:
        raise UserError(f"no event sequences in {root}: {', '.join(SUFFIXES)} files are")
    labels = [m for m in members if Path(m).stem.lower() in NAME_TABLES and len(members) > 1]
    sets = _sets([m for m in members if m not in labels], members)
    chosen = _choose(root, sets, name, members)
    reading = Reading()
    for member, split in chosen:
        _read_file(member, split, _content(members[member], member), given, reading)
    for member in labels:
        reading.names |= _names(_table(_content(members[member], member), member))
    seen: dict[str, int] = {}
    for index, events in enumerate(reading.sequences):
        clash = events.id in seen
        if clash and events.split:
            reading.sequences[index] = events._replace(id=f"{events.split}/{events.id}")
        elif clash:
            reading.sequences[index] = events._replace(id=f"{events.id}#{index}")
        seen[events.id] = index
    if not reading.sequences:
        raise UserError(f"{root} holds no sequences")
    return reading


def _members(path: Path) -> dict[str, Location]:
    """Files by name relative to the root."""
    if path.is_dir():
        files = (p for p in sorted(path.rglob("*")) if p.is_file())
        found = {str(p.relative_to(path)): p for p in files}
        zips = [n for n in found if n.lower().endswith(".zip")]
        if len(zips) == 1 and not any(n.lower().endswith(SUFFIXES) for n in found):
            return _members(found[zips[0]])
        return {n: Location(str(p)) for n, p in found.items() if not any(q.startswith(".") for q in Path(n).parts)}
    if path.suffix.lower() == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                inner = [i.filename for i in archive.infolist() if not i.is_dir()]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{path} is not a whole zip archive: {reason(error)}") from error
        return {n: Location(str(path), n) for n in sorted(inner) if "__MACOSX" not in n}
    return {path.name: Location(str(path))}


def _content(location: Location, member: str) -> bytes:
    try:
        return read_bytes(location)
    except BadSample as error:
        raise UserError(f"cannot read {member}: {error}") from error


def _sets(files: Iterable[str], members: Mapping[str, Any]) -> dict[str, list[tuple[str, str | None]]]:
    """Set -> its files with their parts. `hawkes1d_train.npz` is part train of `hawkes1d`."""
    sets: dict[str, list[tuple[str, str | None]]] = {}
    for file in files:
        stem = Path(file).stem
        # Descriptions of npz sets are JSON files beside them
        if file.lower().endswith(".json") and any(m != file and Path(m).stem.startswith(stem) for m in members):
            continue
        words = stem.replace("-", "_").replace(".", "_").split("_")
        parts = [SPLIT_NAMES[w.lower()] for w in words if w.lower() in SPLIT_NAMES]
        rest = "_".join(w for w in words if w.lower() not in SPLIT_NAMES)
        folder = [p for p in Path(file).parts[:-1]]
        if not parts and folder and folder[-1].lower() in SPLIT_NAMES:
            parts, rest = [SPLIT_NAMES[folder.pop().lower()]], ""
        sets.setdefault("/".join([*folder, rest]).strip("/"), []).append((file, parts[-1] if parts else None))
    return sets


def _choose(
    root: Any, sets: dict[str, list[tuple[str, str | None]]], name: str | None, members: Mapping[str, Any]
) -> list[tuple[str, str | None]]:
    if not sets:
        raise UserError(f"no event sequences in {root}")
    every = [pair for pairs in sets.values() for pair in pairs]
    if name is not None and not (len(members) == 1 and Path(root).is_file()):
        if name in sets and name:
            return sets[name]
        found = [p for p in every if p[0] == name] or [p for p in every if Path(p[0]).stem == name]
        if len(found) == 1:
            return found
        known = list(dict.fromkeys(n for n in [*sets, *(Path(p[0]).stem for p in every)] if n))
        raise UserError(f"no set or file {name} in {root}", [f"--data.name {n}" for n in nearest(name, known) or known])
    if len(sets) > 1:
        # Parts of one set with nothing else in their names, beside tables without a part
        whole = [pairs for pairs in sets.values() if any(split == "train" for _, split in pairs)]
        if len(whole) == 1:
            return whole[0]
        raise UserError(f"{root} holds several sets: choose one with --data.name", [f"--data.name {n}" for n in sets])
    return every


# Formats


def _read_file(
    member: str, split: str | None, content: bytes, columns: dict[str, str | None], reading: Reading
) -> None:
    suffix = Path(member).suffix.lower()
    if suffix == ".npz":
        reading.sequences += _npz(content, member, split)
    elif suffix in (".pkl", ".pickle"):
        _mapping(read_plain(content, member), member, split, reading)
    elif suffix in (".json", ".jsonl"):
        _mapping(_json(content, member), member, split, reading)
    else:
        reading.sequences += _rows(_table(content, member), member, split, columns)


def _npz(content: bytes, member: str, split: str | None) -> Iterator[Events]:
    """Flat arrays: `times`, `offsets`, and where there are more types than one `types`; `window` is the end."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {k: file[k] for k in ("times", "types", "offsets", "window") if k in file.files}
    except Exception as error:  # zipfile, zlib and NumPy raise what they please
        raise UserError(f"{member} is not an npz of event sequences: {reason(error)[:150]}") from error
    missing = [k for k in ("times", "offsets") if k not in arrays]
    if missing:
        raise UserError(f"{member} has no array {missing[0]!r}: times, types, offsets and window are read")
    times, offsets = arrays["times"], arrays["offsets"].astype(np.int64)
    types = arrays.get("types", np.zeros(len(times), dtype=np.int64))
    if len(types) != len(times) or not len(offsets) or offsets[-1] > len(times) or (np.diff(offsets) < 0).any():
        raise UserError(f"{member}: its offsets do not fit its {len(times)} times and {len(types)} types")
    window = arrays.get("window")
    if window is not None and len(window) != len(offsets) - 1:
        raise UserError(f"{member}: {len(window)} windows for {len(offsets) - 1} sequences")
    for i, (a, b) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        end = None if window is None else float(window[i])
        # A window stored as float32 may round below its last event
        if end is not None and b > a and 0 < times[b - 1] - end < 1e-6 * abs(end):
            end = float(times[b - 1])
        yield checked(f"{Path(member).stem}-{i:04d}", times[a:b], types[a:b], end, split)


def _json(content: bytes, member: str) -> Any:
    try:
        text = content.decode("utf-8-sig")
        if member.lower().endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{member} is not JSON: {reason(error)}") from error


def _mapping(content: Any, member: str, split: str | None, reading: Reading) -> None:
    """A pickle's or a JSON file's content: EasyTPP rows, Neural-Hawkes lists, or arrays of sequences."""
    stem = Path(member).stem
    if isinstance(content, Mapping) and isinstance(content.get("dim_process"), (int, np.integer)):
        reading.count = max(reading.count or 0, int(content["dim_process"]))
    if isinstance(content, Mapping) and "timestamps" in content:
        kinds = content.get("types")
        kinds = [np.zeros(len(t), np.int64) for t in content["timestamps"]] if kinds is None else kinds
        end = content.get("tmax")
        counts = content.get("lengths")
        for i, (times, types) in enumerate(zip(content["timestamps"], kinds, strict=False)):
            n = len(times) if counts is None else int(np.ravel(counts[i])[0])
            reading.sequences.append(
                checked(f"{stem}-{i:04d}", np.ravel(times)[:n], np.ravel(types)[:n], _float(end), split)
            )
        return
    if isinstance(content, Mapping):
        lists = {k: v for k, v in content.items() if str(k).lower() in SPLIT_NAMES and isinstance(v, Sequence)}
        full = {k: v for k, v in lists.items() if len(v)}
        if not full:
            raise UserError(f"{member} holds no sequences: it has the keys {', '.join(map(str, list(content)[:6]))}")
        for key, value in full.items():
            own = SPLIT_NAMES[str(key).lower()] if len(lists) > 1 or split is None else split
            _list(value, f"{stem}-{key}" if len(full) > 1 else stem, own, reading)
        return
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise UserError(f"{member} holds a {type(content).__name__}, not sequences of events")
    _list(content, stem, split, reading)


def _list(rows: Sequence[Any], stem: str, split: str | None, reading: Reading) -> None:
    for i, row in enumerate(rows):
        name = f"{stem}-{i:04d}"
        if isinstance(row, Mapping):
            # EasyTPP: a row a sequence
            if "time_since_start" not in row:
                raise UserError(f"{name} has no time_since_start: it has {', '.join(map(str, list(row)[:6]))}")
            times = row["time_since_start"]
            types = row.get("type_event", [0] * len(np.ravel(times)))
            if "dim_process" in row:
                reading.count = max(reading.count or 0, int(row["dim_process"]))
            identity = row.get("seq_idx")
            name = name if identity is None else f"{stem}-{identity}"
            reading.sequences.append(checked(name, times, types, _float(row.get("t_end")), split))
        elif isinstance(row, Sequence) and not isinstance(row, str):
            try:
                times = [e["time_since_start"] for e in row]
                types = [e.get("type_event", 0) for e in row]
            except (TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{name}: every event needs time_since_start and type_event") from error
            reading.sequences.append(checked(name, times, types, None, split))
        else:
            raise UserError(f"{name} is a {type(row).__name__}, not a sequence of events")


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _table(content: bytes, member: str) -> pa.Table:
    suffix = Path(member).suffix.lower()
    try:
        if suffix == ".parquet":
            return pq.read_table(io.BytesIO(content))
        head = content[: content.find(b"\n") + 1 or None]
        delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=lambda d: head.count(d.encode()))
        table = pa_csv.read_csv(io.BytesIO(content), parse_options=pa_csv.ParseOptions(delimiter=delimiter))
        return table.rename_columns([c.strip() for c in table.column_names])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read the table {member}: {reason(error)[:200]}") from error


def _names(table: pa.Table) -> dict[str, str]:
    if table.num_columns < 2:
        return {}
    keys, values = (table.column(i).to_pylist() for i in (0, 1))
    return {str(_label(k)): str(v) for k, v in zip(keys, values, strict=True) if v is not None}


def _column(table: pa.Table, role: str, given: str | None, member: str, needed: bool) -> str | None:
    names = table.column_names
    if given is not None:
        if given in names:
            return given
        hints = [f"did you mean {n}?" for n in nearest(given, names)[:1]]
        raise UserError(f"{member} has no column {given!r}; its columns are {', '.join(names[:12])}", hints)
    lower = {n.lower(): n for n in reversed(names)}
    found = next((lower[n] for n in COLUMNS[role] if n in lower), None)
    if found is None and needed:
        usual = ", ".join(COLUMNS[role][:4])
        raise UserError(
            f"{member} has no column of {role}s ({usual}, ...); its columns are {', '.join(names[:12])}",
            [f"name it with --data.{role}_column"],
        )
    return found


def _numbers(column: pa.ChunkedArray, name: str, member: str) -> np.ndarray:
    """Times as float64; dates become seconds."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        exact = pc.cast(column, pa.timestamp("us"), safe=False)
        values = np.array(pc.cast(exact, pa.int64()).to_numpy(zero_copy_only=False), dtype=np.float64)
        return values / 1e6
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        texts = column.to_pylist()
        wrong = next((i for i, v in enumerate(texts) if not _is_number(v)), 0)
        raise UserError(f"{member}, row {wrong + 2}: {name} is {str(texts[wrong])[:40]!r}, neither a number nor a date")
    return np.array(pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return value is None
    return True


def _rows(table: pa.Table, member: str, split: str | None, columns: dict[str, str | None]) -> list[Events]:
    """A table with a row an event, or (with lists in its cells) a row a sequence."""
    if not table.num_rows:
        raise UserError(f"the table {member} has no rows")
    found = {role: _column(table, role, columns[role], member, role in ("time",)) for role in COLUMNS}
    time = found["time"]
    assert time is not None
    nested = pa.types.is_list(table.schema.field(time).type) or pa.types.is_large_list(table.schema.field(time).type)
    if nested:
        return _nested(table, member, split, found)
    if found["sequence"] is None:
        _column(table, "sequence", None, member, True)
    names = _texts(table, found["sequence"])
    if any(n is None for n in names):
        row = next(i for i, n in enumerate(names) if n is None)
        raise UserError(f"{member}, row {row + 2} names no sequence in column {found['sequence']}")
    times = _numbers(table.column(time), time, member)
    types = _texts(table, found["type"]) if found["type"] else np.full(table.num_rows, "event", dtype=object)
    ends = _numbers(table.column(found["end"]), found["end"], member) if found["end"] else None
    parts = _texts(table, found["split"]) if found["split"] else None
    unique, first, inverse = np.unique(names.astype(str), return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    bounds = np.searchsorted(inverse[order], np.arange(len(unique) + 1))
    result = []
    for k in np.argsort(first, kind="stable"):
        rows = order[bounds[k] : bounds[k + 1]]
        own = split
        if parts is not None:
            said = {str(p).lower() for p in parts[rows] if p is not None}
            if len(said) > 1 or (said and not said <= SPLIT_NAMES.keys()):
                raise UserError(f"{member}: sequence {unique[k]} has the split {', '.join(sorted(said))}: "
                                "one of train, val, test is needed")  # fmt: skip
            own = SPLIT_NAMES[said.pop()] if said else split
        end = None if ends is None or np.isnan(ends[rows]).all() else float(np.nanmax(ends[rows]))
        result.append(checked(str(unique[k]), times[rows], types[rows], end, own, sort=True))
    return result


def _texts(table: pa.Table, column: str | None) -> np.ndarray:
    assert column is not None
    return np.array([_label(v) for v in table.column(column).to_pylist()], dtype=object)


def _nested(table: pa.Table, member: str, split: str | None, found: dict[str, str | None]) -> list[Events]:
    result = []
    for i, row in enumerate(table.to_pylist()):
        name = str(row[found["sequence"]]) if found["sequence"] else f"{Path(member).stem}-{i:04d}"
        times = row[found["time"]] or []
        types = row[found["type"]] or [] if found["type"] else ["event"] * len(times)
        said = str(row[found["split"]]).lower() if found["split"] else ""
        own = SPLIT_NAMES.get(said, split)
        result.append(checked(name, times, types, _float(row[found["end"]]) if found["end"] else None, own))
    return result
