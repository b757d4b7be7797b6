"""Where image-like samples come from: a folder, a zip, a list or a table, read in place and safely.

`find` names the samples, `read_bytes` fetches one; `polyhead.decoding` makes pixels of it. The same image
gives the same pixels whichever way it was named.
"""

from __future__ import annotations

import csv
import os
import stat
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from polyhead.errors import BadSample, UserError, nearest, reason

IMAGE_SUFFIXES = frozenset(
    f".{s}" for s in "jpg jpeg jpe jfif png gif bmp tif tiff webp avif jp2 j2k ppm pgm pbm pnm ico mpo".split()
)
TABLE_SUFFIXES = frozenset((".csv", ".tsv", ".parquet"))
LIST_SUFFIXES = frozenset((".txt", ".lst"))
# What lies beside images without being a sample
SIDE_SUFFIXES = TABLE_SUFFIXES | LIST_SUFFIXES | frozenset((".json", ".md", ".yaml", ".yml", ".xml"))
SIDE_STEMS = ("readme", "license", "licence", "thumbs.db")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
COLUMNS = {
    "path": ("path", "file", "filename", "image", "filepath", "file_name", "image_path", "bag"),
    "label": ("label", "class", "target", "category"),
    "split": ("split", "subset", "fold"),
    "group": (),
}
MAX_BYTES = 512 * 2**20
# A zip member that unpacks to more than this is a bomb if it also shrank by more than the ratio
RATIO_FLOOR, MAX_RATIO = 32 * 2**20, 200


class Location(NamedTuple):
    """Where one sample's bytes are: a file, or a member of a zip; or why there are none."""

    path: str
    member: str | None = None
    problem: str | None = None


class _Columns(NamedTuple):
    """Which columns of a table to use, as asked for."""

    path: str | None
    label: str | None
    split: str | None
    group: str | None
    optional: bool

    def named(self) -> list[str]:
        """The roles whose column must be there."""
        return [] if self.optional else [role for role in COLUMNS if getattr(self, role)]

    def find(self, role: str, table: Iterable[str]) -> str | None:
        given = getattr(self, role)
        lower = {name.lower(): name for name in reversed(list(table))}
        if given is not None and (given in lower.values() or not self.optional):
            return given if given in lower.values() else None
        return next((lower[name] for name in COLUMNS[role] if name in lower), None)


class Entry(NamedTuple):
    """One sample as a person named it: `id` is its path relative to the root."""

    id: str
    label: str | None
    split: str | None
    group: str | None
    location: Location


# Finding the samples


def find(
    root: str | Path,
    name: str | None = None,
    *,
    everything: bool = False,
    path_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    suffixes: Iterable[str] = IMAGE_SUFFIXES,
    known: Callable[[Location], bool] | None = None,
    ignored: list[str] | None = None,
) -> list[Entry]:
    """The samples under `root`, sorted by name (in file order for a list or a table).

    - folder or zip: `SPLIT/CLASS/FILE`, `CLASS/FILE`, `SPLIT/FILE` or plain files, nested or not;
    - folder with one zip and no images: the zip in it. A folder's `split.csv` or `bags.csv` adds its columns;
    - list (.txt, .lst): a path a line, with a label after a tab or a comma if there is one;
    - table (.csv, .tsv, .parquet): a path a row, with columns for label, split and group. Paths in lists and
      tables are relative to their folder or are members of the zip beside them;
    - any other file: that one sample.

    A member that must not be read (its path leaves the archive, it is a link, it is encrypted) and a row
    without its file are entries whose location has a `problem`.

    Args:
        name: which zip or table of a folder that holds several.
        everything: for prediction. Take every file that is not obviously a readme, a list or a table, and not
            only those with one of the `suffixes`, so that nothing goes missing without a word; and do without
            the columns of labels, splits and groups where there are none.
        path_column, label_column, split_column, group_column: a table's columns; None goes by usual names
            (`path`, `file`, `filename`, `image`; `label`, `class`; `split`). A group, such as a patient, is
            only used when its column is named.
        known: whether a file with none of the `suffixes` is a sample all the same, by what it holds.
        ignored: where to append the names of files that `everything` would take and this call does not.

    Raises:
        UserError: nothing there, nothing in it, or more than one thing it could mean.
    """
    columns = _Columns(path_column, label_column, split_column, group_column, optional=everything)
    endings = None if everything else frozenset(suffixes)

    def wanted(entry: Entry) -> bool:
        if not _counts(entry.id) or endings is None or Path(entry.id).suffix.lower() in endings:
            return _counts(entry.id)
        if known is not None and known(entry.location):
            return True
        if ignored is not None:
            ignored.append(entry.id)
        return False

    given, root = str(root), existing(root)
    try:
        entries = _find(root, name, columns, wanted)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or given}: {error.strerror or error}") from error
    if not entries:
        kinds = "files" if everything else "images"
        raise UserError(f"no {kinds} in {given}: a folder, a zip, a list or a table of images is needed")
    repeated = [i for i, n in Counter(e.id for e in entries).items() if n > 1]
    if repeated:
        more = f" (and {len(repeated) - 1} more so)" if len(repeated) > 1 else ""
        raise UserError(f"{given} names {repeated[0]} twice{more}: name each once")
    return entries


