"""Recordings as they lie on disk: where they are, what their channels and annotations are, and samples by slices.

Every reader gives microvolts, each channel at its own rate, and a list of pieces without a gap. EDF and BDF are
read by `timeseries.edf`; BrainVision, FIF, Persyst, EEGLAB, Nihon Kohden and others by MNE; the SWEC archive by
`timeseries.swec`; Parquet and CSV with a column a channel here.
"""

from __future__ import annotations

import csv
import re
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from polyhead.errors import BadSample, UserError, reason
from polyhead.sources import SPLIT_NAMES, existing
from timeseries.edf import UNITS, EdfFile, Mark, Piece
from timeseries.swec import HourFile, SwecFile, same_patient

EDF = (".edf", ".bdf", ".rec")
TABLES = (".parquet", ".csv", ".tsv")
HDF5 = (".h5", ".hdf5", ".mat")
# Read by MNE; of a format in several files, the one that names the others
MNE = (".vhdr", ".fif", ".fif.gz", ".lay", ".set", ".eeg", ".cnt", ".mff", ".nedf", ".vmrk", ".gdf", ".mefd", ".nsx")
# Tables that lie beside recordings without being one
SIDE = re.compile(
    r".*_(channels|events|electrodes|coordsystem|scans|sessions|annotations|predictions)\.\w+|(participants|split|"
    r"splits|recordings|labels|bags|soz|samples|readme|dataset_description)\.\w+", re.IGNORECASE,
)  # fmt: skip
TIME = ("time", "t", "seconds", "sec", "timestamp")
# What a label says about a channel that no table types
TYPED = (
    (re.compile(r"(EKG|ECG)\d*[+-]?", re.I), "ecg"),
    (re.compile(r"(L|R)?(EOG|OC)\d*|(EOG|E\d)[-_ ]?[LR]?", re.I), "eog"),
    (re.compile(r"(EMG|CHIN|LEG|TIB)\w*", re.I), "emg"),
    (re.compile(r"DC\d*|STI\w*|TRIG\w*|STATUS|EVENT|MARK(ER)?|MKR?|PHOTIC|IMP|BURSTS?|SUPPR", re.I), "misc"),
    (re.compile(r"OSAT|SPO2|SAO2|PR|PULSE|RESP\w*|BP\d*|CO2|ETCO2|PLETH|TEMP|ANNOT\w*|.*ANNOTATIONS", re.I), "misc"),
)
PREFIX = re.compile(r"^(POL|EEG|SEEG|ECOG|IEEG)\s+", re.I)
BRAIN = ("ecog", "seeg", "dbs", "eeg", "ieeg")
# Marks that say where samples do not follow each other
BOUNDARY = re.compile(r"(BAD|EDGE)[ _](boundary|ACQ_SKIP)|New Segment/?", re.I)


class Source(Protocol):
    """Samples of a recording."""

    names: list[str]
    rates: list[float]
    pieces: list[Piece]

    def read(self, piece: int, channels: Sequence[int], start: int, stop: int) -> np.ndarray:
        """Samples `[n, stop - start]` of channels that share a rate, float32 microvolts, from a piece's start."""
        ...


@dataclass
class Recording:
    """A recording and what is known about it, samples not yet read.

    Attributes:
        id: its path relative to the root.
        source: where its samples come from.
        kinds: a type a channel, as MNE and BIDS name them, in lower case.
        bads: channels that are marked bad.
        marks: annotations in true time.
        group: the patient.
        split: `train`, `val`, `test`, or None where the data do not say.
        notes: what is odd, in a person's words.
    """

    id: str
    source: Source
    kinds: list[str]
    bads: set[str]
    marks: list[Mark]
    group: str
    split: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """Seconds from the start to the end, gaps included."""
        return max(p.start + p.duration for p in self.source.pieces)


