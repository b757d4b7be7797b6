"""Published TransFER and APViT checkpoints, and the two that TransFER starts from: face.evoLVe's IR-50 and a timm ViT.

TransFER was released in PaddlePaddle: batch norms keep `_mean` and `_variance`, PReLU slopes are `_weight`, and
linear weights are stored `[in, out]`. APViT (PyTorch) nests the trunk's units by stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import UserError

LINEAR = re.compile(r"(.*\.)?(qkv|proj|fc1|fc2|fc)\.weight")
NORMS = {"_mean": "running_mean", "_variance": "running_var", "_weight": "weight"}


def from_paddle(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """PaddlePaddle's names and layout -> PyTorch's: names of statistics and slopes, and linear weights transposed."""
    given = {k: torch.as_tensor(np.asarray(v)) for k, v in state.items() if hasattr(v, "shape")}
    ours: dict[str, Tensor] = {}
    for key, value in given.items():
        parent, _, leaf = key.rpartition(".")
        # The released loader writes every weight twice, with and without the underscore
        if leaf == "_weight" and f"{parent}.weight" in given:
            continue
        name = f"{parent}.{NORMS.get(leaf, leaf)}" if parent else NORMS.get(leaf, leaf)
        if value.ndim == 2 and LINEAR.fullmatch(name):
            value = value.T.contiguous()
        ours[name] = value
    return ours


def is_paddle(state: Mapping[str, Any]) -> bool:
    return any(key.rpartition(".")[2] in NORMS for key in state)


def flat_trunk(state: Mapping[str, Tensor], prefix: str = "extractor.") -> dict[str, Tensor]:
    """APViT's `body.STAGE.UNIT` as `body.NUMBER`; other keys as they are."""
    place = re.compile(re.escape(prefix) + r"body\.(\d+)\.(\d+)\.(.*)")
    found = {k: m for k in state if (m := place.fullmatch(k))}
    units = sorted({(int(m[1]), int(m[2])) for m in found.values()})
    number = {unit: n for n, unit in enumerate(units)}
    return {
        f"{prefix}body.{number[int(m[1]), int(m[2])]}.{m[3]}" if (m := found.get(k)) else k: v for k, v in state.items()
    }


def apvit_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """APViT's keys as `vision.transfer.APViT`'s."""
    renamed = {k.replace("vit.projs.0.", "proj."): v for k, v in flat_trunk(state).items()}
    return {k.removeprefix("vit."): v for k, v in renamed.items()}


