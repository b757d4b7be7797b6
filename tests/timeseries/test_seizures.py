"""From window scores to events, and events against marks."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from timeseries.seizures import Post, Track, agreement, choose_threshold, events, join, kappa, smoothed, total

POST = Post(smooth=1, join=15, shortest=6, tolerance=5)


def track(scores: list[float] | np.ndarray, truth: list[tuple[float, float]], gap_at: int | None = None) -> Track:
    stops = 8.0 + 2.0 * np.arange(len(scores))
    if gap_at is not None:
        stops[gap_at:] += 100
    labels = np.array([float(any(a <= s and b >= s - 2 for a, b in truth)) for s in stops])
    return Track(stops, np.array(scores, float), labels, truth, 2.0, 2.0)


def test_smoothing_looks_back_only_and_not_over_a_gap() -> None:
    scores = [0, 0, 1, 0, 0, 1, 0]
    assert smoothed(track(scores, []), 3).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert smoothed(track(scores, [], gap_at=3), 3).tolist() == pytest.approx([0, 0, 1 / 3, 0, 0, 1 / 3, 1 / 3])


def test_near_events_are_one_and_short_ones_none() -> None:
    scores = np.zeros(100)
    scores[10:14] = scores[18:22] = scores[60] = 1
    found = events(track(scores, []), scores, 0.5, POST)
    assert found == [(26.0, 50.0)]


def test_counts_and_latency() -> None:
    scores = np.zeros(200)
    scores[10:20] = scores[100:110] = 1
    sums = agreement(track(scores, [(30, 44), (350, 370)]), scores, 0.5, POST)
    assert (sums.found, sums.seizures, sums.false_alarms) == (1, 2, 1)
    assert sums.latencies == [28 - 30] and sums.hours == pytest.approx(400 / 3600)
    assert sums.sensitivity == 0.5 and sums.f1 == pytest.approx(2 / 4)
    nearby = agreement(track(scores, [(50, 60)]), scores, 0.5, POST)
    assert nearby.found == 1 and nearby.false_alarms == 1


def test_an_alarm_without_end_is_no_success() -> None:
    scores = np.ones(1800)
    sums = agreement(track(scores, [(1000, 1020)]), scores, 0.5, POST)
    assert sums.found == 1 and sums.false_alarms == 11


def test_the_threshold_finds_all_without_false_alarms_where_that_can_be() -> None:
    rng = np.random.default_rng(0)
    tracks = []
    for _ in range(3):
        scores = rng.uniform(0, 0.3, 900)
        scores[300:310] = rng.uniform(0.7, 0.9, 10)
        tracks.append(track(scores, [(8 + 598, 8 + 620)]))
    level = choose_threshold(tracks, POST)
    sums = total(tracks, level, POST)
    assert 0.3 < level < 0.7 and sums.sensitivity == 1 and sums.false_alarms == 0
    assert choose_threshold([track(np.zeros(10), [])], POST) == 0.5


def test_kappa_is_cohen_s() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(300) < 0.3, rng.random(300) < 0.4
    assert kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_joining() -> None:
    assert join([(5, 6), (0, 1), (1.5, 2)], 0.6) == [(0, 2), (5, 6)]
