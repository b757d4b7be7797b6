"""Interaction logs: tables of who took what and when, read in pieces and put in order.

Parquet, CSV, TSV and RecBole's `.inter`, as a file, in a folder or in a zip; a row an event, or a row a user with a
list of items.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from polyhead.errors import UserError, nearest, reason
from polyhead.sources import existing

PARQUET = (".parquet", ".pq")
SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".txt": "\t"}
SUFFIXES = (*PARQUET, *SEPARATORS)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".tar")
ROLES = {
    "user": ("user_id", "user", "userid", "uid", "session_id", "sessionid", "session", "customer_id", "customerid",
             "visitorid", "reviewerid", "member_id"),
    "item": ("item_id", "item", "itemid", "iid", "movie_id", "movieid", "product_id", "productid", "asin",
             "parent_asin", "article_id", "track_id", "book_id", "business_id", "item_id_list", "item_ids", "items",
             "history", "sequence"),
    "time": ("timestamp", "time", "order", "datetime", "date", "ts", "unixreviewtime", "event_time", "created_at",
             "position", "step"),
}  # fmt: skip
ROWS = 1 << 18


@dataclass
class LogFormat:
    """How a log is to be read.

    Attributes:
        columns: role (user, item, time) -> column, None going by usual names.
        separator: of a text table; None finds it in the first line.
        list_separator: between the items of a text table with a list a user.
        order: by the time column, or as the rows stand.
        duplicates: drop or keep an event with another's user, item and time.
        skip: leave out rows without a user, an item or a time; otherwise they are an error.
    """

    columns: dict[str, str | None] = field(default_factory=dict)
    separator: str | None = None
    list_separator: str | None = None
    order: Literal["time", "rows"] = "time"
    duplicates: Literal["drop", "keep"] = "drop"
    skip: bool = False


@dataclass
class Log:
    """Events in order of user and time, as numbers into sorted ids.

    Attributes:
        users, items: ids, numbers or strings.
        user, item: `[E]` int32.
        time: `[E]`, or None where the rows' own order counts.
        incomplete: rows left out for lack of a user, an item or a time.
        duplicates: events of the same user, item and time as another.
    """

    users: list[Any]
    items: list[Any]
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray | None
    incomplete: int = 0
    duplicates: int = 0


class _Table:
    """One table of a log, opened when it is read.

    Args:
        label: what a person knows it by.
        path: the file, or the archive that holds it.
        member: its name in the archive.
    """

    def __init__(self, label: str, path: Path, member: str | None = None) -> None:
        self.label, self.path, self.member = label, path, member
        self.suffix = Path(member or path.name).suffix.lower()

    def open(self) -> Any:
        if self.member is None:
            return pa.OSFile(str(self.path))
        with zipfile.ZipFile(self.path) as archive:
            return pa.BufferReader(archive.read(self.member))

    def first_line(self) -> str:
        with self.open() as file:
            line = io.BytesIO(file.read(1 << 16)).readline()
        return line.decode("utf-8-sig").rstrip("\r\n")

    def header(self, separator: str | None) -> tuple[list[str], str]:
        """Column names as they stand, and the separator (empty for Parquet)."""
        if self.suffix in PARQUET:
            with self.open() as file:
                return pq.read_schema(file).names, ""
        line = self.first_line()
        usual = SEPARATORS.get(self.suffix, ",")
        choices = [separator] if separator else [usual, *(s for s in (",", "\t", ";", "|") if s != usual)]
        found = [([name.strip() for name in next(csv.reader([line], delimiter=s))], s) for s in choices]
        return max(found, key=lambda f: len(f[0])) if line else ([], usual)


def _tables(root: Path, name: str | None) -> list[_Table]:
    """Every table at `root`, or those that `name` chooses."""
    if root.is_file() and root.suffix.lower() != ".zip":
        return [_Table(root.name, root)]
    archives = [root] if root.is_file() else []
    found: list[_Table] = []
    if root.is_dir():
        files = sorted((p for p in root.iterdir() if p.is_file() and not p.name.startswith(".")), key=_numbered)
        found = [_Table(p.name, p) for p in files if p.suffix.lower() in SUFFIXES and not _aside(p.name)]
        archives = [] if found else [p for p in files if p.suffix.lower() == ".zip"]
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as opened:
                members = sorted((i.filename for i in opened.infolist() if not i.is_dir()), key=_numbered)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {archive}: {reason(error)}") from error
        found += [_Table(m, archive, m) for m in members
                  if Path(m).suffix.lower() in SUFFIXES and not _aside(Path(m).name)]  # fmt: skip
    if name is None:
        return found
    chosen = [t for t in found if fnmatch.fnmatch(t.label, name) or Path(t.label).stem == name]
    if not chosen:
        labels = [t.label for t in found]
        raise UserError(f"no table {name} in {root}", [f"--data.name {n}" for n in nearest(name, labels) or labels])
    return chosen


def _numbered(name: str | Path) -> list[tuple[str, int]]:
    """A key that puts part-2 before part-10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(name))]


