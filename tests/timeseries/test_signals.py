"""Preparation of recordings: blocks, resampling, references, bad channels, bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import BadSample
from timeseries.edf import Mark, Piece
from timeseries.recordings import ArraySource, Recording
from timeseries.signals import Preparation, Prepared, bipolar_pairs

PLAIN = Preparation(rate=100, reference="none", scale="microvolt")


def recording(signal: np.ndarray, rate: float = 100.0, names: list[str] | None = None, bads: set[str] | None = None,
              marks: list[Mark] | None = None) -> Recording:  # fmt: skip
    names = names or [f"A{i + 1}" for i in range(len(signal))]
    source = ArraySource(signal.astype(np.float32), rate, names)
    return Recording("one", source, ["seeg"] * len(names), bads or set(), marks or [], "p")


def noise(channels: int = 4, seconds: float = 90, rate: float = 100, seed: int = 0) -> np.ndarray:
    return 50 * np.random.default_rng(seed).normal(size=(channels, round(seconds * rate)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 80), st.integers(1, 900), st.sampled_from([64.0, 100.0, 128.0, 249.5]))
def test_a_sample_does_not_depend_on_who_asks(start: int, size: int, rate: float) -> None:
    how = Preparation(rate=rate, reference="median", notch=20.0, low=0.5, high=30.0, scale="microvolt")
    first = Prepared(recording(noise()), how)
    whole = first.read(0, 0, first.pieces[0][1])
    start = round(start * rate)
    size = min(size, first.pieces[0][1] - start)
    assert np.array_equal(Prepared(recording(noise()), how).read(0, start, size), whole[:, start : start + size])


@pytest.mark.parametrize(("rate", "target"), [(2000, 256), (160, 208), (128, 256), (512, 512), (249.9, 256)])
def test_a_sine_stays_where_it_is(rate: float, target: float) -> None:
    seconds = 70
    time = np.arange(round(seconds * rate)) / rate
    row = 100 * np.sin(2 * np.pi * 11 * time)
    out = Prepared(recording(row[None], rate), Preparation(rate=target, reference="none", scale="microvolt"))
    got = out.read(0, 0, out.pieces[0][1])[0]
    expected = 100 * np.sin(2 * np.pi * 11 * np.arange(len(got)) / target)
    edge = round(target)
    assert np.abs(got - expected)[edge:-edge].max() < 1.5


def test_what_the_new_rate_cannot_hold_is_filtered_out() -> None:
    time = np.arange(60 * 1000) / 1000
    out = Prepared(recording(100 * np.sin(2 * np.pi * 90 * time)[None], 1000), PLAIN)
    assert np.abs(out.read(0, 500, 1000)).max() < 5


def test_references() -> None:
    signal = noise()
    for name, expected in (
        ("average", signal - signal.mean(0)), ("median", signal - np.median(signal, 0)),
        ("bipolar", signal[:-1] - signal[1:]),
    ):  # fmt: skip
        got = Prepared(recording(signal), Preparation(rate=100, reference=name, scale="microvolt"))  # type: ignore[arg-type]
        assert np.allclose(got.read(0, 0, 9000), expected, atol=1e-3)
    assert got.names == ["A1-A2", "A2-A3", "A3-A4"]
    assert bipolar_pairs(["LA2", "LA1", "B1", "LA10", "REF"]) == [(1, 0)]


def test_one_or_two_channels_are_not_their_own_reference() -> None:
    for count in (1, 2):
        out = Prepared(recording(noise(count)), Preparation(rate=100, reference="median", scale="microvolt"))
        assert np.allclose(out.read(0, 0, 500), noise(count)[:, :500], atol=1e-3)
        assert any("too few for a common reference" in n for n in out.notes)


def test_the_deviation_scale_makes_units_irrelevant() -> None:
    how = Preparation(rate=100, reference="none", scale="mad")
    one, other = (Prepared(recording(noise() * k), how) for k in (1.0, 1e-6))
    assert np.allclose(one.read(0, 0, 500), other.read(0, 0, 500), rtol=1e-3)
    assert any("volts taken for microvolts" in n for n in other.notes) and not one.notes


def test_bad_channels_are_left_out_and_said() -> None:
    signal = noise(6)
    signal[1] = 7.0
    signal[2] = np.nan
    signal[3] = np.clip(signal[3], -20, 20)
    signal[4, 100:103] = np.nan
    out = Prepared(recording(signal, bads={"A6"}), PLAIN)
    assert out.names == ["A1", "A4", "A5"]
    text = "; ".join(out.notes)
    assert "A2) flat, left out" in text and "A3) not numbers, left out" in text and "A4) clipped, kept" in text
    assert "A6) marked bad" in text
    assert bool(np.isfinite(out.read(0, 0, 500)).all())
    with pytest.raises(BadSample, match="flat or hold no numbers"):
        Prepared(recording(np.zeros((2, 9000))), PLAIN)
    with pytest.raises(BadSample, match="no channel of the kinds"):
        Prepared(Recording("x", ArraySource(noise(), 100, ["a", "b", "c", "d"]), ["ecg"] * 4, set(), [], "p"), PLAIN)


def test_named_channels_come_in_order_and_missing_ones_are_silent() -> None:
    signal = noise(3)
    how = Preparation(rate=100, reference="none", scale="microvolt", channels=("A3", "B9", "a1"))
    out = Prepared(recording(signal), how)
    got = out.read(0, 0, 400)
    assert out.names == ["A3", "B9", "a1"] and not got[1].any()
    assert np.allclose(got[[0, 2]], signal[[2, 0], :400], atol=1e-3)
    with pytest.raises(BadSample, match="none of the channels"):
        Prepared(recording(signal), Preparation(rate=100, channels=("X1", "X2")))


def test_channels_of_several_rates() -> None:
    class Two(ArraySource):
        def __init__(self) -> None:
            self.fast, self.slow = noise(1, 60, 200), noise(1, 60, 50)
            self.names, self.rates, self.pieces = ["A1", "A2"], [200.0, 50.0], [Piece(0.0, 60.0)]

        def read(self, piece: int, channels: object, start: int, stop: int) -> np.ndarray:
            return (self.fast if list(channels) == [0] else self.slow)[:, start:stop].astype(np.float32)  # type: ignore[call-overload]

    out = Prepared(Recording("x", Two(), ["seeg"] * 2, set(), [], "p"), PLAIN)
    assert out.read(0, 0, 6000).shape == (2, 6000)
    assert any("2 rates, 50 to 200 Hz" in n for n in out.notes) and any("resampled up from 50" in n for n in out.notes)


def test_beyond_a_piece_lies_its_mirror_image() -> None:
    signal = noise(2, 3)
    got = Prepared(recording(signal), PLAIN).read(0, -50, 400)
    assert np.allclose(got[:, 50:350], signal, atol=1e-3) and np.allclose(got[:, :50], signal[:, 49::-1], atol=1e-3)


MEMORY = """
import resource, sys
import numpy as np
from timeseries.edf import EdfFile
from timeseries.recordings import Recording
from timeseries.signals import Cache, Preparation, Prepared
source = EdfFile(sys.argv[1])
one = Recording("a", source, ["eeg"] * len(source.names), set(), source.marks, "p")
out = Prepared(one, Preparation(rate=256), Cache(64))
total = out.pieces[0][1]
for start in range(0, total - 2048, 2048):
    out.read(0, start, 2048)
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def long_edf(path: Path, minutes: float, channels: int, rate: int) -> None:
    """A header, then records of random samples written one after the other."""
    import edfio

    one = [edfio.EdfSignal(np.zeros(rate), rate, label=f"A{i}", physical_dimension="uV", physical_range=(-500, 500))
           for i in range(channels)]  # fmt: skip
    edfio.Edf(one, data_record_duration=1.0).write(path)
    head = path.read_bytes()[: 256 * (channels + 1)]
    seconds = round(minutes * 60)
    record = np.random.default_rng(0).integers(-3000, 3000, (channels * rate,)).astype("<i2")
    with path.open("wb") as file:
        file.write(head[:236] + str(seconds).ljust(8).encode() + head[244:])
        for i in range(seconds):
            file.write(np.roll(record, 17 * i).tobytes())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    peaks = []
    for minutes in (10, 100):
        path = tmp_path / f"{minutes}.edf"
        long_edf(path, minutes, 128, 256)
        done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parents[2])  # fmt: skip
        peaks.append(int(done.stdout.split()[1]))
        path.unlink()
    assert peaks[1] < 1.1 * peaks[0]
