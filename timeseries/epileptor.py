"""Simulated intracranial recordings with seizures at known times and channels: a network of Epileptors.

Equations 1 to 6 of Jirsa, Stacey, Quilichini, Ivanov and Bernard, "On the nature of seizure dynamics", Brain 137
(2014), with coupling through the slow variable as in Proix et al. (J. Neurosci. 34, 2014):

    x1' = y1 - f1(x1, x2, z) - z + 3.1              f1 = x1^3 - 3 x1^2              for x1 < 0
    y1' = 1 - 5 x1^2 - y1                              = (x2 - 0.6 (z - 4)^2) x1    else
    z'  = r (4 (x1 - x0) - z - sum_j K_ij (x1_j - x1_i))
    x2' = x2 - x2^3 - y2 + 0.45 + 2 g - 0.3 (z - 3.5)
    y2' = (6 max(x2 + 0.25, 0) - y2) / 10
    g'  = -0.01 (g - 0.1 x1)

A recording is a row of episodes of two minutes, each started at the fixed point of its excitabilities x0. A
seizure is a focus of two or three contacts whose x0 is raised for about 20 s. What an electrode sees is x2 - x1
of its neighbourhood, with a coloured background, mains and artefacts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from polyhead.errors import UserError

RATE = 256
# Two Euler steps of 0.1 a sample
STEPS, DT = 2, 0.1
EPISODE, SHORTEST_EPISODE, WARM_UP = 120, 40, 10
# x0 beyond which a contact seizes by itself
THRESHOLD = -2.06
# A channel seizes while the 1-s mean of its x1 is above this, gaps joined and short ones left out
ICTAL, JOIN, SHORTEST = -1.1, 15.0, 10.0
# Samples are stored in tenths of a microvolt
MICROVOLT = 0.1
KINDS = ("muscle", "movement", "pop", "rhythm", "mains", "spindle")
# Recordings that are integrated together: one step in NumPy costs the same for a few of them
TOGETHER = 4
MAINS = 50.0


@dataclass
class Marked:
    """A stretch of a recording: a seizure of some channels, or an artefact."""

    onset: float
    duration: float
    kind: str
    channels: list[int] = field(default_factory=list)


@dataclass
class Simulated:
    """One simulated recording.

    Attributes:
        signal: int16 `[C, samples]`, in units of 0.1 microvolts, `RATE` samples a second.
        seizures: a stretch a channel and seizure, by onset.
        artefacts: by onset.
    """

    signal: np.ndarray
    seizures: list[Marked]
    artefacts: list[Marked]


def fixed_point(x0: np.ndarray) -> np.ndarray:
    """x1 at rest for an excitability: the root of x - (4.1 - 2 x^2 - x^3) / 4 = x0, which rises with x."""
    grid = np.linspace(-3.2, -0.6, 4001)
    return np.interp(x0, grid - (4.1 - 2 * grid**2 - grid**3) / 4, grid)


@dataclass
class _Plan:
    """Excitability of one recording's episodes: resting and raised `[E, C]`, when it is raised, the slow rates."""

    rest: np.ndarray
    raised: np.ndarray
    from_second: np.ndarray
    to_second: np.ndarray
    rate: np.ndarray


def _plan(rng: np.random.Generator, episodes: int, seconds: int, channels: int, seizures: int) -> _Plan:
    focus_size = min(channels, int(rng.integers(2, 4)))
    first = int(rng.integers(0, channels - focus_size + 1))
    focus = np.arange(first, first + focus_size)
    near = np.arange(max(0, first - 1), min(channels, first + focus_size + 1))
    rest = rng.uniform(-2.6, -2.4, (episodes, channels))
    rest[:, near] = rng.uniform(-2.3, -2.2, (episodes, len(near)))
    raised = rest.copy()
    start, stop = np.full(episodes, np.inf), np.full(episodes, np.inf)
    for episode in rng.choice(episodes, min(seizures, episodes), replace=False):
        raised[episode, focus] = rng.uniform(-1.7, -1.5, focus_size)
        start[episode] = rng.uniform(15, 50) * seconds / EPISODE
        stop[episode] = start[episode] + rng.uniform(18, 25)
    return _Plan(rest, raised, start, stop, rng.uniform(0.00025, 0.0004, (episodes, 1)))


