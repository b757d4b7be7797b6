"""Bundles and checkpoints: saving a model with what it needs, and loading one without running its code.

A bundle is a folder: `model.safetensors`, `config.yaml` (the `model` and `data` of a recipe), `README.md`
(the model card). Nothing here runs the general unpickler.
"""

from __future__ import annotations

import copy
import importlib
import importlib.resources
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyhead.data import DataModule
from polyhead.encoders import without_weights
from polyhead.errors import UserError, nearest, reason
from polyhead.files import read_yaml
from polyhead.safe import read_checkpoint
from polyhead.system import System

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "README.md"
CHECKPOINT_KEY = "polyhead"


@dataclass
class Saved:
    """A model as it was found: weights, its recipe, where it came from."""

    state: dict[str, Tensor]
    model: dict[str, Any]
    data: dict[str, Any]
    path: Path

    @property
    def name(self) -> str:
        """The run or bundle it belongs to, for naming a run folder."""
        path = self.path
        if path.suffix == ".ckpt":
            path = path.parent
        return path.parent.name if path.name in ("checkpoints", "bundle") else path.stem


def catalogue() -> dict[str, dict[str, Any]]:
    """Name -> entry of the shipped bundles, read as a package resource."""
    file = importlib.resources.files("checkpoints") / "catalogue.json"
    return json.loads(file.read_text(encoding="utf-8"))


def find(name: str) -> Path:
    """The checkpoint file or bundle folder behind a path or a catalogue name.

    Raises:
        UserError: there is none; names near matches.
    """
    path = Path(name)
    if path.exists():
        return path
    names = catalogue()
    if name in names:
        folder = importlib.resources.files("checkpoints") / names[name]["bundle"]
        if not folder.is_dir():
            raise UserError(f"the bundle {name!r} is not part of this installation")
        return Path(str(folder))
    near = nearest(name, names)
    hints = [f"did you mean {', '.join(near)}?"] if near else ["`polyhead models` lists the shipped ones"]
    raise UserError(f"no checkpoint, bundle or shipped model at {name!r}", hints)


def read(name: str | Path) -> Saved:
    """Read a Lightning checkpoint or a bundle, without executing anything in it.

    Raises:
        UserError: no such model, or the file is not one of ours or is damaged.
    """
    path = find(str(name))
    return _read_bundle(path) if path.is_dir() else _read_checkpoint(path)