class ArraySource:
    """A whole recording in memory: `signal [C, samples]` in units of `gain` microvolts."""

    def __init__(self, signal: np.ndarray, rate: float, names: Sequence[str], gain: float = 1.0) -> None:
        self.signal, self.gain, self.names = signal, gain, list(names)
        self.rates = [rate] * len(signal)
        self.pieces = [Piece(0.0, signal.shape[1] / rate)]

    def read(self, piece: int, channels: Sequence[int], start: int, stop: int) -> np.ndarray:
        return self.signal[list(channels), start:stop].astype(np.float32) * np.float32(self.gain)


class MneSource:
    """Any format that MNE reads without loading it."""

    def __init__(self, path: Path) -> None:
        import mne

        try:
            self.raw: Any = mne.io.read_raw(path, preload=False, verbose="ERROR")
        except Exception as error:  # MNE's readers raise almost anything on a damaged file
            raise BadSample(f"MNE cannot read it: {reason(error)[:200]}") from error
        rate = float(self.raw.info["sfreq"])
        self.names = list(self.raw.ch_names)
        self.rates = [rate] * len(self.names)
        # Annotations count from before the first sample where acquisition began before the file
        shift = self.raw.first_time
        self.marks, cuts = [], [0.0, self.raw.n_times / rate]
        skipped: list[tuple[float, float]] = []
        for item in self.raw.annotations:
            onset, duration, text = float(item["onset"]) - shift, float(item["duration"]), str(item["description"])
            if BOUNDARY.match(text):
                cuts += [onset, onset + duration] if duration else [onset]
                skipped += [(onset, onset + duration)] if "SKIP" in text.upper() else []
            else:
                self.marks.append(Mark(onset, duration, text, tuple(item.get("ch_names") or ())))
        edges = sorted({round(c * rate) for c in cuts if 0 <= c <= cuts[1]})
        self.pieces, self._firsts = [], []
        for first, last in zip(edges, edges[1:], strict=False):
            if not any(a <= (first + last) / 2 / rate < b for a, b in skipped):
                self.pieces.append(Piece(first / rate, (last - first) / rate))
                self._firsts.append(first)

    def read(self, piece: int, channels: Sequence[int], start: int, stop: int) -> np.ndarray:
        first = self._firsts[piece]
        try:
            data = self.raw.get_data(picks=list(channels), start=first + start, stop=first + stop, verbose="ERROR")
        except Exception as error:
            raise BadSample(f"MNE cannot read its samples: {reason(error)[:200]}") from error
        return (data * 1e6).astype(np.float32)


class SwecSource:
    """A file of the SWEC archive."""

    def __init__(self, path: Path) -> None:
        self.file: Any = HourFile(path) if path.suffix.lower() == ".mat" else SwecFile(path)
        self.names = [f"CH{i + 1}" for i in range(self.file.shape[0])]
        self.rates = [self.file.rate] * len(self.names)
        self.pieces = [Piece(0.0, self.file.duration)]
        self.marks = [Mark(a, b - a, "seizure") for a, b in self.file.seizures]

    def read(self, piece: int, channels: Sequence[int], start: int, stop: int) -> np.ndarray:
        rows = self.file.read(start, stop)
        return rows if list(channels) == list(range(len(rows))) else rows[list(channels)]


