"""Bags from every layout, divided by patient, padded, packed, and refused where they do not hold."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medical.bag_data import BagData, planted_bags
from medical.bags import find_bags, folds, pack
from polyhead.errors import BadSample, UserError
from tests.command import polyhead

NONE: dict[str, str | None] = dict.fromkeys(("bag", "label", "group", "split"))


def write_h5(path: Path, features: np.ndarray, coords: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features
        if coords is not None:
            file["coords"] = coords


def test_packing_keeps_every_bag(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(3):
        count = index + 1
        write_h5(tmp_path / f"in/s{index}.h5", rng.normal(size=(count, 4)), rng.integers(0, 99, (count, 2)))
    (tmp_path / "in/broken.h5").write_bytes(b"not hdf5")
    bags = find_bags(tmp_path / "in", NONE)
    assert pack(bags, tmp_path / "out") == 1
    packed = {b.id: b.read() for b in find_bags(tmp_path / "out", NONE)}
    assert sorted(packed) == ["s0", "s1", "s2"]
    for bag in bags:
        if bag.id != "broken":
            got = bag.read()
            np.testing.assert_allclose(packed[bag.id].features, got.features, atol=2e-3)
            np.testing.assert_array_equal(packed[bag.id].coords, got.coords)


@pytest.mark.parametrize(
    ("features", "says"), [(np.zeros((0, 4)), "no instances"), (np.zeros(4), "is needed")]
)
def test_what_is_no_bag_is_said(tmp_path: Path, features: np.ndarray, says: str) -> None:
    write_h5(tmp_path / "one.h5", features)
    write_h5(tmp_path / "two.h5", np.zeros((2, 4)))
    bags = {b.id: b for b in find_bags(tmp_path, NONE)}
    with pytest.raises(BadSample, match=says):
        bags["one"].read()


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=12, max_size=30), fold=st.integers(0, 3), seed=st.integers(0, 5))
def test_no_patient_is_on_two_sides(sizes: list[int], fold: int, seed: int) -> None:
    groups = [f"p{i}" for i, n in enumerate(sizes) for _ in range(n)]
    labels = [str(hash((g, "label")) % 2) for g in groups]
    where = folds(labels, groups, 4, fold, seed)
    sides: dict[str, set[str]] = {}
    for group, part in zip(groups, where, strict=True):
        sides.setdefault(group, set()).add(part)
    assert all(len(parts) == 1 for parts in sides.values())
    assert set(where) <= {"train", "val", "test"}


def test_every_bag_is_tested_once_over_the_folds(shared: Path) -> None:
    tested: list[str] = []
    for fold in range(10):
        data = BagData(str(shared / "data/mil-musk/musk1.parquet"), fold_column="fold", fold=fold)
        data.setup("fit")
        parts = data.parts()
        tested += [data.bags()[i].id for i in parts["test"]]
        assert not set(parts["train"]) & set(parts["test"])
    assert len(tested) == len(set(tested)) == 92


def test_a_table_gives_bags_of_its_rows(tmp_path: Path) -> None:
    table = pa.table({"slide": ["b", "a", "b"], "class": ["x", "y", "x"], "u": [1.0, 2.0, 3.0], "v": [4, 5, 6]})
    pq.write_table(table, tmp_path / "t.parquet")
    bags = {b.id: b for b in find_bags(tmp_path / "t.parquet", {**NONE, "bag": "slide"})}
    np.testing.assert_array_equal(bags["b"].read().features, [[1, 4], [3, 6]])
    assert (bags["b"].label, bags["a"].label) == ("x", "y")
    pq.write_table(pa.table({"u": [1.0]}), tmp_path / "n.parquet")
    with pytest.raises(UserError, match="no bag column"):
        find_bags(tmp_path / "n.parquet", NONE)


def test_unequal_bags_are_padded_and_said() -> None:
    data = BagData(batch_size=3)
    data.setup("fit")
    batch = next(iter(data.loader(data.samples("val"), "val")))
    counts = batch["present"].sum(1).tolist()
    assert counts == [len(data.samples("val").load(i, 0)["features"]) for i in range(3)]
    assert (batch["features"][~batch["present"]] == 0).all()
    assert (batch["instance_label"][~batch["present"]] == -1).all()


def test_the_embedded_bags_hold_their_key_instances() -> None:
    for bag in planted_bags()[:20]:
        key = bag.read().meta["key"]
        assert (len(key) > 0) == (bag.label == "1")


def test_from_features_to_a_table(tmp_path: Path) -> None:
    fit = polyhead("fit", "--config", "medical/acmil", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 20,
                   "--output", tmp_path / "fit")  # fmt: skip
    assert fit.status == 0, fit.err
    rng = np.random.default_rng(0)
    for index, width in enumerate((16, 16, 5)):
        write_h5(tmp_path / f"slides/s{index}.h5", rng.normal(size=(30 + index, width)).astype(np.float32))
    done = polyhead("predict", "--ckpt_path", tmp_path / "fit/bundle", "--data.root", tmp_path / "slides",
                    "--output", tmp_path / "out")  # fmt: skip
    assert done.status == 0, done.err
    rows = pq.read_table(tmp_path / "out/predictions").to_pylist()
    assert {r["id"]: r["instances"] for r in rows} == {"s0": 30, "s1": 31}
    assert all(len(set(r["top"])) == 10 for r in rows)
    (error,) = pq.read_table(tmp_path / "out/errors.parquet").to_pylist()
    assert error["id"] == "s2" and "5 features an instance, the model takes 16" in error["reason"]
    for kind in ("onnx", "torchscript"):
        words = ("export", "--ckpt_path", tmp_path / "fit/bundle", "--format", kind, "--output", tmp_path / kind)
        exported = polyhead(*words)
        assert exported.status == 0, exported.err
    again = polyhead("predict", "--ckpt_path", tmp_path / "onnx/model.onnx", "--data.root", tmp_path / "slides",
                     "--output", tmp_path / "again")  # fmt: skip
    assert again.status == 0, again.err
    for one, other in zip(rows, pq.read_table(tmp_path / "again/predictions").to_pylist(), strict=True):
        assert (one["id"], one["label"], one["top"]) == (other["id"], other["label"], other["top"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
    assert json.loads((tmp_path / "fit/metrics.json").read_text())["val/instance_auroc"] > 0


def test_a_large_bag_is_streamed_to_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from medical import tasks
    from medical.tasks import SlideClassifier

    torch.manual_seed(0)
    facts = {"classes": ["a", "b"], "mean": [0.5] * 6, "deviation": [2.0] * 6}
    system = SlideClassifier(facts, d_inner=16, gate=8).eval()
    batch = {"features": torch.randn(1, 500, 6).half(), "present": torch.ones(1, 500, dtype=torch.bool)}
    with torch.no_grad():
        whole = system.outputs(**batch)
        monkeypatch.setattr(tasks, "LARGE", 100)
        streamed = system.outputs(**batch)
    for name, value in whole.items():
        torch.testing.assert_close(streamed[name], value, rtol=1e-4, atol=1e-6)