def _read_bundle(folder: Path) -> Saved:
    for file in (WEIGHTS, CONFIG):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not a bundle: it has no {file}")
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {folder / WEIGHTS}: {reason(error)}") from error
    config = read_yaml(folder / CONFIG)
    try:
        model, data = dict(config["model"]), dict(config["data"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / CONFIG} is not a bundle's: it lacks model or data") from None
    return Saved({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, model, data, folder)


def _read_checkpoint(path: Path) -> Saved:
    content = read_checkpoint(path)
    if CHECKPOINT_KEY not in content or "state_dict" not in content:
        raise UserError(
            f"{path} is not a checkpoint of this suite",
            ["`polyhead convert` turns published checkpoints into bundles"],
        )
    recipe = content[CHECKPOINT_KEY]
    return Saved(content["state_dict"], recipe["model"], recipe["data"], path)


def _class_of(recipe: dict[str, Any], base: type, what: str) -> type:
    """The class a recipe names, which must be a subclass of `base`."""
    dotted = str(recipe.get("class_path", ""))
    module, _, name = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{what}.class_path {dotted!r} names no class: {reason(error)}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{what}.class_path {dotted!r} is not a {base.__name__}")
    return found


def check_classes(saved: Saved) -> None:
    """Raise a UserError unless the recipe of a saved model names one of our systems and data modules."""
    for recipe, base, what in ((saved.model, System, "model"), (saved.data, DataModule, "data")):
        try:
            _class_of(recipe, base, what)
        except UserError as error:
            raise UserError(f"{saved.path} cannot be used: {error.message}") from error


def _build(recipe: dict[str, Any], base: type, what: str) -> Any:
    _class_of(recipe, base, what)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, what, fail_untyped=False, required=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = getattr(parser.instantiate_classes(parser.parse_object({what: recipe})), what)
    except UserError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        raise UserError(f"the {what} of this recipe cannot be built: {reason(cause)[:300]}") from error
    built.recipe = recipe
    return built


def build_model(recipe: dict[str, Any]) -> System:
    """The System of a recipe (class_path and init_args), for weights to be loaded into. Raises UserError."""
    with without_weights():
        return _build(recipe, System, "model")


def build_data(recipe: dict[str, Any]) -> DataModule:
    """The DataModule of a recipe. Raises UserError."""
    return _build(recipe, DataModule, "data")


def clone(system: System) -> Any:
    """A deep copy without the trainer it may be attached to."""
    trainer, system._trainer = system._trainer, None
    try:
        return copy.deepcopy(system)
    finally:
        system._trainer = trainer


def load_weights(system: System, saved: Saved) -> None:
    """Load every weight; a difference in names or shapes is a UserError that names the first."""
    own = system.state_dict()
    wrong = [
        f"{k}: {list(saved.state[k].shape)} in the checkpoint, {list(v.shape)} in the model"
        for k, v in own.items()
        if k in saved.state and saved.state[k].shape != v.shape
    ]
    missing = sorted(own.keys() - saved.state.keys())
    extra = sorted(saved.state.keys() - own.keys())
    if wrong or missing or extra:
        first = wrong[0] if wrong else f"{(missing or extra)[0]} is {'missing' if missing else 'unknown'}"
        raise UserError(
            f"{saved.path} does not fit this model: {len(wrong)} shapes differ, {len(missing)} weights are "
            f"missing, {len(extra)} are unknown ({first})",
            ["leave --config and --model options out to use the checkpoint's own settings"],
        )
    system.load_state_dict(saved.state)


def init_weights(system: System, saved: Saved) -> list[str]:
    """Start from `saved` where it fits: resized where the network knows how, heads of another size left new.

    A system says how by `adapt_state_dict(state)`, or by `adapt_facts(state, facts)` where it takes what the other
    model's data decided to know what is what.

    Returns the names left at their initial values. Raises UserError when the body does not fit.
    """
    own = system.state_dict()
    given = dict(saved.state)
    adapt = getattr(system, "adapt_state_dict", None)
    if adapt is not None:
        given = adapt(given)
    between = getattr(system, "adapt_facts", None)
    if between is not None:
        given = between(given, saved.model.get("init_args", {}).get("facts") or {})
    heads = tuple(getattr(system, "head_prefixes", lambda: [])())
    new = [k for k, v in own.items() if k not in given or given[k].shape != v.shape]
    body = [k for k in new if not k.startswith(heads)] if heads else new
    if body:
        raise UserError(
            f"{saved.path} does not fit this model: {len(body)} weights beside the head differ ({body[0]})",
            [f"its own settings: {saved.model.get('init_args', {}).get('backbone', saved.model['class_path'])}"],
        )
    system.load_state_dict({**own, **{k: v for k, v in given.items() if k in own and k not in new}})
    return new


def card(name: str, model: dict[str, Any], data: dict[str, Any], metrics: dict[str, float], command: str) -> str:
    """The model card of a fresh bundle: what it is, what it was trained on, what was measured and how."""
    root = data.get("init_args", {}).get("root") or "the embedded sample"
    rows = "\n".join(f"| {k} | {v:.4f} |" for k, v in sorted(metrics.items()))
    table = f"| metric | value |\n|---|---|\n{rows}" if rows else "Nothing: all samples were for training."
    return (
        f"# {name}\n\n- Model: `{model['class_path']}`\n- Data: {Path(str(root)).name}\n- Licence: that of its data\n\n"
        f"## Measured on the validation split\n\n{table}\n\n"
        f"```\n{command}\n```\n"
    )


def save_bundle(
    folder: Path,
    state: dict[str, Tensor],
    model: dict[str, Any],
    data: dict[str, Any],
    card: str,
    half: bool = False,
) -> None:
    """Write a bundle, replacing one that is there only when the new one is complete.

    Args:
        half: store floating-point weights as float16; they are float32 again when loaded.

    Raises:
        UserError: the folder cannot be written.
    """
    # Where the training data and their tables lay, and which set there it was, is not where other data lie
    arguments = data.get("init_args", {})
    places = ("root", "name", "labels", "splits", "boxes", "landmarks")
    local = {k: None for k in places if isinstance(arguments.get(k), str)}
    data = {**data, "init_args": {**arguments, **local, "root": None}}
    small = {k: v.half() if half and v.is_floating_point() else v for k, v in state.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in small.items()}, work / WEIGHTS)
            # Through JSON: a list that model and data share would become a YAML alias
            plain = json.loads(json.dumps({"model": model, "data": data}))
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
            (work / CONFIG).write_text(text, encoding="utf-8")
            (work / CARD).write_text(card, encoding="utf-8")
            # Both are made private by their libraries; results are as readable as other files
            work.chmod(0o755)
            (work / WEIGHTS).chmod(0o644)
            if folder.exists():
                shutil.rmtree(folder)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the bundle {folder}: {getattr(error, 'strerror', None) or error}") from error
