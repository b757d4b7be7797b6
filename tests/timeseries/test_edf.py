"""EDF and BDF: record lengths, several rates, gaps, units, annotations, damage."""

from __future__ import annotations

from pathlib import Path

import edfio
import numpy as np
import pytest

from polyhead.errors import BadSample
from timeseries.edf import EdfFile, Mark, Piece


def signal(rate: float, seconds: float, label: str, unit: str = "uV", kind: type = edfio.EdfSignal) -> edfio.EdfSignal:
    data = 100 * np.sin(np.arange(round(rate * seconds)) / 7) + len(label)
    return kind(data, rate, label=label, physical_dimension=unit, physical_range=(-200, 200))


def made_discontinuous(path: Path, record: float, starts: list[float], width: int = 2) -> None:
    """Rewrite a continuous file's record starts, and say that it has gaps."""
    raw = bytearray(path.read_bytes())
    raw[192:197] = b"EDF+D" if width == 2 else b"BDF+D"
    number = int(raw[252:256])
    labels = [raw[256 + 16 * i : 272 + 16 * i].decode().strip() for i in range(number)]
    at = 256 + number * 216
    samples = [int(raw[at + 8 * i : at + 8 * i + 8]) for i in range(number)]
    offset = sum(s for s, n in zip(samples, labels, strict=True) if "Annotations" not in n) * width
    size = sum(samples) * width
    for i, start in enumerate(starts):
        place = 256 * (number + 1) + i * size + offset
        text = f"+{start:g}\x14\x14\x00".encode()
        end = raw.index(b"\x00", place) + 1
        rest = raw[end : place + (size - offset)]
        raw[place : place + size - offset] = (text + rest)[: size - offset].ljust(size - offset, b"\0")
    path.write_bytes(raw)


@pytest.mark.parametrize("record", [0.25, 1.0, 2.5])
def test_any_record_length_and_several_rates(tmp_path: Path, record: float) -> None:
    signals = [signal(200, 10, "A1"), signal(40, 10, "slow"), signal(200, 10, "A2")]
    edfio.Edf(signals, data_record_duration=record).write(tmp_path / "a.edf")
    file = EdfFile(tmp_path / "a.edf")
    assert file.names == ["A1", "slow", "A2"] and file.rates == [200, 40, 200] and file.pieces == [Piece(0.0, 10.0)]
    for channel in range(3):
        whole = signals[channel].data
        assert np.abs(file.read(0, [channel], 0, len(whole))[0] - whole).max() < 0.01
    assert np.abs(file.read(0, [0, 2], 333, 777) - np.stack([signals[i].data[333:777] for i in (0, 2)])).max() < 0.01


def test_bdf_has_24_bits(tmp_path: Path) -> None:
    one = signal(128, 5, "A1", kind=edfio.BdfSignal)
    edfio.Bdf([one], annotations=[edfio.EdfAnnotation(2.5, 1.0, "seizure")]).write(tmp_path / "a.bdf")
    file = EdfFile(tmp_path / "a.bdf")
    assert np.abs(file.read(0, [0], 0, 640)[0] - one.data).max() < 1e-4
    assert file.marks == [Mark(2.5, 1.0, "seizure")]


@pytest.mark.parametrize(("unit", "factor"), [("uV", 1), ("mV", 1e3), ("V", 1e6), ("nV", 1e-3), ("degC", 1)])
def test_units_come_out_as_microvolts(tmp_path: Path, unit: str, factor: float) -> None:
    one = signal(100, 4, "A1", unit)
    edfio.Edf([one]).write(tmp_path / "a.edf")
    got = EdfFile(tmp_path / "a.edf").read(0, [0], 0, 400)[0]
    assert np.abs(got / factor - one.data).max() < 0.01


@pytest.mark.parametrize("width", [2, 3])
def test_gaps_are_kept(tmp_path: Path, width: int) -> None:
    path = tmp_path / "a.edf"
    kind, file_kind = (edfio.EdfSignal, edfio.Edf) if width == 2 else (edfio.BdfSignal, edfio.Bdf)
    one = signal(100, 6, "A1", kind=kind)
    notes = [edfio.EdfAnnotation(2.2, 1.0, "seizure@@A1")]
    file_kind([one], data_record_duration=1.0, annotations=notes).write(path)
    # Annotations say true times: they stay where they are while records move
    made_discontinuous(path, 1.0, [10, 11, 12, 30, 31, 50], width)
    file = EdfFile(path)
    assert file.pieces == [Piece(0.0, 3.0), Piece(20.0, 2.0), Piece(40.0, 1.0)]
    assert file.marks == [Mark(2.2 - 10, 1.0, "seizure", ("A1",))]
    assert np.abs(file.read(1, [0], 50, 150)[0] - one.data[350:450]).max() < 0.01
    assert any("2 gaps" in n for n in file.notes)


def test_what_is_no_edf_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.edf"
    for content in (b"", b"hello", b"0       " + b"x" * 300):
        path.write_bytes(content)
        with pytest.raises(BadSample):
            EdfFile(path)
    edfio.Edf([signal(100, 10, "A1")]).write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    file = EdfFile(path)
    assert file.pieces[0].duration < 6 and "the file holds" in file.notes[0]
    path.write_bytes(whole[:520])
    with pytest.raises(BadSample, match="no data record"):
        EdfFile(path)
