"""Published SHViT files of every layout, read and mapped; and files that must not be read."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.converters import CONVERTERS, find_converter
from checkpoints.converters import shvit as converter
from polyhead.errors import UserError
from polyhead.safe import read_checkpoint
from vision.shvit import VARIANTS, SHViT, shvit

CUSTOM: dict[str, Any] = dict(
    embed_dim=[16, 16, 24, 32],
    depth=[1, 2, 1, 1],
    partial_dim=[4, 0, 12, 7],
    qk_dim=[5, 16, 3, 16],
    types=["s", "i", "s", "s"],
)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def training_checkpoint(state: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """As the published training script saves it, its command line in a namespace."""
    arguments = argparse.Namespace(model="shvit_s1", lr=1e-3, data_path="imagenet", distillation_type="none")
    return {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 299} | (
        {"lr_scheduler": {}, "model_ema": state, "scaler": {}, "args": arguments} | more
    )


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("distillation", [False, True])
def test_layout_is_the_networks(name: str, distillation: bool) -> None:
    with torch.device("meta"):
        state = shvit(name, distillation=distillation, in_chans=4, num_classes=9).state_dict()
    config = converter.infer(state)
    assert converter.layout(config) == {k: tuple(v.shape) for k, v in state.items()}
    got, named = converter.to_polyhead(state)
    assert named == {"name": name, "num_classes": 9, "in_chans": 4, "distillation": distillation}
    assert list(got) == list(converter.layout(config))


@pytest.mark.parametrize("kind", ["training", "released", "safetensors", "parallel", "flat"])
def test_official_files(kind: str, tmp_path: Path) -> None:
    state = shvit("shvit_s1", num_classes=4).state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "flat":  # 1x1 weights as matrices, and no counts of batches
        flat = {k: v.flatten(1) if v.ndim == 4 and v.shape[2:] == (1, 1) else v for k, v in state.items()}
        assert sum(v.ndim == 2 for v in flat.values()) > 50
        torch.save({"model": {k: v for k, v in flat.items() if not k.endswith("num_batches_tracked")}}, path)
    elif kind == "parallel":
        torch.save(training_checkpoint({f"module.{k}": v for k, v in state.items()}), path)
    else:
        torch.save({"model": state} if kind == "released" else training_checkpoint(state), path)
    got, config = find_converter("shvit")(read_checkpoint(path))
    assert same(got, state)
    shvit(**config).load_state_dict(got)


def test_timm_file(tmp_path: Path) -> None:
    theirs = timm.create_model("shvit_s4", num_classes=3, in_chans=1).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    got, config = converter.to_polyhead(read_checkpoint(tmp_path / "timm.pth"))
    assert config == {"name": "shvit_s4", "num_classes": 3, "in_chans": 1, "distillation": False}
    ours = shvit(**config).eval()
    ours.load_state_dict(got)
    x = torch.randn(2, 1, 64, 64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_headless_and_unpublished_widths() -> None:
    state = shvit("shvit_s2", num_classes=0).state_dict()
    assert converter.to_polyhead(state)[1]["num_classes"] == 0
    custom = SHViT(**CUSTOM, num_classes=2).state_dict()
    got, config = converter.to_polyhead(custom)
    assert {k: config[k] for k in CUSTOM} == CUSTOM
    shvit(**config).load_state_dict(got)
    assert same(got, custom)


def odd(state: dict[str, Tensor], case: str) -> dict[str, Any]:
    if case == "extra":
        return state | {"blocks2.0.0.m.c.bias": torch.zeros(128)}
    if case == "shape":
        return state | {"blocks3.4.ffn.m.pw1.c.weight": torch.zeros(640, 319, 1, 1)}
    if case == "value":
        return state | {"patch_embed.0.c.weight": [1, 2]}
    if case == "missing":
        return {k: v for k, v in state.items() if k != "blocks3.1.se.fc1.bias"}
    if case == "folded":
        return {k.replace(".c.", "."): v for k, v in state.items() if ".bn." not in k}
    return {"empty": {}, "other": timm.create_model("resnet10t").state_dict()}[case]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("extra", "blocks2.0.0.m.c.bias"),
        ("shape", "blocks3.4.ffn.m.pw1.c.weight .*319"),
        ("value", "patch_embed.0.c.weight.* list"),
        ("missing", "blocks3.1.se.fc1.bias.* missing"),
        ("folded", "lacks 'patch_embed.6.c.weight'"),
        ("empty", "lacks"),
        ("other", "conv1.0.weight"),
    ],
)
def test_anything_else_is_refused_by_its_first_odd_key(case: str, words: str) -> None:
    state = shvit("shvit_s1", num_classes=4).state_dict()
    with pytest.raises(UserError, match=words):
        converter.to_polyhead(odd(state, case))


# ---- reading -----------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_malicious_file_does_not_run(wrapped: bool, tmp_path: Path) -> None:
    victim, path = tmp_path / "executed", tmp_path / "evil.pth"
    state = {"weight": torch.zeros(2)}
    evil = argparse.Namespace(x=Malicious(victim)) if wrapped else Malicious(victim)
    torch.save(training_checkpoint(state, args=evil), path)
    with pytest.raises(UserError, match="mkdir.*refused"):
        read_checkpoint(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # what would have happened
    assert victim.exists()


def test_only_the_namespace_is_admitted(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(training_checkpoint({}, args=argparse.Namespace(output=tmp_path)), path)
    with pytest.raises(UserError, match="pathlib.*refused"):
        read_checkpoint(path)
    torch.save(training_checkpoint({}), path)
    assert read_checkpoint(path)["args"].lr == 1e-3
    with pytest.raises(pickle.UnpicklingError):  # the permission ends with the call
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn", bytes(range(256)) * 8])
def test_damaged_files_are_one_line(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        read_checkpoint(path)


def test_other_content_and_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint file"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(UserError, match="no converter for 'shvits'") as caught:
        find_converter("shvits")
    assert caught.value.hints == ["shvit"]
    assert all(find_converter(name) for name in CONVERTERS)