class TableSource:
    """A table with a column of times in seconds and a column a channel; jumps in time are gaps.

    Args:
        path: Parquet (read by row groups), CSV or TSV.
        unit: of the columns.
        rate: samples a second, for a table without times.
    """

    def __init__(self, path: Path, unit: str = "uV", rate: float | None = None) -> None:
        import pyarrow as pa
        import pyarrow.csv as pa_csv
        import pyarrow.parquet as pq

        if unit.lower() not in UNITS:
            raise UserError(f"data.unit is {unit!r}: one of V, mV, uV, nV is needed")
        self.factor = UNITS[unit.lower()]
        try:
            if path.suffix.lower() == ".parquet":
                self._file: Any = pq.ParquetFile(path)
                self._table: Any = None
                schema, rows = self._file.schema_arrow, self._file.metadata.num_rows
                sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            else:
                parse = pa_csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                self._table = pa_csv.read_csv(path, parse_options=parse)
                schema, rows, sizes = self._table.schema, self._table.num_rows, [self._table.num_rows]
        except (pa.ArrowException, OSError) as error:
            raise BadSample(f"cannot be read as a table: {reason(error)[:200]}") from error
        self._ends = np.cumsum(sizes)
        self._kept: tuple[int, Any] = (-1, None)
        time = next((n for n in schema.names if n.lower() in TIME), None)
        numeric = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
        # Whole numbers of a byte are states, not samples
        states = {f.name for f in schema if pa.types.is_int8(f.type) or pa.types.is_boolean(f.type)}
        self.names = [n for n in numeric if n != time and n not in states]
        if not self.names or rows < 2:
            raise BadSample("a table with a column a channel is needed: it has no numeric columns or no rows")
        if time is None and rate is None:
            raise BadSample(f"has no column of times ({', '.join(TIME[:3])}): add one or give --data.table_rate")
        self.pieces, self._firsts = [], [0]
        if time is None:
            assert rate is not None
            self.pieces = [Piece(0.0, rows / rate)]
        else:
            parts = [self._group(i).column(time).to_numpy() for i in range(len(sizes))]
            times = np.concatenate(parts).astype(np.float64)
            steps = np.diff(times)
            usual = float(np.median(steps))
            if not np.isfinite(usual) or usual <= 0:
                raise BadSample(f"its column {time!r} does not rise")
            rate = 1 / usual
            # Times are often rounded; 999.9997 samples a second are 1000
            rate = round(rate) if abs(rate - round(rate)) < 1e-3 * rate else rate
            breaks = np.flatnonzero(np.abs(steps - usual) > 0.5 * usual) + 1
            self._firsts = [0, *breaks.tolist()]
            for a, b in zip(self._firsts, [*self._firsts[1:], rows], strict=True):
                self.pieces.append(Piece(float(times[a] - times[0]), (b - a) / rate))
        self.rates = [float(rate)] * len(self.names)

    def _group(self, index: int) -> Any:
        if self._table is not None:
            return self._table
        if self._kept[0] != index:
            self._kept = (index, self._file.read_row_group(index))
        return self._kept[1]

    def read(self, piece: int, channels: Sequence[int], start: int, stop: int) -> np.ndarray:
        start, stop = start + self._firsts[piece], stop + self._firsts[piece]
        parts = []
        for index in range(int(np.searchsorted(self._ends, start, "right")), len(self._ends)):
            low = int(self._ends[index - 1]) if index else 0
            if low >= stop:
                break
            rows = self._group(index).slice(max(0, start - low), min(stop, int(self._ends[index])) - max(start, low))
            columns = [rows.column(self.names[c]).to_numpy(zero_copy_only=False) for c in channels]
            parts.append(np.stack(columns).astype(np.float64))
        return (np.concatenate(parts, 1) * self.factor).astype(np.float32)


# One file


def label_kind(label: str) -> str:
    """The type that a label speaks of, `eeg` where it says nothing."""
    return next((kind for pattern, kind in TYPED if pattern.fullmatch(clean(label))), "eeg")


def clean(label: str) -> str:
    """A channel's name without what recorders add: `POL G1` is G1, `Fc5.` is Fc5."""
    return PREFIX.sub("", label.strip()).rstrip(".").removesuffix("-Ref").removesuffix("-REF")


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadSample(f"its sidecar {path.name} cannot be read: {reason(error)}") from error


def stem(path: Path) -> str:
    """A file's name without its ending and, as BIDS has it, without what kind of recording it is."""
    name = path.name
    for suffix in sorted((*EDF, *TABLES, *HDF5, *MNE), key=len, reverse=True):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    return re.sub(r"_(ieeg|eeg|meg|total)$", "", name)


