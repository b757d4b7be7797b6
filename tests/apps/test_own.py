"""Help, lists and the doctor: what answers without a training."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import polyhead as package
from apps import models, recipes
from apps.main import DOMAIN, LIGHTNING, OWN
from polyhead.data import DataModule
from polyhead.system import System
from tests.apps.conftest import write_pets
from tests.command import polyhead


def test_help_names_every_subcommand() -> None:
    done = polyhead("--help")
    assert done.status == 0 and not done.err
    listed = [line.split()[0] for line in done.out.split("subcommands:\n")[1].split("\n\n")[0].splitlines()]
    assert listed == [*LIGHTNING, *OWN, *DOMAIN]
    assert polyhead().out == polyhead("-h").out == done.out
    assert polyhead("--version").out == f"polyhead {package.__version__}\n"


@pytest.mark.parametrize("subcommand", [*LIGHTNING, *OWN, *DOMAIN])
def test_every_subcommand_explains_itself(subcommand: str) -> None:
    done = polyhead(subcommand, "--help")
    assert done.status == 0, done.err
    assert done.out.lower().startswith("usage: ")
    if subcommand in LIGHTNING:
        trainer = importlib.import_module("polyhead.trainer").PolyheadTrainer
        options = set(inspect.signature(getattr(trainer, subcommand)).parameters)
        ours = {o for o in options - {"self", "model", "datamodule"} if not o.endswith("dataloaders")}
        for option in {*ours, "output", "monitor", "config", "trainer.max_epochs"}:
            assert f"--{option}" in done.out, option


def cpu_seconds(*arguments: str) -> float:
    """Processor time of a command from its start, whatever else the machine does."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_help_answers_at_once() -> None:
    assert min(cpu_seconds("-m", "apps", "--help") for _ in range(3)) < 1.0
    assert min(cpu_seconds("-m", "apps", "models") for _ in range(2)) < 1.0


@pytest.mark.slow
def test_the_help_of_fit_costs_what_lightning_costs() -> None:
    once = min(cpu_seconds("-c", "import pytorch_lightning") for _ in range(3))
    assert min(cpu_seconds("-m", "apps", "fit", "--help") for _ in range(3)) < 1.5 * once


def test_models_lists_variants_recipes_and_shipped_bundles() -> None:
    done = polyhead("models")
    assert done.status == 0, done.err
    for row in models.variants():
        assert f"{row['name']:<28} {row['family']:<14} {row['parameters']:>12,}" in done.out
    assert all(f"\n  {name}\n" in done.out for name in recipes.names())
    some = polyhead("models", "shvit_s[12]").out
    assert "shvit_s1" in some and "shvit_s2" in some and "shvit_s3" not in some
    facts = json.loads(polyhead("models", "--json").out)
    assert facts["recipes"] == recipes.names()
    assert {v["name"] for v in facts["variants"]} == {r["name"] for r in models.variants()}
    assert {b["name"] for b in facts["shipped"]} == {b["name"] for b in models.shipped()}
    assert all({"system", "data", "results"} <= b.keys() for b in facts["shipped"])


def test_the_doctor_finds_the_installation_well() -> None:
    done = polyhead("doctor")
    assert done.status == 0, done.out
    lines = [line.split(maxsplit=2) for line in done.out.splitlines()]
    assert {mark for mark, *_ in lines} == {"ok"}
    found = {name: text for _, name, text in lines if name != "recipe"}
    assert {"python", "torch", "pytorch-lightning", "jsonargparse", "onnxruntime", "device"} <= found.keys()
    assert found["polyhead"] == package.__version__
    assert [text for _, name, text in lines if name == "recipe"] == recipes.names()


def test_the_doctor_looks_at_data(tmp_path: Path) -> None:
    root = write_pets(tmp_path / "pets")
    well = polyhead("doctor", "--data.root", root)
    assert well.status == 0, well.err
    found = dict(line.split(maxsplit=2)[1:] for line in well.out.splitlines() if line.startswith("ok "))
    assert found["pictures"] == "32" and found["classes"] == "2" and found["problems"] == "0"
    assert found["train"] == "cat 8, dog 8" and found["val"] == "cat 4, dog 4"
    broken = root / "train/cat/3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    (root / "val/dog/1.png").write_bytes(b"")
    done = polyhead("doctor", f"--data.root={root}", "--data.image_size", 32)
    assert done.status == 1
    assert "FAIL  train/cat/3.png      the image is damaged" in done.out
    assert "FAIL  val/dog/1.png        the file is empty" in done.out
    assert "FAIL  problems             2\n" in done.out
    for file in (root / "val/dog").iterdir():
        file.unlink()
    unfit = polyhead("doctor", "--config", "vision/shvit_digits", "--data.root", root)
    assert unfit.status == 1 and "FAIL  fit                  class 'dog' is missing from the val part" in unfit.out


def test_the_doctor_looks_at_embedded_samples() -> None:
    done = polyhead("doctor", "--config", "vision/shvit_digits")
    assert done.status == 0 and "pictures             1797" in done.out and "classes              10" in done.out


# No option without effect


def read_in(function: object) -> tuple[set[str], set[str]]:
    """The parameters of a constructor, and the names its body reads."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body  # type: ignore[arg-type]
    assert isinstance(tree, ast.FunctionDef)
    arguments = {a.arg for a in [*tree.args.args, *tree.args.kwonlyargs]} - {"self"}
    return arguments, {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def classes_of_recipes() -> list[type]:
    found: set[type] = {System, DataModule}
    for name in recipes.names():
        content = recipes.read(recipes.find(name))
        for part in ("model", "data"):
            module, _, member = content[part]["class_path"].rpartition(".")
            found |= set(inspect.getmro(getattr(importlib.import_module(module), member)))
    ours = [c for c in found if c.__module__.split(".")[0] in {"polyhead", "vision", "medical", "timeseries", "recsys"}]
    return sorted((c for c in ours if "__init__" in vars(c)), key=lambda c: c.__name__)


@pytest.mark.parametrize("kind", classes_of_recipes(), ids=lambda c: c.__name__)
def test_every_argument_of_a_recipe_s_class_is_read(kind: type) -> None:
    arguments, read = read_in(vars(kind)["__init__"])
    assert arguments - read == set()


@pytest.mark.parametrize("kind", classes_of_recipes(), ids=lambda c: c.__name__)
def test_every_argument_of_a_recipe_s_class_is_documented(kind: type) -> None:
    arguments, _ = read_in(vars(kind)["__init__"])
    texts = " ".join(c.__doc__ or "" for c in inspect.getmro(kind))
    assert {a for a in arguments if a not in texts} == set()
