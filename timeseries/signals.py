"""From a recording to what a model takes: channels chosen, filtered, resampled, referenced, scaled, block by block.

A recording is never in memory as a whole. Blocks of a fixed length are prepared with a margin on both sides, so
that a sample does not depend on which window asked for it, and the last few are kept.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from scipy import signal as filters

from polyhead.errors import BadSample, UserError
from timeseries.recordings import BRAIN, Recording

# Seconds of a block and of the margin that filters need on either side
BLOCK, MARGIN = 32.0, 4.0
# A recording is judged by so many stretches of so many seconds, evenly spread
LOOKS, LOOK_SECONDS = 10, 8.0
# Deviations in microvolts that cannot be brain; between them is plausible
FAINT, LOUD = 0.1, 5000.0
# A channel that sits at its largest or smallest value for this share of its samples is clipped
CLIPPED = 0.02
# With fewer channels their middle is one of them, and what is left says nothing
FEWEST = 3
Reference = Literal["none", "average", "median", "bipolar"]
Scale = Literal["microvolt", "mad"]


@dataclass(frozen=True)
class Preparation:
    """What is done to a recording.

    Args:
        rate: samples a second that the model takes.
        kinds: types of channels that are taken.
        channels: names, in order, that every recording must give; None takes what there is.
        exclude: patterns of names that are left out.
        reference: `average` or `median` of all channels, `bipolar` (neighbouring contacts of an electrode), `none`.
        notch: mains frequency to take out with its harmonics; None is none.
        low, high: edges in Hz of a zero-phase high pass and low pass; None is none.
        scale: `microvolt` as they are, or `mad`, each channel by its median absolute deviation.
    """

    rate: float = 256.0
    kinds: tuple[str, ...] = BRAIN
    channels: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    reference: Reference = "median"
    notch: float | None = None
    low: float | None = None
    high: float | None = None
    scale: Scale = "mad"


def bipolar_pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Neighbouring contacts of one electrode by their numbers: A1 and A2, A2 and A3."""
    parsed = [re.fullmatch(r"(.*?)(\d+)", n) for n in names]
    place = {(m[1], int(m[2])): i for i, m in enumerate(parsed) if m}
    return [(i, place[p, n + 1]) for (p, n), i in place.items() if (p, n + 1) in place]


def looks_wrong(deviation: np.ndarray) -> str | None:
    """What is odd about channels' deviations in microvolts, if anything."""
    typical = float(np.median(deviation))
    if typical < FAINT:
        return f"its amplitude cannot be right: {typical:.2g} uV on the median channel (volts taken for microvolts?)"
    if typical > LOUD:
        return f"its amplitude cannot be right: {typical:.3g} uV on the median channel"
    return None


class Cache:
    """The last blocks of all recordings, up to a size."""

    def __init__(self, megabytes: float) -> None:
        self.limit, self.size = megabytes * 2**20, 0
        self._kept: OrderedDict[Any, np.ndarray] = OrderedDict()

    def get(self, key: Any) -> np.ndarray | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: Any, block: np.ndarray) -> None:
        self._kept[key] = block
        self.size += block.nbytes
        while self.size > self.limit and len(self._kept) > 1:
            self.size -= self._kept.popitem(last=False)[1].nbytes


