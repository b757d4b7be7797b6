"""The data module of recordings: windows, labels, parts, balance, readers, bad input."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import edfio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from polyhead.data import Split
from polyhead.errors import BadSample, UserError
from tests.timeseries.test_edf import made_discontinuous
from timeseries.recording_data import RecordingData
from timeseries.recordings import clean, find_recordings, is_recording, label_kind, open_recording, patient
from timeseries.swec import Windows as SwecWindows
from timeseries.swec import same_patient, write_swec

RATE = 100.0
PLAIN: dict[str, Any] = {"rate": RATE, "segment": 1.0, "segments": 4, "reference": "none", "scale": "microvolt"}


def write(path: Path, seconds: float = 120, channels: int = 3, rate: float = RATE, seed: int = 0,
          marks: list[tuple[float, float, str]] | None = None, unit: str = "uV") -> np.ndarray:  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    data = 40 * np.random.default_rng(seed).normal(size=(channels, round(seconds * rate)))
    signals = [
        edfio.EdfSignal(row, rate, label=f"A{i + 1}", physical_dimension=unit, physical_range=(-400, 400))
        for i, row in enumerate(data.clip(-400, 400))
    ]
    notes = [edfio.EdfAnnotation(*m) for m in marks or []]
    edfio.Edf(signals, annotations=notes).write(path)
    return data


def module(root: Path | None, **options: Any) -> RecordingData:
    return RecordingData(**{"root": None if root is None else str(root), **PLAIN, **options})


def spans(data: RecordingData, split: Split) -> dict[str, list[tuple[float, float]]]:
    """The stretches that a part's windows read, by recording."""
    samples: Any = data.samples(split)
    found: dict[str, list[tuple[float, float]]] = {}
    for number, piece, first, *_ in samples.rows.tolist():
        opened = samples.recordings[number]
        start = opened.prepared.pieces[piece][0] + first / data.rate
        found.setdefault(opened.id, []).append((start, start + data.window))
    return found


def test_labels_follow_the_last_segment(tmp_path: Path) -> None:
    write(tmp_path / "a.edf", marks=[(30.0, 5.0, "Seizure left"), (60.0, 4.0, "cough")])
    data = module(tmp_path, val_fraction=0.3, test_fraction=0.3)
    data.setup("fit")
    samples: Any = data.samples("train")
    for i in range(len(samples)):
        item = samples.plain(i)
        stop = float(item["stop"])
        assert int(item["label"]) == (30 <= stop and 35 >= stop - 1)
        assert item["x"].shape == (4, 3, 100)
    assert not samples.hard.any()
    val: Any = data.samples("val")
    stops = np.array([float(val.plain(i)["stop"]) for i in range(len(val))])
    assert (val.hard == ((stops > 60) & (stops - 1 < 64))).all() and val.hard.any()


