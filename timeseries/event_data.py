"""The data module of event sequences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from polyhead.data import DataModule, Samples, Split, Unreadable, collate
from polyhead.errors import BadSample, UserError
from polyhead.splits import assign_splits, class_key
from timeseries.events import Events, Reading, checked, read
from timeseries.hawkes import ExponentialHawkes, Span, simulate

Window = Literal["auto", "full", "last_event"]
First = Literal["auto", "scored", "given"]
# The embedded sample: base rates, expected children (row affected, column triggering), decays, end of observation
SAMPLE = {
    "mu": [0.3, 0.15],
    "alpha": [[0.3, 0.2], [0.5, 0.2]],
    "beta": [[1.5, 0.8], [2.5, 1.0]],
    "window": 30.0,
}
# Points after the last event at which predictions hold the intensity, in mean gaps
AHEAD = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
# Steps that an epoch should have, and positions of a training batch that the smallest data have too
STEPS, FEWEST = 50, 64


def embedded() -> Reading:
    """Hawkes sequences of two types with known truth (`SAMPLE`), 400 on [0, 30]."""
    made = simulate(**SAMPLE, count=400, seed=7)  # type: ignore[arg-type]
    parts = ["train"] * 260 + ["val"] * 60 + ["test"] * 80
    sequences = [
        Events(f"sample-{i:03d}", t, np.array(["cause", "effect"], dtype=object)[k], SAMPLE["window"], part)  # type: ignore[arg-type]
        for i, ((t, k), part) in enumerate(zip(made, parts, strict=True))
    ]
    return Reading(sequences, 2)


class Piece(NamedTuple):
    """A sequence, or a stretch of one from its event `first` on, as it is served: times in the reported unit, types 0
    to K - 1."""

    id: str
    span: Span
    problem: str | None = None
    first: int = 0


class EventSamples:
    """Sequences as rows: BOS, then the events.

    A sample holds `types` `[N]` (K for BOS), `dt` `[N]` (the gap before each row), `gap` `[N]` (the scored interval
    after it, 0 where none is), `target` `[N]` (the type that ends that interval, -1 where none does), `first` (the
    place of the first event in its sequence).
    """

    def __init__(self, pieces: list[Piece], kinds: int) -> None:
        self.pieces, self.kinds = pieces, kinds
        self.ids = [p.id for p in pieces]
        self.lengths = np.array([len(p.span.times) + 1 for p in pieces])

    def __len__(self) -> int:
        return len(self.pieces)

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        name, span, problem, first = self.pieces[index]
        if problem is not None:
            raise BadSample(problem)
        arrays = {k: torch.from_numpy(v) for k, v in rows(span, self.kinds).items()}
        return {"id": name, **arrays, "first": torch.tensor(first)}


def rows(span: Span, kinds: int) -> dict[str, np.ndarray]:
    """The arrays of a sample, see `EventSamples`. Differences are taken in double precision."""
    times, types = span.times, span.types
    n = len(times)
    before = 0.0 if span.given or not n else times[0] - span.start
    steps = np.r_[before, np.diff(times)] if n else np.zeros(0)
    tail = span.end - (times[-1] if n else span.start)
    target = np.r_[types, -1].astype(np.int64)
    if span.given:
        target[0] = -1
    return {
        "types": np.r_[kinds, types].astype(np.int64),
        "dt": np.r_[0.0, steps].astype(np.float32),
        "gap": np.r_[steps, tail].astype(np.float32),
        "target": target,
    }


class EventData(DataModule):
    """Sequences of typed events in time.

    Args:
        root: a table (sequence, time, type and perhaps the end of observation), npz, Neural-Hawkes pickle, EasyTPP
            JSON, or a folder or zip of them; None is the embedded sample of Hawkes sequences with known truth.
        name: which set of a folder that holds several, or which file.
        window: `full` counts the time after the last event up to the end of observation, `last_event` stops at the
            last event; `auto` is `full` where the data say the end.
        first_event: `scored` from time 0 on, or `given`: what follows is scored; `auto` is `scored` where the data
            say the end of observation.
        time_unit: the unit in which times are reported, in units of the data: 86400 for seconds as days.
        types: type names in order; None takes those of the data.
        labels: what people call them; from a `marks.csv` beside the data if None.
        time_scale: the mean gap, in which the model measures time; found from the training part when None.
        max_events: longer sequences are served in pieces of so many events; the first of a later piece is given.
        max_positions: padded positions of a batch, and of a piece in training, which bounds the memory. Of small data
            training takes smaller batches, and goes over them several times an epoch, so that it has some 50 steps.
        val_fraction, test_fraction: shares of parts that the data do not name.
        sequence_column, time_column, type_column, end_column, split_column: a table's columns; by usual names if None.
        batch_size, num_workers, seed, on_error: see `polyhead.data.DataModule`; `batch_size` is the most sequences.
    """

    def __init__(
        self, root: str | None = None, name: str | None = None, window: Window = "auto",
        first_event: First = "auto", time_unit: float = 1.0, types: list[str] | None = None,
        labels: list[str] | None = None, time_scale: float | None = None, max_events: int = 5000,
        max_positions: int = 1024, val_fraction: float = 0.15, test_fraction: float = 0.15,
        sequence_column: str | None = None, time_column: str | None = None, type_column: str | None = None,
        end_column: str | None = None, split_column: str | None = None, batch_size: int = 32,
        num_workers: int = 0, seed: int = 0, on_error: Literal["raise", "skip"] = "raise",
    ) -> None:  # fmt: skip
        super().__init__(root, batch_size, num_workers, seed, on_error)
        for option, value in {"time_unit": time_unit, "time_scale": time_scale}.items():
            if value is not None and not (0 < value < float("inf")):
                raise UserError(f"data.{option} is {value}: a number above 0 is needed")
        for option, size in {"max_events": max_events, "max_positions": max_positions}.items():
            if size < 2:
                raise UserError(f"data.{option} is {size}: at least 2 is needed")
        self.name, self.window, self.first_event, self.time_unit = name, window, first_event, float(time_unit)
        self.types = [str(t) for t in types] if types is not None else None
        self.labels = [str(t) for t in labels] if labels is not None else None
        self.time_scale = time_scale
        self.max_events, self.max_positions = max_events, max_positions
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.columns = {"sequence": sequence_column, "time": time_column, "type": type_column, "end": end_column,
                        "split": split_column}  # fmt: skip
        self._reading: Reading | None = None
        self._parts: dict[str, np.ndarray] = {}
        self._baseline: ExponentialHawkes | None = None
        self.left_out = 0

    # Finding

    def reading(self) -> Reading:
        if self._reading is None:
            self._reading = embedded() if self.root is None else read(self.root, self.name, self.columns)
            self._settle(self._reading)
        return self._reading

    def _settle(self, reading: Reading) -> None:
        """Types, labels and conventions that the data decide, where nothing else has."""
        good = [s for s in reading.sequences if s.problem is None]
        ends = bool(good) and all(s.end is not None for s in good)
        if self.window == "auto":
            self.window = "full" if ends else "last_event"
        if self.first_event == "auto":
            self.first_event = "scored" if ends else "given"
        if self.types is None:
            found = {t for s in good for t in s.types if t is not None}
            whole = found and all(re.fullmatch(r"\d{1,6}", t) for t in found)
            highest = max((int(t) for t in found), default=-1) + 1 if whole else 0
            count = max(highest, reading.count or 0)
            # Whole numbers count from 0; numbers with wide holes are names
            contiguous = whole and count <= 4 * len(found) + 8
            self.types = [str(i) for i in range(count)] if contiguous else sorted(found, key=class_key)
            if not self.types:
                raise UserError(f"{self.root} holds no events")
        if self.labels is None:
            self.labels = [reading.names.get(t, t) for t in self.types]

    def parts(self) -> dict[str, np.ndarray]:
        """`train`, `val` and `test` as indices into the sequences."""
        if not self._parts:
            splits = [s.split for s in self.reading().sequences]
            self._parts = assign_splits(splits, None, None, self.val_fraction, self.test_fraction, self.seed)
        return self._parts

    def piece(self, events: Events) -> Piece:
        """One sequence in the reported unit, or what is wrong with it."""
        self.reading()
        empty = Span(np.zeros(0), np.zeros(0, dtype=np.int64), 0.0, 0.0, False)
        if events.problem is not None:
            return Piece(events.id, empty, events.problem)
        number = {name: i for i, name in enumerate(self.types or [])}
        types = np.array([number.get(t, -1) for t in events.types], dtype=np.int64)
        unknown = np.flatnonzero(types < 0)
        if len(unknown):
            at = int(unknown[0])
            kind = events.types[at]
            known = f"none of the {len(number)} types" if kind is not None else "missing"
            return Piece(events.id, empty, f"the type {kind!r} of event {at + 1} is {known}")
        times = events.times / self.time_unit
        given = self.first_event == "given"
        if not given and len(times) and times[0] < 0:
            return Piece(events.id, empty, f"its first event is at {events.times[0]:g}, before observation begins at 0")
        start = (float(times[0]) if len(times) else 0.0) if given else 0.0
        last = float(times[-1]) if len(times) else start
        end = events.end / self.time_unit if self.window == "full" and events.end is not None else last
        return Piece(events.id, Span(times, types, start, max(end, last), given))

    def pieces(self, split: Split) -> list[Piece]:
        """What is served of a part: sequences with something to score, long ones in pieces."""
        sequences = self.reading().sequences
        served: list[Piece] = []
        self.left_out = 0
        for index in self.parts()[split]:
            piece = self.piece(sequences[index])
            if piece.problem is None and not _scored(piece.span):
                self.left_out += 1
                continue
            most = min(self.max_events, self.max_positions - 1) if split == "train" else self.max_events
            served += self._cut(piece, max(2, most))
        return served

    @staticmethod
    def _cut(piece: Piece, most: int) -> list[Piece]:
        """Pieces of at most so many events."""
        span = piece.span
        n = len(span.times)
        if n <= most:
            return [piece]
        # A later piece begins with the event that the one before ended with
        starts = range(0, n - 1, most - 1)
        cut = []
        for a in starts:
            b = min(a + most, n)
            end = span.end if b == n else float(span.times[b - 1])
            first = a == 0
            own = Span(span.times[a:b], span.types[a:b], span.start if first else float(span.times[a]), end,
                       span.given if first else True)  # fmt: skip
            cut.append(Piece(f"{piece.id}@{a}", own, None, a))
        return cut

    def prepare(self, stage: str) -> None:
        if stage == "predict":
            self.reading()
            return
        without = next((s.id for s in self.reading().sequences if s.end is None and s.problem is None), None)
        if self.window == "full" and without is not None:
            raise UserError(
                f"data.window full needs the end of observation of every sequence, and {without} has none",
                ["a column `window` or `end` (--data.end_column) says it; --data.window last_event does without"],
            )
        for part in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            indices = self.parts()[part]
            served = self.pieces(part)  # type: ignore[arg-type]
            where = self.root or "the embedded sample"
            if not len(indices):
                raise UserError(f"{where} has no {part} part")
            bad = [p for p in served if p.problem is not None]
            if bad and self.on_error == "raise":
                raise UserError(
                    f"sequence {bad[0].id} of the {part} part: {bad[0].problem} ({len(bad)} of {len(indices)} are bad)",
                    ["mend or remove them, or leave them out with --data.on_error skip"],
                )
            if len(bad) == len(served):
                raise UserError(f"the {part} part of {where} has no sequence with an event to score")

    # Serving

    def facts(self) -> dict[str, Any]:
        self.reading()
        if self.time_scale is None:
            spans = self._spans("train")
            events = sum(len(s.times) - s.given for s in spans)
            length = sum(s.end - s.start for s in spans)
            self.time_scale = float(f"{length / events:.6g}") if events and length > 0 else 1.0
        return {"types": self.types, "labels": self.labels, "time_scale": self.time_scale,
                "window": self.window, "first_event": self.first_event}  # fmt: skip

    def _spans(self, split: Split) -> list[Span]:
        return [p.span for p in self.pieces(split) if p.problem is None]

    def baseline(self) -> ExponentialHawkes | None:
        """The exponential Hawkes process fitted to the training part, in the reported unit; None without one."""
        if self._baseline is None:
            spans = self._spans("train")
            if not any(_scored(s) and s.end > s.start for s in spans):
                return None
            self._baseline = ExponentialHawkes(len(self.types or [])).fit(spans)
        return self._baseline

    def rates(self) -> np.ndarray:
        """`[K]`: events of each type in the training part per reported unit, none of them 0."""
        train = self._spans("train")
        counts = np.bincount(np.concatenate([s.types[int(s.given) :] for s in train]), minlength=len(self.types or []))
        return np.maximum(counts, 0.1) / sum(s.end - s.start for s in train)

    def baseline_scores(self, split: Split) -> dict[str, float]:
        """What the exponential Hawkes process, and a Poisson process, get on a part, in nats an event."""
        fitted = self.baseline()
        spans = self._spans(split)
        events = sum(len(s.times) - s.given for s in spans)
        if fitted is None or not events:
            return {}
        scores = fitted.score(spans)
        found = {
            "hawkes_nll": float(scores.compensator.sum() - scores.log_type.sum()) / events,
            "hawkes_nll_time": float(scores.compensator.sum() - scores.log_total.sum()) / events,
            "hawkes_nll_type": float((scores.log_total - scores.log_type).mean()),
        }
        if scores.right is not None:
            found["hawkes_type_accuracy"] = float(scores.right.mean())
        rates = self.rates()
        own = np.concatenate([s.types[int(s.given) :] for s in spans])
        length = sum(s.end - s.start for s in spans)
        found["poisson_nll"] = float(rates.sum() * length - np.log(rates[own]).sum()) / events
        return found

    def dataset(self, split: Split) -> Samples:
        kinds = len(self.facts()["types"])
        if split == "predict":
            return EventSamples([self._recent(self.piece(s)) for s in self.reading().sequences], kinds)
        served = self.pieces(split)
        good = [p for p in served if p.problem is None]
        self.skipped += len(served) - len(good)
        return EventSamples(good, kinds)

    def _recent(self, piece: Piece) -> Piece:
        """For prediction: the last `max_events` events; without any there is nothing to go on."""
        span = piece.span
        if piece.problem is None and not len(span.times) and span.given:
            return piece._replace(problem="it has no events")
        if len(span.times) > self.max_events:
            a = len(span.times) - self.max_events
            span = Span(span.times[a:], span.types[a:], float(span.times[a]), span.end, True)
        return piece._replace(span=span)

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        """Files, `(times, types)`, or dicts with `times` and `types`, as in prediction."""
        if self.types is None:
            self.reading()
        found: list[Events] = []
        for index, item in enumerate(items):
            if isinstance(item, (str, Path)):
                found += read(item, None, self.columns).sequences
                continue
            times, types = (item["times"], item["types"]) if isinstance(item, dict) else item
            found.append(checked(f"input-{index}", times, types))
        if self._reading is None:
            self._reading = Reading(found)
            self._settle(self._reading)
        return EventSamples([self._recent(self.piece(s)) for s in found], len(self.types or []))

    def batches(self, samples: Samples, split: Split, epoch: int) -> list[list[int]]:
        """Sequences of like length together, at most `batch_size` and `max_positions`; their order is drawn anew."""
        order = self.order(samples, split, epoch)
        lengths = getattr(samples, "lengths", np.ones(len(samples)))
        order = order[np.argsort(lengths[order], kind="stable")]
        room = self.max_positions
        if split == "train":
            room = min(room, max(FEWEST, int(lengths.sum()) // STEPS))
        batches: list[list[int]] = [[]]
        for index in order.tolist():
            if batches[-1] and (len(batches[-1]) + 1 > self.batch_size
                                or (len(batches[-1]) + 1) * lengths[index] > room):  # fmt: skip
                batches.append([])
            batches[-1].append(index)
        if split == "train":
            rng = np.random.default_rng([self.seed, epoch, 1])
            passes = max(1, STEPS // len(batches))
            batches = [batches[i] for _ in range(passes) for i in rng.permutation(len(batches))]
        return [b for b in batches if b]

    def collate(self, items: list[dict[str, Any] | Unreadable]) -> dict[str, Any]:
        """Rows are padded at the end; `length` `[B]` counts them, `ahead` `[B, G]` are times to look ahead."""
        good = [item for item in items if isinstance(item, dict)]
        longest = max((len(item["types"]) for item in good), default=0)
        blank = {"types": len(self.types or []), "dt": 0.0, "gap": 0.0, "target": -1}
        ahead = torch.tensor(AHEAD) * float(self.time_scale or 1.0)
        padded: list[dict[str, Any] | Unreadable] = [i for i in items if isinstance(i, Unreadable)]
        for item in good:
            n = len(item["types"])
            new = {k: torch.nn.functional.pad(item[k], (0, longest - n), value=v) for k, v in blank.items()}
            padded.append({**item, **new, "length": torch.tensor(n), "ahead": ahead})
        return collate(padded)

    # Telling

    def plan(self) -> dict[str, str]:
        lines = {}
        for split in ("train", "val"):
            samples: Any = self.samples(split)
            events = sum(len(p.span.times) for p in samples.pieces)
            lines[split] = f"{len(samples):,} sequences, {events:,} events"
        scored = "all events" if self.first_event == "scored" else "events after the first"
        until = "the end of observation" if self.window == "full" else "the last event"
        lines["scored"] = f"{scored}, up to {until}; {len(self.types or [])} types, mean gap {self.time_scale:g}"
        if self.left_out:
            lines["left out"] = f"{self.left_out} sequences with nothing to score"
        return lines

    def summary(self) -> dict[str, Any]:
        sequences = self.reading().sequences
        good = [s for s in sequences if s.problem is None]
        lengths = np.array([len(s.times) for s in good] or [0])
        ties = sum(int((np.diff(s.times) == 0).sum()) for s in good)
        counts = {n: sum(s.split == n for s in sequences) for n in ("train", "val", "test")}
        return {
            "sequences": len(sequences),
            "parts": {k: v for k, v in counts.items() if v} or "none named: they will be cut",
            "events": int(lengths.sum()),
            "lengths": f"{lengths.min()} to {lengths.max()}, median {int(np.median(lengths))}",
            "types": f"{len(self.types or [])}: {', '.join((self.labels or [])[:6])}",
            "ties": ties,
            "window": f"{self.window}, first event {self.first_event}",
        }

    def check(self) -> list[tuple[str, str]]:
        pieces = [self.piece(s) for s in self.reading().sequences]
        return [(p.id, p.problem) for p in pieces if p.problem is not None]


def _scored(span: Span) -> bool:
    """Whether the likelihood says anything about a sequence."""
    return len(span.times) > span.given or (not span.given and span.end > span.start)
