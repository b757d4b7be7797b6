"""One contract for every system that a shipped recipe names; exceptions stand in lists with their reasons."""

from __future__ import annotations

import copy
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apps import models, recipes
from apps.cli import read_recipe
from polyhead import bundle
from polyhead.columns import make_columns
from polyhead.data import DataModule
from polyhead.export import SUFFIX, Exported, difference, export
from polyhead.system import Signature, System
from tests.apps.conftest import ONE_BATCH
from tests.command import polyhead

# What makes a recipe small enough to be tried in seconds: arguments of its model
SMALL: dict[str, dict[str, Any]] = {
    "vision/shvit": {"backbone_options": {"embed_dim": [64, 96, 128], "partial_dim": [16, 24, 32], "depth": [1, 1, 1]}},
    "vision/tic": {"backbone_options": {"depths": [1, 1, 1, 1]}},
    "vision/spectformer": {"backbone_options": {"depths": [1, 1, 1, 1]}},
    # Random weights under kept statistics saturate the trunk
    "vision/transfer": {"network_options": {"width": 32, "depth": 1}, "freeze_norms": False},
    "vision/transfer_scratch": {"network_options": {"units": [1, 1, 1], "width": 32, "depth": 2}},
}
# The same of its data
SMALL_DATA: dict[str, dict[str, Any]] = {
    "timeseries/mvpformer": {"hours": 0.0125},
    "timeseries/mvpformer_pretrain": {"hours": 0.0125},
}
# Weights that no loss reaches, and why: recipe -> {beginning of their names: reason}
WITHOUT_GRADIENT: dict[str, dict[str, str]] = {
    "medical/acmil_tables": {"network.classifier.0": "a single branch is the bag: only the head of the bag is trained"}
}
# Biases before a batch norm, which takes any constant away: what gradient they get is rounding
BEFORE_NORM = ("LA_conv1.bias", "LA_conv2.bias")
# Exports that a system does not have, and why: (recipe, format) -> reason
NOT_EXPORTED: dict[tuple[str, str], str] = {}
# Columns that a docstring need not name, being said in architecture.md for all systems
EVERYWHERE = {"part", "sample"}
# Recipes whose system is another recipe's with other numbers, and therefore exported there: recipe -> the other
SAME_NETWORK = {
    "vision/shvit": "vision/shvit_digits",
    "vision/shvit_probe": "vision/shvit_transfer",
    "medical/acmil_images": "medical/acmil",
    "medical/acmil_tables": "medical/acmil",
    "recsys/sasrec": "recsys/mqsa_ted",
}
# Exporters that take so long to trace these, in seconds of one core, that only `make test-all` waits for them
SLOW_TO_EXPORT = {
    ("vision/tic", "onnx"): 20, ("vision/tic", "pt2"): 20, ("vision/spectformer", "onnx"): 8,
    ("vision/spectformer", "pt2"): 4, ("vision/halonet", "onnx"): 9, ("vision/halonet", "pt2"): 6,
    ("vision/shvit_transfer", "onnx"): 7, ("vision/shvit_transfer", "pt2"): 3,
}  # fmt: skip

Part = tuple[System, DataModule]
_built: dict[str, Part] = {}