def _find(root: Path, name: str | None, columns: _Columns, wanted: Callable[[Entry], bool]) -> list[Entry]:
    suffix = root.suffix.lower()
    if root.is_dir():
        return _folder(root, name, columns, wanted)
    if name is not None and not columns.optional:
        raise UserError(f"data.name chooses in a folder, but {root} is a file: leave data.name out")
    if suffix in TABLE_SUFFIXES:
        return _rows(root, columns)
    if named := columns.named():
        raise UserError(f"data.{named[0]}_column names a column of a table, and {root} is none")
    if suffix in LIST_SUFFIXES:
        return _list(root)
    if suffix == ".zip":
        return _laid_out([e for e in _members(root) if wanted(e)])
    return [Entry(root.name, None, None, None, Location(str(root)))]


def _folder(root: Path, name: str | None, columns: _Columns, wanted: Callable[[Entry], bool]) -> list[Entry]:
    here = sorted(p.name for p in root.iterdir() if p.is_file() and not p.name.startswith("."))
    zips = [n for n in here if n.lower().endswith(".zip")]
    tables = [n for n in here if Path(n).suffix.lower() in TABLE_SUFFIXES]
    choice = _choose(root, name, zips, tables) if name is not None else None
    if choice in tables:
        return _rows(root / choice, columns)
    archive: Path | None = root / choice if choice else None
    entries: list[Entry] = []
    if archive is None:
        entries = list(_files(root))
        if zips and not any(Path(e.id).suffix.lower() in IMAGE_SUFFIXES for e in entries):
            if len(zips) > 1:
                raise UserError(
                    f"{root} holds several archives: choose one with --data.name",
                    [f"--data.name {Path(n).stem}" for n in zips],
                )
            archive = root / zips[0]
    if archive is not None:
        entries = _members(archive)
    entries = _laid_out([e for e in entries if wanted(e)])

    table: str | None = next((n for n in ("split.csv", "bags.csv") if n in tables), None)
    named = columns.named()
    if table is None and named:
        if len(tables) != 1:
            what = f"it holds {len(tables)}: {', '.join(tables)}" if tables else "it holds none"
            raise UserError(f"data.{named[0]}_column needs the one table of {root}, but {what}")
        table = tables[0]
    if table is None:
        return entries
    cells = _read_table(root / table)
    if not named and columns.find("path", cells) is None:
        return entries
    return _annotated(entries, _rows(root / table, columns, archive, cells))


def _choose(root: Path, name: str, zips: list[str], tables: list[str]) -> str:
    options = zips + tables
    found = [n for n in options if n == name] or [n for n in options if Path(n).stem == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"data.name {name} fits {' and '.join(found)} in {root}: write the whole name")
    raise UserError(
        f"no archive or table {name} in {root}",
        [f"--data.name {n}" for n in nearest(name, options) or options],
    )


