"""The data module: splits, batches, what a model does not know, and what `doctor` tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from polyhead.bundle import build_data
from polyhead.catalogue import Catalogue
from polyhead.errors import UserError
from recsys.interactions import Interactions


def write(path: Path, lists: dict[Any, list[Any]], times: dict[Any, list[int]] | None = None) -> Path:
    """A log with these histories, its rows out of order."""
    rows = [(u, i, (times or {}).get(u, range(len(v)))[n]) for u, v in lists.items() for n, i in enumerate(v)]
    np.random.default_rng(0).shuffle(rows)  # type: ignore[arg-type]
    user, item, time = ([r[k] for r in rows] for k in range(3))
    text = [any(isinstance(v, str) for v in values) for values in (user, item)]
    user, item = ([str(v) if t else int(v) for v in values] for t, values in zip(text, (user, item), strict=True))
    pq.write_table(pa.table({"user_id": user, "item_id": item, "timestamp": [int(t) for t in time]}), path)
    return path


LISTS = {1: [10, 11, 12, 13, 14], 2: [11, 12, 11], 3: [14, 10], 4: [13], 5: [12, 10, 13, 11]}


def data(path: Path, **options: Any) -> Interactions:
    module = Interactions(str(path), **options)
    module.facts()
    return module


def asked(module: Interactions, split: Any) -> dict[str, tuple[list[int], int]]:
    """user -> known history and target, as item ids."""
    samples = module.questions(split)
    ids = [*module.catalogue.ids, None]
    got = {}
    for n, name in enumerate(samples.ids):
        own = samples.histories.items[samples.histories.starts[n] : samples.histories.starts[n + 1]]
        target = None if samples.target is None else ids[samples.target[n]]
        got[name] = ([ids[i] for i in own], target)
    return got


def test_leave_one_out(tmp_path: Path) -> None:
    module = data(write(tmp_path / "log.parquet", LISTS))
    assert asked(module, "val") == {"1": ([10, 11, 12], 13), "2": ([11], 12), "5": ([12, 10], 13)}
    assert asked(module, "test") == {"1": ([10, 11, 12, 13], 14), "2": ([11, 12], 11), "5": ([12, 10, 13], 11)}
    assert asked(module, "predict")["4"] == ([13], None)
    counts = module.counts.toarray()
    # User 3 has too few events for a test and trains with all of them; validation and test items never enter
    assert counts.sum() == 4 and counts[4, 0] == 1 and counts[0, 1] == 1 and counts[1, 2] == 1 and counts[2, 0] == 1


def test_a_split_by_time_asks_for_what_came_after(tmp_path: Path) -> None:
    times = {1: [0, 1, 2, 10, 20], 2: [3, 12, 22], 3: [4, 5], 4: [21], 5: [1, 2, 3, 4]}
    module = data(write(tmp_path / "log.parquet", LISTS, times), split="time", val_fraction=0.15, test_fraction=0.2)
    train, val, test = (module.train.lengths.tolist(), asked(module, "val"), asked(module, "test"))
    assert train == [3, 1, 2, 0, 4]
    assert val == {"1": ([10, 11, 12], 13), "2": ([11], 12)}
    assert test == {"1": ([10, 11, 12, 13], 14), "2": ([11, 12], 11), "4": ([], 13)}


def test_a_window_cuts_training_before_it_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", {1: [*range(20)], 2: [3, 4, 5]})
    module = data(path, max_len=4)
    assert module.train.lengths.tolist() == [4, 1] and module.counts.sum() == 3
    # As published: four training items and, for the test, the validation item as well; or everything
    assert asked(module, "val")["1"][0] == [14, 15, 16, 17] and asked(module, "test")["1"][0] == [14, 15, 16, 17, 18]
    assert len(asked(data(path, max_len=4, seen="all"), "test")["1"][0]) == 19


def test_a_training_batch_holds_what_the_losses_need(tmp_path: Path) -> None:
    module = data(write(tmp_path / "log.parquet", LISTS))
    samples: Any = module.dataset("train")
    assert sorted(samples.ids) == ["1", "3", "5"]
    batch = samples.load_batch([0, 1, 2], 0)
    size, history = len(module.catalogue), batch["history"]
    assert batch["id"][-1] == "1" and history.shape == (3, 2)
    assert history.flatten()[batch["place"]].tolist() == batch["head"].tolist()
    assert torch.equal(history[history < size], batch["head"])
    edges = zip(batch["edge_row"], batch["edge_item"], batch["edge_share"], strict=True)
    followers = {(int(batch["head"][r]), int(i)): float(s) for r, i, s in edges}
    counts = module.counts.toarray()
    assert followers == {(i, j): 1.0 for i in set(batch["head"].tolist()) for j in np.flatnonzero(counts[i])}
    assert batch["target"].tolist() == [0, 0, 1, 2]


def test_the_order_is_of_seed_and_epoch_and_leaves_nobody_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lists = {u: rng.integers(0, 30, rng.integers(3, 9)).tolist() for u in range(50)}
    module = data(write(tmp_path / "log.parquet", lists), batch_size=8, seed=3)
    samples = module.samples("train")
    first, second = module.batches(samples, "train", 0), module.batches(samples, "train", 1)
    assert first == module.batches(samples, "train", 0) != second
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(len(samples)))
    small = data(write(tmp_path / "log.parquet", lists), batch_size=8, max_positions=4)
    assert max(map(len, small.batches(small.samples("train"), "train", 0))) < 8


def test_long_histories_widen_the_window(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for length, expected in ((40, 50), (120, 150), (10_000, 200)):
        lists = {u: rng.integers(0, 30, length).tolist() for u in range(3)} | {9: [1]}
        assert data(write(tmp_path / "log.parquet", lists)).max_len == expected


def test_what_a_model_does_not_know_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = data(write(tmp_path / "old.parquet", LISTS)).facts()
    newer = write(tmp_path / "new.parquet", {"x": [99, "10", 98, 13, 99], "y": [97]})
    module = Interactions(str(newer), **facts)
    module.setup("predict")
    assert "4 of 6 events are of 3 items that the model does not know" in capsys.readouterr().err
    assert asked(module, "predict") == {"x": ([10, 13], None), "y": ([], None)}
    # A target that the model cannot recommend counts as missed
    assert asked(module, "test")["x"] == ([10, 13], None)
    assert module.questions("test").target is not None and module.questions("test").target[0] == -1  # type: ignore


def test_facts_bring_the_data_back(tmp_path: Path) -> None:
    module = data(write(tmp_path / "log.parquet", {"u": ["ä", "b", "ä", "c"], "v": ["c", "b", "c"]}))
    facts = module.facts()
    again = build_data({"class_path": "recsys.Interactions", "init_args": {"root": None, **facts}})
    assert again.facts() == facts and Catalogue.unpack(facts["items"]).ids == ["b", "c", "ä"]
    with pytest.raises(UserError, match="damaged"):
        Catalogue.unpack("nonsense")


def test_raw_histories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = data(write(tmp_path / "log.parquet", LISTS))
    samples: Any = module.raw_dataset([[10, "11", 77], [], np.array([14])])
    batch = module.collate([samples.load(n, 0) for n in range(3)])
    size = len(module.catalogue)
    assert batch["history"].tolist() == [[0, 1], [size, size], [size, 4]] and batch["id"][2] == "input-2"
    assert "1 items that the model does not know" in capsys.readouterr().err
    with pytest.raises(UserError, match="list of item ids"):
        module.raw_dataset(["10"])


def test_too_little_to_learn_from_is_said(tmp_path: Path) -> None:
    for lists, stage in (({1: [1, 2], 2: [3, 4]}, "fit"), ({1: [1], 2: [2]}, "test")):
        module = Interactions(str(write(tmp_path / "log.parquet", lists)))
        with pytest.raises(UserError, match="has nothing for the"):
            module.setup(stage)
    with pytest.raises(UserError, match="kcore 9"):
        Interactions(str(write(tmp_path / "log.parquet", LISTS)), kcore=9).facts()


def test_the_core_renumbers(tmp_path: Path) -> None:
    module = data(write(tmp_path / "log.parquet", {**LISTS, 6: [10, 11, 12, 13]}), kcore=3)
    assert module.catalogue.ids == [10, 11, 12, 13] and module.ids() == ["1", "2", "5", "6"]


def test_the_core_leaves_nobody_out_of_prediction(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", {**LISTS, 6: [10, 11, 12, 13]})
    facts = data(path, kcore=3).facts()
    module = Interactions(str(path), kcore=3, **facts)
    module.setup("predict")
    assert asked(module, "predict")["3"] == ([10], None)  # 14 is no item of the core
    assert len(asked(module, "predict")) == 6 and set(asked(module, "test")) == {"1", "2", "5", "6"}
    small = Interactions(str(write(tmp_path / "new.parquet", {9: [12, 10]})), kcore=3, **facts)
    small.setup("predict")
    assert asked(small, "predict") == {"9": ([12, 10], None)}


def test_prediction_goes_on_without_what_is_no_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = data(write(tmp_path / "old.parquet", LISTS)).facts()
    (tmp_path / "new.csv").write_text("user,item,time\na,10,1\n,11,2\nb,,3\na,10,1\n")
    with pytest.raises(UserError, match="rows without"):
        Interactions(str(tmp_path / "new.csv"), **facts).setup("test")
    module = Interactions(str(tmp_path / "new.csv"), **facts)
    module.setup("predict")
    assert asked(module, "predict") == {"a": ([10], None)}
    said = capsys.readouterr().err
    assert "2 rows lack a user, an item or a time" in said and "1 events have the user, item and time" in said


def test_the_summary_counts(tmp_path: Path) -> None:
    told = data(write(tmp_path / "log.parquet", LISTS)).summary()
    assert told["events"] == 15 and told["users"] == 5 and told["repeated items"].startswith("1 events")
    assert told["test"] == "3 users, the targets of 0 never occur in training"