def small(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe with small pictures and batches, and whatever `SMALL` says."""
    recipe = copy.deepcopy(recipe)
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    for arguments in (model, data):
        if "image_size" in arguments:
            arguments["image_size"] = 64
    model |= SMALL.get(name, {})
    data |= {"batch_size": min(4, data["batch_size"]), "num_workers": 0, **SMALL_DATA.get(name, {})}
    return recipe


def build(name: str) -> Part:
    """A recipe's model and data on the embedded sample, built once."""
    if name not in _built:
        recipe = small(read_recipe(["--config", name]), name)
        data = bundle.build_data(recipe["data"])
        facts = data.facts()
        torch.manual_seed(0)
        model = {**recipe["model"], "init_args": {**recipe["model"]["init_args"], "facts": facts}}
        system = bundle.build_model(model)
        settle(system)
        system.recipe = model
        system.data_recipe = {**recipe["data"], "init_args": {**recipe["data"]["init_args"], **facts}}
        _built[name] = system, data
    return _built[name]


def settle(system: System) -> None:
    """Statistics, gains and zeros away from their initial values, which hide what is not reached or not saved."""
    generator = torch.Generator().manual_seed(1)
    for name, value in [*system.named_buffers(), *system.named_parameters()]:
        if value.is_floating_point() and value.ndim == 1 and ("running" in name or name.endswith("weight")):
            value.data = 0.7 + 0.6 * torch.rand(value.shape, generator=generator)
        elif isinstance(value, torch.nn.Parameter) and not bool(value.any()):
            value.data = 0.05 * torch.randn(value.shape, generator=generator)


def first_batch(data: DataModule, split: Any) -> dict[str, Any]:
    data.setup({"train": "fit", "val": "fit", "test": "test", "predict": "predict"}[split])
    return next(iter(data.loader(data.samples(split), split)))


def outputs(system: System, batch: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return system.eval()(batch)


SYSTEMS = recipes.names()
FORMATS = list(SUFFIX)
EXPORTS = [
    pytest.param(name, format, marks=[pytest.mark.slow] if (name, format) in SLOW_TO_EXPORT else [])
    for name in SYSTEMS
    if name not in SAME_NETWORK
    for format in FORMATS
]


def test_the_exceptions_speak_of_systems_that_exist() -> None:
    pairs = [*NOT_EXPORTED, *SLOW_TO_EXPORT]
    named = {*SMALL, *SMALL_DATA, *WITHOUT_GRADIENT, *SAME_NETWORK, *SAME_NETWORK.values(), *(n for n, _ in pairs)}
    assert named <= set(SYSTEMS)
    assert {f for _, f in pairs} <= set(FORMATS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_forward_gives_what_the_signature_says(name: str) -> None:
    system, data = build(name)
    signature = system.signature()
    batch = first_batch(data, "val")
    got = outputs(system, batch)
    assert set(signature.outputs) <= got.keys()
    assert set(signature.inputs) == set(system.input_names()) <= batch.keys()
    for key, example in signature.inputs.items():
        assert batch[key].dtype == example.dtype and batch[key].ndim == example.ndim and len(example) >= 2
    assert all(len(v) == len(batch["id"]) and bool(torch.isfinite(v).all()) for v in got.values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_loss_reaches_every_weight(name: str) -> None:
    system, data = build(name)
    batch = first_batch(data, "train")
    system.train()
    system.zero_grad()
    torch.manual_seed(0)
    losses = system.losses(batch)
    assert losses["loss"].ndim == 0 and bool(torch.isfinite(losses["loss"]))
    losses["loss"].backward()
    allowed = WITHOUT_GRADIENT.get(name, {})
    trained = {n: p for n, p in system.named_parameters() if p.requires_grad}
    assert trained
    missing = {n for n, p in trained.items() if p.grad is None or not bool(p.grad.any())}
    missing = {n for n in missing if not n.endswith(BEFORE_NORM)}
    assert {n for n in missing if not n.startswith(tuple(allowed) or ("\0",))} == set()
    assert all(any(n.startswith(a) for n in missing) for a in allowed), "an exception that is none"
    assert all(bool(torch.isfinite(p.grad).all()) for p in trained.values() if p.grad is not None)
    groups = list(system.parameter_groups())
    assert sum(len(g["params"]) for g in groups) == len(trained)


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_evaluation_gives_named_numbers(name: str) -> None:
    system, data = build(name)
    batch = first_batch(data, "val")
    system.eval()
    metrics = system.make_metrics()
    with torch.no_grad():
        losses = system.evaluate(batch, metrics)
    values = {name: metric.compute() for name, metric in metrics.items() if metric.update_called}
    assert losses["loss"].ndim == 0 and any(v.numel() == 1 for v in values.values())
    system.results["val"] = values
    named = system.named_results("val")
    assert named and all(isinstance(v, float) for v in named.values())
    monitored = recipes.read(recipes.find(name))["monitor"].removeprefix("val/")
    assert monitored in {*losses, *values, "epoch"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_bundle_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    system, data = build(name)
    bundle.save_bundle(tmp_path / "b", system.state_dict(), system.recipe, system.data_recipe, "card")
    saved = bundle.read(tmp_path / "b")
    again = bundle.build_model(saved.model)
    bundle.load_weights(again, saved)
    batch = first_batch(data, "val")
    for key, value in outputs(system, batch).items():
        assert torch.equal(value, outputs(again, batch)[key])
    served = bundle.build_data(saved.data)
    assert served.facts() == data.facts() and served.root is None


@pytest.mark.parametrize("name", SYSTEMS)
def test_rows_have_the_columns_that_the_docstring_names(name: str) -> None:
    system, data = build(name)
    batch = first_batch(data, "predict")
    columns = system.columns(batch, outputs(system, batch))
    assert columns and "id" not in columns
    assert all(len(values) >= len(batch["id"]) for values in columns.values())
    named = set(re.findall(r"`(\w+)`", type(system).__doc__ or ""))
    assert set(columns) <= named | EVERYWHERE


def unseen(signature: Signature) -> Iterator[dict[str, Tensor]]:
    """Inputs of batch sizes, and other sizes where they may vary, that neither tracing nor export has met."""
    for batch in (3, 4):
        inputs = {}
        for key, example in signature.inputs.items():
            value = example[torch.arange(batch) % len(example)]
            for axis in signature.dynamic.get(key, {}):
                value = torch.cat([value, value.flip(axis)], axis) if batch == 4 else value
            inputs[key] = value
        yield inputs


@pytest.mark.parametrize(("name", "format"), EXPORTS)
def test_exports_agree_on_sizes_that_were_not_traced(name: str, format: Any, tmp_path: Path) -> None:
    system, data = build(name)
    path = tmp_path / f"model{SUFFIX[format]}"
    if (name, format) in NOT_EXPORTED:
        pytest.skip(NOT_EXPORTED[name, format])
    largest, varies = export(system, path, format)
    signature = system.signature()
    if signature.dynamic and not varies:
        signature = signature.fixed()
    assert largest <= signature.tolerance
    exported = Exported(path)
    for inputs in unseen(signature):
        with torch.inference_mode():
            expected = {k: v.numpy() for k, v in system.outputs(**inputs).items() if k in signature.outputs}
        assert difference(exported.run({k: v.numpy() for k, v in inputs.items()}), expected) <= signature.tolerance
    assert exported.meta["facts"] == data.facts() and exported.meta["data"]["init_args"]["root"] is None
    batch = first_batch(data, "predict")
    if all(batch[k].shape[1:] == v.shape[1:] for k, v in signature.inputs.items()):
        got = exported.run({k: batch[k].numpy() for k in signature.inputs})
        rows, wanted = make_columns(exported.meta["columns"], got), system.columns(batch, outputs(system, batch))
        assert rows.keys() == wanted.keys()
        for key, values in wanted.items():
            if isinstance(values, np.ndarray) and values.dtype.kind == "f":
                assert np.allclose(rows[key], values, atol=1e-4)


# Domain -> how a name of its table becomes a network of the published size
BUILDERS: dict[str, Callable[[str], torch.nn.Module]] = {}


def vision_network(name: str) -> torch.nn.Module:
    from polyhead.encoders import without_weights
    from vision.backbones import create_backbone
    from vision.transfer import VARIANTS, create_transfer

    with without_weights():
        if name in VARIANTS:
            return create_transfer(name)
        return create_backbone(name, num_classes=1000)


def medical_network(name: str) -> torch.nn.Module:
    from medical.medusa import MEDUSA, preset

    options = {k: v for k, v in preset(name).items() if k != "global_size"}
    return MEDUSA(2, **options)


def timeseries_network(name: str) -> torch.nn.Module:
    from timeseries.variants import create_network

    return create_network(name)


BUILDERS |= {"vision": vision_network, "medical": medical_network, "timeseries": timeseries_network}


def test_the_table_of_variants_counts_parameters_right() -> None:
    rows = models.variants()
    assert len(rows) == len({(r["domain"], r["name"]) for r in rows}) >= 5
    wrong = {}
    for row in rows:
        with torch.device("meta"):
            network = BUILDERS[row["domain"]](row["name"])
        count = sum(p.numel() for p in network.parameters())
        if count != row["parameters"]:
            wrong[row["name"]] = (count, row["parameters"])
    assert not wrong


def test_every_recipe_s_backbone_is_in_the_table() -> None:
    names = {r["name"] for r in models.variants()}
    for name in SYSTEMS:
        backbone = recipes.read(recipes.find(name))["model"]["init_args"].get("backbone")
        assert backbone is None or backbone in names, name


def test_shipped_bundles_are_whole() -> None:
    for row in models.shipped():
        saved = bundle.read(row["name"])
        bundle.load_weights(bundle.build_model(saved.model), saved)
        assert row["results"] and row["system"] and row["data"]
        assert all(0 <= v <= 1 or v > 0 for v in row["results"].values())


def options(name: str) -> list[str]:
    """What makes a recipe small, as options."""
    recipe = small(read_recipe(["--config", name]), name)
    sizes = [
        f"--{part}.{key}={recipe[part]['init_args'][key]}"
        for part, keys in (("data", ("batch_size", "num_workers", "image_size", "hours")), ("model", ("image_size",)))
        for key in keys
        if key in recipe[part]["init_args"]
    ]
    return sizes + [f"--model.{k}={json.dumps(v)}" for k, v in SMALL.get(name, {}).items()]


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_recipe_runs_a_batch_and_goes_on(name: str, tmp_path: Path) -> None:
    """As a person starts it, but for sizes; then one epoch more from where it stopped."""
    run = tmp_path / "run"
    done = polyhead("fit", "--config", name, "--output", run, *options(name), *ONE_BATCH)
    assert done.status == 0, done.err
    assert (run / "report.html").is_file() and (run / "bundle/model.safetensors").is_file()
    again = polyhead("fit", "--output", run, "--resume", "--trainer.max_epochs=2")
    assert again.status == 0, again.err
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1 and checkpoint["global_step"] == 2
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_killed_and_resumed_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    limits = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2")
    common = ("fit", "--config", name, *options(name), *limits, "--last.every_n_steps=1")
    kill = '{"class_path": "tests.toy.KillAt", "init_args": {"where": "step", "step": 5}}'
    killed = polyhead(*common, "--output", tmp_path / "broken", f"--trainer.callbacks+={kill}")
    assert killed.status == -signal.SIGKILL, killed.err
    for run, extra in (("broken", ["--resume"]), ("whole", [])):
        done = polyhead(*common, "--output", tmp_path / run, *extra)
        assert done.status == 0, done.err
    checkpoints = [tmp_path / run / "checkpoints/last.ckpt" for run in ("broken", "whole")]
    broken, whole = (torch.load(path, weights_only=True)["state_dict"] for path in checkpoints)
    assert broken.keys() == whole.keys() and all(torch.equal(v, whole[k]) for k, v in broken.items())