def _annotated(entries: list[Entry], rows: list[Entry]) -> list[Entry]:
    """`entries` with what a table says about them; rows without a file stay, as what they are."""
    known = {row.location: row for row in rows}
    merged = []
    for entry in entries:
        row = known.pop(entry.location, None)
        if row is not None:
            entry = entry._replace(
                label=row.label if row.label is not None else entry.label,
                split=row.split if row.split is not None else entry.split,
                group=row.group,
            )
        merged.append(entry)
    return merged + [row for row in known.values() if row.location.problem]


def existing(root: str | Path) -> Path:
    """`root` as a path. Raises UserError, with near names, when nothing is there."""
    path = Path(root).expanduser()
    if not str(root):
        raise UserError("data.root is empty: leave it out for the embedded sample")
    if not path.exists():
        near = nearest(path.name, os.listdir(path.parent)) if path.parent.is_dir() else []
        raise UserError(f"no such file or folder: {root}", [f"near: {path.parent / n}" for n in near])
    return path


def _counts(path: str) -> bool:
    """Whether a file is a sample and not something that lies beside samples."""
    name = path.rsplit("/", 1)[-1].lower()
    return not name.startswith(SIDE_STEMS) and Path(name).suffix not in SIDE_SUFFIXES


def _hidden(parts: Iterable[str]) -> bool:
    return any(part == "__MACOSX" or part.startswith(".") for part in parts)


