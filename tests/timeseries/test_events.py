"""Event sequences from files of every kind, what is wrong with them, and the data module."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import BadSample, UserError
from timeseries.event_data import EventData, EventSamples, Piece, rows
from timeseries.event_pickles import read_plain
from timeseries.events import Events, read
from timeseries.hawkes import Span

TIMES = [[0.0, 1.5, 2.0], [0.5, 0.5, 4.0, 9.0], [3.0]]
TYPES = [[0, 1, 0], [2, 2, 1, 0], [1]]


def same(found: list[Events]) -> None:
    assert [e.times.tolist() for e in found] == TIMES
    assert [[int(t) for t in e.types] for e in found] == TYPES
    assert all(e.problem is None for e in found) and len({e.id for e in found}) == 3


def gatech() -> dict[str, Any]:
    sequences = [
        [
            {"time_since_start": t, "time_since_last_event": 0.0, "type_event": k, "idx_event": i}
            for i, (t, k) in enumerate(zip(times, types, strict=True))
        ]
        for times, types in zip(TIMES, TYPES, strict=True)
    ]
    return {"dim_process": 5, "train": sequences, "dev": [], "test": [], "args": None}


def easytpp() -> list[dict[str, Any]]:
    return [
        {"dim_process": 5, "seq_idx": i, "seq_len": len(t), "time_since_start": t, "type_event": k}
        for i, (t, k) in enumerate(zip(TIMES, TYPES, strict=True))
    ]


def long_table() -> pa.Table:
    flat = [(f"s{i}", t, k) for i in range(3) for t, k in zip(TIMES[i], TYPES[i], strict=True)]
    return pa.table({"seq": [f[0] for f in flat], "time": [f[1] for f in flat], "mark": [f[2] for f in flat]})


def write(folder: Path, form: str) -> Path:
    """The three sequences as a file of a kind."""
    path = folder / f"train.{form}"
    if form in ("pkl", "py2.pkl"):
        path.write_bytes(pickle.dumps(gatech(), protocol=2 if form == "pkl" else 0))
    elif form == "manifold.pkl":
        arrays = {k: np.empty(3, dtype=object) for k in ("timestamps", "types")}
        for i in range(3):
            arrays["timestamps"][i], arrays["types"][i] = np.array(TIMES[i]), np.array(TYPES[i])
        path.write_bytes(pickle.dumps({**arrays, "lengths": np.array([3, 4, 1])}))
    elif form == "json":
        path.write_text(json.dumps(easytpp()))
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in easytpp()))
    elif form == "npz":
        flat = np.concatenate(TIMES), np.concatenate(TYPES)
        np.savez(path, times=flat[0], types=flat[1], offsets=np.array([0, 3, 7, 8]))
    elif form == "csv":
        pa_csv.write_csv(long_table(), path)
    elif form == "parquet":
        pq.write_table(long_table(), path)
    elif form == "lists.parquet":
        pq.write_table(pa.table({"seq_idx": [0, 1, 2], "time_since_start": TIMES, "type_event": TYPES}), path)
    return path


FORMS = ["pkl", "py2.pkl", "manifold.pkl", "json", "jsonl", "npz", "csv", "parquet", "lists.parquet"]


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_file_holds_the_same_sequences(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, form)
    reading = read(path)
    same(reading.sequences)
    assert {e.split for e in reading.sequences} == {"train"}
    assert reading.count == (5 if form in ("pkl", "py2.pkl", "json", "jsonl") else None)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(path, f"inner/{path.name}")
    path.unlink()
    same(read(tmp_path / "all.zip").sequences)
    same(read(tmp_path).sequences)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil-was-here",)


@pytest.mark.parametrize("content", [{"train": [Evil()]}, Evil(), {"train": [[{"time_since_start": Path("a")}]]}])
def test_a_pickle_that_asks_for_an_import_is_refused(content: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="refused"):
        read(tmp_path / "x.pkl")
    assert not (tmp_path / "evil-was-here").exists()


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200))
def test_damaged_pickles_raise_one_line(content: bytes) -> None:
    try:
        read_plain(content, "x.pkl")
    except UserError as error:
        assert "\n" not in error.message


def table(tmp_path: Path, name: str = "x.csv", **columns: list[Any]) -> Path:
    path = tmp_path / name
    pa_csv.write_csv(pa.table(columns), path)
    return path


def test_rows_of_a_table_are_sorted_and_ties_keep_their_order(tmp_path: Path) -> None:
    path = table(tmp_path, user=["a", "b", "a", "a"], timestamp=[5.0, 1.0, 2.0, 5.0], event=["x", "y", "z", "w"])
    first, second = read(path).sequences
    assert first.times.tolist() == [2.0, 5.0, 5.0] and first.types.tolist() == ["z", "x", "w"] and second.id == "b"


def test_dates_become_seconds(tmp_path: Path) -> None:
    path = table(tmp_path, id=["a", "a"], time=["2020-01-01 00:00:00", "2020-01-02 12:00:00"], type=["x", "y"])
    assert np.diff(read(path).sequences[0].times).tolist() == [129600.0]


def test_columns_by_name_and_what_is_said_without_them(tmp_path: Path) -> None:
    path = table(tmp_path, who=["a", "a"], when=[1.0, 2.0], what=["x", "y"], until=[9.0, 9.0])
    with pytest.raises(UserError, match="has no column of times") as info:
        read(path)
    assert info.value.hints == ["name it with --data.time_column"]
    names = {"sequence": "who", "time": "when", "type": "what", "end": "until"}
    found = read(path, None, names).sequences[0]
    assert found.end == 9.0 and found.types.tolist() == ["x", "y"]
    with pytest.raises(UserError, match="no column 'whom'"):
        read(path, None, {**names, "sequence": "whom"})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"time_since_start": [1.0, float("nan")], "type_event": [0, 0]}, "event 2 is not a number"),
    ({"time_since_start": [1.0, float("inf")], "type_event": [0, 0]}, "event 2 is not a number"),
    ({"time_since_start": [3.0, 2.0], "type_event": [0, 0]}, "go back at event 2: 2 after 3"),
    ({"time_since_start": [1.0, 2.0], "type_event": [0]}, "2 times and 1 types"),
    ({"time_since_start": [1.0, "x"], "type_event": [0, 0]}, "no number"),
    ({"time_since_start": [1.0, 2.0], "type_event": [0, None]}, "event 2 is missing"),
    ({"time_since_start": [1.0, 2.0], "type_event": [0, 0], "t_end": 1.5}, "before its last event"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_what_is_wrong_with_a_sequence_is_its_reason(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([*easytpp()[:2], row]))
    data = EventData(str(path))
    samples = data.dataset("predict")
    with pytest.raises(BadSample, match=reason):
        samples.load(2, 0)
    assert samples.load(0, 0)["types"].tolist() == [5, 0, 1, 0]
    assert len(data.check()) == 1


def many(tmp_path: Path, bad: int = 0) -> Path:
    rng = np.random.default_rng(0)
    made = [{"time_since_start": np.sort(rng.uniform(0, 9, n)).tolist(), "type_event": rng.integers(0, 3, n).tolist()}
            for n in [1, 0, *rng.integers(2, 30, 40)]]  # fmt: skip
    for row in made[5 : 5 + bad]:
        row["time_since_start"] = row["time_since_start"][::-1]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(made))
    return path


def test_bad_sequences_are_named_or_left_out(tmp_path: Path) -> None:
    path = many(tmp_path, bad=12)
    with pytest.raises(UserError, match="times go back") as info:
        EventData(str(path)).setup("fit")
    assert "on_error skip" in info.value.hints[0]
    data = EventData(str(path), on_error="skip")
    data.setup("fit")
    assert 0 < len(data.samples("train")) < 30 and data.skipped > 0


def test_sequences_with_nothing_to_score_are_counted(tmp_path: Path) -> None:
    data = EventData(str(many(tmp_path)))
    data.setup("fit")
    served = sum(len(data.pieces(p)) for p in ("train", "val", "test"))  # type: ignore[arg-type]
    assert served == 40
    samples = data.dataset("predict")
    assert len(samples) == 42
    # A single event is history enough to predict from; none at all is not
    assert len(samples.load(0, 0)["types"]) == 2
    with pytest.raises(BadSample, match="no events"):
        samples.load(1, 0)


def test_types_that_the_model_does_not_know(tmp_path: Path) -> None:
    path = write(tmp_path, "json")
    data = EventData(str(path), types=["0", "1"], time_scale=1.0)
    samples = data.dataset("predict")
    assert samples.load(0, 0)["id"]
    with pytest.raises(BadSample, match="type '2' of event 1 is none of the 2 types"):
        samples.load(1, 0)


def test_gaps_are_differences_in_double_precision() -> None:
    times = 1e9 + np.array([0.0, 1e-3, 2e-3])
    got = rows(Span(times, np.array([0, 1, 0]), times[0], times[-1], True), 2)
    assert np.allclose(got["dt"], [0, 0, 1e-3, 1e-3], rtol=1e-3)
    assert got["target"].tolist() == [-1, 1, 0, -1] and np.allclose(got["gap"], [0, 1e-3, 1e-3, 0], rtol=1e-3)


def test_conventions_of_the_window() -> None:
    span = Span(np.array([1.0, 3.0]), np.array([0, 1]), 0.0, 5.0, False)
    got = rows(span, 2)
    assert got["gap"].tolist() == [1, 2, 2] and got["target"].tolist() == [0, 1, -1] and got["dt"].tolist() == [0, 1, 2]
    empty = rows(Span(np.zeros(0), np.zeros(0, dtype=int), 0.0, 5.0, False), 2)
    assert empty["gap"].tolist() == [5] and empty["target"].tolist() == [-1] and empty["types"].tolist() == [2]


def windowed(tmp_path: Path) -> Path:
    return table(tmp_path, seq=["a", "a", "b", "c"], time=[1.0, 2.0, 3.0, 4.0], type=[0, 1, 0, 1], window=[9.0] * 4)


def test_auto_follows_what_the_data_say(tmp_path: Path) -> None:
    data = EventData(str(windowed(tmp_path)))
    facts = data.facts()
    assert (facts["window"], facts["first_event"]) == ("full", "scored")
    plain = EventData(str(write(tmp_path, "csv")))
    assert (plain.facts()["window"], plain.facts()["first_event"]) == ("last_event", "given")
    stop = EventData(str(windowed(tmp_path)), window="last_event", first_event="given")
    assert stop.piece(stop.reading().sequences[0]).span.end == 2.0
    with pytest.raises(UserError, match="window full needs the end"):
        EventData(str(write(tmp_path, "csv")), window="full").setup("fit")


def test_the_time_unit_scales_what_is_reported(tmp_path: Path) -> None:
    path = str(windowed(tmp_path))
    one, ten = EventData(path), EventData(path, time_unit=10)
    assert ten.facts()["time_scale"] == pytest.approx(one.facts()["time_scale"] / 10)
    assert ten.dataset("predict").load(0, 0)["dt"].tolist() == pytest.approx([0, 0.1, 0.1])


def test_long_sequences_come_in_pieces_that_miss_no_event() -> None:
    times = np.arange(1.0, 36.0)
    piece = Piece("x", Span(times, np.arange(35) % 2, 0.0, 40.0, False))
    cut = EventData._cut(piece, 10)
    scored = np.concatenate([p.span.times[int(p.span.given) :] for p in cut])
    assert np.array_equal(scored, times) and all(len(p.span.times) <= 10 for p in cut)
    assert sum(p.span.end - p.span.start for p in cut) == 40.0 and [p.first for p in cut] == [0, 9, 18, 27]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 8), st.integers(60, 200))
def test_batches_hold_everything_once_and_stay_small(lengths: list[int], size: int, positions: int) -> None:
    data = EventData(batch_size=size, max_positions=positions)
    pieces = [
        Piece(str(i), Span(np.arange(n) * 1.0, np.zeros(n, int), 0.0, float(n), False)) for i, n in enumerate(lengths)
    ]
    samples = EventSamples(pieces, 2)
    for epoch in (0, 1):
        batches = data.batches(samples, "train", epoch)
        served = sorted(i for b in batches for i in b)
        passes = len(served) // len(lengths)
        assert served == sorted(list(range(len(lengths))) * passes) and (passes == 1 or len(batches) <= 50)
        assert sorted(i for b in data.batches(samples, "val", epoch) for i in b) == list(range(len(lengths)))
        assert all(len(b) <= size for b in batches)
        assert all(len(b) == 1 or len(b) * max(samples.lengths[b]) <= positions for b in batches)
        assert batches == data.batches(samples, "train", epoch)


def test_padding_lies_after_the_events() -> None:
    data = EventData()
    data.setup("fit")
    samples = data.samples("train")
    batch = data.collate([samples.load(i, 0) for i in (0, 1, 2)])
    for b, n in enumerate(batch["length"].tolist()):
        assert (batch["types"][b, n:] == 2).all() and (batch["target"][b, n:] == -1).all()
        assert not batch["gap"][b, n:].any() and not batch["dt"][b, n:].any()
    assert batch["types"].dtype == torch.int64 and batch["dt"].dtype == torch.float32


def test_sets_of_a_folder(tmp_path: Path) -> None:
    for name in ("a_train", "a_dev", "b_train"):
        np.savez(tmp_path / f"{name}.npz", times=np.arange(3.0), offsets=np.array([0, 3]))
    with pytest.raises(UserError, match="several sets") as info:
        read(tmp_path)
    assert info.value.hints == ["--data.name a", "--data.name b"]
    assert [e.split for e in read(tmp_path, "a").sequences] == ["val", "train"]
    assert len(read(tmp_path, "b_train").sequences) == 1
    with pytest.raises(UserError, match="no set or file c"):
        read(tmp_path, "c")


WRONG: list[tuple[str, bytes, str]] = [
    ("x.csv", b"", "cannot read the table"),
    ("x.csv", b"seq,time,type\n", "no rows"),
    ("x.csv", b"seq,time,type\na,soon,1\n", "neither a number nor a date"),
    ("x.json", b"{", "not JSON"),
    ("x.json", b"{}", "no sequences"),
    ("x.json", b"[[1, 2]]", "every event needs"),
    ("x.npz", b"PK", "not an npz"),
    ("x.pkl", b"\x80\x04", "not a pickle"),
    ("x.parquet", b"PAR1", "cannot read the table"),
    ("x.zip", b"PK\x03\x04", "not a whole zip"),
    ("x.txt", b"hello", "no event sequences"),
]


@pytest.mark.parametrize(("name", "content", "reason"), WRONG)
def test_files_that_are_none_are_one_line(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason) as info:
        read(tmp_path / name)
    assert "\n" not in info.value.message


def test_the_shared_sets_are_read_as_they_lie(shared: Path) -> None:
    so = EventData(str(shared / "data/events-stackoverflow"), time_unit=86400)
    facts = so.facts()
    assert len(facts["types"]) == 22 and facts["labels"][4] == "Famous Question" and facts["first_event"] == "given"
    assert [len(so.parts()[p]) for p in ("train", "val", "test")] == [2829, 313, 1326]
    two = EventData(str(shared / "data/hawkes_synthetic"), name="hawkes2d")
    assert two.facts()["window"] == "full" and [len(two.parts()[p]) for p in ("train", "val", "test")] == [
        900,
        120,
        250,
    ]