def to_polyhead(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A published state dict, or a checkpoint that holds it -> ours and the arguments of the network.

    `config["partial"]` says that only a part of the network is in it (a trunk, an encoder), whose rest is new.

    Raises:
        UserError: none of the four layouts.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    state = {k.removeprefix("module."): v for k, v in state.items() if k != "StructuredToParameterName@@"}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if is_paddle(state):
        state = from_paddle(state)
    if "input_layer.0.weight" in state and "output_layer.0.weight" in state:
        return _evolve(state)
    if "patch_embed.proj.weight" in state and "cls_token" in state:
        return _timm(state)
    if not {"extractor.input_layer.0.weight", "head.fc.weight"} <= set(state):
        raise UserError("not a TransFER checkpoint: extractor.input_layer and head.fc are not both in it")
    if "vit.patch_pos_embed" in state:
        ours = apvit_names(state)
        return ours, {"name": "apvit", **_sizes(ours, "")}
    if "convert.proj.weight" not in state:
        raise UserError("not a whole TransFER checkpoint: convert.proj is missing")
    ours = dict(state)
    branches = len({k.split(".")[2] for k in ours if k.startswith("attention.las.")})
    first = ours["attention.las.0.LA_conv1.weight"]
    ratio = first.shape[1] // first.shape[0]
    return ours, {"name": "transfer", "branches": branches, "ratio": ratio, **_sizes(ours, "vit.")}


def _trunk(state: Mapping[str, Tensor], prefix: str = "extractor.") -> dict[str, Any]:
    """Units and widths of a trunk: a unit with a stride has a projection, and so begins a stage; the first does too."""
    count = 1 + max(int(m[1]) for k in state if (m := re.match(re.escape(prefix) + r"body\.(\d+)\.", k)))
    stem = state[f"{prefix}input_layer.0.weight"].shape[0]
    outer = [state[f"{prefix}body.{n}.res_layer.1.weight"].shape[0] for n in range(count)]
    starts = [n for n in range(count) if n == 0 or f"{prefix}body.{n}.shortcut_layer.0.weight" in state]
    units = [b - a for a, b in zip(starts, [*starts[1:], count], strict=True)]
    squeeze = f"{prefix}body.0.res_layer.5.fc1.weight" in state
    return {"units": units, "widths": [stem, *(outer[n] for n in starts)], "squeeze": squeeze}


def _sizes(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    width = state[f"{prefix}cls_token"].shape[-1]
    depth = len({m[1] for k in state if (m := re.match(re.escape(prefix) + r"blocks\.(\d+)\.", k))})
    inner = state[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0]
    key = "vit.pos_embed" if prefix else "patch_pos_embed"
    tokens = state[key].shape[1] - (1 if prefix else 0)
    trunk = _trunk(state)
    size = math.isqrt(tokens) * 2 ** len(trunk["units"])
    sizes = {
        **trunk, "width": width, "depth": depth, "mlp_ratio": inner / width, "image_size": size,
        "qkv_bias": f"{prefix}blocks.0.attn.qkv.bias" in state, "num_classes": state["head.fc.weight"].shape[0],
    }  # fmt: skip
    if not prefix:
        half = depth // 2
        sizes |= {"keep_num": round(tokens * 160 / 196), "keep_rates": [1.0] * half + [0.9] * (depth - half)}
    return sizes


def _evolve(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trunk of face.evoLVe's IR-50: its last stage and output layer are left out."""
    trunk = _trunk(state, "")
    count = sum(trunk["units"][:3])
    ours = {}
    for key, value in state.items():
        place = re.match(r"body\.(\d+)\.", key)
        if key.startswith("input_layer.") or (place and int(place[1]) < count):
            ours[f"extractor.{key}"] = value
    config = {"units": trunk["units"][:3], "widths": trunk["widths"][:4], "squeeze": trunk["squeeze"]}
    return ours, {"name": "transfer", "partial": True, "num_classes": 7, **config}


def _timm(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The encoder of a timm ViT: without its patch embedding and head, class token and positions included."""
    keep = ("cls_token", "pos_embed", "blocks.", "norm.")
    ours = {f"vit.{k}": v for k, v in state.items() if k.startswith(keep)}
    width = state["cls_token"].shape[-1]
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    tokens = state["pos_embed"].shape[1] - 1
    # timm's first small ViT, which TransFER starts from, has 8 heads of 96; all others heads of 64
    heads = 8 if (depth, ratio) == (8, 3.0) else width // 64
    return ours, {
        "name": "transfer", "partial": True, "num_classes": 7, "width": width, "depth": depth, "mlp_ratio": ratio,
        "heads": heads,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state, "image_size": 8 * math.isqrt(tokens),
    }  # fmt: skip


def recipe(config: dict[str, Any], classes: Sequence[str], image_size: int) -> dict[str, Any]:
    """`model` and `data` in recipe form; the published models see ImageNet's normalisation."""
    options = {k: v for k, v in config.items() if k not in ("name", "partial", "num_classes", "image_size")}
    size = config.get("image_size", 112)
    facts = {"classes": list(classes)}
    model = {"variant": config["name"], "network_options": options, "image_size": size, "facts": facts}
    return {
        "model": {"class_path": "vision.ExpressionClassifier", "init_args": model},
        "data": {"class_path": "vision.FaceData", "init_args": {"image_size": size, **facts}},
    }
