"""Checkpoints of HaloNet, SpectFormer and TiC: every variant told from its shapes, others refused in a line."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from checkpoints.converters import find_converter
from checkpoints.converters.tic import layer
from polyhead.errors import UserError
from vision import halonet, spectformer, tic

FAMILIES: dict[str, Any] = {
    "halonet": (halonet.VARIANTS, halonet.halonet),
    "spectformer": (spectformer.VARIANTS, spectformer.spectformer),
    "tic": (tic.VARIANTS, tic.tic),
}
BLOCK = {"halonet": "stages.0.2.", "spectformer": "blocks.1.", "tic": "stages.2.blocks.1."}  # one to leave out
EVERY = [(family, name) for family, (variants, _) in FAMILIES.items() for name in variants]


def state_of(family: str, name: str, **options: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return FAMILIES[family][1](name, **options).state_dict()


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_variants_are_told_from_their_shapes(family: str, name: str) -> None:
    state = state_of(family, name, num_classes=7, in_chans=2)
    got, config = find_converter(family)({"state_dict": {f"module.{k}": v for k, v in state.items()}})
    assert config == {"name": name, "num_classes": 7, "in_chans": 2}
    assert got.keys() == state.keys()
    headless = {k: v for k, v in state.items() if "head." not in k}
    assert find_converter(family)(headless)[1]["num_classes"] == 0


def test_timm_weights_load() -> None:
    theirs = timm.create_model("haloregnetz_b", num_classes=3).state_dict()
    got, config = find_converter("halonet")(theirs)
    ours = FAMILIES["halonet"][1](**config)
    ours.load_state_dict(got)
    assert all(torch.equal(v, theirs[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("size", [(160, 160), (192, 256), (96, 128)])
@pytest.mark.parametrize("name", ["spectformer_t", "spectformer_hxs"])
def test_spectformers_of_other_sizes(name: str, size: tuple[int, int]) -> None:
    state = state_of("spectformer", name, img_size=size)
    _, config = find_converter("spectformer")({"model": state})
    expected = size[0] if size[0] == size[1] else list(size)
    assert config["img_size"] == expected
    assert {k: v.shape for k, v in state_of("spectformer", **config).items()} == {k: v.shape for k, v in state.items()}


def test_second_classifier_is_kept() -> None:
    state = state_of("spectformer", "spectformer_h_s", token_label=True)
    got, config = find_converter("spectformer")({"model": {"state_dict": state}})
    assert config["token_label"] and "aux_head.weight" in got


def test_published_layer() -> None:
    block = tic.MSAConvBlock(4, 6, (5, 3), bias=True)
    got, config = layer(block.state_dict())
    assert config == {"input_channel": 4, "output_channel": 6, "kernel_size": [5, 3], "bias": True}
    tic.MSAConvBlock(**config).load_state_dict(got)
    assert layer(tic.MSAConvAttention(4, 3).state_dict())[1] == {"input_channel": 4}
    with pytest.raises(UserError, match="no network"):
        find_converter("tic")(block.state_dict())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_models_are_refused(family: str) -> None:
    convert = find_converter(family)
    with pytest.raises(UserError, match="layer1.0.conv1.weight|conv1.weight|bn1.weight"):
        convert(timm.create_model("resnet18").state_dict())
    name = next(iter(FAMILIES[family][0]))
    state = state_of(family, name)
    with pytest.raises(UserError, match="whole"):
        convert({k: v for k, v in list(state.items())[-2:]})
    with pytest.raises(UserError, match="no known variant"):
        convert({k: v for k, v in state.items() if not k.startswith(BLOCK[family])})
