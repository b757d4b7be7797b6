"""The SWEC iEEG archive: its HDF5 layout, and which windows the published training reads from it.

`IDxx/IDxx_total.h5` holds `data/ieeg [C, samples]` in microvolts, `data/seizures` with fields `onsets` and
`offsets` in seconds, and the attribute `sampling_rate`. ID01 to ID18 are second copies of other patients
(`DUPLICATES`): a split must keep both copies on one side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from polyhead.errors import BadSample, reason

# The same person twice: same channels, rate, length and seizures
DUPLICATES = {
    f"ID{first:02d}": f"ID{second}"
    for first, second in enumerate((20, 21, 22, 24, 25, 27, 28, 29, 30, 31, 32, 34, 35, 36, 37, 38, 39, 40), start=1)
}
# Seconds around a selected seizure that its windows may come from
AROUND = 1800.0
Seizures = list[tuple[float, float]]


def same_patient(name: str) -> str:
    """One name for both copies of a patient."""
    return DUPLICATES.get(name, name)


class SwecFile:
    """One patient's file, read in slices.

    Attributes:
        rate: samples a second.
        shape: channels and samples.
        seizures: (onset, offset) in seconds.

    Raises:
        BadSample: it is not of this layout.
    """

    def __init__(self, path: str | Path) -> None:
        import h5py
        import hdf5plugin  # noqa: F401 - registers the archive's compression

        self.path = Path(path)
        try:
            with h5py.File(path, "r") as file:
                self.rate = float(file.attrs["sampling_rate"])
                self.shape: tuple[int, int] = file["data/ieeg"].shape
                table: Any = file["data/seizures"][()] if "data/seizures" in file else ()
                found = zip(table["onsets"], table["offsets"], strict=True) if len(table) else ()
                self.seizures: Seizures = [(float(a), float(b)) for a, b in found]
        except (OSError, KeyError, ValueError) as error:
            raise BadSample(f"not an HDF5 file of the SWEC layout: {reason(error)}") from error

    @property
    def duration(self) -> float:
        return self.shape[1] / self.rate

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples `[C, stop - start]`, float32 microvolts."""
        import h5py

        with h5py.File(self.path, "r") as file:
            return file["data/ieeg"][:, start:stop].astype(np.float32)


class HourFile:
    """The older release (ETHZ): `IDxx_Nh.mat` holds hour N as `EEG`, `IDxx_info.mat` rate and seizures of all hours.

    Attributes:
        rate, shape, seizures: as of `SwecFile`, seizures in this hour's own time.

    Raises:
        BadSample: it is not of this layout, or the table beside it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        from scipy.io import loadmat

        path = Path(path)
        found = re.fullmatch(r"(.+)_(\d+)h", path.stem)
        info = path.with_name(f"{found[1]}_info.mat") if found else None
        if found is None or info is None or not info.is_file():
            raise BadSample("a .mat file of the SWEC layout is called IDxx_Nh.mat and lies beside IDxx_info.mat")
        try:
            table = loadmat(info, squeeze_me=True)
            self.signal = np.asarray(loadmat(path)["EEG"])
            self.rate = float(table["fs"])
            pairs = zip(np.atleast_1d(table["seizure_begin"]), np.atleast_1d(table["seizure_end"]), strict=True)
            before = 3600.0 * (int(found[2]) - 1)
            spans = [(float(a) - before, float(b) - before) for a, b in pairs]
        except Exception as error:  # scipy raises almost anything on a damaged file
            raise BadSample(f"not a .mat file of the SWEC layout: {reason(error)[:200]}") from error
        if self.signal.shape[0] > self.signal.shape[1]:
            self.signal = self.signal.T
        self.shape: tuple[int, int] = self.signal.shape
        self.seizures: Seizures = [(a, b) for a, b in spans if b > 0 and a < self.duration]

    @property
    def duration(self) -> float:
        return self.shape[1] / self.rate

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples `[C, stop - start]`, float32 microvolts."""
        return self.signal[:, start:stop].astype(np.float32)


def write_swec(path: str | Path, signal: np.ndarray, rate: float, seizures: Seizures) -> None:
    """Write microvolts `[C, samples]` in the archive's layout."""
    import h5py

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["sampling_rate"] = float(rate)
        file.create_dataset("data/ieeg", data=signal.astype(np.float32), compression="gzip")
        kind = np.dtype([("onsets", "<f8"), ("offsets", "<f8")])
        file.create_dataset("data/seizures", data=np.array(seizures, dtype=kind))


