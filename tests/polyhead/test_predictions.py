"""Predictions are complete, appear whole, survive kills and stay small in memory."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import UserError
from polyhead.predictions import (
    PredictionWriter,
    done_ids,
    join_errors,
    part_files,
    read_errors,
    read_predictions,
    remove,
)


def test_columns_of_every_kind(tmp_path: Path) -> None:
    with PredictionWriter(tmp_path) as writer:
        writer.add(
            {
                "id": ["a", "b"],
                "label": ["cat", None],
                "probability": torch.tensor([[0.25, 0.75], [1, 0]]),
                "half": np.array([1.5, 2.5], np.float16),
                "box": np.arange(8).reshape(2, 2, 2),
                "ragged": [[1.0], [2.0, 3.0]],
            }
        )
        writer.add_error("c", "line one\n  line two")
    table = read_predictions(tmp_path)
    assert table.schema.field("part").type == pa.int32()
    assert table.schema.field("probability").type == pa.list_(pa.float32(), 2)
    assert table.to_pylist()[1] == {
        "id": "b",
        "part": 0,
        "label": None,
        "probability": [1.0, 0.0],
        "half": 2.5,
        "box": [[4, 5], [6, 7]],
        "ragged": [2.0, 3.0],
    }
    assert read_errors(tmp_path).to_pylist() == [{"id": "c", "part": None, "reason": "line one line two"}]
    assert pq.read_table(tmp_path / "predictions").num_rows == 2
    assert done_ids(tmp_path) == {"a", "b", "c"}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), max_size=30),
    rows_per_part=st.integers(1, 9),
    calls=st.integers(1, 5),
    rank=st.sampled_from([None, 0, 3]),
)
def test_every_row_is_written_once_and_no_id_is_torn(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    rows_per_part: int,
    calls: int,
    rank: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    rows = [(f"s{i}", k) for i, size in enumerate(sizes) for k in range(size)]
    failed = [f"s{i}" for i, size in enumerate(sizes) if size == 0]
    with PredictionWriter(folder, rows_per_part, rank=rank) as writer:
        # Calls that end in the middle of an id
        for at in range(0, len(rows), calls):
            some = rows[at : at + calls]
            writer.add(
                {
                    "id": [i for i, _ in some],
                    "part": [k for _, k in some],
                    "value": [float(k) for _, k in some],
                }
            )
        for name in failed:
            writer.add_error(name, "none")
    written = read_predictions(folder)
    assert sorted(zip(written["id"].to_pylist(), written["part"].to_pylist(), strict=True)) == sorted(rows)
    assert sorted(read_errors(folder)["id"].to_pylist()) == sorted(failed)
    homes: dict[str, set[str]] = {}
    for path in part_files(folder):
        for name in pq.read_table(path)["id"].to_pylist():
            homes.setdefault(name, set()).add(path.name)
    assert all(len(home) == 1 for home in homes.values())
    assert done_ids(folder) == {f"s{i}" for i in range(len(sizes))}


RUN = """
import sys, numpy as np
from polyhead.predictions import PredictionWriter, done_ids
folder, n = sys.argv[1], int(sys.argv[2])
done = done_ids(folder)
with PredictionWriter(folder, rows_per_part=16, resume=True) as writer:
    for i in range(n):
        if i == n // 100:
            print("begun", flush=True)
        name = f"s{i}"
        if name in done:
            continue
        if i % 7 == 3:
            writer.add_error(name, "broken")
            continue
        parts = i % 3 + 1
        for k in range(parts):
            writer.add({"id": [name], "part": [k], "p": np.full((1, 3), i + k, np.float32)})
        if i % 11 == 5:
            writer.add_error(name, "one face is hidden", part=parts)
