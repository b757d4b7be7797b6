"""Files that the commands on recordings write."""

from __future__ import annotations

from pathlib import Path

import edfio
import numpy as np
import pytest

from polyhead.errors import UserError
from timeseries.edf import EdfFile, Mark
from timeseries.recording_commands import annotate, epileptor, write_edf, write_events
from timeseries.recordings import read_events


@pytest.mark.parametrize(
    ("rate", "samples", "padded"), [(200.0, 847, 1000), (1000.0, 15_500, 15_500), (128.0, 384, 384)]
)
def test_any_length_fits_whole_records(tmp_path: Path, rate: float, samples: int, padded: int) -> None:
    row = 3e4 * np.sin(np.arange(samples) / 9).astype(np.float32)
    marks = [Mark(1.25, 2.5, "seizure", ("A1",))]
    write_edf(tmp_path / "a.edf", [("A1", rate, row), ("B1", rate / 2, row[::2])], marks)
    file = EdfFile(tmp_path / "a.edf")
    got = file.read(0, [0], 0, padded)[0]
    assert got.shape == (padded,) and np.abs(got[:samples] - row).max() < 1.0
    assert file.marks == marks and file.rates == [rate, rate / 2]


def test_events_come_back(tmp_path: Path) -> None:
    marks = [Mark(1.5, 2.0, "seizure", ("A1", "A2")), Mark(7.0, 0.0, "note")]
    write_events(tmp_path / "a_events.tsv", marks, [0.9, 0.1])
    assert read_events(tmp_path / "a_events.tsv") == marks
    write_edf(tmp_path / "a.edf", [], marks)
    texts = [(a.onset, a.duration, a.text) for a in edfio.read_edf(tmp_path / "a.edf").annotations]
    assert texts == [(1.5, 2.0, "seizure (A1 A2)"), (7.0, 0.0, "note")]


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/file").touch()
    with pytest.raises(UserError, match="not empty"):
        epileptor(str(tmp_path / "x"))
    with pytest.raises(UserError, match="--recordings"):
        epileptor(str(tmp_path / "y"), recordings=0)
    with pytest.raises(UserError, match="holds no predictions"):
        annotate(str(tmp_path), str(tmp_path / "z"))