class Prepared:
    """A recording as the model sees it.

    Attributes:
        names: of the channels that come out.
        pieces: (start in seconds, samples at the model's rate) of every stretch without a gap.
        notes: what is odd about the recording or was done to it.

    Raises:
        BadSample: no channel of the wanted kinds is left, a named one is missing, or it cannot be read.
    """

    def __init__(self, recording: Recording, how: Preparation, cache: Cache | None = None) -> None:
        self.recording, self.how = recording, how
        self.cache = cache if cache is not None else Cache(64)
        self.notes = list(recording.notes)
        self.source = recording.source
        self._pick()
        self._ratios = {r: Fraction(how.rate / r).limit_denominator(4000) for r in {self._rate(c) for c in self.picks}}
        self.pieces = [(p.start, int(p.duration * how.rate + 1e-6)) for p in self.source.pieces]
        self._note_rates()
        self._judge()
        self._mix = self._montage()
        self.scale = np.ones(len(self.names), np.float32)
        if how.scale == "mad":
            self.scale = self._spread()

    def _rate(self, channel: int) -> float:
        return self.source.rates[channel]

    # Channels

    def _pick(self) -> None:
        how, names = self.how, self.source.names
        if how.channels is not None:
            lower = {n.lower(): i for i, n in reversed(list(enumerate(names)))}
            missing = [n for n in how.channels if n.lower() not in lower]
            if len(missing) == len(how.channels):
                raise BadSample(f"has none of the channels that the model knows ({', '.join(how.channels[:4])}, ...)")
            if missing:
                self.notes.append(f"{_some(missing, 'channel')} missing, taken as silent")
            self.picks = [lower[n.lower()] for n in how.channels if n.lower() in lower]
            self._silent = set(missing)
            self.names = list(how.channels)
        else:
            wanted = {k.lower() for k in how.kinds}
            self.picks = [i for i, k in enumerate(self.recording.kinds) if k in wanted]
            self.picks = [i for i in self.picks if not any(fnmatch(names[i], p) for p in how.exclude)]
            marked = [names[i] for i in self.picks if names[i] in self.recording.bads]
            if marked and len(marked) < len(self.picks):
                self.notes.append(f"{_some(marked, 'channel')} marked bad, left out")
                self.picks = [i for i in self.picks if names[i] not in self.recording.bads]
            if not self.picks:
                raise BadSample(f"has no channel of the kinds {', '.join(how.kinds)}")
            self._silent, self.names = set(), [names[i] for i in self.picks]
        self._gone: set[int] = set()

    def _note_rates(self) -> None:
        rates = sorted({self._rate(c) for c in self.picks})
        if rates[0] < 0.999 * self.how.rate:
            shown = ", ".join(f"{r:g}" for r in rates if r < self.how.rate)
            self.notes.append(
                f"resampled up from {shown} to {self.how.rate:g} Hz: nothing is above {rates[0] / 2:g} Hz in it"
            )
        if len(rates) > 1:
            self.notes.append(f"has channels of {len(rates)} rates, {rates[0]:g} to {rates[-1]:g} Hz")

    def _judge(self) -> None:
        """Leave out channels that are flat, not numbers, or clipped, and say what was found."""
        rows: list[list[np.ndarray]] = [[] for _ in self.picks]
        for piece, start, stop in self._looks():
            for rate, members in self._by_rate():
                a, b = int(start * rate), int(stop * rate)
                data = self.source.read(piece, [self.picks[m] for m in members], a, max(b, a + 1))
                for m, row in zip(members, data, strict=True):
                    rows[m].append(row)
        found: dict[str, list[str]] = {"flat": [], "not numbers": [], "clipped": []}
        deviations = []
        for i, parts in enumerate(rows):
            row = np.concatenate(parts).astype(np.float64)
            good = row[np.isfinite(row)]
            name = self.source.names[self.picks[i]]
            if len(good) < len(row) / 2:
                found["not numbers"].append(name)
                self._gone.add(i)
            elif np.ptp(good) <= 1e-6 * max(1e-6, float(np.abs(good).max())):
                found["flat"].append(name)
                self._gone.add(i)
            else:
                deviations.append(float(good.std()))
                edge = max(float((good == good.max()).mean()), float((good == good.min()).mean()))
                if edge > CLIPPED and len(good) > 200:
                    found["clipped"].append(name)
        if not deviations:
            raise BadSample("all of its channels are flat or hold no numbers")
        for what, names in found.items():
            if names:
                done = "kept" if what == "clipped" else "taken as silent" if self.how.channels else "left out"
                self.notes.append(f"{_some(names, 'channel')} {what}, {done}")
        odd = looks_wrong(np.array(deviations))
        if odd:
            self.notes.append(odd)
        if self._gone and self.how.channels is None:
            keep = [i for i in range(len(self.picks)) if i not in self._gone]
            self.picks, self.names = [self.picks[i] for i in keep], [self.names[i] for i in keep]
            self._gone = set()

    def _looks(self) -> list[tuple[int, float, float]]:
        """(piece, start, stop) in seconds of the piece, of stretches that stand for the whole."""
        lengths = [p.duration for p in self.source.pieces]
        total = sum(lengths)
        if total <= LOOKS * LOOK_SECONDS:
            return [(i, 0.0, d) for i, d in enumerate(lengths)]
        found = []
        for place in (np.arange(LOOKS) + 0.5) / LOOKS * total:
            piece = int(np.searchsorted(np.cumsum(lengths), place, "right"))
            at = place - sum(lengths[:piece])
            start = max(0.0, min(at - LOOK_SECONDS / 2, lengths[piece] - LOOK_SECONDS))
            found.append((piece, start, min(lengths[piece], start + LOOK_SECONDS)))
        return found

    def _montage(self) -> np.ndarray | None:
        """For the bipolar montage, the pairs; the names change with them."""
        live = len(self.picks) - len(self._gone)
        if self.how.reference in ("average", "median") and live < FEWEST:
            self.notes.append(
                f"{live} channel{'s are' if live > 1 else ' is'} too few for a common reference: left as is"
            )
        if self.how.reference != "bipolar":
            return None
        pairs = bipolar_pairs(self.names)
        if not pairs:
            raise BadSample("has no neighbouring contacts for a bipolar montage")
        self.names = [f"{self.names[a]}-{self.names[b]}" for a, b in pairs]
        return np.array(pairs)

    def _spread(self) -> np.ndarray:
        """Median absolute deviation of each channel that comes out, as a normal deviation in microvolts."""
        parts = []
        for piece, start, stop in self._looks():
            first = int(start * self.how.rate)
            size = min(int(stop * self.how.rate), self.pieces[piece][1]) - first
            if size > 0:
                parts.append(self._prepare(piece, first, first + size))
        if not parts:
            return np.ones(len(self.names), np.float32)
        rows = np.concatenate(parts, 1)
        spread = 1.4826 * np.median(np.abs(rows - np.median(rows, 1, keepdims=True)), 1)
        typical = np.median(spread[spread > 0]) if (spread > 0).any() else 1.0
        return np.where(spread > 1e-3 * typical, spread, typical).astype(np.float32)

    # Samples

    def _by_rate(self) -> list[tuple[float, list[int]]]:
        rates: dict[float, list[int]] = {}
        for i, channel in enumerate(self.picks):
            rates.setdefault(self._rate(channel), []).append(i)
        return list(rates.items())

    def _resampled(self, piece: int, start: int, stop: int) -> np.ndarray:
        """Samples at the model's rate `[picked channels, stop - start]`, before reference and scale."""
        out = np.empty((len(self.picks), stop - start), np.float64)
        for rate, members in self._by_rate():
            ratio = self._ratios[rate]
            up, down = ratio.numerator, ratio.denominator
            total = round(self.source.pieces[piece].duration * rate)
            # Input that begins on a whole period of the two rates: output samples then fall on the same grid
            margin = int(MARGIN / 2 * rate)
            first = max(0, (start * down // up - margin) // down * down)
            last = min(total, stop * down // up + margin + 1)
            data = self.source.read(piece, [self.picks[m] for m in members], first, last).astype(np.float64)
            data = _mended(data)
            if self.how.notch:
                data = _notched(data, rate, self.how.notch)
            if up != down:
                data = filters.resample_poly(data, up, down, axis=1, padtype="line")
            offset = first * up // down
            part = data[:, start - offset : stop - offset]
            if part.shape[1] < stop - start:
                part = np.pad(part, ((0, 0), (0, stop - start - part.shape[1])), mode="edge")
            out[members] = part
        return out

    def _prepare(self, piece: int, start: int, stop: int) -> np.ndarray:
        """Prepared samples `[C, stop - start]` but for the scale."""
        how, total = self.how, self.pieces[piece][1]
        margin = int(MARGIN * how.rate)
        a, b = max(0, start - margin), min(total, stop + margin)
        data = self._resampled(piece, a, b)
        for edge, kind in ((how.low, "highpass"), (how.high, "lowpass")):
            if edge is not None and edge < how.rate / 2:
                sections = filters.butter(2, edge, kind, fs=how.rate, output="sos")
                data = filters.sosfiltfilt(sections, data, axis=1, padlen=min(data.shape[1] - 1, margin))
        data = data[:, start - a : stop - a]
        if how.reference in ("average", "median"):
            data[list(self._gone)] = 0
            live = [i for i in range(len(data)) if i not in self._gone]
            live = live if len(live) >= FEWEST else []
            middle = np.median if how.reference == "median" else np.mean
            if live:
                data[live] -= middle(data[live], axis=0)
        if self._mix is not None:
            data = data[self._mix[:, 0]] - data[self._mix[:, 1]]
        if how.channels is not None and how.reference != "bipolar":
            data[list(self._gone)] = 0
            full = np.zeros((len(how.channels), data.shape[1]))
            full[[i for i, n in enumerate(how.channels) if n not in self._silent]] = data
            data = full
        return data

    def _block(self, piece: int, number: int) -> np.ndarray:
        key = (id(self), piece, number)
        found = self.cache.get(key)
        if found is None:
            size = int(BLOCK * self.how.rate)
            stop = min((number + 1) * size, self.pieces[piece][1])
            found = (self._prepare(piece, number * size, stop) / self.scale[:, None]).astype(np.float32)
            self.cache.put(key, found)
        return found

    def read(self, piece: int, start: int, size: int) -> np.ndarray:
        """`size` samples `[C, size]`, float32; what lies before or after the piece is its mirror image."""
        total = self.pieces[piece][1]
        if total < 1:
            raise BadSample("holds less than one sample at the model's rate")
        a, b = max(0, start), min(total, start + size)
        block = int(BLOCK * self.how.rate)
        parts = [self._block(piece, n) for n in range(a // block, (b - 1) // block + 1)]
        rows = np.concatenate(parts, 1) if len(parts) > 1 else parts[0]
        rows = rows[:, a - a // block * block :][:, : b - a]
        if b - a < size:
            rows = np.pad(rows, ((0, 0), (a - start, start + size - b)), mode="symmetric")
        return rows


def _some(names: Sequence[str], what: str) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def _mended(data: np.ndarray) -> np.ndarray:
    """Samples that are no numbers, replaced along a straight line between their neighbours."""
    bad = ~np.isfinite(data)
    for row in np.flatnonzero(bad.any(1)):
        good = np.flatnonzero(~bad[row])
        data[row, bad[row]] = np.interp(np.flatnonzero(bad[row]), good, data[row, good]) if len(good) else 0.0
    return data


def _notched(data: np.ndarray, rate: float, mains: float) -> np.ndarray:
    for frequency in np.arange(mains, rate / 2 - 1, mains):
        b, a = filters.iirnotch(frequency, 30.0, rate)
        data = filters.filtfilt(b, a, data, axis=1, padlen=min(data.shape[1] - 1, int(rate)))
    return data


def check_preparation(how: Preparation) -> None:
    """Raise a UserError where a value makes no sense."""
    if how.rate <= 0:
        raise UserError(f"data.rate is {how.rate:g}: more than 0 Hz is needed")
    for name in ("notch", "low", "high"):
        value = getattr(how, name)
        if value is not None and not 0 < value < 1e5:
            raise UserError(f"data.{name} is {value:g}: a frequency above 0 Hz is needed")
    if how.low is not None and how.high is not None and how.low >= how.high:
        raise UserError(f"data.low is {how.low:g} and data.high is {how.high:g}: the band is empty")