def test_windows_are_what_the_file_holds(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.edf", seconds=30)
    data = module(tmp_path / "a.edf")
    data.setup("predict")
    item = data.samples("predict").load(3, 0)
    assert item["id"] == "a.edf@3.000"
    assert np.abs(item["x"].transpose(0, 1).flatten(1).numpy() - truth[:, 300:700]).max() < 0.1
    assert item["about"] == {"recording": "a.edf", "start": 3.0, "stop": 7.0, "since": 6.0,
                             "channels": ["A1", "A2", "A3"], "padded": False, "notes": ""}  # fmt: skip


@pytest.mark.parametrize("patients", [3, 7])
def test_no_patient_is_on_two_sides(tmp_path: Path, patients: int) -> None:
    for i in range(patients):
        for run in range(2):
            write(tmp_path / f"sub-{i:02d}/sub-{i:02d}_run-{run}_eeg.edf", seconds=40, marks=[(20.0, 5.0, "seizure")])
    data = module(tmp_path, val_fraction=0.34, test_fraction=0.33)
    data.setup("fit")
    data.setup("test")
    groups = [{o.group for o in data.opened(s)[0]} for s in ("train", "val", "test")]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == patients


def test_parts_in_time_do_not_overlap(tmp_path: Path) -> None:
    write(tmp_path / "one.edf", seconds=200, marks=[(20.0, 5.0, "sz"), (150.0, 5.0, "sz"), (190.0, 5.0, "sz")])
    data = module(tmp_path)
    data.setup("fit")
    data.setup("test")
    parts = [spans(data, s)["one.edf"] for s in ("train", "val", "test")]
    events = [(20.0, 25.0), (150.0, 155.0), (190.0, 195.0)]
    for part, (a, b) in zip(parts, events, strict=True):
        assert any(s <= a and e >= b for s, e in [(part[0][0], part[-1][1])])
    for earlier, later in zip(parts, parts[1:], strict=False):
        assert max(b for _, b in earlier) <= min(a for a, _ in later) + 1e-9
    assert parts[0][0][0] == 0 and parts[2][-1][1] > 199


def test_both_copies_of_a_swec_patient_stay_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("ID01", "ID20", "ID05", "ID60"):
        write_swec(tmp_path / name / f"{name}_total.h5", 30 * rng.normal(size=(3, 6000)), 100, [(20.0, 30.0)])
    data = module(tmp_path, val_fraction=0.34, test_fraction=0.33)
    data.setup("fit")
    data.setup("test")
    sides = {o.id[:4]: s for s in ("train", "val", "test") for o in data.opened(s)[0]}
    assert len(sides) == 4 and sides["ID01"] == sides["ID20"] and same_patient("ID01") == "ID20"
    truth = data.samples(sides["ID01"]).truth[0]  # type: ignore[attr-defined]
    assert truth == [(20.0, 30.0)]


def test_no_window_crosses_a_gap_and_marks_keep_their_time(tmp_path: Path) -> None:
    path = tmp_path / "a.edf"
    write(path, seconds=60, marks=[(100.0, 3.0, "seizure")])
    made_discontinuous(path, 1.0, [*range(30), *range(90, 120)])
    data = module(tmp_path, splits={"train": ["a*"]})
    own = spans(data, "train")["a.edf"]
    assert all(b <= 30 + 1e-9 or a >= 90 - 1e-9 for a, b in own) and len(own) == 2 * 27
    samples: Any = data.samples("train")
    positive = [samples.plain(i)["about"]["stop"] for i in np.flatnonzero(samples.rows[:, 3])]
    assert positive == [100.0, 101.0, 102.0, 103.0, 104.0]


def test_a_split_table_and_folders_say_parts(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.edf", seconds=30, marks=[(10.0, 5.0, "seizure")])
    (tmp_path / "split.csv").write_text("file,split,patient\na.edf,train,p1\nb.edf,val,p2\nc.edf,test,p3\n")
    data = module(tmp_path)
    data.setup("fit")
    data.setup("test")
    assert [[o.id for o in data.opened(s)[0]] for s in ("train", "val", "test")] == [["a.edf"], ["b.edf"], ["c.edf"]]
    for name, part in (("a", "train"), ("b", "val"), ("c", "test")):
        (tmp_path / part).mkdir()
        (tmp_path / f"{name}.edf").rename(tmp_path / part / f"{name}.edf")
    (tmp_path / "split.csv").unlink()
    data = module(tmp_path)
    data.setup("fit")
    assert [o.id for o in data.opened("val")[0]] == ["val/b.edf"]


def test_balanced_batches(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.edf", channels=2 + i, marks=[(30.0, 20.0, "seizure"), (60.0, 20.0, "cough")])
    data = module(tmp_path, split_by="time", val_fraction=0.15, test_fraction=0.1, steps=7, balance=[0.5, 0.25],
                  batch_size=12)  # fmt: skip
    data.setup("fit")
    samples: Any = data.samples("train")
    made = data.batches(samples, "train", 0)
    assert len(made) == 7 and made != data.batches(samples, "train", 1) and made == data.batches(samples, "train", 0)
    for batch in made:
        assert len(set(batch)) == len(batch) == 12 and len({samples.rows[i, 0] for i in batch}) == 1
        assert sum(samples.rows[i, 3] for i in batch) >= 6 and sum(bool(samples.hard[i]) for i in batch) >= 3
    batch = data.collate([samples.load(i, 0) for i in made[0]])
    assert batch["x"].ndim == 4 and len(batch["id"]) == 12 and set(batch["truth"]) == {int(batch["recording"][0])}


def test_augmentation_depends_on_seed_epoch_and_window_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.edf", marks=[(30.0, 20.0, "seizure"), (100.0, 9.0, "seizure")])
    options = {"jitter": 0.5, "flip_sign": True, "flip_channels": True, "gain": 0.3}
    first, second = module(tmp_path, **options), module(tmp_path, **options)
    for data in (first, second):
        data.setup("fit")
    a, b = (d.samples("train").load(9, 2)["x"] for d in (first, second))
    assert torch.equal(a, b) and not torch.equal(a, first.samples("train").load(9, 3)["x"])
    val = first.samples("val").load(0, 0)["x"]
    assert torch.equal(val, first.samples("val").load(0, 5)["x"])


def test_a_short_clip_gives_a_padded_window(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.edf", seconds=3)
    data = module(tmp_path)
    data.setup("predict")
    (item,) = [data.samples("predict").load(i, 0) for i in range(len(data.samples("predict")))]
    assert item["about"]["padded"] and item["about"]["start"] == -1.0 and item["about"]["stop"] == 3.0
    assert np.abs(item["x"].transpose(0, 1).flatten(1)[:, 100:].numpy() - truth).max() < 0.1


def test_what_cannot_be_read_is_one_error_and_the_rest_goes_on(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "good.edf", seconds=20, marks=[(5.0, 3.0, "seizure"), (500.0, 3.0, "seizure")])
    (tmp_path / "broken.edf").write_bytes(b"0       nonsense")
    flat = edfio.EdfSignal(np.zeros(2000), 100, label="A1", physical_dimension="uV", physical_range=(-1, 1))
    edfio.Edf([flat]).write(tmp_path / "flat.edf")
    write(tmp_path / "slow.edf", seconds=20, rate=50)
    write(tmp_path / "volts.edf", seconds=20, unit="nV")
    data = module(tmp_path)
    data.setup("predict")
    samples = data.samples("predict")
    errors = {}
    for i in range(len(samples)):
        try:
            samples.load(i, 0)
        except BadSample as error:
            errors[samples.ids[i]] = str(error)
    assert errors.keys() == {"broken.edf", "flat.edf"} and "flat" in errors["flat.edf"]
    said = capsys.readouterr().err
    assert "slow.edf: resampled up from 50 to 100 Hz" in said and "volts.edf: its amplitude cannot be right" in said
    assert "'seizure' at 500.0 s is outside" in said
    with pytest.raises(UserError, match="cannot read"):
        module(tmp_path, on_error="raise", labels={"x": ["seizure"]}).setup("fit")


def test_annotations_that_match_nothing_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.edf", marks=[(30.0, 5.0, "grand mal")])
    with pytest.raises(UserError, match="one class only") as caught:
        module(tmp_path).setup("fit")
    assert "grand mal (1)" in caught.value.hints[0]
    data = module(tmp_path, labels={"seizure": ["grand*"]})
    data.setup("fit")
    assert data.facts()["classes"] == ["background", "seizure"]


def test_onset_and_offset_marks_make_an_event(tmp_path: Path) -> None:
    write(tmp_path / "a.edf", marks=[(30.0, 0.0, "seizure onset"), (41.5, 0.0, "seizure end"), (60.0, 0.0, "seizure")])
    data = module(tmp_path)
    opened = data.opened("train")[0][0]
    assert opened.truth(0) == [(30.0, 41.5)] and any("without duration" in n for n in opened.prepared.notes)


def test_events_in_a_bids_table_win_and_channels_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "sub-7/ieeg/sub-7_task-x_ieeg.edf"
    write(path, channels=4, marks=[(1.0, 1.0, "seizure")])
    (path.parent / "sub-7_task-x_events.tsv").write_text(
        "onset\tduration\ttrial_type\tchannels\n50\t10\tseizure\tA1,A3\n80\tn/a\tnote\tn/a\n"
    )
    (path.parent / "sub-7_task-x_channels.tsv").write_text(
        "name\ttype\tunits\tstatus\nA1\tSEEG\tuV\tgood\nA2\tECG\tuV\tgood\nA3\tSEEG\tuV\tgood\nA4\tSEEG\tuV\tbad\n"
    )
    data = module(tmp_path)
    (opened,), _ = data.opened("train")
    assert opened.prepared.names == ["A1", "A3"] and opened.group == "7" and opened.truth(0) == [(50.0, 60.0)]
    label, channels = data.label_of(opened, 55.0)
    assert label == 1 and channels.tolist() == [1, 1]
    (path.parent / "sub-7_task-x_events.tsv").write_text("onset\tduration\ttrial_type\nsoon\t10\tseizure\n")
    assert "line 2: no onset" in module(tmp_path).opened("predict")[1][0].reason


def test_tables_with_a_column_a_channel(tmp_path: Path) -> None:
    time = np.concatenate([np.arange(1000), np.arange(3000, 4500)]) / 100 - 2.0
    rows = np.random.default_rng(0).normal(size=(3, len(time))).astype(np.float32)
    columns = {"time": time, **{f"G{i}": r for i, r in enumerate(rows)}, "state": np.zeros(len(time), np.int8)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=700)
    for unit, factor in (("uV", 1.0), ("mV", 1e3)):
        one = open_recording(tmp_path / "a.parquet", "a", unit)
        assert one.source.names == ["G0", "G1", "G2"] and one.source.rates == [100.0] * 3
        assert [(round(p.start, 6), p.duration) for p in one.source.pieces] == [(0.0, 10.0), (30.0, 15.0)]
        got = one.source.read(1, [0, 2], 300, 1100)
        assert np.allclose(got, rows[[0, 2], 1300:2100] * factor)
    (tmp_path / "b.csv").write_text("A,B\n" + "1.5,2\n" * 300)
    with pytest.raises(BadSample, match="no column of times"):
        open_recording(tmp_path / "b.csv", "b")
    assert open_recording(tmp_path / "b.csv", "b", table_rate=50).source.pieces[0].duration == 6
    with pytest.raises(UserError, match="data.unit"):
        open_recording(tmp_path / "a.parquet", "a", "inches")


def test_the_older_swec_release(tmp_path: Path) -> None:
    from scipy.io import savemat

    signal = 30 * np.random.default_rng(0).normal(size=(3, 5000))
    savemat(tmp_path / "ID3_2h.mat", {"EEG": signal})
    savemat(tmp_path / "ID3_info.mat", {"fs": 100.0, "seizure_begin": [10.0, 3610.0], "seizure_end": [20.0, 3625.0]})
    data = module(tmp_path)
    (opened,), failed = data.opened("predict")
    assert not failed and opened.truth(0) == [(10.0, 25.0)] and opened.group == "ID3"
    assert np.allclose(opened.prepared.read(0, 100, 50), signal[:, 100:150], atol=1e-3)
    (tmp_path / "ID3_info.mat").unlink()
    assert "IDxx_info.mat" in module(tmp_path).opened("predict")[1][0].reason


def test_a_zip_is_read_without_leaving_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.edf", seconds=20)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        file.write(tmp_path / "a.edf", "sub-1/a.edf")
        file.write(tmp_path / "a.edf", "../outside.edf")
    data = module(tmp_path / "all.zip")
    data.setup("predict")
    assert [o.id for o in data.opened("predict")[0]] == ["sub-1/a.edf"] and len(data.samples("predict")) == 17
    (tmp_path / "bad.zip").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="no readable zip"):
        module(tmp_path / "bad.zip").setup("predict")


def test_mne_s_formats_are_read(tmp_path: Path) -> None:
    import mne

    info = mne.create_info(["A1", "A2", "EKG"], 128, ["seeg", "seeg", "ecg"])
    signal = 4e-5 * np.random.default_rng(0).normal(size=(3, 128 * 20))
    raw = mne.io.RawArray(signal, info, first_samp=640, verbose="ERROR")
    raw.set_annotations(mne.Annotations([5.0, 12.0], [2.0, 1.0], ["seizure", "BAD_ACQ_SKIP"]))
    raw.save(tmp_path / "a_raw.fif", verbose="ERROR")
    one = open_recording(tmp_path / "a_raw.fif", "a")
    assert one.kinds == ["seeg", "seeg", "ecg"] and [m.text for m in one.marks] == ["seizure"]
    assert [(p.start, p.duration) for p in one.source.pieces] == [(0.0, 12.0), (13.0, 7.0)]
    assert one.marks[0].onset == pytest.approx(5.0)
    assert np.allclose(one.source.read(1, [1], 0, 100)[0], 1e6 * signal[1, 13 * 128 : 13 * 128 + 100], atol=1e-3)


def test_names_of_channels_and_patients() -> None:
    assert [clean(n) for n in ("POL G1", "Fc5.", "EEG Fp1-Ref", " A1 ")] == ["G1", "Fc5", "Fp1", "A1"]
    kinds = [label_kind(n) for n in ("POL EKG1", "ECG", "DC09", "EOG L", "Status", "G12", "Fp1", "EMG1", "SpO2")]
    assert kinds == ["ecg", "ecg", "misc", "eog", "misc", "eeg", "eeg", "emg", "misc"]
    names = ["sub-01_ses-2_ieeg.edf", "ID03_total.h5", "S001R05.edf", "chb03_12.edf", "other.edf"]
    assert [patient(Path(n)) for n in names] == ["01", "ID22", "S001", "chb03", "other"]


def test_what_is_taken_for_a_recording(tmp_path: Path) -> None:
    for name in ("a.edf", "a.parquet", "a_events.tsv", "b_channels.csv", "split.csv", ".c.edf", "d.vhdr", "d.eeg",
                 "d.vmrk", "ID1_part_2.h5", "notes.txt"):  # fmt: skip
        (tmp_path / name).write_bytes(b"x")
    assert {p.name for p in tmp_path.iterdir() if is_recording(p)} == {"a.edf", "a.parquet", "d.vhdr"}
    notes: list[str] = []
    assert [f.id for f in find_recordings(tmp_path, notes)] == ["a.edf", "d.vhdr"]
    assert notes == ["a.parquet is left out: a.edf is the same recording"]
    with pytest.raises(UserError, match="no recordings"):
        (tmp_path / "empty").mkdir()
        find_recordings(tmp_path / "empty", [])


def test_windows_at_events(tmp_path: Path) -> None:
    marks = [(float(4 * i), 4.0, "T0" if i % 2 == 0 else "T1") for i in range(25)]
    for run in (1, 2, 3):
        write(tmp_path / f"S001R{run:02d}.edf", seconds=100, marks=marks, seed=run)
    options: dict[str, Any] = {
        "labels": {"rest": ["T0"], "move": ["T1", "T2"]}, "windows": "events", "offsets": [0.5, 2.0], "segments": 2,
        "train_offsets": [0.0, 2.0], "splits": {"train": ["*R01*"], "val": ["*R02*"], "test": ["*R03*"]},
        "fixed_channels": True, "standardise": True,
    }  # fmt: skip
    data = module(tmp_path, **options)
    facts = data.facts()
    assert facts["classes"] == ["rest", "move"] and facts["channels"] == ["A1", "A2", "A3"]
    data.setup("fit")
    samples: Any = data.samples("val")
    assert len(samples) == 50 and samples.rows[:, 3].sum() == 24
    item = samples.load(0, 0)
    assert float(item["start"]) == 0.5 and item["energy_mean"].shape == (3, 4)
    starts = {float(data.samples("train").load(4, e)["start"]) for e in range(30)}
    assert len(starts) > 20 and min(starts) >= 8.0 and max(starts) <= 10.0
    other = module(tmp_path, **{**options, "splits": {"train": ["*R77*"]}, "split_by": "time"})
    other.setup("fit")
    assert len(other.samples("train")) > len(other.samples("val")) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, "data.segments"), ({"rate": -1}, "data.rate"), ({"balance": [0.9, 0.9]}, "data.balance"),
        ({"low": 30.0, "high": 10.0}, "band is empty"), ({"splits": {"training": ["*"]}}, "training"),
        ({"train_offsets": [2.0, 1.0]}, "data.train_offsets"), ({"segment": 0.01}, "14 samples"),
    ],
)  # fmt: skip
def test_values_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(None, **options)


def test_swec_zones_that_meet_are_one() -> None:
    windows = SwecWindows(2000.0, [(600.0, 630.0), (700.0, 720.0)], 5, 5.0, 5.0, slowdown=True)
    (zone,) = windows.zones()
    begins = windows.begins()
    steps = np.diff(begins)
    assert np.allclose(steps[zone[0] : zone[1] - 1], 1.0) and np.allclose(steps[: zone[0]], 5.0)
    assert begins[zone[1]] >= 720 and np.allclose(steps[zone[1] :], 5.0)


def test_the_embedded_sample_has_its_truth() -> None:
    data = RecordingData(hours=1 / 80)
    data.setup("fit")
    samples: Any = data.samples("train")
    assert len(samples.recordings) == 6 and {len(o.prepared.names) for o in samples.recordings} >= {8, 16}
    batch = data.collate([samples.plain(i) for i in range(3)])
    assert set(batch["channel_label"].unique().tolist()) <= {0, 1}