def sidecar(path: Path, what: str) -> Path | None:
    """The table of `events` or `channels` of a recording; in a BIDS tree also one further up (by mne-bids)."""
    for name in (f"{stem(path)}_{what}.tsv", f"{stem(path)}_{what}.csv"):
        if (path.parent / name).is_file():
            return path.parent / name
    if path.parent.name not in ("ieeg", "eeg") or "sub-" not in path.name:
        return None
    import mne_bids

    try:
        bids = mne_bids.get_bids_path_from_fname(path, verbose=False)
        found = bids.find_matching_sidecar(suffix=what, extension=".tsv", on_error="ignore")
        return Path(found) if found else None
    except (ValueError, RuntimeError):
        return None


def read_events(path: Path) -> list[Mark]:
    """The rows of an events table: `onset`, `duration`, `trial_type` (or another text), `channels` where given."""
    marks = []
    for number, row in enumerate(_rows(path), 2):
        text = next((row[k] for k in ("trial_type", "description", "event", "label", "value") if row.get(k)), "")
        try:
            duration = row.get("duration") or "n/a"
            seconds = 0.0 if duration.lower() == "n/a" else float(duration)
            names = tuple(n for n in re.split(r"[,;\s]+", row.get("channels") or "") if n and n.lower() != "n/a")
            marks.append(Mark(float(row["onset"]), seconds, text, names))
        except (KeyError, TypeError, ValueError):
            raise BadSample(f"{path.name}, line {number}: no onset in seconds") from None
    return marks


def patient(path: Path) -> str:
    """Whose recording it is, by its name: BIDS' `sub-`, SWEC's `ID`, PhysioNet's `S001R03`; else by itself."""
    found = re.search(r"sub-([A-Za-z0-9]+)", str(path))
    if found:
        return found[1]
    found = re.match(r"(ID\d+)", path.name)
    if found:
        return same_patient(found[1])
    found = re.match(r"([A-Za-z]*\d+)[Rr]\d+$", stem(path)) or re.match(r"(chb\d+)_", stem(path))
    return found[1] if found else stem(path)


def open_recording(path: Path, name: str, unit: str = "uV", table_rate: float | None = None) -> Recording:
    """A recording with what its file and the tables beside it say.

    Raises:
        BadSample: it cannot be read.
    """
    lower = path.name.lower()
    source: Any
    notes: list[str] = []
    kinds: list[str] | None = None
    bads: set[str] = set()
    if lower.endswith(EDF):
        source = EdfFile(path)
        marks, notes = source.marks, list(source.notes)
        odd = {u for u in source.units if u.lower() not in UNITS}
        kinds = [label_kind(n) for n in source.names]
        kinds = [k if u.lower() in UNITS or not u else "misc" for k, u in zip(kinds, source.units, strict=True)]
        if "" in odd:
            notes.append("does not say the unit of its samples: taken as microvolts")
    elif lower.endswith(HDF5):
        source = SwecSource(path)
        marks = source.marks
    elif lower.endswith(TABLES):
        source = TableSource(path, unit, table_rate)
        marks = []
    else:
        source = MneSource(path)
        marks, bads = source.marks, {clean(b) for b in source.raw.info["bads"]}
        said_kinds = zip(source.names, source.raw.get_channel_types(), strict=True)
        kinds = [label_kind(n) if k in ("eeg", "misc") else k for n, k in said_kinds]
    if kinds is None:
        kinds = [label_kind(n) for n in source.names]
    names = [clean(n) for n in source.names]
    repeated = [n for n, k in Counter(names).items() if k > 1]
    source.names = names if not repeated else list(source.names)
    if len(source.pieces) > 1 and not any("gap" in n for n in notes):
        gaps = len(source.pieces) - 1
        notes.append(f"has {gaps} gap{'s' if gaps > 1 else ''}; no window crosses one")
    typed = sidecar(path, "channels")
    if typed is not None:
        said = {clean(r.get("name", "")): r for r in _rows(typed)}
        kinds = [str(said.get(n, {}).get("type") or k).lower() for n, k in zip(names, kinds, strict=True)]
        bads |= {n for n, r in said.items() if str(r.get("status", "")).lower() == "bad"}
    events = sidecar(path, "events")
    if events is not None:
        marks = read_events(events)
    return Recording(name, source, kinds, bads, sorted(marks), patient(path), None, notes)