def _integrate(
    plans: Sequence[_Plan], rngs: Sequence[np.random.Generator], seconds: int
) -> tuple[np.ndarray, np.ndarray]:
    """All episodes of some recordings at once: x2 - x1 `[E, samples, C]` and the 1-s means of x1 `[E, s, C]`."""
    width = max(p.rest.shape[1] for p in plans)

    def joined(name: str) -> np.ndarray:
        padded = [np.pad(getattr(p, name), ((0, 0), (0, width - p.rest.shape[1])), constant_values=-2.5) for p in plans]
        return np.concatenate(padded).astype(np.float32)

    rest, raised = joined("rest"), joined("raised")
    r = np.concatenate([p.rate for p in plans]).astype(np.float32)
    start, stop = (np.concatenate([getattr(p, n) for p in plans]) for n in ("from_second", "to_second"))
    there = np.concatenate([np.arange(width) < p.rest.shape[1] for p in plans for _ in p.rest]).reshape(-1, width)
    there = there.astype(np.float32)
    index = np.arange(width)
    coupling = (0.5 * np.exp(-np.abs(index[:, None] - index))).astype(np.float32)
    np.fill_diagonal(coupling, 0)
    degree = there @ coupling
    x1 = fixed_point(rest).astype(np.float32)
    z = 4.1 - 2 * x1**2 - x1**3
    y1, x2, y2, g = 1 - 5 * x1**2, np.full_like(x1, -0.5), np.zeros_like(x1), 0.1 * x1
    per_second = RATE * STEPS
    seen = np.empty((len(rest), seconds * RATE, width), np.float32)
    means = np.empty((len(rest), seconds, width), np.float32)
    spread = np.float32(np.sqrt(DT))
    dt = np.float32(DT)
    for second in range(-WARM_UP, seconds):
        x0 = np.where(((second >= start) & (second < stop))[:, None], raised, rest).astype(np.float32)
        drawn = []
        for plan, rng in zip(plans, rngs, strict=True):
            own = rng.standard_normal((2, per_second, *plan.rest.shape), dtype=np.float32)
            drawn.append(np.pad(own, ((0, 0), (0, 0), (0, 0), (0, width - own.shape[-1]))))
        noise = np.concatenate(drawn, 2) if len(drawn) > 1 else drawn[0]
        noise[0] *= 0.025 * spread
        noise[1] *= 0.25 * spread
        total = np.zeros_like(x1)
        for step in range(per_second):
            square = x1 * x1
            low = x1 < 0
            f1 = np.where(low, square * (x1 - 3), (x2 - 0.6 * np.square(z - 4)) * x1)
            # Explicit Euler diverges on the cubic branch: its own slope is taken implicitly
            brake = 1 + dt * np.where(low, 3 * square - 6 * x1, 0)
            pull = (x1 * there) @ coupling - degree * x1
            d1 = (y1 - f1 - z + 3.1) * dt
            dz = r * (4 * (x1 - x0) - z - pull) * dt
            d2 = (x2 - x2 * x2 * x2 - y2 + 0.45 + 2 * g - 0.3 * (z - 3.5)) * dt
            dy2 = (6 * np.maximum(x2 + 0.25, 0) - y2) * (dt / 10)
            y1 += (1 - 5 * square - y1) * dt
            g -= (0.01 * dt) * (g - 0.1 * x1)
            x1 += d1 / brake + noise[0, step]
            z += dz
            x2 += d2 + noise[1, step]
            y2 += dy2
            total += x1
            if second >= 0 and step % STEPS == STEPS - 1:
                np.subtract(x2, x1, out=seen[:, second * RATE + step // STEPS])
        if second >= 0:
            means[:, second] = total / per_second
    return seen, means


def _moving_mean(x: np.ndarray, size: int) -> np.ndarray:
    """The centred mean over `size` samples of the last axis, shorter at the ends."""
    sums = np.concatenate([np.zeros((*x.shape[:-1], 1)), np.cumsum(x, -1, dtype=np.float64)], -1)
    right = np.minimum(np.arange(x.shape[-1]) + size // 2 + 1, x.shape[-1])
    left = np.maximum(np.arange(x.shape[-1]) - size // 2, 0)
    return (sums[..., right] - sums[..., left]) / (right - left)


def coloured(rng: np.random.Generator, channels: int, samples: int, exponent: float = 1.5) -> np.ndarray:
    """Noise of unit deviation whose power falls as 1 / f^exponent, `[C, samples]`."""
    size = 1 << (samples - 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal((channels, size), dtype=np.float32))
    frequency = np.fft.rfftfreq(size, 1 / RATE)
    spectrum *= np.maximum(frequency, 0.2) ** (-exponent / 2)
    spectrum[:, 0] = 0
    noise = np.fft.irfft(spectrum, size)[:, :samples]
    return noise / noise.std(1, keepdims=True)


def _band(rng: np.random.Generator, channels: int, samples: int, low: float, high: float) -> np.ndarray:
    """Noise of unit deviation between two frequencies, `[C, samples]`."""
    spectrum = np.fft.rfft(rng.standard_normal((channels, samples)))
    frequency = np.fft.rfftfreq(samples, 1 / RATE)
    spectrum[:, (frequency < low) | (frequency > high)] = 0
    noise = np.fft.irfft(spectrum, samples)
    return noise / np.maximum(noise.std(1, keepdims=True), 1e-9)


def _artefact(rng: np.random.Generator, kind: str, channels: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which channels, and what is added to them in microvolts `[n, samples]`."""
    time = np.arange(samples) / RATE
    many = rng.permutation(channels)[: max(1, round(channels * rng.uniform(0.5, 1.0)))]
    first = int(rng.integers(0, channels))
    few = np.arange(first, min(channels, first + int(rng.integers(1, 5))))
    fade = np.minimum(1, np.minimum(time, time[::-1]) / 0.5)
    if kind == "muscle":
        return few, rng.uniform(60, 200) * fade * _band(rng, len(few), samples, 20, 100)
    if kind == "movement":
        return many, rng.uniform(100, 400) * fade * _band(rng, len(many), samples, 0.3, 3)
    if kind == "pop":
        height = rng.uniform(300, 1000) * rng.choice([-1, 1])
        return few[:1], height * np.exp(-time / rng.uniform(0.3, 1.5))[None]
    if kind == "rhythm":
        phase = 2 * np.pi * rng.uniform(2, 7) * time
        shape = np.sin(phase) + 0.3 * np.sin(2 * phase + rng.uniform(0, 6))
        return many, rng.uniform(50, 150) * fade * shape * rng.uniform(0.6, 1.2, (len(many), 1))
    if kind == "mains":
        return many, rng.uniform(30, 150) * np.sin(2 * np.pi * MAINS * time) * rng.uniform(0.5, 1, (len(many), 1))
    return many, rng.uniform(40, 100) * np.hanning(samples) * np.sin(2 * np.pi * rng.uniform(11, 15) * time)[None]


def _record(rng: np.random.Generator, source: np.ndarray, artefacts: int) -> tuple[np.ndarray, list[Marked]]:
    """What the electrodes see of x2 - x1 `[C, samples]`, and where artefacts lie."""
    channels, samples = source.shape
    index = np.arange(channels)
    mixing = np.exp(-np.abs(index[:, None] - index) / 0.6)
    signal = (mixing @ (source - _moving_mean(source, 2 * RATE))).astype(np.float32)
    signal *= rng.uniform(60, 110, (channels, 1))
    background = coloured(rng, channels + 1, samples)
    shared = rng.uniform(0.1, 0.5)
    signal += rng.uniform(25, 50, (channels, 1)) * (
        np.sqrt(1 - shared) * background[1:] + np.sqrt(shared) * background[:1]
    )
    time = np.arange(samples) / RATE
    signal += rng.uniform(1, 6, (channels, 1)) * np.sin(2 * np.pi * MAINS * time + rng.uniform(0, 6))
    marks = []
    for kind in KINDS:
        for _ in range(artefacts):
            seconds = rng.uniform(1, 2) if kind == "spindle" else rng.uniform(4, 20)
            size = min(round(seconds * RATE), samples)
            start = int(rng.integers(0, samples - size + 1))
            where, added = _artefact(rng, kind, channels, size)
            signal[where, start : start + size] += added.astype(np.float32)
            marks.append(Marked(start / RATE, size / RATE, kind, sorted(int(c) for c in where)))
    return np.clip(signal / MICROVOLT, -32767, 32767).astype(np.int16), sorted(marks, key=lambda m: m.onset)


def stretches(active: np.ndarray, join: float, shortest: float) -> list[tuple[float, float]]:
    """Runs of True in a row of seconds as (onset, offset); gaps under `join` are joined, short ones left out."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    merged: list[tuple[float, float]] = []
    for onset, offset in edges.reshape(-1, 2).tolist():
        if merged and onset - merged[-1][1] < join:
            merged[-1] = (merged[-1][0], offset)
        else:
            merged.append((onset, offset))
    return [(a, b) for a, b in merged if b - a >= shortest]


def simulate(
    channels: Sequence[int], seed: int = 0, hours: float = 1.0, seizures: int = 4, artefacts: int = 6
) -> list[Simulated]:
    """A recording for every entry of `channels`.

    Args:
        channels: contacts of each recording.
        seed: the same seed gives the same bits.
        hours: length of each, in whole seconds; cut into equal episodes of at most two minutes.
        seizures: an hour of each recording, at least one where it is not 0.
        artefacts: an hour, of each of `KINDS`.

    Raises:
        UserError: a recording without channels or too short for a seizure.
    """
    episodes = max(1, round(hours * 3600 / EPISODE))
    seconds = min(EPISODE, round(hours * 3600 / episodes))
    if seconds < SHORTEST_EPISODE or any(c < 1 for c in channels) or min(seizures, artefacts) < 0:
        raise UserError(f"nothing to simulate: recordings need a channel and {SHORTEST_EPISODE} s or more")
    count = max(1, round(seizures * hours)) if seizures else 0
    result: list[Simulated] = []
    for start in range(0, len(channels), TOGETHER):
        own = channels[start : start + TOGETHER]
        rngs = [np.random.default_rng([seed, start + i]) for i in range(len(own))]
        plans = [_plan(rng, episodes, seconds, c, count) for rng, c in zip(rngs, own, strict=True)]
        seen, means = _integrate(plans, rngs, seconds)
        for i, (rng, width) in enumerate(zip(rngs, own, strict=True)):
            part = slice(i * episodes, (i + 1) * episodes)
            source = seen[part, :, :width].reshape(-1, width).T
            signal, marks = _record(rng, source, round(artefacts * hours))
            active = means[part, :, :width].reshape(-1, width) > ICTAL
            found = [
                Marked(a, b - a, "seizure", [c])
                for c in range(width) for a, b in stretches(active[:, c], JOIN, SHORTEST)
            ]  # fmt: skip
            result.append(Simulated(signal, sorted(found, key=lambda m: (m.onset, m.channels)), marks))
    return result
