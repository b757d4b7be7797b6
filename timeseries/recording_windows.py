"""Recordings opened for a data module: their events by class, and windows of them as samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyhead.data import Split, Unreadable, generator
from polyhead.errors import BadSample
from timeseries import epileptor, rhythms
from timeseries.edf import Mark
from timeseries.recordings import ArraySource, Recording
from timeseries.seizures import Intervals, join
from timeseries.signals import Prepared

if TYPE_CHECKING:
    from timeseries.recording_data import RecordingData

# The embedded sample: contacts of each simulated recording
SIMULATED: dict[str, tuple[int, ...]] = {
    "train": (16, 8, 12, 10, 14, 9),
    "val": (12, 16, 10),
    "test": (6, 8, 10, 12, 16, 20, 24, 6, 14, 18, 22, 24, 16, 9),
}
STATE_RUNS = {"train": (3, 5, 7), "val": (9,), "test": (11, 13)}


def simulated(split: str, hours: float, seed: int) -> list[Recording]:
    """The embedded sample's recordings of a part (see `timeseries.epileptor`)."""
    offset = {"train": 0, "val": 1, "test": 2, "predict": 3}[split]
    contacts = SIMULATED.get(split, SIMULATED["val"][:1])
    made = epileptor.simulate(contacts, seed=1000 * seed + offset, hours=hours)
    return [as_recording(f"simulated-{split}-{i:02d}", one, split) for i, one in enumerate(made)]


def simulated_states(split: str, labels: dict[str, list[str]], seed: int) -> list[Recording]:
    """The embedded sample of windows at events (see `timeseries.rhythms`): one subject, named as its runs are."""
    made = []
    for run in STATE_RUNS.get(split, STATE_RUNS["val"]):
        signal, blocks = rhythms.simulate_states(len(labels), 100 * seed + run)
        texts = rhythms.state_names(labels)
        marks = [Mark(onset, duration, texts[state]) for onset, duration, state in blocks]
        source = ArraySource(signal, epileptor.RATE, rhythms.NAMES)
        made.append(Recording(f"S001R{run:02d}", source, ["eeg"] * len(signal), set(), marks, "S001", split))
    return made


def as_recording(name: str, one: epileptor.Simulated, split: str | None = None) -> Recording:
    names = [f"A{i + 1}" for i in range(len(one.signal))]
    marks = [Mark(m.onset, m.duration, m.kind, tuple(names[c] for c in m.channels)) for m in one.seizures]
    marks += [Mark(m.onset, m.duration, f"artefact {m.kind}") for m in one.artefacts]
    source = ArraySource(one.signal, epileptor.RATE, names, epileptor.MICROVOLT)
    return Recording(name, source, ["seeg"] * len(names), set(), sorted(marks), name, split)


class Opened:
    """A recording ready to serve windows: prepared signal, events of each class, stretches to stay away from."""

    def __init__(self, prepared: Prepared, classes: Mapping[str, Sequence[str]], split: str | None) -> None:
        self.prepared, self.split = prepared, split
        recording = prepared.recording
        self.id, self.group, self.marks = recording.id, recording.group, recording.marks
        self.events: list[list[Mark]] = [[] for _ in classes]
        self.others: list[Mark] = []
        for mark in paired(self.marks, prepared.notes, classes):
            number = class_of(mark.text, classes)
            if mark.onset > recording.duration or mark.onset + mark.duration < 0:
                prepared.notes.append(f"annotation {mark.text!r} at {mark.onset:.1f} s is outside the recording")
            elif number is None:
                self.others.append(mark)
            else:
                self.events[number].append(mark)

    def truth(self, number: int) -> Intervals:
        """Stretches of a class, those that touch each other joined."""
        return join([(m.onset, m.onset + m.duration) for m in self.events[number]], 0.0)


def class_of(text: str, classes: Mapping[str, Sequence[str]]) -> int | None:
    """The number of the first class one of whose patterns the text matches, whatever its case."""
    lower = text.strip().lower()
    return next((i for i, ps in enumerate(classes.values()) if any(fnmatch(lower, p.lower()) for p in ps)), None)