print("whole", flush=True)
"""


def test_killed_at_any_moment_and_resumed_every_sample_is_there_once(tmp_path: Path) -> None:
    n, torn = 3000, 0
    chance = random.Random(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for attempt in range(9):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path), str(n)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        if attempt < 8:
            time.sleep(chance.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        finished = process.stdout.read() == "whole\n"
        process.stdout.close()
        process.wait()
        # At every moment the finished parts can be read
        read_predictions(tmp_path)
        torn += 0 < len(done_ids(tmp_path)) < n
    assert finished and torn >= 3
    rows = read_predictions(tmp_path).select(["id", "part"]).to_pylist()
    counts = Counter((row["id"], row["part"]) for row in rows)
    expected = {(f"s{i}", k) for i in range(n) if i % 7 != 3 for k in range(i % 3 + 1)}
    assert set(counts) == expected and set(counts.values()) == {1}
    errors = Counter((row["id"], row["part"]) for row in read_errors(tmp_path).to_pylist())
    whole = {(f"s{i}", None) for i in range(n) if i % 7 == 3}
    partly = {(f"s{i}", i % 3 + 1) for i in range(n) if i % 11 == 5 and i % 7 != 3}
    assert set(errors) == whole | partly and set(errors.values()) == {1}
    # What kills left half written is gone
    assert all(re.fullmatch(r"part-\d{5}\.parquet", p.name) for p in (tmp_path / "predictions").iterdir())


def test_memory_stays_flat(tmp_path: Path) -> None:
    def write(rows: int) -> int:
        peak = 0
        with PredictionWriter(tmp_path / str(rows), rows_per_part=2048) as writer:
            for i in range(0, rows, 256):
                writer.add({"id": [f"s{k}" for k in range(i, i + 256)], "p": np.zeros((256, 20), np.float32)})
                writer.add_error(f"e{i}", "none")
                peak = max(peak, pa.total_allocated_bytes())
        return peak

    before = pa.total_allocated_bytes()
    tracemalloc.start()
    small = write(10_240)
    python = tracemalloc.get_traced_memory()[0]
    large = write(102_400)
    grown = tracemalloc.get_traced_memory()[0] - python
    tracemalloc.stop()
    assert read_predictions(tmp_path / "102400").num_rows == 102_400
    assert large - before < 1.5 * (small - before) + 2**20
    assert grown < 2**20


def test_one_long_sample_is_not_scanned_again_and_again(tmp_path: Path) -> None:
    started = time.monotonic()
    with PredictionWriter(tmp_path, rows_per_part=100) as writer:
        for i in range(5000):
            writer.add({"id": ["recording"], "part": [i]})
    assert [p.name for p in part_files(tmp_path)] == ["part-00000.parquet"]
    assert time.monotonic() - started < 10


def test_errors_are_there_even_when_there_are_none(tmp_path: Path) -> None:
    PredictionWriter(tmp_path).close()
    table = pq.read_table(tmp_path / "errors.parquet")
    assert table.num_rows == 0 and table.column_names == ["id", "part", "reason"]
    assert read_predictions(tmp_path).num_rows == 0


def test_after_an_exception_whole_samples_are_kept_and_the_last_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        with PredictionWriter(tmp_path) as writer:
            writer.add({"id": ["a", "b"]})
            writer.add_error("c", "none")
            raise KeyError
    assert done_ids(tmp_path) == {"a", "c"}


def test_unfinished_files_are_ignored(tmp_path: Path) -> None:
    with PredictionWriter(tmp_path) as writer:
        writer.add({"id": ["a"]})
    stray = tmp_path / "predictions" / ".part-00001-x7.parquet"
    stray.write_bytes(b"PAR1 cut short")
    assert done_ids(tmp_path) == {"a"}
    assert read_predictions(tmp_path).num_rows == 1
    PredictionWriter(tmp_path, resume=True).close()
    assert not stray.exists()


def test_ranks_share_a_folder(tmp_path: Path) -> None:
    writers = [PredictionWriter(tmp_path, 4, rank=rank) for rank in range(3)]
    for i in range(60):
        writers[i % 3].add({"id": [f"s{i}"]})
    for rank, writer in enumerate(writers):
        writer.add_error(f"e{rank}", "none")
        writer.close()
    assert sorted(read_predictions(tmp_path)["id"].to_pylist()) == sorted(f"s{i}" for i in range(60))
    for _ in range(2):
        join_errors(tmp_path)
        assert [p.name for p in tmp_path.glob("errors*")] == ["errors.parquet"]
        assert sorted(read_errors(tmp_path)["id"].to_pylist()) == ["e0", "e1", "e2"]
    assert len(done_ids(tmp_path)) == 63


def test_a_used_folder_is_refused_and_removal_takes_only_its_own(tmp_path: Path) -> None:
    with PredictionWriter(tmp_path) as writer:
        writer.add({"id": ["a"], "score": [1.0]})
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="already holds predictions"):
        PredictionWriter(tmp_path)
    with pytest.raises(UserError, match="other columns than this run: score"):
        PredictionWriter(tmp_path, resume=True).add({"id": ["b"], "other": [1.0]})
    remove(tmp_path)
    assert done_ids(tmp_path) == set()
    assert (tmp_path / "metrics.json").exists()
    PredictionWriter(tmp_path).close()


def test_columns_that_change_are_our_mistake(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path)
    writer.add({"id": ["a"], "p": np.zeros((1, 3))})
    with pytest.raises(RuntimeError, match="p "):
        writer.add({"id": ["b"], "p": np.zeros((1, 4))})
    with pytest.raises(ValueError, match="column p has 2 rows"):
        writer.add({"id": ["b"], "p": np.zeros((2, 3))})


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        PredictionWriter(tmp_path / "file" / "run")
    damaged = tmp_path / "run" / "predictions"
    damaged.mkdir(parents=True)
    (damaged / "part-00000.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match="cannot read"):
        done_ids(tmp_path / "run")
