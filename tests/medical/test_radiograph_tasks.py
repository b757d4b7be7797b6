"""The radiograph classifier as it is run: what is settled on validation travels, and rows say what files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from medical.radiograph_tasks import RadiographClassifier
from polyhead.calibration import calibrated
from polyhead.errors import UserError
from tests.command import polyhead
from tests.medical.test_radiographs import dicom

SMALL = {"backbone": "resnet18", "image_size": 64, "global_size": 32, "base": 4, "head_width": 8}


def classifier(**options: object) -> RadiographClassifier:
    torch.manual_seed(0)
    return RadiographClassifier({"classes": ["clear", "disc"]}, **{**SMALL, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("radiographs") / "run"
    options = ["--model.image_size", "64", "--data.image_size", "64", "--model.global_size", "32", "--model.base", "4"]
    settle = ["--model.positive", "disc", "--model.sensitivity", "0.9"]
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
    done = polyhead("fit", "--config", "medical/medusa", "--output", folder, *options, *settle, *short)
    assert done.status == 0, done.err
    return folder


def test_what_validation_settles_is_in_the_bundle_and_in_the_best_checkpoint(run: Path) -> None:
    settings = yaml.safe_load((run / "bundle/config.yaml").read_text())["model"]["init_args"]
    assert 0 < settings["threshold"] < 1 and len(settings["offsets"]) == 2 and settings["scale"] > 0
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    kept = checkpoint["polyhead"]["model"]["init_args"]
    assert {k: kept[k] for k in ("threshold", "offsets", "scale")} == {
        k: settings[k] for k in ("threshold", "offsets", "scale")
    }
    # The threshold is the largest that finds nine of ten
    found = json.loads((run / "metrics.json").read_text())
    assert found["val/alert.sensitivity"] >= 0.9 and found["val/threshold"] == pytest.approx(settings["threshold"])


def test_the_test_reports_alerts_with_intervals(run: Path) -> None:
    done = polyhead("test", "--ckpt_path", "best", "--output", run)
    assert done.status == 0, done.err
    found = json.loads((run / "metrics.json").read_text())
    names = ("alert.sensitivity", "alert.specificity", "sensitivity.disc", "ppv.disc", "auroc", "balanced_accuracy")
    for name in names:
        assert 0 <= found[f"test/{name}.low"] <= found[f"test/{name}"] <= found[f"test/{name}.high"] <= 1


def test_rows_have_alerts_and_identifiers_and_export_gives_the_same(run: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        dicom(tmp_path / "in" / f"{i}.dcm", PatientID=f"P-{i}")
    (tmp_path / "in" / "bad.dcm").write_bytes(b"nothing")
    root = ("--data.root", tmp_path / "in")
    done = polyhead("predict", "--ckpt_path", run / "bundle", *root, "--output", tmp_path / "out")
    assert done.status == 0, done.err
    rows = pq.read_table(tmp_path / "out/predictions").to_pylist()
    assert sorted(r["patient"] for r in rows) == ["P-0", "P-1", "P-2"] and {r["study"] for r in rows} == {"1.2.3"}
    settings = yaml.safe_load((run / "bundle/config.yaml").read_text())["model"]["init_args"]
    assert all(r["alert"] == (r["probabilities"][1] >= np.float32(settings["threshold"])) for r in rows)
    assert pq.read_table(tmp_path / "out/errors.parquet").num_rows == 1
    done = polyhead(
        "predict", "--ckpt_path", run / "bundle", *root, "--data.anonymise", "true", "--output", tmp_path / "b"
    )
    assert done.status == 0 and "patient" not in pq.read_table(tmp_path / "b/predictions").column_names
    done = polyhead("explain", "--ckpt_path", run / "bundle", *root, "--output", tmp_path / "c", "--limit", "1")
    assert done.status == 0, done.err
    done = polyhead("export", "--ckpt_path", run / "bundle", "--format", "onnx", "--output", tmp_path / "d")
    assert done.status == 0, done.err
    done = polyhead("predict", "--ckpt_path", tmp_path / "d/model.onnx", *root, "--output", tmp_path / "e")
    assert done.status == 0, done.err
    same = {r["id"]: r for r in pq.read_table(tmp_path / "e/predictions").to_pylist()}
    for row in rows:
        assert all(same[row["id"]][k] == row[k] for k in ("label", "alert", "patient", "study", "instance"))
        assert same[row["id"]]["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
    wide = ("--data.image_size", "96", "--output", tmp_path / "f")
    done = polyhead("predict", "--ckpt_path", tmp_path / "d/model.onnx", *root, *wide)
    assert done.status == 2 and "takes" in done.err and "Traceback" not in done.err
    arrays = np.load(next((tmp_path / "c/explain").glob("*.npz")))
    assert {"image", "global_map", "gate_2", "gate_3", "gate_4", "grad_cam", "probabilities"} == set(arrays.files)


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_finds_the_wanted_share_whatever_the_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = np.arange(40) % 2
    raw = torch.from_numpy(rng.dirichlet([1.0, 1.0], 40).astype(np.float32))
    system = classifier(positive="disc", sensitivity=0.9, calibrate="balanced")
    table = torch.cat([raw, torch.from_numpy(np.stack([label, np.arange(40)], 1)).float()], 1)
    system.results["val"] = {"rows": table}
    system.recipe = {"init_args": {}}
    assert system.settle()
    seen = calibrated(raw, system.scale, system.offsets).numpy()[label == 1, 1]
    shaken = seen * (1 + 1e-6 * rng.choice([-1.0, 1.0], len(seen)))
    assert (seen >= np.float32(system.threshold)).mean() >= 0.9 and (shaken >= system.threshold).mean() >= 0.9


def test_norms_without_pretrained_weights_learn_their_statistics() -> None:
    for options, still in (({}, False), ({"freeze_norms": True}, True)):
        system = classifier(**options).train()
        before = system.network.backbone.bn1.running_mean.clone()  # type: ignore[operator, union-attr]
        system.losses(
            {"image": torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8), "label": torch.tensor([0, 1] * 2)}
        )
        assert torch.equal(before, system.network.backbone.bn1.running_mean) == still  # type: ignore[arg-type, union-attr]


def test_the_map_explains_the_class_that_the_title_names() -> None:
    image = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    maps = {}
    for offsets in ([9.0, -9.0], [-9.0, 9.0]):
        system = classifier(offsets=offsets).eval()
        arrays = system.explain({"image": image})[0][1]
        maps[int(arrays["probabilities"].argmax())] = arrays["grad_cam"]
    assert set(maps) == {0, 1} and not np.allclose(maps[0], maps[1])


def test_frozen_parts_stay_until_their_epoch() -> None:
    system = classifier(freeze=["body"], unfreeze_at=1, freeze_norms=True)
    body = system.network.body
    assert body is not None and not any(p.requires_grad for p in body.parameters())
    assert all(p.requires_grad for p in system.network.heads.parameters())
    system.train()
    assert not body.encoder[0][1].training and not system.network.backbone.bn1.training  # type: ignore[index, union-attr]


def test_both_views_come_from_one_image() -> None:
    system = classifier().eval()
    image = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    x, g = system.views(image)
    assert x.shape == (2, 3, 64, 64) and g.shape == (2, 1, 32, 32)
    flipped = system.views(image.flip(-1))
    assert torch.allclose(flipped[0], x.flip(-1), atol=1e-5) and torch.allclose(flipped[1], g.flip(-1), atol=1e-4)


def test_enlarged_views_show_the_centre_and_are_averaged_with_their_mirrors() -> None:
    image = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    rim = image.clone()
    rim[..., :6], rim[..., 58:], rim[..., :6, :], rim[..., 58:, :] = 0, 0, 0, 0
    plain = classifier().eval()
    x, g = plain.views(image, 1.25)
    assert torch.equal(x, plain.views(rim, 1.25)[0]) and torch.equal(g, plain.views(rim, 1.25)[1])
    enlarged = torch.nn.functional.interpolate(image[..., 6:58, 6:58].float(), (64, 64), mode="bilinear")
    assert torch.allclose(x, (enlarged / 255 - plain.mean) / plain.std, atol=1e-5)
    several = classifier(flip_tta=True, tta_zooms=[1.0, 1.25]).eval()
    with torch.no_grad():
        views = [plain._run(i, z).logits.softmax(-1) for i in (image, image.flip(-1)) for z in (1.0, 1.25)]
        both = several.outputs(image=image)
        assert torch.allclose(both["probabilities"], torch.stack(views).mean(0), atol=1e-6)
        assert torch.allclose(both["probabilities"], several.outputs(image=image.flip(-1))["probabilities"], atol=1e-6)
        assert torch.equal(both["logits"], plain.outputs(image=image)["logits"])


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="model.tta_zooms is .0.5."):
        classifier(tta_zooms=[0.5])
    for option, value in {"threshold": 7.0, "dropout": 2.0, "std": (0.0, 1.0, 1.0)}.items():
        with pytest.raises(UserError, match=f"model.{option} is"):
            classifier(**{option: value, **({"positive": "disc"} if option == "threshold" else {})})
    for option in ("base", "global_channels", "head_width"):
        with pytest.raises(UserError, match=f"{option} is 0: at least 1"):
            classifier(**{option: 0})
    with pytest.raises(UserError, match="model.positive is 'dsic'"):
        classifier(positive="dsic")
    with pytest.raises(UserError, match="name it by model.positive"):
        classifier(sensitivity=0.9)
    with pytest.raises(UserError, match="model.offsets has 3 numbers for 2 classes"):
        classifier(offsets=[0.0, 1.0, 2.0])
