"""Bundles and checkpoints: whole, plain, and refused with a reason where they do not fit."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from polyhead import bundle
from polyhead.errors import UserError
from polyhead.safe import read_checkpoint
from tests.toy import Toy

FACTS = {"classes": ["a", "b", "c"]}
MODEL = {"class_path": "tests.toy.Toy", "init_args": {"facts": FACTS, "width": 16}}
DATA = {"class_path": "tests.toy.ToyData", "init_args": {"root": "/somewhere", "classes": FACTS["classes"]}}


def toy(**options: Any) -> Toy:
    torch.manual_seed(len(options))
    system = Toy(FACTS, **options)
    system.recipe = MODEL
    return system


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle.save_bundle(tmp_path / "runs/x/bundle", toy().state_dict(), MODEL, DATA, "# card")
    return tmp_path / "runs/x/bundle"


def test_a_bundle_is_three_plain_files(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    assert not [p for p in folder.parent.iterdir() if p != folder]
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert content["model"] == MODEL and content["data"]["init_args"] == {"root": None, "classes": ["a", "b", "c"]}
    assert "&" not in (folder / "config.yaml").read_text()
    assert folder.stat().st_mode & 0o777 == 0o755


def test_what_is_read_builds_the_same_model(folder: Path) -> None:
    saved = bundle.read(folder)
    again = bundle.build_model(saved.model)
    bundle.load_weights(again, saved)
    x = torch.randn(5, 8)
    assert torch.equal(again.eval().network(x), toy().eval().network(x))
    assert again.recipe == MODEL and saved.name == "x"
    assert bundle.build_data(saved.data).classes == ["a", "b", "c"]


def test_half_weights_are_whole_again_when_read(tmp_path: Path) -> None:
    state = toy().state_dict()
    bundle.save_bundle(tmp_path / "b", state, MODEL, DATA, "", half=True)
    stored = load_file(tmp_path / "b/model.safetensors")
    assert stored["network.0.weight"].dtype == torch.float16
    assert stored["network.1.num_batches_tracked"].dtype == torch.int64
    read = bundle.read(tmp_path / "b").state
    assert read["network.0.weight"].dtype == torch.float32
    assert torch.allclose(read["network.0.weight"], state["network.0.weight"], atol=1e-3)


def test_an_old_bundle_is_replaced_only_by_a_whole_one(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(TypeError):
        bundle.save_bundle(folder, toy().state_dict(), {**MODEL, "init_args": {"odd": object()}}, DATA, "")
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["bundle"]
    bundle.save_bundle(folder, {"w": torch.ones(1)}, MODEL, DATA, "")
    assert load_file(folder / "model.safetensors").keys() == {"w"}


def test_a_name_is_that_of_the_run(tmp_path: Path) -> None:
    def name(path: str) -> str:
        return bundle.Saved({}, {}, {}, Path(path)).name

    assert name("runs/cats/checkpoints/best.ckpt") == name("runs/cats/bundle") == "cats"
    assert name("bundles/flowers") == "flowers" and name("some/where/model.onnx") == "model"


def test_weights_that_do_not_fit_name_the_first(folder: Path) -> None:
    saved = bundle.read(folder)
    with pytest.raises(UserError, match=r"7 shapes differ, .*network.0.weight: \[16, 8\] in the checkpoint, \[4, 8\]"):
        bundle.load_weights(toy(width=4), saved)
    saved.state.pop("network.4.bias")
    saved.state["more"] = torch.ones(1)
    with pytest.raises(UserError, match=r"1 weights are missing, 1 are unknown \(network.4.bias is missing\)"):
        bundle.load_weights(toy(), saved)


class Headed(Toy):
    def head_prefixes(self) -> list[str]:
        return ["network.4"]


def test_starting_from_weights_leaves_other_heads_new(folder: Path) -> None:
    saved = bundle.read(folder)
    system = Headed(FACTS)
    system.network[4] = torch.nn.Linear(16, 7)
    head = system.network[4].weight.detach().clone()
    assert bundle.init_weights(system, saved) == ["network.4.weight", "network.4.bias"]
    assert torch.equal(system.network[0].weight, saved.state["network.0.weight"])  # type: ignore[arg-type]
    assert torch.equal(system.network[4].weight, head)
    assert bundle.init_weights(Headed(FACTS), saved) == []
    with pytest.raises(UserError, match="weights beside the head differ"):
        bundle.init_weights(Headed(FACTS, width=4), saved)
    with pytest.raises(UserError, match="weights beside the head differ"):
        bundle.init_weights(toy(width=4), saved)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ({"class_path": "os.system"}, "is not a System"),
        ({"class_path": "builtins.eval"}, "is not a System"),
        ({"class_path": "tests.toy.ToyData"}, "is not a System"),
        ({"class_path": "tests.toy.Toyy"}, "names no class"),
        ({"class_path": "no.such.module"}, "names no class"),
        ({}, "names no class"),
        ({"class_path": "tests.toy.Toy", "init_args": {"facts": FACTS, "width": "wide"}}, "cannot be built: .*'int'"),
        ({"class_path": "tests.toy.Toy", "init_args": {"facts": FACTS, "colour": 1}}, "'colour' is not accepted"),
    ],
)
def test_only_our_own_classes_are_built(recipe: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        bundle.build_model(recipe)


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("planted",)


def test_reading_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": Planted()}}, "bad.ckpt")
    with pytest.raises(UserError, match="bad.ckpt asks for .*mkdir to be imported, which may run code: refused"):
        bundle.read("bad.ckpt")
    assert not Path("planted").exists()
    torch.save({"args": argparse.Namespace(lr=0.1), "w": torch.ones(2)}, "plain.pth")
    content = read_checkpoint("plain.pth")
    assert content["args"].lr == 0.1
    save_file({"w": torch.ones(2)}, "w.safetensors")
    assert torch.equal(read_checkpoint("w.safetensors")["w"], torch.ones(2))
    torch.save([1, 2], "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_checkpoint("list.pth")


def test_near_names_of_shipped_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "catalogue", lambda: {"shvit_s1_flowers": {"bundle": "bundles/none"}})
    with pytest.raises(UserError) as raised:
        bundle.find("shvit_s1_flower")
    assert raised.value.hints == ["did you mean shvit_s1_flowers?"]
    with pytest.raises(UserError, match="not part of this installation"):
        bundle.find("shvit_s1_flowers")
