"""A person's mistake is one line that says what and where, at most four hints, status 2, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper

from apps import recipes
from tests.apps.conftest import ONE_BATCH, TOY, write_pets
from tests.command import Done, polyhead


class Planted:
    """Unpickling this would leave a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch planted",)


CONFIGS = {
    "key.yaml": "model:\n  class_path: vision.ImageClassifier\n  init_args:\n    bakbone: shvit_s1\n",
    "nested.yaml": "model:\n  class_path: vision.ImageClassifier\n  init_args:\n    optimizer:\n"
    "      class_path: torch.optim.AdamW\n      init_args: {lrr: 0.1}\n",
    "top.yaml": "modle:\n  class_path: vision.ImageClassifier\n",
    "trainer.yaml": "monitor: val/loss\ntrainer:\n  max_epoch: 3\n",
    "value.yaml": "trainer:\n  accumulate_grad_batches: three\n",
    "callback.yaml": "trainer:\n  callbacks:\n  - class_path: polyhead.progress.Progres\n",
    "syntax.yaml": "model:\n  class_path: vision.ImageClassifier\n init_args: [\n",
    "ckpt.yaml": "monitor: val/loss\nckpt_path: some.ckpt\n",
    "output.yaml": "output: here\n",
    "text.yaml": "just text\n",
    "list.yaml": "- a\n- b\n",
    "empty.yaml": "",
}


