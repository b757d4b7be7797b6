"""Faces: published layouts by name and never by number, alignment, and photographs with none or several faces."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polyhead.errors import UserError
from tests.command import polyhead
from vision.expression_tasks import ExpressionClassifier
from vision.face_align import TEMPLATE, Face, align, crop, similarity
from vision.face_layouts import FERPLUS, canonical, class_order, vote
from vision.faces import FaceData, FacesInPhotos, cut

NETWORK = {"units": [1, 1, 1], "widths": [8, 8, 12, 16], "ratio": 4, "width": 24, "depth": 2, "heads": 4}


def picture(path: Path, shade: int = 100, size: tuple[int, int] = (40, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


# Names


def test_names_of_many_sets_mean_the_same_expressions() -> None:
    assert [canonical(n) for n in ("Happy", "smiling", "angry", "SURPRISED", "neutral_front")] == [
        "happiness", "happiness", "anger", "surprise", "neutral",
    ]  # fmt: skip
    assert canonical("dog") is None
    assert class_order(["neutral", "happy", "angry"]) == ["angry", "happy", "neutral"]
    assert class_order(["neutral", "cat"]) is None and class_order(["happy", "smile"]) is None


@pytest.mark.parametrize(
    ("counts", "majority", "plurality"),
    [
        ([6, 1, 0, 1, 0, 0, 0, 0, 2, 0], "neutral", "neutral"),  # single votes do not count: 6 of 8
        ([4, 4, 0, 0, 0, 0, 0, 0, 0, 0], None, "neutral"),  # half is no majority
        ([0, 0, 3, 0, 0, 0, 0, 0, 6, 0], None, "surprise"),  # unknown wins
        ([0, 0, 0, 0, 0, 0, 0, 2, 1, 1], "contempt", "contempt"),
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], None, "neutral"),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 10], None, None),
    ],
)
def test_votes(counts: list[int], majority: str | None, plurality: str | None) -> None:
    assert vote(counts, "majority") == majority
    assert vote(counts, "plurality") == plurality


# Layouts


def test_raf_db(tmp_path: Path) -> None:
    lines = []
    for i, number in enumerate([1, 4, 7, 5, 4, 7, 1, 5] * 3):
        name = f"{'test' if i % 4 == 3 else 'train'}_{i:05d}.jpg"
        picture(tmp_path / f"basic/Image/aligned/{name.replace('.jpg', '_aligned.jpg')}")
        lines.append(f"{name} {number}")
    (tmp_path / "basic/EmoLabel").mkdir()
    (tmp_path / "basic/EmoLabel/list_patition_label.txt").write_text("\n".join(lines))
    data = FaceData(str(tmp_path), image_size=16)
    data.parts()
    labels = {e.id: e.label for e in data.entries()}
    assert labels["train_00000.jpg"] == "surprise" and labels["train_00001.jpg"] == "happiness"
    assert {e.split for e in data.entries()} == {"train", "test"} and len(labels) == 24
    (tmp_path / "basic/EmoLabel/list_patition_label.txt").write_text("train_00000.jpg 9\n")
    with pytest.raises(UserError, match="line 1 is not"):
        FaceData(str(tmp_path), image_size=16).parts()


def test_ferplus(tmp_path: Path) -> None:
    rows = [["usage", "Image name", *FERPLUS, "unknown", "NF"]]
    for i in range(24):
        usage, folder = [("Training", "FER2013Train"), ("PublicTest", "FER2013Valid"), ("PrivateTest", "FER2013Test")][
            i % 3
        ]
        votes = [0] * 10
        votes[i // 3 % 2] = 9
        picture(tmp_path / folder / f"fer{i:07d}.png")
        rows.append([usage, f"fer{i:07d}.png", *map(str, votes)])
    rows += [["Training", "", *["1"] * 10], ["Training", "fer0000000.png", *["1"] * 10]]
    with open(tmp_path / "fer2013new.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    data = FaceData(str(tmp_path), image_size=16)
    parts = data.parts()
    assert data.classes == ["happiness", "neutral"]
    assert [len(parts[p]) for p in ("train", "val", "test")] == [8, 8, 8]
    assert data.summary()["left out"]["not pictures"] == 2


def test_affectnet(tmp_path: Path) -> None:
    for part, count in (("train_set", 20), ("val_set", 4)):
        (tmp_path / part / "annotations").mkdir(parents=True)
        for i in range(count):
            picture(tmp_path / part / "images" / f"{i}.jpg")
            np.save(tmp_path / part / "annotations" / f"{i}_exp.npy", str([6, 1][i % 2]))
    data = FaceData(str(tmp_path), image_size=16)
    parts = data.parts()
    assert data.classes == ["anger", "happiness"] and len(parts["test"]) == 4
    (tmp_path / "val_set/annotations/0_exp.npy").write_bytes(b"no")
    with pytest.raises(UserError, match="0_exp.npy holds no number"):
        FaceData(str(tmp_path), image_size=16).parts()


# Alignment


@settings(deadline=None, max_examples=40)
@given(st.floats(-3, 3), st.floats(0.3, 4), st.floats(-50, 50), st.floats(-50, 50), st.integers(2, 5))
def test_a_similarity_is_found_again(angle: float, scale: float, x: float, y: float, count: int) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    target = TEMPLATE[:count] @ turn.T + [x, y]
    got = similarity(TEMPLATE[:count], target)
    assert np.allclose(got, np.column_stack([turn, [x, y]]), atol=1e-6)


def test_the_fit_is_least_squares_in_the_picture() -> None:
    rng = np.random.default_rng(0)
    points = TEMPLATE * 1.5 + 20 + rng.normal(0, 3, TEMPLATE.shape)
    best = similarity(TEMPLATE, points)

    def missed(m: np.ndarray) -> float:
        return float(((TEMPLATE @ m[:, :2].T + m[:, 2] - points) ** 2).sum())

    for _ in range(50):
        a, b, c, d = rng.normal(0, 0.02, 4)
        other = best + np.array([[a, -b, 50 * c], [b, a, 50 * d]])
        assert missed(best) <= missed(other)


def test_points_come_to_lie_on_the_template() -> None:
    image = np.zeros((200, 240, 3), dtype=np.uint8)
    angle = 0.3
    turn = 1.3 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (TEMPLATE - 56) @ turn.T + [120, 100]
    for x, y in points:
        image[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2] = 255
    for count in (2, 5):
        made = align(image, points[:count], 112)
        for x, y in TEMPLATE[:count]:
            assert made[round(y), round(x)].max() > 120
    double = align(image, points, 224)
    assert double.shape == (224, 224, 3)
    assert double[round(2 * TEMPLATE[2, 1]), round(2 * TEMPLATE[2, 0])].max() > 120


def test_a_box_without_points_is_a_square_about_it() -> None:
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    image[40:60, 30:50] = 200
    made = crop(image, (30, 40, 20, 20), 48, margin=0.0)
    assert made[8:40, 8:40].min() == 200
    assert crop(image, (-10, -10, 20, 20), 32)[0, 0].max() == 0
    assert cut(image, Face((30, 40, 20, 20), 1.0, None), 32).shape == (32, 32, 3)


# Photographs


@pytest.fixture(scope="module")
def portrait(request: pytest.FixtureRequest) -> Image.Image:
    """A real face, 224 px."""
    shared: Path = request.getfixturevalue("shared")
    data = FaceData(str(shared / "data/faces-london"), image_size=224)
    data.parts()
    return data.fetch(data.entries()[:1], 224)(0)


def photographs(folder: Path, portrait: Image.Image) -> Path:
    folder.mkdir()
    portrait.save(folder / "one.png")
    both = Image.new("RGB", (560, 300), (90, 90, 90))
    both.paste(portrait, (20, 30))
    both.paste(portrait, (300, 50))
    both.save(folder / "two.png")
    Image.new("RGB", (300, 200), (120, 120, 120)).save(folder / "none.png")
    return folder


def test_a_photograph_gives_a_row_a_face_and_none_an_error(portrait: Image.Image, tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos", portrait)
    run = tmp_path / "run"
    import json

    options = json.dumps(NETWORK)
    done = polyhead("fit", "--config", "vision/transfer_scratch", "--output", run, f"--model.network_options={options}",
                    "--model.image_size", "64", "--data.image_size", "64", "--trainer.max_epochs", "1",
                    "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1")  # fmt: skip
    assert done.status == 0, done.err
    done = polyhead("predict", "--ckpt_path", run / "bundle", "--data.root", root, "--data.align", "detect",
                    "--output", tmp_path / "out")  # fmt: skip
    assert done.status == 0, done.err
    rows = pq.read_table(tmp_path / "out/predictions").to_pylist()
    found = {(r["id"], r["part"]) for r in rows}
    assert found == {("one.png", 0), ("two.png", 0), ("two.png", 1)}
    lefts = sorted(r["box"][0] for r in rows if r["id"] == "two.png")
    assert lefts[0] < 200 < lefts[1]
    errors = pq.read_table(tmp_path / "out/errors.parquet").to_pylist()
    assert [(e["id"], e["reason"]) for e in errors] == [("none.png", "no face was found in it")]
    done = polyhead("explain", "--ckpt_path", run / "bundle", "--data.root", root, "--data.align", "detect",
                    "--output", tmp_path / "seen")  # fmt: skip
    assert done.status == 0, done.err
    assert len(list((tmp_path / "seen/explain").glob("*.png"))) == 3
    done = polyhead("test", "--ckpt_path", "best", "--output", run)
    assert done.status == 0 and "Mean map of each class" in (run / "report.html").read_text()


def test_landmarks_turn_faces_and_the_rest_is_counted(shared: Path) -> None:
    root = shared / "data/faces-london"
    data = FaceData(str(root), image_size=64, align="landmarks", landmarks=str(root / "landmarks.csv"))
    plain = FaceData(str(root), image_size=64)
    for d in (data, plain):
        d.setup("test")
    turned, taken = data.samples("test"), plain.samples("test")
    differ = [not torch.equal(turned.load(i, 0)["image"], taken.load(i, 0)["image"]) for i in range(len(turned))]
    assert 0 < sum(differ) <= len(differ)
    assert data.summary()["taken as they are"] == len(differ) - sum(differ)


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="goes with data.align landmarks"):
        FaceData(landmarks=str(tmp_path))
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "b" / "x.png")
    with pytest.raises(UserError, match="needs the points of these pictures"):
        FaceData(str(tmp_path), align="landmarks").check()
    with pytest.raises(UserError, match="no YuNet model at nowhere.onnx"):
        FaceData(align="detect", yunet="nowhere.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no YuNet model that OpenCV can read"):
        FaceData(align="detect", yunet=str(tmp_path / "bad.onnx"))
    (tmp_path / "points.csv").write_text("file,x0\na,1\n")
    with pytest.raises(UserError, match="no points x0, y0, x1, y1"):
        FaceData(align="landmarks", landmarks=str(tmp_path / "points.csv"))
    (tmp_path / "points.csv").write_text("file,x0,y0,x1,y1\na,1,2,1,2\n")
    with pytest.raises(UserError, match="not finite or lie on one another"):
        FaceData(align="landmarks", landmarks=str(tmp_path / "points.csv"))
    (tmp_path / "points.csv").write_text("file,x0,y0,x1,y1\na,1,2,,4\n")
    with pytest.raises(UserError, match="the points of a are not all numbers"):
        FaceData(align="landmarks", landmarks=str(tmp_path / "points.csv"))


def test_faces_of_several_photographs_are_one_batch(portrait: Image.Image) -> None:
    data = FaceData(image_size=48, align="detect")
    samples = data.raw_dataset([portrait, np.asarray(portrait)])
    assert isinstance(samples, FacesInPhotos)
    batch: dict[str, Any] = data.collate([samples.load(i, 0) for i in range(2)])
    assert batch["id"] == ["input-0", "input-1"] and batch["about"]["sample"] == [0, 1]
    assert batch["image"].shape == (2, 3, 48, 48)
    system = ExpressionClassifier({"classes": ["happy", "sad"]}, network_options=NETWORK, image_size=48).eval()
    with torch.no_grad():
        assert len(system.columns(batch, system(batch))["label"]) == 2