def _aside(name: str) -> bool:
    """Whether a text file is about the data rather than data."""
    return name.lower().startswith(("readme", "licen")) or "readme" in name.lower()


def _bare(name: str) -> str:
    """A column's name without RecBole's type."""
    return name.partition(":")[0].strip().lower()


def _find_columns(table: _Table, names: list[str], format: LogFormat) -> dict[str, str]:
    """role -> column of this table, for the roles it has.

    Raises:
        UserError: a column that was asked for by name is not there.
    """
    known = {_bare(n): n for n in reversed(names)}
    found: dict[str, str] = {}
    for role, usual in ROLES.items():
        given = format.columns.get(role)
        if given is not None:
            match = given if given in names else known.get(_bare(given))
            if match is None:
                near = nearest(given, names)
                raise UserError(
                    f"{table.label} has no column {given!r} (--data.{role}_column); it has {_listed(names)}",
                    [f"did you mean {', '.join(near)}?"] if near else [],
                )
            found[role] = match
        elif hit := next((known[n] for n in usual if n in known), None):
            found[role] = hit
    if format.order == "rows":
        found.pop("time", None)
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "none"


def _choose(root: Path, name: str | None, format: LogFormat) -> list[tuple[_Table, dict[str, str], str]]:
    """The tables to read, each with its columns and separator. Raises UserError."""
    tables = _tables(root, name)
    if not tables:
        raise UserError(f"no log at {root}: a table is needed ({', '.join(SUFFIXES)}), alone, in a folder or a zip")
    opened: list[tuple[_Table, dict[str, str], str]] = []
    complaints: list[UserError] = []
    for table in tables:
        if table.suffix in COMPRESSED:
            raise UserError(f"{table.label} is compressed: unpack it, or put it into a zip")
        try:
            names, separator = table.header(format.separator)
            columns = _find_columns(table, names, format)
        except UserError as error:
            complaints.append(error)
            continue
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {table.label}: {reason(error)[:200]}",
                            ["--data.name chooses another"] if len(tables) > 1 else []) from error  # fmt: skip
        missing = [role for role in ("user", "item") if role not in columns]
        if missing:
            complaints.append(UserError(
                f"{table.label} has no column for the {missing[0]} that is known by its name: name it with "
                f"--data.{missing[0]}_column; it has {_listed(names)}",
                ["another separator is given by --data.separator"] if len(names) == 1 else [],
            ))  # fmt: skip
            continue
        opened.append((table, columns, separator))
    # A table that was asked for is not left out because something in it is wrong
    if complaints and (name is not None or not opened):
        raise complaints[0]
    if len(opened) > 1 and name is None:
        raise UserError(f"{root} holds several logs: choose one with --data.name",
                        [f"--data.name {Path(t.label).stem}" for t, _, _ in opened])  # fmt: skip
    return opened