# Many files


def unpack(archive: Path, folder: Path) -> None:
    """The members of a zip as files under `folder`: recordings are read in slices, which a zip cannot give.

    Members that would leave the folder, links and encrypted ones are left out. Raises UserError.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                target = (folder / member.filename).resolve()
                link = (member.external_attr >> 16) & 0o170000 == 0o120000
                if member.is_dir() or link or member.flag_bits & 1 or not target.is_relative_to(folder.resolve()):
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"{archive} is no readable zip: {reason(error)}") from error


def is_recording(path: Path) -> bool:
    """Whether a file is taken for a recording by its name."""
    lower = path.name.lower()
    if path.name.startswith(".") or SIDE.fullmatch(path.name):
        return False
    # BrainVision's samples and markers, and EEGLAB's, are named by another file
    if lower.endswith((".eeg", ".vmrk")):
        return lower.endswith(".eeg") and not path.with_suffix(".vhdr").exists()
    if lower.endswith(HDF5) and re.search(r"_part_\d+$|_info$", path.stem):
        return False
    return lower.endswith((*EDF, *TABLES, *HDF5, *MNE))


@dataclass(frozen=True)
class Found:
    """A recording's place, before it is opened."""

    id: str
    path: Path
    split: str | None = None
    group: str | None = None


def find_recordings(root: str | Path, notes: list[str]) -> list[Found]:
    """The recordings under a folder, or the one file; a folder's `split.csv` says parts and patients.

    Where two files are the same recording in two formats, the first of EDF, other formats, tables is taken.

    Raises:
        UserError: there is none.
    """
    root = existing(root)
    if root.is_file():
        return [Found(root.name, root)]
    paths = sorted(p for p in root.rglob("*") if is_recording(p) and (p.is_file() or p.suffix in (".mff", ".mefd")))
    order: Callable[[Path], tuple[bool, str]] = lambda p: (p.suffix.lower() in TABLES, p.name)  # noqa: E731
    chosen: dict[Path, Path] = {}
    for path in sorted(paths, key=order):
        key = path.parent / stem(path)
        if key in chosen:
            notes.append(f"{path.relative_to(root)} is left out: {chosen[key].name} is the same recording")
        else:
            chosen[key] = path
    if not chosen:
        kinds = "EDF, BDF, BrainVision, FIF, Persyst, EEGLAB, HDF5 or tables"
        raise UserError(f"no recordings in {root}: {kinds} are read")
    said: dict[str, dict[str, str]] = {}
    for name in ("split.csv", "splits.csv", "recordings.csv"):
        if (root / name).is_file():
            for row in _rows(root / name):
                file = next((row[k] for k in ("file", "path", "recording", "id") if row.get(k)), "")
                said[file] = said[Path(file).name] = row
    result = []
    for path in sorted(chosen.values()):
        row = said.get(str(path.relative_to(root)), said.get(path.name, {}))
        split = SPLIT_NAMES.get((row.get("split") or "").lower())
        above = [SPLIT_NAMES[p.lower()] for p in path.relative_to(root).parts[:-1] if p.lower() in SPLIT_NAMES]
        group = row.get("patient") or row.get("group") or row.get("subject") or None
        result.append(Found(str(path.relative_to(root)), path, split or next(iter(above), None), group))
    return result
