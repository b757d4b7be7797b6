"""Published ACMIL checkpoints: `{model, optimizer, epoch, config}`, whose `model` has our network's own keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polyhead.errors import UserError

AFFINE = r"(weight|bias)"
COMMON = rf"dimreduction\.fc1\.weight|(classifier\.\d+|Slide_classifier)\.fc\.{AFFINE}"
KEYS = {
    "ga": re.compile(rf"{COMMON}|attention\.(attention_[VU]\.0|attention_weights)\.{AFFINE}"),
    "mha": re.compile(
        rf"{COMMON}|q|sub_attention\.\d+\.([qkvo]_proj|out_proj|layer_norm)\.{AFFINE}"
        rf"|bag_attention\.(v_proj|out_proj|layer_norm)\.{AFFINE}"
    ),
}


def to_polyhead(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict, or a checkpoint that holds it -> the same and the arguments of `medical.acmil.ACMIL`.

    What shapes do not tell (how many instances STKIM masks, and how often) are training settings and keep
    their published defaults.

    Raises:
        UserError: not an ACMIL.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    ours = {key.removeprefix("module."): value for key, value in state.items()}
    arch = "mha" if "q" in ours else "ga"
    for key in ours:
        if not KEYS[arch].fullmatch(key):
            raise UserError(f"not an ACMIL checkpoint: it has the key {key!r}, which such a network has not")
    try:
        inner, width = ours["dimreduction.fc1.weight"].shape
        classes = ours["Slide_classifier.fc.weight"].shape[0]
        branches = ours["q"].shape[1] if arch == "mha" else ours["attention.attention_weights.weight"].shape[0]
        gate = 128 if arch == "mha" else ours["attention.attention_V.0.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"not a whole ACMIL checkpoint: the key {error} is missing") from error
    config = {
        "d_feat": width,
        "d_inner": inner,
        "num_classes": classes,
        "n_token": branches,
        "arch": arch,
        "gate": gate,
    }
    return ours, config


def recipe(config: dict[str, Any], classes: Sequence[str], image_size: int) -> dict[str, Any]:
    """`model` and `data` in recipe form; the published models take features as they are, unscaled."""
    width = config["d_feat"]
    facts = {"classes": list(classes), "mean": [0.0] * width, "deviation": [1.0] * width, "instances": "auto"}
    model = {k: config[k] for k in ("arch", "d_inner", "n_token", "gate")}
    return {
        "model": {"class_path": "medical.SlideClassifier", "init_args": {**model, "facts": facts}},
        "data": {"class_path": "medical.BagData", "init_args": {**facts, "standardise": False}},
    }