def paired(marks: Sequence[Mark], notes: list[str], classes: Mapping[str, Sequence[str]]) -> list[Mark]:
    """Marks with durations: a class's `... onset` without one ends at its next `... offset`."""
    result: list[Mark] = []
    begun: Mark | None = None
    lost = 0
    for mark in marks:
        known = class_of(mark.text, classes) is not None
        words = mark.text.lower()
        if not known or mark.duration > 0:
            result.append(mark)
        elif any(w in words for w in ("offset", "end", "stop")):
            if begun is not None:
                result.append(begun._replace(duration=mark.onset - begun.onset))
            begun = None
        else:
            lost += begun is not None
            begun = mark
    lost += begun is not None
    if lost:
        notes.append(f"{lost} annotation{'s' if lost > 1 else ''} of a class without duration or end, left out")
    return result


class Windows:
    """Windows of recordings as samples.

    Attributes:
        rows: int64 `[n, 6]`: recording, piece, first sample (at the model's rate, below 0 where padded), label, and
            for windows at events the first sample of the annotation and the last at which a window may start.
        hard: windows that meet some other annotation `[n]`.
        failed: recordings that cannot be read, as (id, reason); they come after the windows.
    """

    def __init__(self, module: RecordingData, recordings: list[Opened], split: Split,
                 failed: list[Unreadable]) -> None:  # fmt: skip
        self.module, self.recordings, self.split, self.failed = module, recordings, split, failed
        parts = [module.windows_of(r, i, split) for i, r in enumerate(recordings)]
        self.rows = np.concatenate([p[0] for p in parts]) if parts else np.zeros((0, 6), np.int64)
        self.hard = np.concatenate([p[1] for p in parts]) if parts else np.zeros(0, bool)

    def __len__(self) -> int:
        return len(self.rows) + len(self.failed)

    @cached_property
    def ids(self) -> list[str]:
        names = [f"{self.recordings[r].id}@{self._start(r, p, s):.3f}" for r, p, s, *_ in self.rows.tolist()]
        return names + [f.id for f in self.failed]

    @cached_property
    def truth(self) -> list[Intervals]:
        """The marked stretches of every recording that are of any class but background."""
        return [join([i for n in range(len(o.events)) for i in o.truth(n)], 0.0) for o in self.recordings]

    def _group(self, opened: Opened, index: int) -> str:
        """What comes and goes together when results are drawn anew: patients, recordings where they are few."""
        if len({o.group for o in self.recordings}) > 2:
            return opened.group
        return opened.id if len(self.recordings) > 2 else self.ids[index]

    def _start(self, recording: int, piece: int, sample: int) -> float:
        return self.recordings[recording].prepared.pieces[piece][0] + sample / self.module.rate

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        if index >= len(self.rows):
            raise BadSample(self.failed[index - len(self.rows)].reason)
        module = self.module
        return self._window(index, generator(module.seed, epoch, index) if self.split == "train" else None)

    def plain(self, index: int) -> dict[str, Any]:
        """A window as evaluation would see it, whatever its part."""
        return self._window(index, None)

    def _window(self, index: int, source: torch.Generator | None) -> dict[str, Any]:
        module = self.module
        number, piece, first, label, base, latest = (int(v) for v in self.rows[index])
        opened = self.recordings[number]
        prepared = opened.prepared
        if source is not None:
            first = module.moved(first, base, latest, prepared.pieces[piece][1], source)
        size, length = module.window_samples, module.segment_samples
        signal = prepared.read(piece, first, size)
        x = torch.from_numpy(np.ascontiguousarray(signal.reshape(len(signal), -1, length).swapaxes(0, 1)))
        start = self._start(number, piece, first)
        stop = start + module.window
        sample: dict[str, Any] = {
            "id": self.ids[index], "group": self._group(opened, index), "x": x,
            "recording": torch.tensor(number), "first": torch.tensor(first),
            "start": torch.tensor(start, dtype=torch.float64), "stop": torch.tensor(stop, dtype=torch.float64),
        }  # fmt: skip
        if self.split != "predict" and module.labelled:
            if module.windows == "sliding":
                label, channels = module.label_of(opened, stop)
                sample["channel_label"] = torch.from_numpy(channels)
            sample["label"] = torch.tensor(label)
            sample["truth"] = self.truth[number]
        if module.standardise:
            sample["energy_mean"], sample["energy_deviation"] = module.energies_of(opened)
        if source is not None:
            module.augment(sample, source)
        sample["about"] = {
            "recording": opened.id, "start": start, "stop": stop,
            "since": stop - module.spoken_of, "channels": prepared.names,
            "padded": first < 0 or first + size > prepared.pieces[piece][1], "notes": "; ".join(prepared.notes),
        }  # fmt: skip
        return sample