# Bundles whose settings do not fit: name -> what is changed
BUNDLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bundle_of_code": lambda model: model.update(class_path="os.system", init_args={"command": "touch planted"}),
    "bundle_of_nothing": lambda model: model.update(class_path="vision.NoSuchThing"),
    "bundle_of_tomorrow": lambda model: model["init_args"].update(colour_sense=3),
    "bundle_without_class": lambda model: model.pop("class_path"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_run: Path, digits_run: Path) -> Iterator[Path]:
    """A working folder with everything that can be wrong in it."""
    root = tmp_path_factory.mktemp("errors")
    for name, text in CONFIGS.items():
        (root / name).write_text(text)
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    write_pets(root / "pets")
    for name in ("truncated", "no_val"):
        shutil.copytree(root / "pets", root / name)
    good = (root / "truncated/train/cat/3.png").read_bytes()
    (root / "truncated/train/cat/3.png").write_bytes(good[: len(good) // 2])
    shutil.rmtree(root / "no_val/val/dog")
    (root / "nothing").mkdir()
    (root / "file").write_text("")
    shutil.copytree(toy_run, root / "toy")
    shutil.copytree(digits_run, root / "digits")

    for name in ("cut", "unreadable"):
        shutil.copytree(root / "digits/bundle", root / name)
    weights = (root / "cut/model.safetensors").read_bytes()
    (root / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "unreadable/config.yaml").write_text("model:\n  class_path: [\n")
    for name, model in BUNDLES.items():
        shutil.copytree(root / "digits/bundle", root / name)
        content = yaml.safe_load((root / name / "config.yaml").read_text())
        model(content["model"])
        (root / name / "config.yaml").write_text(yaml.safe_dump(content))
    torch.save({"state_dict": {}, "polyhead": {"model": Planted(), "data": {}}}, root / "planted.ckpt")
    (root / "pickle.ckpt").write_bytes(pickle.dumps(Planted()))
    torch.save({"state_dict": {}}, root / "foreign.ckpt")
    (root / "text.ckpt").write_text("hello")
    (root / "zero.ckpt").write_bytes(b"")
    checkpoint = (root / "digits/checkpoints/best.ckpt").read_bytes()
    (root / "cut.ckpt").write_bytes(checkpoint[: len(checkpoint) // 2])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    foreign = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(foreign, root / "foreign.onnx")
    (root / "text.onnx").write_text("x")
    yield root
    assert not list(root.rglob("planted"))


# What a person types -> the lines they see. DIGITS is the shipped digits recipe; "..." ends what may go on
CASES: dict[str, list[str]] = {
    # Subcommands, recipes, paths
    "fti DIGITS": ["unknown subcommand 'fti'", "  did you mean fit?"],
    "qwxyz": [
        "unknown subcommand 'qwxyz'",
        "  subcommands: fit, validate, test, predict, export, explain, models, doctor, convert...",
    ],
    "fit": ["fit needs --config RECIPE", "  `polyhead models` lists the {recipes} shipped ones"],
    "fit --config vision/shvitt": [
        "no recipe or file 'vision/shvitt' for --config",
        "  did you mean vision/shvit,...",
    ],
    "fit --config shvit": ["no recipe or file 'shvit' for --config", "  did you mean vision/shvit?"],
    "fit DIGITS --data.root nowhere": ["no such file or folder: nowhere"],
    "fit DIGITS --data.root=": ["data.root is empty: leave it out for the embedded sample"],
    "fit DIGITS --data.root pets/trian": ["no such file or folder: pets/trian", "  near: pets/train"],
    "fit DIGITS --data.root nothing": [
        "no images in nothing: a folder, a zip, a list or a table of images is needed",
    ],
    "fit DIGITS --data.root no_val": [
        "class 'dog' is missing from the val part of no_val: every class must be there in training and in validation",
    ],
    "fit DIGITS --data.root truncated": [
        "cannot read train/cat/3.png: the image is damaged: image file is truncated",
        "  mend or remove it, or leave such samples out with --data.on_error skip",
    ],
    "fit DIGITS --data.root pets --data.name cats": ["no archive or table cats in pets"],
    # Options
    "fit DIGITS --outptu x": ["unknown option --outptu", "  did you mean --output?"],
    "fit DIGITS --trainer.max_epoch 3": [
        "unknown option --trainer.max_epoch",
        "  did you mean --trainer.max_epochs?",
    ],
    "fit DIGITS --trainer.max 3": [
        "unknown option --trainer.max",
        "  did you mean --trainer.max_epochs, --trainer.max_steps, --trainer.max_time?",
    ],
    "fit DIGITS --lr 3": ["unknown option --lr", "  did you mean --model.optimizer.lr?"],
    "fit DIGITS --epochs 3": [
        "unknown option --epochs",
        "  did you mean --best.every_n_epochs, --last.every_n_epochs, --trainer.max_epochs?",
    ],
    "fit DIGITS --nonsense 3": ["unknown option --nonsense", "  `polyhead fit --help` lists all"],
    "fit DIGITS --modle.backbone x": ["unknown option --modle.backbone", "  did you mean --model?"],
    "fit DIGITS --model.bakbone x": [
        "--model.bakbone: vision.ImageClassifier has no option 'bakbone'",
        "  did you mean backbone?",
    ],
    "fit DIGITS --model.num_classes 3": [
        "--model.num_classes: vision.ImageClassifier has no option 'num_classes'",
        "  the number of classes comes from the data",
    ],
    "fit DIGITS --model.optimizer.lrr 3": [
        "--model.optimizer.lrr: torch.optim.AdamW has no option 'lrr'",
        "  did you mean lr?",
    ],
    "fit DIGITS --data.batch_siz 3": [
        "--data.batch_siz: vision.ImageData has no option 'batch_siz'",
        "  did you mean batch_size?",
    ],
    "fit DIGITS --data.root": ["--data.root needs a value"],
    "fit DIGITS --monitor": ["--monitor needs a value"],
    "fit --config": ["--config needs a value"],
    "fit DIGITS stray": [
        "fit does not understand 'stray'",
        "  options begin with --, and take their value after them",
    ],
    "fit DIGITS -x": ["fit does not understand '-x'", "  options begin with --, and take their value after them"],
    # Values
    "fit DIGITS --trainer.max_epochs three": ["--trainer.max_epochs is 'three': a whole number or null is needed"],
    "fit DIGITS --data.batch_size x": ["--data.batch_size is 'x': a whole number is needed"],
    "fit DIGITS --data.batch_size 0": ["data.batch_size is 0: at least 1 is needed"],
    "fit DIGITS --data.num_workers -1": ["data.num_workers is -1: 0 or more is needed"],
    "fit DIGITS --data.scale 3": ["--data.scale is '3': a list, such as '[1, 2]', or null is needed"],
    "fit DIGITS --data.cache disk": ["--data.cache is 'disk': one of ram, none is needed"],
    "fit DIGITS --model.distillation medium": ["--model.distillation is 'medium': one of hard, soft is needed"],
    "fit DIGITS --model.mean [1,2]": ["--model.mean is '[1, 2]': a list of 3 or null is needed"],
    "fit DIGITS --model.pretrained maybe": ["--model.pretrained is 'maybe': true or false is needed"],
    "fit DIGITS --model.freeze backbone": [
        "--model.freeze is 'backbone': a list, such as '[a, b]', or null is needed",
    ],
    "fit DIGITS --model.freeze [backbon]": ["model.freeze: the network has no parameters named backbon..."],
    "fit DIGITS --model.optimizer.lr x": ["--model.optimizer.lr is 'x': a number is needed"],
    "fit DIGITS --model.optimizer.lr -1": ["model.optimizer cannot be made: Invalid learning rate: -1.0"],
    "fit DIGITS --model.ema_decay 2": ["model.ema_decay is 2: it must be between 0 and 1"],
    'fit DIGITS --model.lr_scale={"nothing":3}': ["model.lr_scale names 'nothing', with which no weight's name begins"],
    'fit DIGITS --model.lr_scale={"network":0}': [
        "model.optimizer cannot be made: optimizer got an empty parameter list"
    ],
    "fit DIGITS --last.every_n_steps 0": ["last.every_n_steps is 0: at least 1 is needed"],
    "fit DIGITS --seed_everything true": ["--seed_everything is true or false: a whole number is needed"],
    "explain --ckpt_path digits/bundle --limit 0": ["--limit is 0: at least 1 is needed"],
    "fit DIGITS --mode best": ["--mode is 'best': one of min, max is needed"],
    "fit DIGITS --seed_everything abc": ["--seed_everything is 'abc': true or false or a whole number is needed"],
    "fit DIGITS --resume=perhaps --output run": ["--resume is 'perhaps': true or false is needed"],
    "fit DIGITS --monitor val/acuracy": [
        "--monitor val/acuracy is no metric of ImageClassifier",
        "  did you mean val/accuracy?",
    ],
    "fit DIGITS --monitor accuracy": [
        "--monitor accuracy is no metric of ImageClassifier",
        "  did you mean val/accuracy?",
    ],
    "fit DIGITS --trainer.accelerator quantum": [
        "You selected an invalid accelerator name: `accelerator='quantum'`. Available names are:...",
    ],
    "export --ckpt_path digits/bundle --format onxx": ["--format is 'onxx': one of onnx, torchscript, pt2 is needed"],
    "explain --ckpt_path digits/bundle --limit few": ["--limit is 'few': a whole number is needed"],
    # Classes
    "fit DIGITS --model vision.ImageClasifier": [
        "--model names 'vision.ImageClasifier': there is no such class",
        "  did you mean vision.ImageClassifier?",
    ],
    "fit DIGITS --model nowhere.ImageClassifier": [
        "--model names 'nowhere.ImageClassifier': there is no such class",
        "  did you mean vision.ImageClassifier?",
    ],
    "fit DIGITS --model os.system": ["--model names 'os.system', which is no System"],
    "fit DIGITS --data vision.ImageClassifier": [
        "--data names 'vision.ImageClassifier', which is no DataModule",
        "  did you mean...",
    ],
    "fit DIGITS --model.backbone shvit_s9": [
        "unknown network 'shvit_s9': it is neither one of Polyhead's nor one of timm's",
        "  did you mean shvit_s4, shvit_s3, shvit_s2?",
    ],
    "fit DIGITS --model.backbone_options.in_chans 1": [
        "SHViT takes images [B, 1, H, W], got [64, 3, 64, 64]: give 1 channels, or build the model with in_chans=3",
    ],
    "fit DIGITS --model.backbone_options.depht [1,1,1]": [
        "an option of shvit_s1 does not fit: SHViT.__init__() got an unexpected keyword argument 'depht'",
    ],
    "fit DIGITS --model.optimizer torch.optim.Adamm": [
        "--model.optimizer names 'torch.optim.Adamm': there is no such class",
        "  did you mean torch.optim.Adam?",
    ],
    "fit DIGITS --model.scheduler WarmupCosin": [
        "--model.scheduler names 'WarmupCosin': there is no such class",
        "  did you mean polyhead.schedules.WarmupCosine?",
    ],
    "fit DIGITS --trainer.callbacks+=pytorch_lightning.callbacks.EarlyStoping": [
        "--trainer.callbacks names 'pytorch_lightning.callbacks.EarlyStoping': there is no such class",
        "  did you mean pytorch_lightning.callbacks.EarlyStopping?",
    ],
    "fit --model vision.ImageClassifier": [
        "fit needs --data",
        "  a recipe names one: --config NAME",
    ],
    "fit --data vision.ImageData": [
        "fit needs --config RECIPE",
        "  `polyhead models` lists the {recipes} shipped ones",
    ],
    # Recipes that cannot be used
    "fit DIGITS --config key.yaml": [
        "key.yaml, line 4: model.bakbone: vision.ImageClassifier has no option 'bakbone'",
        "  did you mean backbone?",
    ],
    "fit DIGITS --config nested.yaml": [
        "nested.yaml, line 6: model.optimizer.lrr: torch.optim.AdamW has no option 'lrr'",
        "  did you mean lr?",
    ],
    "fit DIGITS --config top.yaml": [
        "top.yaml, line 2: modle.class_path is no key of a recipe",
        "  did you mean model?",
    ],
    "fit DIGITS --config trainer.yaml": [
        "trainer.yaml, line 3: trainer.max_epoch is no key of a recipe",
        "  did you mean trainer.max_epochs?",
    ],
    "fit DIGITS --config value.yaml": [
        "value.yaml, line 2: trainer.accumulate_grad_batches is 'three': a whole number is needed",
    ],
    "fit DIGITS --config callback.yaml": [
        "callback.yaml, line 2: trainer.callbacks names 'polyhead.progress.Progres': there is no such class",
        "  did you mean polyhead.progress.Progress?",
    ],
    "fit --config syntax.yaml": [
        "syntax.yaml, line 3 is not YAML: expected <block end>, but found '<block mapping start>'",
    ],
    "fit DIGITS --config ckpt.yaml": [
        "ckpt.yaml, line 2: ckpt_path is no key of a recipe: give it as --ckpt_path on the command line",
    ],
    "fit DIGITS --config output.yaml": [
        "output.yaml, line 1: output is no key of a recipe: give it as --output on the command line",
    ],
    "fit --config text.yaml": ["text.yaml is no recipe: it holds text, not keys such as model and data"],
    "fit --config list.yaml": ["list.yaml is no recipe: it holds a list, not keys such as model and data"],
    "fit --config empty.yaml": ["empty.yaml is no recipe: it holds nothing, not keys such as model and data"],
    "fit --config binary.yaml": ["binary.yaml is not YAML: it is not text in UTF-8"],
    # Options that would have no effect
    "fit DIGITS --strict": ["fit has no option --strict: it belongs to predict"],
    "fit DIGITS --limit 3": ["fit has no option --limit: it belongs to explain"],
    "fit DIGITS --format onnx": ["fit has no option --format: it belongs to export"],
    "export --ckpt_path digits/bundle --resume": ["export has no option --resume: it belongs to fit and predict"],
    "test --ckpt_path digits/bundle --init_from digits/bundle": ["test has no option --init_from: it belongs to fit"],
    "fit DIGITS --model.facts {}": ["--model.facts would be ignored: the data decides it"],
    "fit DIGITS --data.seed 3": ["--data.seed would be ignored: --seed_everything decides it"],
    "fit DIGITS --data.init_args.seed 3": ["--data.seed would be ignored: --seed_everything decides it"],
    "fit DIGITS --trainer.default_root_dir x": ["--trainer.default_root_dir would be ignored: --output decides it"],
    "fit DIGITS --trainer.logger.save_dir x": ["--trainer.logger.save_dir would be ignored: --output decides it"],
    "fit DIGITS --best.monitor val/loss": ["--best.monitor would be ignored: --monitor decides it"],
    "fit DIGITS --last.dirpath x": ["--last.dirpath would be ignored: --output decides it"],
    "fit DIGITS --resume": ["--resume goes on in --output DIR, which is not given"],
    "predict --ckpt_path digits/bundle --resume": ["--resume goes on in --output DIR, which is not given"],
    "fit DIGITS --output digits --resume --overwrite": [
        "--resume keeps what --output holds and --overwrite replaces it: give one of them",
    ],
    "fit DIGITS --output digits --resume --init_from toy/bundle": [
        "--resume restores the weights that --init_from would set: give one of them",
    ],
    "fit DIGITS --output new --init_from toy/bundle --ckpt_path digits/checkpoints/last.ckpt": [
        "--ckpt_path restores the weights that --init_from would set: give one of them",
    ],
    # Outputs
    "fit DIGITS --output file": ["--output file is a file: a folder is needed"],
    "fit DIGITS --output file/run": ["cannot make the folder --output file/run: Not a directory"],
    "fit DIGITS --output /dev/full": ["--output /dev/full is a file: a folder is needed"],
    "fit DIGITS --output /proc/run": ["cannot make the folder --output /proc/run: No such file or directory"],
    "fit DIGITS --output digits": [
        "digits already holds results of fit (config.yaml)",
        "  add --resume or --overwrite, or choose another --output",
    ],
    "fit DIGITS --output digits --overwrite --init_from digits/bundle": [
        "--overwrite would delete digits/bundle, which this call reads: choose another --output",
    ],
    "fit DIGITS --output digits --overwrite --data.root nowhere": ["no such file or folder: nowhere"],
    "fit DIGITS --output digits --overwrite --data.root no_val": [
        "class 'dog' is missing from the val part of no_val: every class must be there in training and in validation",
    ],
    # Models
    "predict --data.root pets": [
        "predict needs trained weights: --ckpt_path MODEL",
        "  MODEL: a checkpoint, a bundle, a shipped model (`polyhead models`), or best/last with --output DIR",
    ],
    "test DIGITS": [
        "test needs trained weights: --ckpt_path MODEL",
        "  MODEL: a checkpoint, a bundle, a shipped model (`polyhead models`), or best/last with --output DIR",
    ],
    "predict --ckpt_path nowhere.ckpt": [
        "no checkpoint, bundle or shipped model at 'nowhere.ckpt'",
        "  `polyhead models` lists the shipped ones",
    ],
    "predict --ckpt_path nowhere.onnx": ["no exported model at nowhere.onnx"],
    "predict --ckpt_path best": ["--ckpt_path best means a checkpoint of --output DIR, which is not given"],
    "predict --ckpt_path best --output nowhere": ["no best checkpoint: there is no nowhere/checkpoints/best.ckpt"],
    "fit DIGITS --ckpt_path last --output nowhere": [
        "nothing to continue from: there is no nowhere/checkpoints/last.ckpt",
    ],
    "fit DIGITS --ckpt_path nowhere.ckpt": [
        "no checkpoint, bundle or shipped model at 'nowhere.ckpt'",
        "  `polyhead models` lists the shipped ones",
    ],
    "fit DIGITS --init_from nowhere": [
        "no checkpoint, bundle or shipped model at 'nowhere'",
        "  `polyhead models` lists the shipped ones",
    ],
    "fit DIGITS --init_from toy/bundle": [
        "toy/bundle does not fit this model: 227 weights beside the head differ (network.patch_embed.0.c.weight)",
        "  its own settings: tests.toy.Toy",
    ],
    "fit DIGITS --ckpt_path digits/bundle": [
        "fit --ckpt_path continues a training and needs a Lightning checkpoint, not digits/bundle",
        "  --init_from digits/bundle starts a new training from its weights",
    ],
    "fit DIGITS --ckpt_path toy/checkpoints/last.ckpt": [
        "toy/checkpoints/last.ckpt holds a tests.toy.Toy, and vision/shvit_digits, line 4: model names a "
        "vision.ImageClassifier",
        "  leave --config and --model out to use its own settings",
    ],
    "fit DIGITS --output digits --resume --model.freeze [backbone]": [
        "digits/checkpoints/last.ckpt cannot be continued: its optimiser has other parameter groups than "
        "these settings make",
        "  continue with the run's own settings, or start anew from its weights with --init_from",
    ],
    "fit DIGITS --output digits --resume --model.backbone_options {}": [
        "digits/checkpoints/last.ckpt does not fit this model: 192 shapes differ, 242 weights are missing, 0 "
        "are unknown (network.patch_embed.0.c.weight: [8, 3, 3, 3] in the checkpoint, [16, 3, 3, 3] in the model)",
        "  leave --config and --model options out to use the checkpoint's own settings",
    ],
    "fit DIGITS --model.teacher toy/bundle": ["the teacher toy/bundle knows other classes than the data"],
    "predict DIGITS --ckpt_path toy/bundle": [
        "toy/bundle holds a tests.toy.Toy, and vision/shvit_digits, line 4: model names a vision.ImageClassifier",
        "  leave --config and --model out to use its own settings",
    ],
    "test --ckpt_path digits/bundle --data.root pets": [
        "the test part of pets has a class 'cat' that is none of: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
    ],
    "test --ckpt_path digits/bundle --data.root pets --data.classes [cat,dog]": [
        "digits/bundle does not fit this model: 2 shapes differ, 0 weights are missing, 0 are unknown "
        "(network.head.l.weight: [10, 128] in the checkpoint, [2, 128] in the model)",
        "  leave --config and --model options out to use the checkpoint's own settings",
    ],
    "test --ckpt_path digits/bundle --model.backbone_options {}": [
        "digits/bundle does not fit this model: 192 shapes differ, 242 weights are missing, 0 are unknown "
        "(network.patch_embed.0.c.weight: [8, 3, 3, 3] in the checkpoint, [16, 3, 3, 3] in the model)",
        "  leave --config and --model options out to use the checkpoint's own settings",
    ],
    "explain --ckpt_path toy/bundle": ["Toy has no explanation"],
    "predict --ckpt_path planted.ckpt": [
        "planted.ckpt asks for posix.system to be imported, which may run code: refused",
        "  ask its author for the bare state dict, or a safetensors file",
    ],
    "predict --ckpt_path pickle.ckpt": ["pickle.ckpt is not a checkpoint that torch can read safely"],
    "fit DIGITS --init_from planted.ckpt": [
        "planted.ckpt asks for posix.system to be imported, which may run code: refused",
        "  ask its author for the bare state dict, or a safetensors file",
    ],
    "fit DIGITS --model.teacher planted.ckpt": [
        "planted.ckpt asks for posix.system to be imported, which may run code: refused",
        "  ask its author for the bare state dict, or a safetensors file",
    ],
    "predict --ckpt_path foreign.ckpt": [
        "foreign.ckpt is not a checkpoint of this suite",
        "  `polyhead convert` turns published checkpoints into bundles",
    ],
    "predict --ckpt_path text.ckpt": ["text.ckpt is not a checkpoint file, or is damaged"],
    "predict --ckpt_path zero.ckpt": ["zero.ckpt is not a checkpoint file, or is damaged"],
    "predict --ckpt_path cut.ckpt": ["cut.ckpt is not a checkpoint file, or is damaged:..."],
    "predict --ckpt_path cut": [
        "cannot read cut/model.safetensors: Error while deserializing header: incomplete metadata, file not "
        "fully covered",
    ],
    "predict --ckpt_path unreadable": [
        "unreadable/config.yaml, line 3 is not YAML: expected the node content, but found '<stream end>'",
    ],
    "predict --ckpt_path bundle_of_code": [
        "bundle_of_code cannot be used: model.class_path 'os.system' is not a System",
    ],
    "predict --ckpt_path bundle_of_nothing": [
        "bundle_of_nothing cannot be used: model.class_path 'vision.NoSuchThing' names no class: module "
        "'vision' has no attribute 'NoSuchThing'",
    ],
    "predict --ckpt_path bundle_of_tomorrow": [
        "bundle_of_tomorrow: model.colour_sense: vision.ImageClassifier has no option 'colour_sense'",
        "  did you mean lr_scale?",
    ],
    "predict --ckpt_path bundle_without_class": [
        "bundle_without_class cannot be used: model.class_path '' names no class: Empty module name",
    ],
    "fit --init_from bundle_of_code": ["bundle_of_code cannot be used: model.class_path 'os.system' is not a System"],
    "fit DIGITS --model.teacher bundle_of_code": ["model.class_path 'os.system' is not a System"],
    "predict --ckpt_path nothing": ["nothing is not a bundle: it has no model.safetensors"],
    "predict --ckpt_path pets/train/cat/0.png": [
        "pets/train/cat/0.png is not a checkpoint that torch can read safely",
    ],
    "predict --ckpt_path foreign.onnx": [
        "foreign.onnx was not written by `polyhead export`: it carries no polyhead.json",
    ],
    "predict --ckpt_path text.onnx": ["cannot read text.onnx:..."],
    "test --ckpt_path foreign.onnx": ["test needs a checkpoint or a bundle; an exported file can only predict"],
    "fit DIGITS --init_from foreign.onnx": ["foreign.onnx is not a checkpoint that torch can read safely"],
    "fit DIGITS --ckpt_path foreign.onnx": [
        "fit --ckpt_path continues a training and needs a Lightning checkpoint, not foreign.onnx",
    ],
    # Our own subcommands
    "models nonsense": ["no model is called 'nonsense'", "  `polyhead models` lists all"],
    "models --jso": ["models has no option --jso", "  did you mean --json?"],
    "tile": ["tile needs --slides"],
    "tile --slide x": ["unknown option --slide", "  did you mean --slide_mpp, --slides?"],
    "doctor --foo": ["doctor takes --config and --data options, not --foo"],
    "doctor --data.root nowhere": ["no such file or folder: nowhere"],
    "doctor --data.rot pets": ["--data.rot: vision.ImageData has no option 'rot'", "  did you mean root?"],
    "doctor --config nowhere --data.root pets": [
        "no recipe or file 'nowhere' for --config",
        "  `polyhead models` lists the {recipes} shipped ones",
    ],
}


def words(command: str) -> list[str]:
    given = command.replace("DIGITS", "--config vision/shvit_digits").split()
    return [*given, *ONE_BATCH] if given[0] == "fit" else given


def left(place: Path) -> set[Path]:
    return set(place.rglob("*"))


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, Done]:
    """What every command answers, run for real, two at a time."""
    before = left(place)
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda command: polyhead(*words(command), cwd=place), CASES)
        found = dict(zip(CASES, done, strict=True))
    assert left(place) == before, "a refused command left something behind"
    return found


@pytest.mark.parametrize("command", CASES)
def test_a_mistake_is_one_line(answers: dict[str, Done], command: str) -> None:
    done = answers[command]
    assert done.status == 2, done.err
    assert "Traceback" not in done.err and "Warning" not in done.err and not done.out
    lines = done.err.rstrip("\n").splitlines()
    # Before it only the plan that a fit prints
    start = next(i for i, line in enumerate(lines) if line.startswith("polyhead: "))
    got = [lines[start].removeprefix("polyhead: "), *lines[start + 1 :]]
    assert len(got) <= 5 and all(len(line) <= 240 for line in got)
    wanted = [line.replace("{recipes}", str(len(recipes.names()))) for line in CASES[command]]
    open_ended = [g[: len(w) - 3] + "..." if w.endswith("...") else g for g, w in zip(got, wanted, strict=False)]
    assert open_ended == wanted and len(got) == len(wanted)


def test_debug_shows_the_traceback(place: Path) -> None:
    done = polyhead("predict", "--ckpt_path", "nowhere.ckpt", "--debug", cwd=place)
    assert done.status != 0
    assert "Traceback" in done.err and "UserError" in done.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 300 kB, where this may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("fit DIGITS --output {}/run", "run/checkpoints/best.ckpt"),
        ("export --ckpt_path digits/bundle --format torchscript --output {}/run", "run/model.pt"),
        ("predict --ckpt_path digits/bundle --output {}/run", "run/config_predict.yaml"),
    ],
)
def test_a_full_disk_is_one_line_and_no_half_file(place: Path, small_disk: Path, command: str, file: str) -> None:
    if command.startswith("predict"):
        (small_disk / "filler").write_bytes(bytes(300 * 1024))
    done = polyhead(*words(command.format(small_disk)), cwd=place)
    assert done.status == 2
    assert done.err.splitlines()[-1] == f"polyhead: cannot write {small_disk / file}: No space left on device"
    assert not [p for p in small_disk.rglob("*") if p.suffix in (".ckpt", ".pt", ".parquet")]


def test_a_disk_that_may_not_be_written(place: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = polyhead(*words(f"fit DIGITS --output {small_disk}/run"), cwd=place)
    assert done.status == 2
    assert done.err == f"polyhead: cannot make the folder --output {small_disk}/run: Read-only file system\n"


def test_samples_that_cannot_be_read_are_left_out_of_training_on_demand(place: Path) -> None:
    options = ("--data.root", "truncated", "--data.on_error", "skip", "--output", "skipped", *ONE_BATCH)
    done = polyhead("fit", "--config", "vision/shvit_digits", *options, cwd=place)
    assert done.status == 0, done.err
    assert "1 samples could not be read and were left out" in done.err
    shutil.rmtree(place / "skipped")


def test_the_options_of_a_call_come_from_one_place(place: Path) -> None:
    """What a recipe says about one call is refused; what it says about the run is taken."""
    (place / "run.yaml").write_text("overwrite: true\n")
    done = polyhead(*words("fit --config TOY --config run.yaml --output toy".replace("TOY", str(TOY))), cwd=place)
    assert done.status == 0, done.err
    (place / "run.yaml").unlink()
