"""Simulated recordings: the same seed, the truth, the two kinds."""

from __future__ import annotations

import time

import numpy as np
import pytest

from polyhead.errors import UserError
from timeseries.epileptor import MICROVOLT, RATE, fixed_point, simulate, stretches
from timeseries.rhythms import NAMES, simulate_states


def test_a_recording_with_its_truth() -> None:
    (one,) = simulate([8], seed=3, hours=1 / 60, seizures=60)
    again = simulate([8], seed=3, hours=1 / 60, seizures=60)[0]
    assert np.array_equal(one.signal, again.signal) and one.seizures == again.seizures
    assert not np.array_equal(one.signal, simulate([8], seed=4, hours=1 / 60, seizures=60)[0].signal)
    assert one.signal.shape == (8, 60 * RATE) and one.signal.dtype == np.int16
    deviation = one.signal.std(1) * MICROVOLT
    assert bool(((deviation > 15) & (deviation < 500)).all())
    assert one.seizures and all(m.duration >= 10 and len(m.channels) == 1 for m in one.seizures)
    ictal = {c for m in one.seizures for c in m.channels}
    # A seizure is louder between 3 and 30 Hz than the same channel before it
    mark = one.seizures[0]
    row = one.signal[mark.channels[0]].astype(float)
    inside = np.diff(row[round((mark.onset + 2) * RATE) : round((mark.onset + 9) * RATE)]).std()
    before = np.diff(row[: round(max(1, mark.onset - 3) * RATE)]).std()
    assert len(ictal) < 8 and inside > before


def test_without_seizures_there_are_none() -> None:
    (one,) = simulate([6], seed=1, hours=1 / 60, seizures=0, artefacts=0)
    assert not one.seizures and not one.artefacts


def test_rest_is_a_fixed_point() -> None:
    x0 = np.array([-2.5, -2.2, -2.06])
    x = fixed_point(x0)
    assert np.allclose(x - (4.1 - 2 * x**2 - x**3) / 4, x0, atol=1e-5)


def test_stretches_are_joined_and_short_ones_left_out() -> None:
    row = np.zeros(100, bool)
    row[5:10] = row[20:30] = row[60:63] = True
    assert stretches(row, 15, 10) == [(5, 30)]


def test_nothing_to_simulate_is_an_error() -> None:
    for arguments in ({"channels": [0]}, {"channels": [4], "hours": 0.001}, {"channels": [4], "seizures": -1}):
        with pytest.raises(UserError):
            simulate(**arguments)  # type: ignore[arg-type]


def test_states_differ_in_the_rhythm_of_known_channels() -> None:
    signal, marks = simulate_states(2, 0)
    assert {s for _, _, s in marks} == {0, 1}
    power = {}
    for state in (0, 1):
        rows = [signal[:, round(a * RATE) : round((a + d) * RATE)] for a, d, s in marks if s == state]
        spectra = [np.abs(np.fft.rfft(r[:, :1000])) ** 2 for r in rows if r.shape[1] >= 1000]
        power[state] = np.mean(spectra, 0)[:, 37:42].mean(1)  # about 10 Hz
    ratio = power[1] / power[0]
    assert ratio[NAMES.index("C3")] < 0.6 and 0.7 < ratio[NAMES.index("O1")] < 1.4


@pytest.mark.slow
def test_it_is_400_times_faster_than_life() -> None:
    began = time.process_time()
    simulate([16], seed=0, hours=1.0)
    assert 3600 / (time.process_time() - began) > 400
