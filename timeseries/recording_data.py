"""The data module of recordings: windows of segments from files or simulation, labelled by annotations."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from polyhead.data import DataModule, Samples, Split, Unreadable, collate
from polyhead.errors import BadSample, UserError
from polyhead.sources import existing
from polyhead.splits import split_indices
from timeseries.mvpformer import EnergyEncoder
from timeseries.recording_windows import Opened, Windows, class_of, simulated, simulated_states
from timeseries.recordings import ArraySource, Recording, find_recordings, open_recording, unpack
from timeseries.seizures import join
from timeseries.signals import Cache, Preparation, Prepared, Reference, Scale, check_preparation

SEIZURE = ["*seizure*", "seiz", "sz", "sz[ _0-9-]*", "ictal*"]
PARTS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",),
}  # fmt: skip
# Segments from which a recording's own energies are measured
MEASURED = 240


class RecordingData(DataModule):
    """Windows from intracranial or scalp recordings, or from simulated ones.

    Args:
        root: a recording, or a folder or zip of them (EDF, BDF, BrainVision, FIF, Persyst, EEGLAB, SWEC's HDF5, tables;
            BIDS or not); None is the embedded sample of simulated recordings with seizures.
        labelled: whether windows have labels; False for pre-training.
        labels: class -> patterns of annotation texts, such as '{seizure: ["*seizure*", sz]}'.
        classes: class names in order; None takes `background` and those of `labels` (sliding windows), or those of
            `labels` (windows at events).
        windows: `sliding` over everything, or at `events` (a window's class is its annotation's).
        rate: samples a second of the model; recordings are resampled to it.
        segment: seconds of a segment.
        segments: segments of a window.
        stride: seconds between windows; a segment by default.
        offsets: for windows at events, where they start after the annotation does, in seconds; None slides by the
            stride as long as the annotation lasts.
        train_offsets: in training, windows at events start anywhere between these two instead.
        jitter: in training, windows start this many seconds earlier or later at random.
        channels: names, in order, that all recordings give; None takes what each has.
        fixed_channels: find `channels` from the training recordings: those that all of them have.
        kinds: types of channels that are taken.
        exclude: patterns of channel names that are left out.
        reference: average, median, bipolar or none.
        notch: mains frequency to remove with its harmonics.
        low, high: edges of a zero-phase high pass and low pass in Hz.
        scale: `microvolt`, or `mad`: each channel by its median absolute deviation.
        standardise: give the model each recording's mean and deviation of log band energies.
        unit: of tables, which do not say it.
        table_rate: samples a second of tables without a column of times.
        splits: part -> patterns of recording names, such as '{train: ["*R03*"], test: ["*R11*"]}'; those that none
            matches are left out, and where nothing matches the splits are cut.
        split_by: `group` (patients), `time` (each recording in order), or `auto`: by patient where there are three.
        val_fraction, test_fraction: shares of parts that the data do not name.
        steps: training batches an epoch; 0 goes through all windows.
        balance: shares of a training batch: windows of an event, and windows that meet another annotation.
        flip_sign, flip_channels: in training, turn the sign or the order of channels by a coin.
        gain: in training, scale windows by exp(gain * N(0, 1)).
        hours: of each simulated recording.
        cache_mb: memory for prepared signals.
        batch_size, num_workers, seed, on_error: see `polyhead.data.DataModule`.
    """

    def __init__(
        self, root: str | None = None, labelled: bool = True, labels: dict[str, list[str]] | None = None,
        classes: list[str] | None = None, windows: Literal["sliding", "events"] = "sliding",
        rate: float = 256.0, segment: float = 2.0, segments: int = 4, stride: float | None = None,
        offsets: list[float] | None = None, train_offsets: list[float] | None = None, jitter: float = 0.0,
        channels: list[str] | None = None, fixed_channels: bool = False, kinds: list[str] | None = None,
        exclude: list[str] | None = None, reference: Reference = "median", notch: float | None = None,
        low: float | None = None, high: float | None = None, scale: Scale = "mad", standardise: bool = False,
        unit: str = "uV", table_rate: float | None = None, splits: dict[str, list[str]] | None = None,
        split_by: Literal["auto", "group", "time"] = "auto", val_fraction: float = 0.15,
        test_fraction: float = 0.15, steps: int = 0, balance: list[float] | None = None,
        flip_sign: bool = False, flip_channels: bool = False, gain: float = 0.0, hours: float = 1.0,
        cache_mb: float = 2048.0, batch_size: int = 32, num_workers: int = 0, seed: int = 0,
        on_error: Literal["raise", "skip"] = "skip",
    ) -> None:  # fmt: skip
        super().__init__(root, batch_size, num_workers, seed, on_error)
        self.labelled, self.windows = labelled, windows
        self.labels: dict[str, list[str]] = {k: list(v) for k, v in (labels or {"seizure": SEIZURE}).items()}
        self.classes = list(classes) if classes else self._classes()
        self.rate, self.segment, self.segments = float(rate), float(segment), int(segments)
        self.stride = float(stride) if stride else self.segment
        self.offsets, self.train_offsets, self.jitter = offsets, train_offsets, jitter
        self.channels = list(channels) if channels else None
        self.fixed_channels = fixed_channels
        self.kinds, self.exclude = tuple(kinds or Preparation.kinds), tuple(exclude or ())
        self.reference: Reference = reference
        self.notch, self.low, self.high = notch, low, high
        self.scale: Scale = scale
        self.standardise, self.unit, self.table_rate = standardise, unit, table_rate
        self.splits, self.split_by = splits, split_by
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.steps, self.balance = steps, list(balance or [])
        self.flip_sign, self.flip_channels, self.gain = flip_sign, flip_channels, gain
        self.hours = hours
        self._check()
        self.segment_samples = round(self.rate * self.segment)
        self.window_samples = self.segment_samples * self.segments
        self.window = self.window_samples / self.rate
        # Seconds before its end that a window speaks of
        self.spoken_of = self.segment if windows == "sliding" else self.window
        self.cache = Cache(cache_mb)
        self._open: dict[str, tuple[list[Opened], list[Unreadable]]] = {}
        self._said: set[str] = set()
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        self._encoder = EnergyEncoder(self.segment_samples, 1)
        self._energies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _classes(self) -> list[str]:
        return list(self.labels) if self.windows == "events" else ["background", *self.labels]

    def _check(self) -> None:
        check_preparation(self.preparation())
        if self.segments < 1 or self.segment <= 0 or self.stride <= 0 or self.rate * self.segment < 14:
            raise UserError(
                f"data.segments {self.segments}, data.segment {self.segment:g} s and data.stride {self.stride:g} s: "
                "a segment needs 14 samples or more, and there must be one"
            )
        if len(self.balance) > 2 or sum(self.balance) > 1 or min(self.balance, default=0) < 0:
            raise UserError(f"data.balance is {self.balance}: two shares of a batch, at most 1 in all, are needed")
        if self.labelled and len(self.classes) != len(self._classes()):
            raise UserError(f"data.classes names {len(self.classes)}, data.labels makes {len(self._classes())}")
        if self.train_offsets is not None and not (len(self.train_offsets) == 2 and
                                                   self.train_offsets[0] <= self.train_offsets[1]):  # fmt: skip
            raise UserError(f"data.train_offsets is {self.train_offsets}: two times in seconds, in order, are needed")
        for name, patterns in (self.splits or {}).items():
            if name not in ("train", "val", "test"):
                raise UserError(f"data.splits has a part {name!r}: train, val and test are known")
            if isinstance(patterns, str):
                raise UserError(f"data.splits.{name} is text: a list of patterns is needed")

    def preparation(self) -> Preparation:
        return Preparation(
            self.rate, self.kinds, tuple(self.channels) if self.channels else None, self.exclude, self.reference,
            self.notch, self.low, self.high, self.scale,
        )  # fmt: skip

    # Recordings and their parts

    def _raw(self, everything: bool) -> tuple[list[Recording], list[Unreadable]]:
        """Every recording under the root, opened but not prepared."""
        assert self.root is not None
        notes: list[str] = []
        found, failed = [], []
        root = Path(self.root)
        if root.suffix.lower() == ".zip" and root.is_file():
            if self._unpacked is None:
                self._unpacked = tempfile.TemporaryDirectory(prefix="recordings-")
                unpack(root, Path(self._unpacked.name))
            root = Path(self._unpacked.name)
        for place in find_recordings(root, notes):
            try:
                recording = open_recording(place.path, place.id, self.unit, self.table_rate)
                recording.split = place.split
                recording.group = place.group or recording.group
                found.append(recording)
            except BadSample as error:
                failed.append(Unreadable(place.id, str(error)))
        for note in notes:
            self.say(note)
        if not everything and not found:
            raise UserError(f"no recording in {self.root} can be read: {failed[0].id}: {failed[0].reason}")
        return found, failed

    def _assign(self, recordings: list[Recording]) -> list[str | None]:
        """The part of each recording: as said, by pattern, by patient; None where each is cut in time."""
        said = [r.split for r in recordings]
        if any(said):
            return [s or "none" for s in said]
        if self.splits:

            def matched(name: str) -> str:
                for part, patterns in (self.splits or {}).items():
                    if any(fnmatch(name, p) or fnmatch(Path(name).name, p) for p in patterns):
                        return part
                return "none"

            found = [matched(r.id) for r in recordings]
            if any(f != "none" for f in found):
                return list(found)
            self.say("data.splits matches no recording here: parts are cut anew")
        groups = [r.group for r in recordings]
        by_group = self.split_by == "group" or (self.split_by == "auto" and len(set(groups)) >= 3)
        if not by_group:
            return [None] * len(recordings)
        marked = [any(class_of(m.text, self.labels) is not None for m in r.marks) for r in recordings]
        shares = {"train": 1 - self.val_fraction - self.test_fraction, "val": self.val_fraction,
                  "test": self.test_fraction}  # fmt: skip
        cut = split_indices(marked, groups, shares, self.seed)
        parts: dict[int, str] = {int(i): part for part, indices in cut.items() for i in indices}
        return [parts[i] for i in range(len(recordings))]

    def _serve(self, recordings: list[Recording], parts: Sequence[str | None],
                  failed: list[Unreadable]) -> list[Opened]:  # fmt: skip
        opened = []
        how = self.preparation()
        for recording, part in zip(recordings, parts, strict=True):
            try:
                opened.append(Opened(Prepared(recording, how, self.cache), self.labels, part))
            except BadSample as error:
                failed.append(Unreadable(recording.id, str(error)))
        self._tell(opened)
        return opened

    def opened(self, split: Split) -> tuple[list[Opened], list[Unreadable]]:
        """The recordings of a part, and those that cannot be read."""
        if split in self._open:
            return self._open[split]
        if self.root is None:
            recordings = self._embedded(split)
            self._find_channels(recordings, [split] * len(recordings))
            result: tuple[list[Opened], list[Unreadable]] = self._serve(recordings, [split] * len(recordings), []), []
        else:
            recordings, failed = self._raw(everything=split == "predict")
            parts: list[str | None] = [split] * len(recordings)
            if split != "predict":
                parts = self._assign(recordings)
                self._find_channels(recordings, parts)
                kept = [i for i, p in enumerate(parts) if p in (None, split)]
                recordings, parts = [recordings[i] for i in kept], [parts[i] for i in kept]
            result = (self._serve(recordings, parts, failed), failed)
        self._open[split] = result
        return result

    def _embedded(self, split: Split) -> list[Recording]:
        if self.windows == "events":
            return simulated_states(split, self.labels, self.seed)
        return simulated(split, self.hours, self.seed)

    def _find_channels(self, recordings: list[Recording], parts: Sequence[str | None]) -> None:
        """The channels that all training recordings have, in the order of the first."""
        if not self.fixed_channels or self.channels is not None:
            return
        sets = []
        for recording, part in zip(recordings, parts, strict=True):
            if part in (None, "train") or self.root is None:
                wanted = zip(recording.source.names, recording.kinds, strict=True)
                sets.append([n for n, k in wanted if k in self.kinds and n not in recording.bads])
        if not sets:
            return
        common = [n for n in sets[0] if all(n in s for s in sets)]
        self.channels = [n for n in common if not any(fnmatch(n, p) for p in self.exclude)]
        if not self.channels:
            raise UserError("the training recordings have no channel in common: leave data.fixed_channels out")

    def _tell(self, opened: list[Opened]) -> None:
        """Every note once, with the recordings that it is about."""
        about: dict[str, list[str]] = {}
        for one in opened:
            for note in one.prepared.notes:
                about.setdefault(note, []).append(one.id)
        for note, names in about.items():
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            self.say(f"{', '.join(names[:2])}{more}: {note}")

    def say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(f"note: {text}", file=sys.stderr, flush=True)

    # Windows

    def windows_of(self, opened: Opened, number: int, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Rows (recording, piece, first sample, label) and whether each meets another annotation."""
        rows: list[tuple[int, ...]] = []
        size, step = self.window_samples, max(1, round(self.stride * self.rate))
        low, high = self._part_of(opened, split)
        for piece, (start, count) in enumerate(opened.prepared.pieces):
            a, b = (max(0, round((low - start) * self.rate)), min(count, round((high - start) * self.rate)))
            if self.windows == "events" and split != "predict" and self.labelled:
                rows += self._at_events(opened, number, piece, a, b)
            elif b - a >= size:
                rows += [(number, piece, s, -1, 0, 0) for s in range(a, b - size + 1, step)]
            elif b == count and a == 0 and count > 0:
                rows.append((number, piece, count - size, -1, 0, 0))
        table = np.array(rows, np.int64).reshape(-1, 6)
        stops = np.array([opened.prepared.pieces[p][0] + (s + size) / self.rate for _, p, s, *_ in rows])
        if self.windows == "sliding" and split != "predict" and self.labelled:
            table[:, 3] = [self.label_of(opened, s)[0] for s in stops]
        hard = np.zeros(len(rows), bool)
        for mark in opened.others:
            hard |= (stops > mark.onset) & (stops - self.segment < mark.onset + mark.duration)
        return table, hard

    def _part_of(self, opened: Opened, split: Split) -> tuple[float, float]:
        """The stretch of a recording that belongs to a part, in seconds; parts in time follow each other."""
        duration = opened.prepared.recording.duration
        if opened.split is not None or split == "predict":
            return 0.0, duration + 1
        first = duration * (1 - self.val_fraction - self.test_fraction)
        second = duration * (1 - self.test_fraction)
        events = join([i for n in range(len(opened.events)) for i in opened.truth(n)], 0.0)
        if self.windows == "sliding" and len(events) >= 3 and self.val_fraction and self.test_fraction:
            # Midway between two seizures, so that each part has one
            later = max(1, round(len(events) * self.test_fraction))
            middle = max(1, round(len(events) * self.val_fraction))
            if later + middle < len(events):
                cuts = [len(events) - later - middle, len(events) - later]
                first, second = ((events[c - 1][1] + events[c][0]) / 2 for c in cuts)
        return {"train": (0.0, first), "val": (first, second), "test": (second, duration + 1)}[split]

    def _at_events(self, opened: Opened, number: int, piece: int, low: int, high: int) -> list[tuple[int, ...]]:
        """Rows of the windows at annotations that lie in the samples [low, high) of a piece."""
        rows = []
        start = opened.prepared.pieces[piece][0]
        size = self.window_samples
        for label, marks in enumerate(opened.events):
            for mark in marks:
                offsets = self.offsets
                if offsets is None:
                    offsets = np.arange(0.0, mark.duration - self.window + 1e-6, self.stride).tolist()
                for offset in offsets:
                    base = round((mark.onset - start) * self.rate)
                    first = base + round(offset * self.rate)
                    # Annotated blocks are often a little shorter than they were meant to be
                    inside = offset + self.window <= mark.duration + 0.05 * self.window
                    if inside and low <= first and first + size <= high:
                        latest = max(first, base + int((mark.duration - self.window) * self.rate))
                        rows.append((number, piece, first, label, base, latest))
        return sorted(rows, key=lambda r: r[2])

    def label_of(self, opened: Opened, stop: float) -> tuple[int, np.ndarray]:
        """The class of a window that ends at `stop`, and of each channel (-1 where annotations name none)."""
        label = 0
        channels = np.zeros(len(opened.prepared.names), np.int64)
        for number, marks in enumerate(opened.events, 1):
            for mark in marks:
                if mark.onset <= stop and mark.onset + mark.duration >= stop - self.segment:
                    label = number
                    if mark.channels:
                        named = [i for i, n in enumerate(opened.prepared.names) if n in mark.channels]
                        channels[named] = number
                    else:
                        channels[:] = -1
        return label, channels

    def moved(self, first: int, base: int, latest: int, count: int, source: torch.Generator) -> int:
        """A training window's start, moved at random inside its piece."""
        if count < self.window_samples:
            return first
        drawn = float(torch.rand((), generator=source))
        if self.windows == "events" and self.train_offsets:
            low, high = (base + round(o * self.rate) for o in self.train_offsets)
            low = min(low, latest)
            first = low + round(drawn * (max(low, min(high, latest)) - low))
        elif self.jitter:
            first += round((2 * drawn - 1) * self.jitter * self.rate)
        return min(max(0, first), count - self.window_samples)

    def augment(self, sample: dict[str, Any], source: torch.Generator) -> None:
        draws = torch.rand(2, generator=source)
        if self.gain:
            sample["x"] = sample["x"] * torch.exp(self.gain * torch.randn((), generator=source))
        if self.flip_sign and draws[0] < 0.5:
            sample["x"] = -sample["x"]
        if self.flip_channels and draws[1] < 0.5:
            sample["x"] = sample["x"].flip(1)
            for key in ("channel_label", "energy_mean", "energy_deviation"):
                if key in sample:
                    sample[key] = sample[key].flip(0)

    @torch.no_grad()
    def energies_of(self, opened: Opened) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation `[C, bands]` of the log band energies over a recording's segments."""
        key = id(opened)
        if key not in self._energies:
            length, features = self.segment_samples, []
            places = [
                (p, s) for p, (_, count) in enumerate(opened.prepared.pieces)
                for s in range(0, count - length + 1, length)
            ] or [(0, opened.prepared.pieces[0][1] - length)]  # fmt: skip
            for index in np.unique(np.linspace(0, len(places) - 1, min(MEASURED, len(places))).round().astype(int)):
                piece, start = places[index]
                features.append(self._encoder.energies(torch.from_numpy(opened.prepared.read(piece, start, length))))
            rows = torch.stack(features)
            deviation = rows.std(0, correction=0).clamp(min=1e-2) if len(rows) > 1 else torch.ones_like(rows[0])
            self._energies[key] = rows.mean(0), deviation
        return self._energies[key]

    # The frame

    def prepare(self, stage: str) -> None:
        for split in PARTS[stage]:
            opened, failed = self.opened(split)
            if split == "predict":
                continue
            for one in failed:
                if self.on_error == "raise":
                    raise UserError(f"cannot read {one.id}: {one.reason}", ["leave it out with --data.on_error skip"])
                self.say(f"{one.id} is left out: {one.reason}")
            windows: Any = self.samples(split)
            if not len(windows):
                raise UserError(f"{self.root or 'the embedded sample'} has no window for the {split} part")
            if self.labelled and split in ("train", "test", "val"):
                self._check_labels(opened, windows, split)

    def _check_labels(self, opened: list[Opened], windows: Windows, split: Split) -> None:
        present = set(windows.rows[:, 3].tolist())
        if split == "val" and self.windows == "sliding" and present == {0}:
            self.say("the validation part has no event: choose the best weights by --monitor val/loss --mode min")
        if split == "train" and len(present) < 2:
            texts = Counter(m.text for o in opened for m in o.marks)
            found = ", ".join(f"{t} ({n})" for t, n in texts.most_common(8)) or "none at all"
            wanted = "; ".join(f"{k}: {', '.join(p)}" for k, p in self.labels.items())
            raise UserError(
                f"the training recordings have windows of one class only, by data.labels {wanted}",
                [f"their annotations are {found}", "name yours: --data.labels '{seizure: [TEXT]}'"],
            )

    def facts(self) -> dict[str, Any]:
        if self.fixed_channels and self.channels is None:
            self.opened("train")
        facts: dict[str, Any] = {
            "rate": self.rate, "segment": self.segment, "segments": self.segments, "stride": self.stride,
            "channels": self.channels, "standardise": self.standardise, "windows": self.windows,
        }  # fmt: skip
        return {"classes": self.classes, **facts} if self.labelled else facts

    def dataset(self, split: Split) -> Samples:
        opened, failed = self.opened(split)
        return Windows(self, opened, split, failed if split == "predict" else [])

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        """Recordings by path, or arrays `[C, samples]` in microvolts at the model's rate, as in prediction."""
        recordings: list[Recording] = []
        failed: list[Unreadable] = []
        for index, item in enumerate(items):
            if isinstance(item, (np.ndarray, torch.Tensor)):
                signal = np.asarray(item, np.float32)
                names = self.channels or [f"CH{i + 1}" for i in range(len(signal))]
                if signal.ndim != 2 or len(names) != len(signal):
                    failed.append(Unreadable(f"input-{index}", f"shape {signal.shape}: [channels, samples] is needed"))
                    continue
                source = ArraySource(signal, self.rate, names)
                recordings.append(Recording(f"input-{index}", source, ["eeg"] * len(names), set(), [], str(index)))
                continue
            try:
                recordings.append(open_recording(existing(item), str(item), self.unit, self.table_rate))
            except BadSample as error:
                failed.append(Unreadable(str(item), str(error)))
        opened = self._serve(recordings, ["predict"] * len(recordings), failed)
        return Windows(self, opened, "predict", failed)

    def batches(self, samples: Samples, split: Split, epoch: int) -> list[list[int]]:
        """Windows of one batch come from one recording, unless all have the same channels."""
        windows: Any = samples
        if split == "train" and self.steps and isinstance(windows, Windows):
            return self._balanced(windows, epoch)
        if split == "train" and self.channels is not None:
            return super().batches(samples, split, epoch)
        order = self.order(samples, split, epoch)
        owner = np.full(len(windows), -1)
        owner[: len(windows.rows)] = windows.rows[:, 0]
        if split != "train":
            cuts = np.flatnonzero(np.diff(owner[order])) + 1
            runs = np.split(order, cuts)
        else:
            runs = [order[owner[order] == r] for r in np.unique(owner)]
        size = self.batch_size
        made = [run[i : i + size].tolist() for run in runs for i in range(0, len(run), size)]
        if split != "train":
            return [b for b in made if b]
        shuffled = np.random.default_rng([self.seed, epoch, 1]).permutation(len(made))
        return [made[i] for i in shuffled]

    def _balanced(self, windows: Windows, epoch: int) -> list[list[int]]:
        """`steps` batches, each of one recording, with the asked shares of events and of other annotations."""
        rng = np.random.default_rng([self.seed, epoch])
        owner, label = windows.rows[:, 0], windows.rows[:, 3]
        owners = np.unique(owner)
        turns = np.concatenate([rng.permutation(owners) for _ in range(-(-self.steps // len(owners)))])[: self.steps]
        made = []
        for turn in turns:
            own = np.flatnonzero(owner == turn)
            chosen: list[int] = []
            pools = [own[label[own] > 0], own[windows.hard[own] & (label[own] <= 0)]]
            for pool, share in zip(pools, self.balance, strict=False):
                count = min(len(pool), round(share * self.batch_size))
                chosen += rng.choice(pool, count, replace=False).tolist()
            rest = np.setdiff1d(own, chosen)
            count = min(len(rest), self.batch_size - len(chosen))
            made.append(chosen + rng.choice(rest, count, replace=False).tolist())
        return made

    def collate(self, items: list[dict[str, Any] | Unreadable]) -> dict[str, Any]:
        """Stacked windows, `about` (what is known of each, as prediction columns), `truth` (marked seizures)."""
        good = [item for item in items if isinstance(item, dict)]
        plain: list[dict[str, Any] | Unreadable] = [i for i in items if isinstance(i, Unreadable)]
        batch = collate(plain + [{k: v for k, v in i.items() if k not in ("about", "truth")} for i in good])
        batch["about"] = {k: [i["about"][k] for i in good] for k in (good[0]["about"] if good else ())}
        batch["truth"] = {int(i["recording"]): i["truth"] for i in good if "truth" in i}
        return batch

    # Telling

    def plan(self) -> dict[str, str]:
        lines = {}
        for split in ("train", "val"):
            windows: Any = self.samples(split)
            hours = sum(n for o in windows.recordings for _, n in o.prepared.pieces) / self.rate / 3600
            counts = Counter(windows.rows[:, 3].tolist())
            named = ", ".join(f"{c} {counts[i]:,}" for i, c in enumerate(self.classes)) if self.labelled else ""
            lines[split] = f"{len(windows):,} windows of {len(windows.recordings)} recordings, {hours:.2f} h; {named}"
        return lines

    def summary(self) -> dict[str, Any]:
        if self.root is None:
            return {"recordings": "simulated", "hours each": self.hours}
        recordings, failed = self._raw(everything=True)
        texts = Counter(m.text for r in recordings for m in r.marks)
        return {
            "recordings": len(recordings), "not readable": len(failed),
            "patients": len({r.group for r in recordings}),
            "hours": round(sum(r.duration for r in recordings) / 3600, 3),
            "rates": ", ".join(f"{r:g}" for r in sorted({x for r in recordings for x in r.source.rates})),
            "channels": ", ".join(str(n) for n in sorted({len(r.source.names) for r in recordings})),
            "annotations": dict(texts.most_common(12)),
            "classes": "none" if not any(class_of(t, self.labels) is not None for t in texts) else list(self.labels),
        }  # fmt: skip

    def check(self) -> list[tuple[str, str]]:
        opened, failed = self.opened("predict")
        return [(f.id, f.reason) for f in failed]
