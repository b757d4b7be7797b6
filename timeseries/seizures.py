"""From probabilities of windows to seizures, and how well they agree with marked ones.

A window speaks of its last segment, `[stop - segment, stop]`. Scores are smoothed backwards in time, those above
a threshold become events, near ones are joined and short ones left out; an event is right when it meets a marked
seizure within a tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Intervals = list[tuple[float, float]]


@dataclass(frozen=True)
class Post:
    """How scores become events.

    Attributes:
        smooth: windows that are averaged, the present one and those before it.
        join: seconds; events with a shorter gap between them are one.
        shortest: seconds; shorter events are left out.
        tolerance: seconds by which an event may miss a marked seizure.
        longest: seconds; longer events are cut into pieces of at most this, each right or wrong by itself, so
            that an alarm that never ends is no success (as in SzCORE, Dan et al. 2024).
    """

    smooth: int = 3
    join: float = 15.0
    shortest: float = 6.0
    tolerance: float = 5.0
    longest: float = 300.0


@dataclass
class Track:
    """The windows of one recording in time.

    Attributes:
        stops: seconds at which each window ends, ascending `[n]`.
        scores: probability of a seizure `[n]`.
        labels: 1 where the last segment meets a marked seizure `[n]`.
        truth: marked seizures.
        stride, segment: seconds between windows, and of the part that a window speaks of.
    """

    stops: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    truth: Intervals
    stride: float
    segment: float

    @property
    def hours(self) -> float:
        return len(self.stops) * self.stride / 3600


class Agreement(NamedTuple):
    """Counts and times of events against marked seizures."""

    found: int
    seizures: int
    false_alarms: int
    hours: float
    latencies: list[float]

    def __add__(self, other: Agreement) -> Agreement:  # type: ignore[override]
        pairs: Any = zip(self, other, strict=True)
        return Agreement(*(a + b for a, b in pairs))

    @property
    def sensitivity(self) -> float:
        return self.found / self.seizures if self.seizures else float("nan")

    @property
    def per_hour(self) -> float:
        return self.false_alarms / self.hours if self.hours else float("nan")

    @property
    def f1(self) -> float:
        """Over episodes: found ones, false alarms and missed ones."""
        total = 2 * self.found + self.false_alarms + (self.seizures - self.found)
        return 2 * self.found / total if total else float("nan")


def join(intervals: Sequence[tuple[float, float]], gap: float) -> Intervals:
    """Intervals in order, those nearer than `gap` made one."""
    merged: Intervals = []
    for start, stop in sorted(intervals):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def smoothed(track: Track, windows: int) -> np.ndarray:
    """The mean of each score and the `windows` - 1 before it; a gap in time begins anew."""
    scores = track.scores.astype(np.float64)
    if windows <= 1 or not len(scores):
        return scores
    breaks = np.flatnonzero(np.diff(track.stops) > 1.5 * track.stride) + 1
    parts = []
    for part in np.split(scores, breaks):
        sums = np.concatenate([[0.0], np.cumsum(part)])
        first = np.maximum(np.arange(len(part)) - windows + 1, 0)
        parts.append((sums[1:] - sums[first]) / (np.arange(len(part)) + 1 - first))
    return np.concatenate(parts)


def events(track: Track, smooth: np.ndarray, threshold: float, post: Post) -> Intervals:
    """Stretches of windows whose smoothed score reaches the threshold, joined, short ones left out."""
    above = track.stops[smooth >= threshold]
    found = join([(s - track.segment, s) for s in above], max(post.join, 1e-6))
    return [(a, b) for a, b in found if b - a >= post.shortest - 1e-9]


def cut(intervals: Intervals, longest: float) -> Intervals:
    """Intervals in pieces of equal length, none above `longest`."""
    pieces: Intervals = []
    for a, b in intervals:
        count = max(1, int(np.ceil((b - a) / longest - 1e-9)))
        edges = np.linspace(a, b, count + 1).tolist()
        pieces += list(zip(edges, edges[1:], strict=False))
    return pieces


def agreement(track: Track, smooth: np.ndarray, threshold: float, post: Post) -> Agreement:
    """Events against marked seizures. Latency is from the mark to the end of the first window above threshold."""
    found = cut(events(track, smooth, threshold, post), post.longest)
    slack = post.tolerance
    latencies, hit = [], [False] * len(found)
    for onset, offset in track.truth:
        meeting = [i for i, (a, b) in enumerate(found) if a <= offset + slack and b >= onset - slack]
        for i in meeting:
            hit[i] = True
        if meeting:
            latencies.append(found[meeting[0]][0] + track.segment - onset)
    return Agreement(len(latencies), len(track.truth), hit.count(False), track.hours, latencies)


def total(tracks: Sequence[Track], threshold: float, post: Post) -> Agreement:
    """`agreement` over recordings."""
    sums = Agreement(0, 0, 0, 0.0, [])
    for track in tracks:
        sums = sums + agreement(track, smoothed(track, post.smooth), threshold, post)
    return sums


def alarmed(tracks: Sequence[Track], threshold: float, post: Post) -> tuple[np.ndarray, np.ndarray]:
    """Every window's label, and whether it lies in an event."""
    inside = []
    for track in tracks:
        state = np.zeros(len(track.stops), bool)
        for a, b in events(track, smoothed(track, post.smooth), threshold, post):
            state |= (track.stops > a + 1e-9) & (track.stops <= b + 1e-9)
        inside.append(state)
    labels = np.concatenate([t.labels for t in tracks]) > 0
    return labels, np.concatenate(inside)


def kappa(labels: np.ndarray, states: np.ndarray) -> float:
    """Cohen's kappa of two binary rows; not a number where both say the same everywhere."""
    agree = float((labels == states).mean())
    chance = float(labels.mean() * states.mean() + (1 - labels.mean()) * (1 - states.mean()))
    return (agree - chance) / (1 - chance) if chance < 1 else float("nan")


def choose_threshold(tracks: Sequence[Track], post: Post, per_hour: float = 0.1) -> float:
    """The threshold with the most seizures found at no more than so many false alarms an hour, or one in all: none
    in a few hours would ask for less than so many.

    Of equally good ones the middle of the widest range, on the logarithm of the odds, since a narrow one owes
    more to chance.
    """
    odds = np.linspace(-6, 6, 97)
    levels = 1 / (1 + np.exp(-odds))
    if not any(t.truth for t in tracks):
        return 0.5
    smooth = [smoothed(t, post.smooth) for t in tracks]
    allowed = np.ceil(per_hour * sum(t.hours for t in tracks))
    values = []
    for level in levels:
        sums = Agreement(0, 0, 0, 0.0, [])
        for track, row in zip(tracks, smooth, strict=True):
            sums = sums + agreement(track, row, float(level), post)
        values.append((-max(0.0, sums.false_alarms - allowed), sums.found, -sums.false_alarms))
    best = max(values)
    good = np.array([v == best for v in values])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], good.astype(int), [0]]))).reshape(-1, 2)
    first, last = max(edges.tolist(), key=lambda e: e[1] - e[0])
    return float(levels[(first + last - 1) // 2])