class _Ids:
    """Numbers for ids as they turn up."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def encode(self, values: pa.Array) -> np.ndarray:
        encoded = values.dictionary_encode()
        own = [self.numbers.setdefault(v, len(self.numbers)) for v in encoded.dictionary.to_pylist()]
        return np.array(own, dtype=np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]

    def sorted(self, text: bool, what: str) -> tuple[list[Any], np.ndarray]:
        """The ids in order, whole numbers as such, and where each number has gone."""
        names = list(self.numbers)
        if len({type(name) for name in names}) > 1:
            raise UserError(f"the {what} are numbers in some tables and text in others: save them alike")
        if text and all(isinstance(n, str) and n.isascii() and n.isdigit() and str(int(n)) == n for n in names):
            names = [int(n) for n in names]
        order = sorted(range(len(names)), key=names.__getitem__)
        place = np.empty(len(names), dtype=np.int32)
        place[order] = np.arange(len(names), dtype=np.int32)
        return [names[i] for i in order], place


def _id_column(column: pa.Array, what: str) -> pa.Array:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_floating(kind):
        # Whole numbers become floats where another tool met a missing one
        filled = pc.if_else(pc.is_nan(column), None, column)
        if pc.all(pc.equal(filled, pc.floor(filled))).as_py() is not False:
            return filled.cast(pa.int64())
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = pc.utf8_trim_whitespace(column).cast(pa.string())
        column = pc.if_else(pc.equal(column, ""), None, column)
        # The same floats, as text
        if pc.all(pc.match_substring_regex(column, r"^\d+(\.0)?$")).as_py():
            column = pc.replace_substring_regex(column, r"\.0$", "")
        return column
    raise UserError(f"{what} holds {kind}: ids are whole numbers or text")


def _time_column(column: pa.Array, what: str) -> tuple[pa.Array, bool]:
    """Times as int64 or float64, missing ones null, and whether they are dates, in microseconds.

    Raises:
        UserError: with the first that is no time.
    """
    kind = column.type
    if pa.types.is_temporal(kind):
        return column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()), True
    if pa.types.is_integer(kind):
        return column.cast(pa.int64()), False
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_nan(column), None, column).cast(pa.float64()), False
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        text = pc.utf8_trim_whitespace(column)
        text = pc.if_else(pc.equal(text, ""), None, text)
        for target in (pa.int64(), pa.float64()):
            try:
                return _time_column(text.cast(target), what)
            except pa.ArrowInvalid:
                pass
        text = pc.replace_substring_regex(text, r" ?(UTC|GMT)$", "Z")
        try:
            return text.cast(pa.timestamp("us", "UTC") if _zoned(text) else pa.timestamp("us")).cast(pa.int64()), True
        except pa.ArrowInvalid as error:
            value = str(error).partition("string: '")[2].partition("'")[0]
            raise UserError(
                f"{what} cannot be read as times: {value!r} is neither a number nor a date like 2024-01-31 12:00:00"
            ) from error
    raise UserError(f"{what} holds {kind}: a number or a date is needed")


def _zoned(text: pa.Array) -> bool:
    first = next((v.as_py() for v in text if v.is_valid), "")
    return re.search(r"\d(Z|[+-]\d\d:?(\d\d)?)$", first[10:]) is not None


def _pieces(table: _Table, columns: dict[str, str], separator: str) -> Iterator[dict[str, pa.Array]]:
    """The columns of a table by role, some hundred thousand rows at a time."""
    names = list(dict.fromkeys(columns.values()))
    every = table.header(separator)[0] if separator else []
    with table.open() as file:
        if table.suffix in PARQUET:
            batches: Any = pq.ParquetFile(file).iter_batches(ROWS, columns=names)
        else:
            batches = pacsv.open_csv(
                file,
                pacsv.ReadOptions(block_size=1 << 22, column_names=every, skip_rows=1),
                pacsv.ParseOptions(delimiter=separator),
                pacsv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string()),
                                     strings_can_be_null=True),
            )  # fmt: skip
        for batch in batches:
            yield {role: batch.column(name) for role, name in columns.items()}


def _spread(
    piece: dict[str, pa.Array], list_separator: str | None, typed: bool, where: str
) -> tuple[dict[str, pa.Array], bool]:
    """A row an event: lists of items become rows of their own, in order; and whether a row's items share one time."""
    items = piece["item"]
    if typed or list_separator:
        text = pc.replace_substring_regex(items.cast(pa.string()), r"^\s*[\[(]|[\])]\s*$", "")
        text = pc.utf8_trim_whitespace(text)
        blank = typed or list_separator == " "
        items = pc.utf8_split_whitespace(text) if blank else pc.split_pattern(text, str(list_separator))
    elif pa.types.is_fixed_size_list(items.type):
        items = items.cast(pa.list_(items.type.value_type))
    if not _is_list(items.type):
        if pa.types.is_string(items.type) and pc.any(pc.match_substring_regex(items, r"^\s*\[.*,.*\]\s*$")).as_py():
            raise UserError(f"{where} holds lists of items: say what stands between them by --data.list_separator")
        return piece, False
    parents = pc.list_parent_indices(items)
    flat = items.flatten()
    if typed or list_separator:
        flat = pc.utf8_trim(flat, " \t'\"")
    spread = {"user": piece["user"].take(parents), "item": flat}
    if "time" not in piece:
        return spread, False
    times = piece["time"]
    if not _is_list(times.type):
        return {**spread, "time": times.take(parents)}, True
    if not pc.all(pc.equal(pc.list_value_length(items), pc.list_value_length(times))).as_py():
        raise UserError(f"{where}: a list of items and its list of times have different lengths")
    return {**spread, "time": times.flatten()}, False


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def read_log(root: str | Path, name: str | None = None, format: LogFormat | None = None) -> Log:
    """Read a log and put it in order of user and time; events of one time stay in the order of their rows.

    Args:
        root: a table, a zip, or a folder with tables.
        name: which table of several; a pattern such as `part-*` reads all that fit as one.
        format: how.

    Raises:
        UserError: nothing there, columns not found, or rows that say nothing.
    """
    form = format or LogFormat()
    if form.separator == "\\t":
        form = replace(form, separator="\t")
    if form.separator is not None and len(form.separator) != 1:
        raise UserError(f"--data.separator is {form.separator!r}: one character is needed, such as ; or \\t, a tab")
    users, items = _Ids(), _Ids()
    parts: list[tuple[np.ndarray, ...]] = []
    incomplete = 0
    text = True
    baskets = False
    dates: set[bool] = set()
    for table, columns, separator in _choose(existing(root), name, form):
        text = text and table.suffix not in PARQUET
        typed = columns["item"].endswith(":token_seq")
        where = {role: f"column {column} of {table.label}" for role, column in columns.items()}
        try:
            for piece in _pieces(table, columns, separator):
                rows, shared = _spread(piece, form.list_separator, typed, where["item"])
                baskets = baskets or shared
                if "time" not in rows and form.order == "time" and rows is piece:
                    raise UserError(
                        f"{table.label} has no column of times that is known by its name: name it with "
                        "--data.time_column, or take the order of the rows with --data.order rows",
                        ["a cell with a list of items is read with --data.list_separator"],
                    )
                keys = {k: _id_column(rows[k], where[k]) for k in ("user", "item")}
                if "time" in rows:
                    keys["time"], date = _time_column(rows["time"], where["time"])
                    dates.add(date)
                    if len(dates) > 1:
                        raise UserError(f"{where['time']}: some times are dates and others numbers: save them alike")
                whole = np.logical_and.reduce([k.is_valid().to_numpy(zero_copy_only=False) for k in keys.values()])
                if not whole.all():
                    incomplete += int((~whole).sum())
                    if not form.skip:
                        lacking = next(k for k, v in keys.items() if v.null_count)
                        raise UserError(
                            f"{table.label} has rows without {'an' if lacking == 'item' else 'a'} {lacking} "
                            f"({where[lacking].partition(' of ')[0]})",
                            ["mend them, or leave them out with --data.on_error skip"],
                        )
                    keys = {k: v.filter(pa.array(whole)) for k, v in keys.items()}
                encoded = [users.encode(keys["user"]), items.encode(keys["item"])]
                parts.append((*encoded, *([keys["time"].to_numpy(zero_copy_only=False)] if "time" in keys else [])))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {table.label}: {reason(error)[:200]}") from error
    if not any(len(p[0]) for p in parts):
        raise UserError(f"{root} holds no events")
    if len({len(p) for p in parts}) > 1:
        raise UserError(f"some tables of {root} have times and some have not")
    # The items of a list that has one time are no duplicates of each other
    return _ordered(users, items, _joined(parts), text, None if baskets else form.duplicates, incomplete)


