"""Published checkpoints through `polyhead convert` to predictions."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import polyhead
from polyhead.bundle import read as read_bundle
from tests.command import polyhead as command
from vision.backbones import create_backbone
from vision.shvit import shvit


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training checkpoint in the official layout with 7 classes, and timm's state dict of the same."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    theirs = timm.create_model("shvit_s1", num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm1d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    torch.save(theirs.state_dict(), folder / "timm.pt")
    from checkpoints.converters.shvit import to_polyhead

    official, _ = to_polyhead(theirs.state_dict())
    torch.save({"model": official, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, folder / "official.pth")
    (folder / "names.txt").write_text("\n".join("abcdefg") + "\n")
    return folder


def test_both_layouts_give_timm_s_probabilities(files: Path, tmp_path: Path) -> None:
    theirs = timm.create_model("shvit_s1", num_classes=7).eval()
    theirs.load_state_dict(torch.load(files / "timm.pt", weights_only=True))
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = theirs((x - mean) / std).softmax(-1)[0].numpy()
    # The published evaluation looks at the centre 7/8
    around = np.zeros((256, 256, 3), np.uint8)
    around[16:240, 16:240] = pixels
    for name in ("timm.pt", "official.pth"):
        bundle = tmp_path / Path(name).stem
        done = command("convert", files / name, "--output", bundle, "--classes", files / "names.txt")
        assert done.status == 0, done.err
        row = polyhead.load(str(bundle)).predict(Image.fromarray(around))[0]
        np.testing.assert_allclose(row["probabilities"], expected, atol=2e-6)
        assert row["label"] == "abcdefg"[int(expected.argmax())]


def test_a_converted_checkpoint_starts_a_training_with_a_new_head_and_size(files: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert command("convert", files / "official.pth", "--output", bundle).status == 0
    done = command(
        "fit", "--config", "vision/shvit", "--init_from", bundle, "--output", tmp_path / "run",
        "--data.image_size", 64, "--model.image_size", 64, "--trainer.max_epochs", 1,
        "--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1, "--data.batch_size", 4,
        "--model.ema_decay", "null", "--model.optimizer.init_args.lr", "0.0",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "new: network.head" in done.err
    start = shvit("shvit_s1", num_classes=7)
    start.load_state_dict(torch.load(files / "official.pth", weights_only=False)["model"])
    trained = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in start.named_parameters():
        if not name.startswith("head.l"):
            assert torch.equal(trained[f"network.{name}"], value), name
    assert len(yaml.safe_load((tmp_path / "run/bundle/config.yaml").read_text())["data"]["init_args"]["classes"]) == 10


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: ("convert", f / "none.pt", "--output", "b"), "polyhead: no checkpoint file at"),
        (lambda f: ("convert", "--output", "b"), "polyhead: convert takes a checkpoint file, or --from timm:NAME"),
        (lambda f: ("convert", "--from", "timm:shvit_s9", "--output", "b"), "polyhead: timm has no model 'shvit_s9'"),
        (lambda f: ("convert", f / "timm.pt", "--output", f), "polyhead: "),
        (lambda f: ("convert", f / "timm.pt", "--output", "b", "--classes", f / "timm.pt"), "polyhead: cannot read"),
        (lambda f: ("convert", f / "other.pt", "--output", "b"), "polyhead: no system knows this checkpoint"),
        (lambda f: ("convert", f / "timm.pt", "--output", "b", "--system", "vit"), "polyhead: no converter for 'vit'"),
    ],
)
def test_mistakes(files: Path, tmp_path: Path, make: object, says: str) -> None:
    torch.save({"weight": torch.zeros(3)}, files / "other.pt")
    done = command(*make(files), cwd=tmp_path)  # type: ignore[operator]
    assert done.status == 2
    assert done.err.startswith(says), done.err
    assert len(done.err.splitlines()) <= 5
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "side", "share"), [("spectformer_h_s", 96, 0.96), ("spectformer_t", 96, 0.875), ("halonet26t", 64, 0.95)]
)
def test_backbones_with_places_go_from_a_published_file_to_a_training(
    name: str, side: int, share: float, tmp_path: Path
) -> None:
    options = {"img_size": side, "token_label": True} if name == "spectformer_h_s" else {}
    if name == "spectformer_t":
        options = {"img_size": side}
    torch.manual_seed(0)
    network = create_backbone(name, 7, **options)
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "file.pth")
    done = command("convert", tmp_path / "file.pth", "--output", tmp_path / "bundle")
    assert done.status == 0, done.err
    config = yaml.safe_load((tmp_path / "bundle/config.yaml").read_text())
    assert config["data"]["init_args"]["crop_fraction"] == share
    done = command(
        "fit", "--config", "vision/shvit", "--model.backbone", name, "--init_from", tmp_path / "bundle",
        "--output", tmp_path / "run", "--data.image_size", 64, "--model.image_size", 64, "--trainer.max_epochs", 1,
        "--model.backbone_options", "{token_label: true}" if "token_label" in options else "{}",
        "--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1, "--data.batch_size", 4,
        "--model.ema_decay", "null", "--model.optimizer.init_args.lr", "0.0",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "new: network." in done.err
    own = create_backbone(name, 7, image_size=64, **{k: v for k, v in options.items() if k != "img_size"})
    expected = own.resize_state(network.state_dict()) if options else network.state_dict()  # type: ignore[operator]
    got = read_bundle(tmp_path / "run/bundle").state
    heads = ("network.head", "network.aux_head")
    kept = {k: v for k, v in got.items() if not k.startswith(heads) and "running" not in k and "tracked" not in k}
    assert kept and all(torch.equal(v, expected[k.removeprefix("network.")]) for k, v in kept.items())
    assert got[next(k for k in got if k.startswith("network.head") and k.endswith("weight"))].shape[0] == 10


def test_a_file_without_a_head_or_of_grey_images_is_refused(tmp_path: Path) -> None:
    for options, says in (({"num_classes": 0}, "has no classifier"), ({"num_classes": 7, "in_chans": 1}, "1 channels")):
        torch.save(create_backbone("halonet26t", **options).state_dict(), tmp_path / "file.pth")
        done = command("convert", tmp_path / "file.pth", "--output", tmp_path / "bundle")
        assert done.status == 2 and says in done.err and not (tmp_path / "bundle").exists(), done.err
