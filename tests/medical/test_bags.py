"""Bags from every layout, divided by patient, padded, packed, and refused where they do not hold."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from medical.bag_data import BagData, BagSamples, planted_bags
from medical.bags import Bag, draw_folds, find_bags
from medical.packed import pack, pack_command
from medical.tasks import SlideClassifier
from medical.tiles import TileEncoder
from polyhead.errors import BadSample, UserError
from polyhead.predictions import read_errors
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
    assert len(pack(bags, tmp_path / "out")) == 1
    packed = {b.id: b.read() for b in find_bags(tmp_path / "out", NONE)}
    assert sorted(packed) == ["s0", "s1", "s2"]
    for bag in bags:
        if bag.id != "broken":
            got = bag.read()
            np.testing.assert_allclose(packed[bag.id].features, got.features, atol=2e-3)
            np.testing.assert_array_equal(packed[bag.id].coords, got.coords)


@pytest.mark.parametrize(("features", "says"), [(np.zeros((0, 4)), "no instances"), (np.zeros(4), "is needed")])
def test_what_is_no_bag_is_said(tmp_path: Path, features: np.ndarray, says: str) -> None:
    write_h5(tmp_path / "one.h5", features)
    write_h5(tmp_path / "two.h5", np.zeros((2, 4)))
    bags = {b.id: b for b in find_bags(tmp_path, NONE)}
    with pytest.raises(BadSample, match=says):
        bags["one"].read()


def bag_table(path: Path, patients: int) -> Path:
    """Two bags of three instances a patient, with columns of folds; `torn` parts the bags of a patient."""
    rows = [
        (f"b{p}-{b}", f"p{p}", p % 2, p % 4 + 1, str(b)) for p in range(patients) for b in range(2) for _ in range(3)
    ]
    bag, patient, label, fold, torn = zip(*rows, strict=True)
    features = np.random.default_rng(0).normal(size=(3, len(rows))) + np.array(label)
    values = {"u": features[0], "v": features[1], "w": features[2]}
    pq.write_table(pa.table({"bag": bag, "patient": patient, "label": label, "instance_index": np.arange(len(rows)),
                             "round": fold, "torn": torn, **values}), path)  # fmt: skip
    return path


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=12, max_size=30), seed=st.integers(0, 5))
def test_no_patient_is_in_two_folds(sizes: list[int], seed: int) -> None:
    groups = [f"p{i}" for i, n in enumerate(sizes) for _ in range(n)]
    labels = [str(hash((g, "label")) % 2) for g in groups]
    where = draw_folds(labels, groups, 4, seed)
    sides: dict[str, set[int]] = {}
    for group, part in zip(groups, where, strict=True):
        sides.setdefault(group, set()).add(part)
    assert all(len(parts) == 1 for parts in sides.values())
    assert set(where) == {0, 1, 2, 3}


@pytest.mark.parametrize("share", [None, 0.2])
def test_a_fold_is_tested_and_all_others_train_unless_some_are_asked_for(tmp_path: Path, share: float | None) -> None:
    table = bag_table(tmp_path / "t.parquet", patients=20)
    sides = []
    for fold in range(5):
        data = BagData(str(table), folds=5, fold=fold, val_fraction=share)
        parts = {p: {data.bags()[i].group for i in where} for p, where in data.parts().items()}
        assert not parts["train"] & parts["test"] and not parts["val"] & (parts["train"] | parts["test"])
        assert bool(parts["val"]) == (share is not None) and len(set.union(*parts.values())) == 20
        assert {data.bags()[i].label for i in data.parts()["test"]} == {"0", "1"}
        sides.append(parts["test"])
    assert len(set.union(*sides)) == sum(map(len, sides)) == 20


def test_folds_of_a_table_that_part_a_patient_are_refused(tmp_path: Path) -> None:
    table = bag_table(tmp_path / "t.parquet", patients=20)
    with pytest.raises(UserError, match=r"t.parquet: patient p0 is in folds 0 and 1 of column 'torn'"):
        BagData(str(table), fold_column="torn").parts()
    data = BagData(str(table), fold_column="round", fold=3)
    assert data.fold_numbers() == [1, 2, 3, 4] and data.facts()["mean"] and len(data.facts()["mean"]) == 3
    with pytest.raises(UserError, match="data.fold is 0: there are folds 1 to 4"):
        BagData(str(table), fold_column="round").parts()


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e6])
def test_standardised_features_know_no_unit(tmp_path: Path, unit: float) -> None:
    table = pq.read_table(bag_table(tmp_path / "t.parquet", patients=20))
    for name in ("u", "v", "w"):
        table = table.set_column(table.column_names.index(name), name, pc.multiply(table[name], unit))
    pq.write_table(table.append_column("same", pa.array([7.0 * unit] * len(table))), tmp_path / "t.parquet")
    data = BagData(str(tmp_path / "t.parquet"), folds=5)
    facts = data.facts()
    train = np.concatenate([data.bags()[i].read().features for i in data.parts()["train"]])
    scaled = (train - np.array(facts["mean"])) / np.array(facts["deviation"])
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled[:, :-1].std(0), 1, atol=1e-4)
    assert np.abs(scaled[:, -1]).max() < 1e-4


def test_a_feature_that_is_no_number_is_said_with_its_place(tmp_path: Path) -> None:
    table = pa.table({"bag": ["a", "a", "b"], "label": [0, 0, 1], "u": [1.0, float("nan"), 2.0]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(BadSample, match="t.parquet, row 2 below the head, column u: nan"):
        find_bags(tmp_path / "t.parquet", NONE)[0].read()
    with pytest.raises(UserError, match="cannot read a: t.parquet, row 2 below the head, column u"):
        BagData(str(tmp_path / "t.parquet"), val_fraction=0.0, test_fraction=0.0).facts()


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


# Images as bags


def instance_images(root: Path, archive: bool = False) -> Path:
    """Six bags of instance images: bright ones hold a white square."""
    rows = ["bag,label,patient"]
    pictures = root / "pictures"
    for number in range(6):
        folder = pictures / f"B{number}"
        folder.mkdir(parents=True)
        for instance in range(3 + number % 2):
            image = Image.new("RGB", (40, 30), (20, 30, 40))
            if number % 2 and instance == 0:
                image.paste((255, 255, 255), (5, 5, 25, 25))
            image.save(folder / f"i{instance}.png")
        rows.append(f"B{number},{number % 2},p{number // 2}")
    if archive:
        with zipfile.ZipFile(root / "pictures.zip", "w") as file:
            for path in sorted(pictures.rglob("*.png")):
                file.write(path, str(path.relative_to(pictures)))
        shutil.rmtree(pictures)
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.parametrize("archive", [False, True])
def test_folders_of_instance_images_are_bags(tmp_path: Path, archive: bool) -> None:
    data = BagData(str(instance_images(tmp_path, archive)), encoder="encoder:efficientnet_lite0")
    bags = {b.id: b for b in data.bags()}
    assert sorted(bags) == [f"B{i}" for i in range(6)] and data.facts()["instances"] == "images"
    assert [len(bags[f"B{i}"].read().features) for i in range(6)] == [3, 4] * 3
    assert bags["B3"].label == "1" and bags["B3"].group == "p1"
    assert bags["B1"].read().meta["files"] == ["i0.png", "i1.png", "i2.png", "i3.png"]
    bright, dark = bags["B1"].read().features, bags["B0"].read().features
    assert np.abs(bright[0] - dark[0]).max() > 0.1 and np.array_equal(bright[1], dark[1])


def test_a_model_of_instance_images_needs_no_table_to_predict(tmp_path: Path) -> None:
    root = instance_images(tmp_path)
    (root / "labels.csv").unlink()
    bags = BagData(str(root), encoder="encoder:efficientnet_lite0", instances="images").bags(everything=True)
    assert sorted(b.id for b in bags) == [f"pictures/B{i}" for i in range(6)]


def test_a_table_that_names_files_means_tiles(tmp_path: Path) -> None:
    root = instance_images(tmp_path)
    files = sorted((root / "pictures").rglob("*.png"))
    rows = [f"{p.relative_to(root)},{i % 2}" for i, p in enumerate(files)]
    (root / "labels.csv").unlink()
    (root / "split.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    data = BagData(str(root), encoder="encoder:efficientnet_lite0", tile=20)
    assert len(data.bags()) == len(files) and data.facts()["instances"] == "auto"


def test_mirrored_encodings_keep_the_order_of_the_tiles(tmp_path: Path) -> None:
    image = Image.new("RGB", (160, 96), (90, 90, 90))
    image.paste((255, 255, 255), (0, 0, 32, 32))
    encoder = TileEncoder("encoder:efficientnet_lite0", 32, None)
    plain = encoder.encode("a", image).features.astype(np.float32)
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    seen = encoder.encode("a", flipped).features.astype(np.float32).reshape(3, 5, -1)[:, ::-1].reshape(15, -1)
    mirrored = encoder.encode("a", image, 1).features.astype(np.float32)
    assert np.allclose(mirrored, seen, atol=1e-2)
    assert np.abs(mirrored - plain).max() > 1e-2
    samples = [BagSamples([Bag("a", lambda: encoder.encode("a", image), "0", None, None,
                               lambda k: encoder.encode("a", image, k))], {"0": 0}, plain.shape[1], mirror=on)
               for on in (False, True)]  # fmt: skip
    still = {samples[0].load(0, epoch)["features"].float().sum().item() for epoch in range(8)}
    moving = {samples[1].load(0, epoch)["features"].float().sum().item() for epoch in range(8)}
    assert len(still) == 1 and len(moving) > 1


def test_packing_streams_and_tells_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    arrays = {f"s{i}": rng.normal(size=(5 + i, 4)).astype(np.float32) for i in range(12)}
    for name, values in arrays.items():
        with h5py.File(tmp_path / "in" / f"{name}.h5", "w") as file:
            file["features"] = values
    (tmp_path / "in" / "broken.h5").write_bytes(b"no")
    rows = ["slide_id,label,patient", *(f"s{i},{i % 2},p{i}" for i in range(12)), "broken,0,p99"]
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    pack_command(str(tmp_path / "in"), str(tmp_path / "out"), str(tmp_path / "labels.csv"), dtype="float32")
    assert "left out broken" in capsys.readouterr().err
    bags = find_bags(tmp_path / "out", NONE)
    assert {b.id: (b.label, b.group) for b in bags} == {f"s{i}": (str(i % 2), f"p{i}") for i in range(12)}
    assert all(np.array_equal(b.read().features, arrays[b.id]) for b in bags)
    with pytest.raises(UserError, match="is packed already"):
        pack_command(str(tmp_path / "in"), str(tmp_path / "out"))


def test_packing_leaves_out_what_it_could_not_keep(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    write_h5(root / "good.h5", np.ones((3, 2), np.float32))
    write_h5(root / "huge.h5", np.array([[1, 70000], [1, 2]], np.float32))
    write_h5(root / "hole.h5", np.array([[1, 2], [np.nan, 2]], np.float32))
    done = polyhead("pack", "--features", root, "--output", tmp_path / "half")
    assert done.status == 0 and "1 bags in" in done.err
    said = {r["id"]: r["reason"] for r in read_errors(tmp_path / "half").to_pylist()}
    assert said == {"huge": "a feature of 70000 is beyond the 65504 of float16: --dtype float32 holds it",
                    "hole": "hole.h5: feature 0 of instance 1 is nan"}  # fmt: skip
    assert f"left out hole of {root}: {said['hole']}\n" in done.err
    assert np.isfinite(np.load(tmp_path / "half/features.npy")).all()
    done = polyhead("pack", "--features", root, "--output", tmp_path / "whole", "--dtype", "float32", "--strict", True)
    assert done.status == 2 and "1 bags were left out" in done.err
    assert sorted(b.id for b in find_bags(tmp_path / "whole", NONE)) == ["good", "huge"]


def test_packing_names_its_own_options_and_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    root = feature_folder(tmp_path / "in", 2)
    (tmp_path / "labels.csv").write_text("glass,label\ns0,a\ns1,b\n")
    words = ("pack", "--features", root, "--labels", tmp_path / "labels.csv", "--output", tmp_path / "a/b/out")
    done = polyhead(*words)
    assert done.status == 2 and "name it with --bag_column" in done.err, done.err
    (tmp_path / "empty").mkdir()
    write_h5(tmp_path / "empty/hole.h5", np.full((1, 2), np.nan, np.float32))
    done_empty = polyhead("pack", "--features", tmp_path / "empty", "--output", tmp_path / "a/b/out")
    assert done_empty.status == 2 and "nothing to pack" in done_empty.err, done_empty.err
    assert not (tmp_path / "a").exists()
    assert polyhead(*words, "--bag_column", "glass").status == 0
    assert {b.id: b.label for b in find_bags(tmp_path / "a/b/out", NONE)} == {"s0": "a", "s1": "b"}


# What tables say of bags


def feature_folder(root: Path, count: int = 12) -> Path:
    root.mkdir()
    for i in range(count):
        write_h5(root / f"s{i}.h5", np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32))
    return root


def test_prediction_takes_bags_that_no_table_names(tmp_path: Path) -> None:
    root = feature_folder(tmp_path / "in", 5)
    (tmp_path / "labels.csv").write_text("slide_id,label\ns0,a\ns1,b\n")
    data = BagData(str(root), labels=str(tmp_path / "labels.csv"))
    assert len(data.bags()) == 2 and len(data.bags(everything=True)) == 5


def test_parts_go_by_usual_names_and_others_are_refused(tmp_path: Path) -> None:
    root = feature_folder(tmp_path / "in")
    names = ["Training", "valid", "TEST"]
    rows = [f"s{i},{'ab'[i // 3 % 2]},{names[i % 3]}" for i in range(12)]
    (tmp_path / "labels.csv").write_text("slide_id,label,split\n" + "\n".join(rows))
    parts = BagData(str(root), labels=str(tmp_path / "labels.csv")).parts()
    assert [len(parts[p]) for p in ("train", "val", "test")] == [4, 4, 4]
    (tmp_path / "labels.csv").write_text("slide_id,label,split\ns0,a,holdout\n")
    with pytest.raises(UserError, match="names a part 'holdout'"):
        BagData(str(root), labels=str(tmp_path / "labels.csv")).parts()


def test_a_split_file_of_clam(tmp_path: Path) -> None:
    root = feature_folder(tmp_path / "in")
    (tmp_path / "labels.csv").write_text("slide_id,label\n" + "".join(f"s{i},{'ab'[i % 2]}\n" for i in range(12)))
    lines = [",train,val,test", "0,s0,s6,s8", "1,s1,s7,s9", "2,s2,,s10", "3,s3,,"]
    (tmp_path / "splits_0.csv").write_text("\n".join(lines))
    data = BagData(str(root), labels=str(tmp_path / "labels.csv"), splits=str(tmp_path / "splits_0.csv"))
    named = {p: sorted(data.bags()[i].id for i in indices) for p, indices in data.parts().items()}
    assert named == {"train": ["s0", "s1", "s2", "s3"], "val": ["s6", "s7"], "test": ["s10", "s8", "s9"]}
    (tmp_path / "splits_0.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no columns train, val and test"):
        BagData(str(root), labels=str(tmp_path / "labels.csv"), splits=str(tmp_path / "splits_0.csv")).parts()


def test_folds_of_a_table_must_be_whole_and_complete(tmp_path: Path) -> None:
    root = feature_folder(tmp_path / "in")
    for cell, text in (("", "must hold a whole number"), (None, "names no fold for bag s11")):
        rows = [f"s{i},{'ab'[i % 2]},{i % 4}" for i in range(11)] + ([] if cell is None else [f"s11,a,{cell}"])
        (tmp_path / "labels.csv").write_text("slide_id,label,fold\n" + "\n".join(rows))
        data = BagData(str(root), labels=str(tmp_path / "labels.csv"), fold_column="fold")
        if cell is None:
            data._bags = find_bags(root, NONE)
            for bag in data._bags:
                bag.label = "a"
        with pytest.raises(UserError, match=text):
            data.parts()


def test_restraint_is_for_training_alone() -> None:
    facts = {"classes": ["a", "b"], "mean": [0.0] * 6, "deviation": [1.0] * 6}
    torch.manual_seed(0)
    plain = SlideClassifier(facts, d_inner=8, gate=4, n_token=2, n_masked_patch=0)
    held = SlideClassifier(facts, d_inner=8, gate=4, n_token=2, n_masked_patch=0, smoothing=0.2, input_dropout=0.5)
    held.load_state_dict(plain.state_dict())
    batch = {"features": torch.randn(3, 5, 6), "present": torch.ones(3, 5, dtype=torch.bool),
             "label": torch.tensor([0, 1, 1]), "id": ["x", "y", "z"]}  # fmt: skip
    assert torch.equal(plain.eval()(batch)["logits"], held.eval()(batch)["logits"])
    # Without dropout, smoothed cross-entropy is the mixture of that of the label and that of all classes
    logits = plain(batch)["logits"]
    wanted = 0.8 * F.cross_entropy(logits, batch["label"]) - 0.2 * logits.log_softmax(-1).mean()
    assert torch.allclose(held.losses(batch)["bag"], wanted)
    assert not torch.equal(held.train().losses(batch)["bag"], held.losses(batch)["bag"])
    assert torch.equal(plain.train().losses(batch)["bag"], plain.losses(batch)["bag"])
    with pytest.raises(UserError, match="model.input_dropout is 1"):
        SlideClassifier(facts, input_dropout=1.0)


def csv_table(path: Path, **columns: list[Any]) -> Path:
    """Eight bags of two instances with features f1 and f2, as a CSV."""
    rng = np.random.default_rng(0)
    names = [f"b{i // 2}" for i in range(16)]
    table = {
        "bag": names,
        "label": [i // 2 % 2 for i in range(16)],
        "f1": rng.normal(size=16),
        "f2": rng.normal(size=16),
    }
    pacsv.write_csv(pa.table({**table, **columns}), path)
    return path


def test_features_of_a_table_are_known_by_name(tmp_path: Path) -> None:
    first = csv_table(tmp_path / "first.csv")
    data = BagData(str(first), test_fraction=0.25, val_fraction=0.25)
    data.prepare("fit")
    facts = data.facts()
    assert facts["feature_columns"] == ["f1", "f2"]
    table = pacsv.read_csv(first)
    pacsv.write_csv(table.select(["f2", "bag", "f1"]).append_column("f0", table["f1"]), tmp_path / "later.csv")
    later = BagData(str(tmp_path / "later.csv"), **facts).dataset("predict")
    before = BagData(str(first), **facts).dataset("predict")
    for index in range(8):
        assert torch.equal(later.load(index, 0)["features"], before.load(index, 0)["features"])
    pacsv.write_csv(table.drop_columns(["f2"]), tmp_path / "less.csv")
    with pytest.raises(UserError, match="less.csv has no column 'f2', which the model was trained on"):
        BagData(str(tmp_path / "less.csv"), **facts).dataset("predict")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"f2": ["1,5"] * 16}, "column 'f2' holds '1,5' among its numbers"),
        ({"f2": ["0.5"] * 15 + ["<0.1"]}, "column 'f2' holds '<0.1'"),
        ({"split": ["train", "test"] * 8}, "the rows of bag b0 say test and train in column 'split'"),
        ({"patient": ["p", "q"] * 8}, "the rows of bag b0 say p and q in column 'patient'"),
        ({"label": [" "] * 2 + ["x"] * 14}, "bag b0 has no label"),
        ({"patient": ["p"] * 16, "split": ["train"] * 8 + ["test"] * 8}, "group 'p' is in train and test"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(tmp_path: Path, columns: dict[str, list[Any]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        BagData(str(csv_table(tmp_path / "t.csv", **columns))).prepare("fit")


def test_text_of_another_encoding_and_half_folds_are_refused(tmp_path: Path) -> None:
    path = csv_table(tmp_path / "t.csv", label=["é", "é", "b", "b"] * 4, fold=[0.5, 0.5, 1.0, 1.0] * 4)
    with pytest.raises(UserError, match="column 'fold' must hold a whole number"):
        BagData(str(path), fold_column="fold").fold_numbers()
    path.write_bytes(path.read_text(encoding="utf-8").encode("latin-1"))
    with pytest.raises(UserError, match="column 'label' is not UTF-8 text"):
        BagData(str(path)).prepare("fit")


def test_a_table_of_labels_that_contradicts_itself(tmp_path: Path) -> None:
    path = csv_table(tmp_path / "t.csv")
    (tmp_path / "said.csv").write_text("bag,label\nb0,1\nb1,0\nb0,0\n")
    with pytest.raises(UserError, match="said.csv has two rows of bag b0 that say different things"):
        BagData(str(path), labels=str(tmp_path / "said.csv")).prepare("fit")


def test_arrays_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    data = BagData(mean=[0.0, 0.0], deviation=[1.0, 1.0], classes=["a", "b"])
    samples = data.raw_dataset([np.ones((2, 2)), np.full((2, 2), np.nan), np.array([["x", "y"]])])
    assert samples.load(0, 0)["features"].shape == (2, 2)
    for index, says in ((1, "feature 0 of instance 0 is nan"), (2, "holds no numbers")):
        with pytest.raises(BadSample, match=says):
            samples.load(index, 0)