def _joined(parts: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """The parts' columns, one after the other, so that no more than one is held twice."""
    columns: list[list[np.ndarray]] = [list(c) for c in zip(*parts, strict=True)]
    parts.clear()
    whole = []
    for column in columns:
        whole.append(np.concatenate(column))
        column.clear()
    return whole


def _ordered(
    users: _Ids, items: _Ids, columns: list[np.ndarray], text: bool, duplicates: str | None, incomplete: int
) -> Log:
    user_names, user_place = users.sorted(text, "users")
    item_names, item_place = items.sorted(text, "items")
    user, item = user_place[columns[0]], item_place[columns[1]]
    columns[:2] = []
    if not columns:
        order = np.argsort(user, kind="stable")
        return Log(user_names, item_names, user[order], item[order], None, incomplete)
    time = columns.pop()
    order = np.lexsort((time, user))
    user, item, time = user[order], item[order], time[order]
    repeated = _repeated(user, item, time) if duplicates else np.empty(0, dtype=np.int64)
    if len(repeated) and duplicates == "drop":
        user, item, time = (np.delete(values, repeated) for values in (user, item, time))
    return Log(user_names, item_names, user, item, time, incomplete, len(repeated))


def _repeated(user: np.ndarray, item: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Which events, in order of user and time, have the user, item and time of an earlier one, as indices."""
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    # Only events of one user at one time can be such; they are few
    some = np.flatnonzero(np.concatenate([[False], same]) | np.concatenate([same, [False]]))
    order = some[np.lexsort((item[some], time[some], user[some]))]
    before, after = order[:-1], order[1:]
    equal = (user[after] == user[before]) & (time[after] == time[before]) & (item[after] == item[before])
    return after[equal]


def core(user: np.ndarray, item: np.ndarray, least: int) -> np.ndarray:
    """Which events are left when every user and every item has `least` of them, `[E]`: the k-core."""
    keep = np.ones(len(user), dtype=bool)
    while True:
        few = [np.bincount(v[keep], minlength=int(v.max(initial=-1)) + 1) < least for v in (user, item)]
        rest = keep & ~few[0][user] & ~few[1][item]
        if rest.sum() == keep.sum():
            return keep
        keep = rest