def _files(root: Path) -> Iterator[Entry]:
    """Every file under a folder that is not hidden. Links to folders are followed, once each."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not _hidden([f]))
        inner = os.path.relpath(folder, root)
        for file in sorted(files):
            if not _hidden([file]):
                id = file if inner == "." else f"{inner}/{file}".replace(os.sep, "/")
                # Names need not be valid text on disk, ids must be in a table
                id = id.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                yield Entry(id, None, None, None, Location(os.path.join(str(Path(folder)), file)))


def _members(path: Path) -> list[Entry]:
    """Every member of a zip that is a file and not hidden; what must not be read keeps its reason."""
    # A name that occurs twice means its last member, as it would after unpacking
    infos = {info.filename: info for info in _archive(str(path)).infolist() if not info.is_dir()}
    entries = []
    for name, info in sorted(infos.items()):
        parts = name.replace("\\", "/").split("/")
        problem = None
        if name.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":"):
            problem = "refused: the path of this archive member leads out of the archive"
        elif _hidden(parts):
            continue
        elif stat.S_ISLNK(info.external_attr >> 16):
            problem = "refused: this archive member is a link"
        elif info.flag_bits & 0x1:
            problem = "this archive member is encrypted"
        entries.append(Entry(name, None, None, None, Location(str(path), name, problem)))
    return entries


def _laid_out(entries: list[Entry]) -> list[Entry]:
    """Labels and splits from the folders that files lie in."""
    folders = [tuple(e.id.split("/")[:-1]) for e in entries]
    good = [f for f, e in zip(folders, entries, strict=True) if not e.location.problem]
    if not good:
        return entries
    # An outer folder that only holds folders says nothing: archives often have one
    skip = 0
    while len({f[skip] if len(f) > skip + 1 else None for f in good}) == 1 and len(good[0]) > skip + 1:
        if good[0][skip].lower() in SPLIT_NAMES:
            break
        skip += 1
    first = {f[skip].lower() for f in good if len(f) > skip}
    splits = first & SPLIT_NAMES.keys()
    # A class may be called `test`; splits are known by a training folder, or by nothing else being there
    by_split = bool(splits) and (splits == first or any(SPLIT_NAMES[s] == "train" for s in splits))
    result = []
    for folder, entry in zip(folders, entries, strict=True):
        rest = list(folder[skip:])
        if entry.location.problem is None or _plain(entry.id):
            split = SPLIT_NAMES.get(rest[0].lower()) if by_split and rest else None
            if split is not None:
                rest.pop(0)
            label = rest[0] if rest and (split is not None or not by_split) else None
            entry = entry._replace(split=split, label=label)
        result.append(entry)
    return result


def _plain(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/") and "\\" not in name and ":" not in name


# Lists and tables


class _Named:
    """Finds the file or the member that a list or a table means by a path.

    A table beside a zip may name its members by less than the whole path: by the file name, with or without
    suffix, under folders named after the row's split and label.
    """

    def __init__(self, folder: Path, archive: Path | None) -> None:
        self.folder, self.archive = folder, archive

    @cached_property
    def members(self) -> dict[str, Location]:
        return {e.id: e.location for e in _members(self.archive)} if self.archive is not None else {}

    @cached_property
    def short(self) -> dict[str, list[str]]:
        """Members by file name, with and without suffix."""
        short: dict[str, list[str]] = {}
        for member in self.members:
            file = member.rsplit("/", 1)[-1]
            for key in {file, file.rsplit(".", 1)[0]}:
                short.setdefault(key, []).append(member)
        return short

    def __call__(self, path: str, split: str | None = None, label: str | None = None) -> tuple[str, Location]:
        """A name relative to the root, and the location."""
        path = path.removeprefix("./")
        inner = [p for p in (split, label) if p]
        tries = [path, "/".join([*inner, path]), *(f"{p}/{path}" for p in inner)]
        for name in tries:
            file = self.folder / name
            if file.exists():
                return name, Location(str(file))
        for name in tries:
            if name in self.members:
                return name, self.members[name]
        found = [n for n in self.short.get(path.rsplit("/", 1)[-1], ()) if _ends(n, path)]
        if len(found) == 1:
            return found[0], self.members[found[0]]
        if found:
            many = f"the name fits {len(found)} members of {self.archive}, {found[0]} being the first"
            return path, Location(path, None, many)
        return path, Location(str(self.folder / path), None, "no such file")


def _ends(member: str, path: str) -> bool:
    whole = f"/{member}"
    return whole.endswith(f"/{path}") or whole.rsplit(".", 1)[0].endswith(f"/{path}")


def _beside(folder: Path, stem: str) -> Path | None:
    """The zip that a table in `folder` speaks of: the one of its own name, or the only one."""
    zips = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".zip")
    same = [p for p in zips if p.stem == stem]
    return same[0] if same else zips[0] if len(zips) == 1 else None


def _list(path: Path) -> list[Entry]:
    find_file = _Named(path.parent, _beside(path.parent, path.stem))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: a list has a path a line") from None
    entries: dict[str, Entry] = {}
    for line in (line.strip() for line in lines):
        if not line:
            continue
        # File names may hold commas: the whole line is tried first
        name, tab, label = line.partition("\t")
        location = find_file(name.strip())[1]
        if location.problem and not tab and "," in line:
            before, _, after = line.rpartition(",")
            there = find_file(before.strip())[1]
            if not there.problem or Path(before.strip()).suffix:
                name, label, location = before, after, there
        name, label = name.strip(), label.strip()
        entry = Entry(name, label or None, None, None, location)
        if entries.setdefault(name, entry).label != entry.label:
            raise UserError(f"{path} gives {name} two labels: {entries[name].label} and {label}")
    return list(entries.values())


def _read_table(path: Path) -> dict[str, list[str | None]]:
    """Columns of a table as text; an empty cell is None."""
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"cannot read the table {path}: {reason(error)}") from error
        return {
            name: [None if v is None or v != v else str(v) for v in table.column(name).to_pylist()]
            for name in table.column_names
        }
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, None)
            if not header:
                raise UserError(f"the table {path} is empty")
            rows = [row for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the table {path}: {reason(error)}") from error
    wrong = next((i for i, row in enumerate(rows) if len(row) != len(header)), None)
    if wrong is not None:
        raise UserError(f"row {wrong + 2} of {path} has {len(rows[wrong])} cells, its header {len(header)}")
    return {name.strip(): [row[i].strip() or None for row in rows] for i, name in enumerate(header)}


def _rows(
    path: Path,
    columns: _Columns,
    archive: Path | None = None,
    table: dict[str, list[str | None]] | None = None,
) -> list[Entry]:
    table = _read_table(path) if table is None else table
    chosen = {role: columns.find(role, table) for role in COLUMNS}
    for role, found in chosen.items():
        given = getattr(columns, role)
        if found is None and (role == "path" or (given is not None and not columns.optional)):
            wanted = f"column {given!r}" if given else f"column of paths ({', '.join(COLUMNS['path'][:4])})"
            names = list(table)
            listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
            hints = nearest(given, names) if given else ["name it with --data.path_column"]
            raise UserError(f"{path} has no {wanted}; its columns are {listed}", hints)

    def cells(role: str) -> Sequence[str | None]:
        column = chosen[role]
        return table[column] if column is not None else [None] * len(next(iter(table.values())))

    find_file = _Named(path.parent, archive or _beside(path.parent, path.stem))
    entries, resolved = [], []
    for row, (file, label, split, group) in enumerate(
        zip(cells("path"), cells("label"), cells("split"), cells("group"), strict=True), 2
    ):
        if file is None:
            raise UserError(f"row {row} of {path} names no file in column {chosen['path']}")
        name, location = find_file(file, split, label)
        if split is not None:
            if split.lower() not in SPLIT_NAMES:
                raise UserError(f"row {row} of {path}: split {split!r} is none of train, val, test")
            split = SPLIT_NAMES[split.lower()]
        entries.append(Entry(file, label, split, group, location))
        resolved.append(name)
    # File names that occur in several folders are told apart by what they were found as
    if len({e.id for e in entries}) < len(entries):
        entries = [e._replace(id=name) for e, name in zip(entries, resolved, strict=True)]
    return entries


# Reading


_open: dict[tuple[int, str], zipfile.ZipFile] = {}
_open_lock = threading.Lock()


def _archive(path: str) -> zipfile.ZipFile:
    """The open zip of this process: a handle shared with a forked worker would share its position too."""
    key = (os.getpid(), path)
    with _open_lock:
        if key not in _open:
            while len(_open) >= 16:
                _open.pop(next(iter(_open)))
            try:
                _open[key] = zipfile.ZipFile(path)
            except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
                raise UserError(f"{path} is not a whole zip archive: {reason(error)}") from error
        return _open[key]


def read_bytes(location: Location) -> bytes:
    """The bytes of one sample.

    Raises:
        BadSample: it is missing, may not be read, is damaged, or is too large (512 MiB; in a zip also a
            member of more than 32 MiB that was packed by more than 200 to 1).
    """
    if location.problem is not None:
        raise BadSample(location.problem)
    if location.member is None:
        return _read_file(location.path)
    try:
        archive = _archive(location.path)
        info = archive.getinfo(location.member)
        if info.file_size > MAX_BYTES:
            raise BadSample(f"unpacks to {info.file_size:,} bytes, more than {MAX_BYTES:,}")
        if info.file_size > RATIO_FLOOR and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            packed = f"{info.compress_size:,} bytes unpack to {info.file_size:,}"
            raise BadSample(f"a decompression bomb: {packed}")
        with archive.open(info) as file:
            return file.read(MAX_BYTES + 1)
    except UserError as error:
        raise BadSample(error.message) from error
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError, RuntimeError) as error:
        raise BadSample(f"the archive member cannot be read: {reason(error)}") from error


def read_head(location: Location, count: int) -> bytes:
    """The first bytes of a sample, unpacking no more; none where they cannot be read."""
    try:
        if location.problem is not None or not (location.member or Path(location.path).is_file()):
            return b""
        if location.member is None:
            with open(location.path, "rb") as file:
                return file.read(count)
        with _archive(location.path).open(location.member) as member:
            return member.read(count)
    except (UserError, zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError, RuntimeError):
        return b""


def _read_file(path: str) -> bytes:
    try:
        status = os.stat(path)
        # Reading a pipe or a device may never end
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadSample(f"holds {status.st_size:,} bytes, more than {MAX_BYTES:,}")
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror or error}") from error