@dataclass(frozen=True)
class Windows:
    """The windows of one recording as the published loader numbers them (sheet of the system, 4.2).

    Around seizures steps may be a T-th of the stride ("slow-down"). Floors are Python's float `//` throughout.

    Args:
        duration: of the recording, seconds.
        seizures: (onset, offset), seconds.
        segments: T.
        segment: seconds of a segment.
        stride: seconds between windows.
        slowdown: step finely around seizures.
    """

    duration: float
    seizures: Sequence[tuple[float, float]]
    segments: int
    segment: float
    stride: float
    slowdown: bool = False

    @property
    def window(self) -> float:
        return self.segments * self.segment

    @property
    def fine(self) -> float:
        return self.stride / self.segments

    def zones(self) -> list[tuple[int, int]]:
        """Items [first slowed, first after] of every zone of fine steps, in order."""
        if not self.slowdown:
            return []
        found: list[tuple[int, int]] = []
        for onset, offset in sorted(self.seizures):
            wanted = onset - 3 * self.window
            first = 0 if wanted < 0 else self._at(wanted, found) + 1
            opening = self._begin(first, found)
            steps = (offset + 2 * self.window - opening) // self.fine
            most = (self.duration - self.window - opening) // self.fine
            steps = int(max(0, min(steps, most)))
            if found and first <= found[-1][1]:
                found[-1] = (found[-1][0], max(found[-1][1], first + steps))
            elif steps:
                found.append((first, first + steps))
        return found

    def _begin(self, item: int, zones: Sequence[tuple[int, int]]) -> float:
        slow = sum(min(item, stop) - start for start, stop in zones if item > start)
        return slow * self.fine + (item - slow) * self.stride

    def _at(self, time: float, zones: Sequence[tuple[int, int]]) -> int:
        """The last item that starts at or before a time."""
        item, step = 0, self.stride
        for start, stop in zones:
            for boundary, after in ((start, self.fine), (stop, self.stride)):
                if self._begin(boundary, zones) <= time:
                    item, step = boundary, after
        return int(item + (time - self._begin(item, zones)) // step)

    def begins(self) -> np.ndarray:
        """The start of every item in seconds."""
        zones = self.zones()
        return np.array([self._begin(i, zones) for i in range(self.count())], dtype=np.float64)

    def count(self) -> int:
        slow = sum(stop - start for start, stop in self.zones())
        rest = (self.duration - slow * self.stride / self.segments - 2 * self.window) // self.stride
        return max(0, int(slow + rest + 1))

    def labels(self) -> np.ndarray:
        """1 where an item's last segment meets a seizure, both closed; the segment in whole seconds, as published."""
        last = self.window // self.segments
        begins = self.begins()
        found = np.zeros(len(begins), dtype=np.int64)
        for onset, offset in self.seizures:
            found |= (begins + self.window - last <= offset) & (begins + self.window >= onset)
        return found

    def ranges(self, chosen: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Items [from, to) around the chosen seizures (numbered from 1), merged; all items where none is chosen."""
        count, zones = self.count(), self.zones()
        if not chosen:
            return [(0, count)]
        found: list[tuple[int, int]] = []
        for k in sorted(chosen):
            onset, offset = self.seizures[k - 1]
            begin, end = self._at(onset, zones), self._at(offset, zones)
            start = max(0, self._at(onset - AROUND, zones))
            stop = min(count, self._at(offset + AROUND, zones))
            if k > 1:
                start = max(start, begin - (begin - self._at(self.seizures[k - 2][1], zones)) // 2)
            if k != max(chosen) and k < len(self.seizures):
                stop = min(stop, end + (self._at(self.seizures[k][0], zones) - end) // 2)
            if found and start <= found[-1][1]:
                found[-1] = (found[-1][0], max(found[-1][1], stop))
            else:
                found.append((start, stop))
        return found


def published_window(file: SwecFile, begin: float, segments: int, segment: float, rate: float) -> torch.Tensor:
    """A window `[T, C, L]` as the published loader reads it: truncated start, linear interpolation to `rate`."""
    window = segments * segment
    start = int(begin * file.rate)
    raw: Any = torch.from_numpy(file.read(start, start + int(window * file.rate)))
    wanted = round(window * rate)
    if raw.shape[1] != wanted:
        raw = F.interpolate(raw[None], size=wanted, mode="linear", align_corners=False)[0]
    return raw.view(len(raw), segments, -1).transpose(0, 1)
