"""Predictions on disk: parts that appear whole or not at all, and a table of what could not be read.

    FOLDER/predictions/part-00000.parquet   `id`, `part` and the system's columns
    FOLDER/errors.parquet                   `id`, `part` (null: the whole sample), `reason`

A run that was killed goes on where it stopped: `done_ids` tells what is finished; nothing is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from polyhead.errors import UserError, reason
from polyhead.files import atomic_write

ERROR_SCHEMA = pa.schema([("id", pa.string()), ("part", pa.int32()), ("reason", pa.string())])


class PredictionWriter:
    """Writes rows in parts as they come, keeping no more than one part in memory.

    All rows of one id lie in one part file, so that an id is either finished or not begun. For that the rows
    of an id must be added one after the other; they may be spread over several calls.

    Args:
        folder: the run folder.
        rows_per_part: rows a file, at least; a call's rows stay together.
        resume: go on in a folder that holds parts; without it, parts there are an error.
        rank: of several processes that share the folder, this one. Each writes files of its own
            (`part-r3-00000.parquet`, `errors-r3.parquet`), joined by `join_errors` in the end.

    Raises:
        UserError: the folder cannot be written, or holds predictions and `resume` is not set.
    """

    def __init__(
        self, folder: str | Path, rows_per_part: int = 2048, resume: bool = False, rank: int | None = None
    ) -> None:
        if rows_per_part < 1:
            raise UserError(f"rows_per_part is {rows_per_part}: at least 1 is needed")
        self.folder = Path(folder)
        self.rows_per_part = rows_per_part
        prefix = "" if rank is None else f"r{rank}-"
        self._prefix = f"part-{prefix}"
        self._errors_path = self.folder / ("errors.parquet" if rank is None else f"errors-r{rank}.parquet")
        self._schema: pa.Schema | None = None
        self._batches: list[pa.RecordBatch] = []
        self._rows = 0
        self._last: tuple[str | None, int] = (None, 0)  # the last id, and the row where its run begins
        self._errors: list[tuple[str, int | None, str]] = []

        own = [p for p in part_files(self.folder) if re.fullmatch(rf"{self._prefix}\d+\.parquet", p.name)]
        if (own or self._errors_path.exists()) and not resume:
            raise UserError(f"{self.folder} already holds predictions: go on with --resume or --overwrite them")
        self._next = 1 + max((int(p.stem.rsplit("-", 1)[1]) for p in own), default=-1)
        self._inherited = bool(own)
        if own:
            self._schema = _read(own[0], pq.read_schema).remove_metadata()
        self._tidy(resume)

    def _tidy(self, resume: bool) -> None:
        """Leaves of a killed run go: temporary files, and errors of parts whose sample will be done again."""
        for path in self.folder.glob(f"predictions/.{self._prefix}*"):
            path.unlink(missing_ok=True)
        kept = []
        if resume and self._errors_path.exists():
            finished = _ids(part_files(self.folder))
            for batch in _batches(self._errors_path):
                whole = batch.filter(pa.array([p is None or i in finished for i, p in _pairs(batch)], pa.bool_()))
                kept.append(whole)
        self._write_errors(iter(kept))

    def add(self, rows: Mapping[str, Any]) -> None:
        """Take one row for every entry of `rows["id"]`.

        Args:
            rows: column -> list, array or tensor with one entry a row. `part` (int32, which face or window of
                the sample) is 0 where it is left out. An array [n, k] becomes lists of the fixed length k.
        """
        batch = _as_batch(rows)
        if not batch.num_rows:
            return
        if self._schema is None:
            self._schema = batch.schema
        elif batch.schema != self._schema:
            self._mismatch(batch.schema)
        self._inherited = False
        ids = batch.column("id").to_pylist()
        first = next((k + 1 for k in range(len(ids) - 2, -1, -1) if ids[k] != ids[-1]), 0)
        if first or ids[0] != self._last[0]:
            self._last = (ids[-1], self._rows + first)
        self._batches.append(batch)
        self._rows += batch.num_rows
        if self._rows >= self.rows_per_part:
            self._write(keep_last=True)

    def add_error(self, id: str, reason: str, part: int | None = None) -> None:
        """Note that a sample, or only a `part` of it, could not be read."""
        self._errors.append((id, part, " ".join(reason.split())))
        if len(self._errors) >= self.rows_per_part:
            self._flush_errors()

    def flush(self) -> None:
        """Write what is finished: all but the rows of the last id, which may go on."""
        self._write(keep_last=True)

    def close(self) -> None:
        """Write everything. Only between samples: an id whose rows go on later would be torn."""
        self._write(keep_last=False)

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the last sample may be half there
        self._write(keep_last=kind is not None)

    def _mismatch(self, got: pa.Schema) -> None:
        assert self._schema is not None
        ours, theirs = ({f.name: str(f.type) for f in s} for s in (self._schema, got))
        changed = [f"{n} ({ours.get(n, 'none')}, now {theirs.get(n, 'none')})" for n in {**ours, **theirs}]
        different = [c for n, c in zip({**ours, **theirs}, changed, strict=True) if ours.get(n) != theirs.get(n)]
        text = ", ".join(different) or "the order of columns"
        if self._inherited:
            raise UserError(
                f"the predictions in {self.folder} have other columns than this run: {text}. They are of "
                "another model: choose another --output, or --overwrite them"
            )
        raise RuntimeError(f"prediction columns changed during a run: {text}")

    def _write(self, keep_last: bool) -> None:
        """Errors first: a kill in between then repeats samples, and loses none."""
        self._flush_errors()
        end = self._last[1] if keep_last else self._rows
        if end == 0:
            return
        table = pa.Table.from_batches(self._batches)
        path = self.folder / "predictions" / f"{self._prefix}{self._next:05d}.parquet"
        with atomic_write(path) as temporary:
            pq.write_table(table.slice(0, end), temporary)
        self._next += 1
        # Taken, not sliced: a slice would keep the whole part alive
        rest = table.take(pa.array(np.arange(end, self._rows)))
        self._batches = rest.combine_chunks().to_batches()
        self._rows -= end
        self._last = (self._last[0], 0)

    def _flush_errors(self) -> None:
        if self._errors:
            columns = zip(zip(*self._errors, strict=True), ERROR_SCHEMA, strict=True)
            arrays = [pa.array(list(values), field.type) for values, field in columns]
            new = pa.record_batch(arrays, schema=ERROR_SCHEMA)
            self._write_errors(_chain(self._errors_path, new))
            self._errors = []

    def _write_errors(self, batches: Iterator[pa.RecordBatch]) -> None:
        with (
            atomic_write(self._errors_path) as temporary,
            pq.ParquetWriter(temporary, ERROR_SCHEMA) as writer,
        ):
            for batch in batches:
                if batch.num_rows:
                    writer.write_batch(batch)


def _as_batch(rows: Mapping[str, Any]) -> pa.RecordBatch:
    ids = pa.array([str(i) for i in rows["id"]], pa.string())
    columns: dict[str, pa.Array] = {"id": ids}
    part = np.zeros(len(ids)) if rows.get("part") is None else np.asarray(rows["part"])
    columns["part"] = pa.array(part.astype(np.int32))
    for name, values in rows.items():
        if name not in columns:
            columns[name] = _as_column(values)
        if len(columns[name]) != len(ids):
            raise ValueError(f"column {name} has {len(columns[name])} rows, id has {len(ids)}")
    return pa.record_batch(columns)


def _as_column(values: Any) -> pa.Array:
    if isinstance(values, (list, tuple)):
        return pa.array(values)
    array = np.ascontiguousarray(values)
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    column = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def part_files(folder: str | Path) -> list[Path]:
    """The finished parts of a run folder, of all ranks. Temporary files begin with a dot and do not count."""
    return sorted((Path(folder) / "predictions").glob("part-*.parquet"))


def _error_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("errors*.parquet") if re.fullmatch(r"errors(-r\d+)?\.parquet", p.name))


def _read(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with _read(path, pq.ParquetFile) as file:
        yield from file.iter_batches(65536)


def _chain(path: Path, new: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    if path.exists():
        yield from _batches(path)
    yield new


def _pairs(batch: pa.RecordBatch) -> Iterator[tuple[str, int | None]]:
    return zip(batch.column("id").to_pylist(), batch.column("part").to_pylist(), strict=True)


def _ids(paths: list[Path]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        found.update(_read(path, lambda p: pq.read_table(p, columns=["id"])).column("id").to_pylist())
    return found


def done_ids(folder: str | Path) -> set[str]:
    """The ids that a resumed run leaves out: of finished parts, and of samples that could not be read."""
    folder = Path(folder)
    done = _ids(part_files(folder))
    for path in _error_files(folder):
        for batch in _batches(path):
            done.update(i for i, part in _pairs(batch) if part is None)
    return done


def join_errors(folder: str | Path) -> None:
    """Join the errors of all ranks into `errors.parquet`, once all of them have closed."""
    folder = Path(folder)
    files = _error_files(folder)
    with atomic_write(folder / "errors.parquet") as temporary:
        with pq.ParquetWriter(temporary, ERROR_SCHEMA) as writer:
            for path in files:
                for batch in _batches(path):
                    writer.write_batch(batch)
    for path in files:
        if path.name != "errors.parquet":
            path.unlink()


def remove(folder: str | Path) -> None:
    """Remove the predictions and errors of a run folder, and nothing else: what `--overwrite` asks for."""
    folder = Path(folder)
    for path in [*part_files(folder), *folder.glob("predictions/.part-*"), *_error_files(folder)]:
        path.unlink(missing_ok=True)


def read_predictions(folder: str | Path) -> pa.Table:
    """All rows of a run folder."""
    tables = [_read(path, pq.read_table) for path in part_files(folder)]
    if not tables:
        return pa.schema([("id", pa.string()), ("part", pa.int32())]).empty_table()
    return pa.concat_tables(tables)


def read_errors(folder: str | Path) -> pa.Table:
    """What could not be read, of all ranks."""
    tables = [_read(path, pq.read_table) for path in _error_files(Path(folder))]
    return pa.concat_tables(tables) if tables else ERROR_SCHEMA.empty_table()
