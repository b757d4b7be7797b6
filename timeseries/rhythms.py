"""Simulated scalp recordings in which states alternate: blocks of about 4 s whose rhythms differ in known channels.

In every state but the first the 10-Hz rhythm of some channels is weaker, as it is over the hand area in movement
(event-related desynchronisation; Pfurtscheller and Lopes da Silva 1999).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from timeseries.epileptor import RATE, coloured

NAMES = ("Fz", "F3", "F4", "C3", "Cz", "C4", "P3", "Pz", "P4", "O1", "O2", "T7", "T8")
# Channels whose rhythm weakens in each state but the first, in turn
WEAKENED = (("C3", "P3"), ("C4", "P4"), ("Cz", "Pz"))
BLOCK = 4.1
# Share of the rhythm's amplitude that is left
LEFT = 0.45


def simulate_states(states: int, seed: int, blocks: int = 30) -> tuple[np.ndarray, list[tuple[float, float, int]]]:
    """One recording: microvolts `[13, samples]` at 256 Hz, and (onset, duration, state) of its blocks.

    Args:
        states: how many; they alternate, the first between the others.
        seed: of everything random.
        blocks: how many blocks.
    """
    rng = np.random.default_rng(seed)
    samples = round(blocks * BLOCK * RATE)
    time = np.arange(samples) / RATE
    order = [0 if i % 2 == 0 else 1 + (i // 2) % (states - 1) for i in range(blocks)] if states > 1 else [0] * blocks
    marks = [(i * BLOCK, BLOCK, state) for i, state in enumerate(order)]
    envelope = np.ones((len(NAMES), samples))
    for onset, duration, state in marks:
        inside = slice(round(onset * RATE), round((onset + duration) * RATE))
        if state:
            envelope[[NAMES.index(n) for n in WEAKENED[(state - 1) % len(WEAKENED)]], inside] = LEFT
    phase = 2 * np.pi * 10 * time + np.cumsum(rng.normal(0, 0.05, (len(NAMES), samples)), 1)
    strength = rng.uniform(6, 12, (len(NAMES), 1)) * (1 + 0.3 * coloured(rng, len(NAMES), samples, 1.0)).clip(0.2)
    signal = 10 * coloured(rng, len(NAMES), samples) + envelope * strength * np.sin(phase)
    return signal.astype(np.float32), marks


def state_names(labels: Mapping[str, Sequence[str]]) -> list[str]:
    """A text for each class that its patterns match."""
    return [next(iter(patterns)).replace("*", "") or name for name, patterns in labels.items()]
