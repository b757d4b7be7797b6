"""SAHP checkpoints: the authors' layout and EasyTPP's, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import UserError

# Computed anew, or never used
BUFFERS = re.compile(r"(position_emb|layer_position_emb)\.(position|div_term)|layer_intensity_hidden\.\w+")
OFFICIAL = {
    "type_emb.weight": "embedding.types.weight",
    "position_emb.Wt.weight": "embedding.shift.weight",
    "attention.output_linear.weight": "blocks.0.attention.out.weight",
    "attention.output_linear.bias": "blocks.0.attention.out.bias",
    "feed_forward.w_1.weight": "blocks.0.up.weight",
    "feed_forward.w_1.bias": "blocks.0.up.bias",
    "feed_forward.w_2.weight": "blocks.0.down.weight",
    "feed_forward.w_2.bias": "blocks.0.down.bias",
    "input_sublayer.norm.a_2": "blocks.0.norm1.weight",
    "input_sublayer.norm.b_2": "blocks.0.norm1.bias",
    "output_sublayer.norm.a_2": "blocks.0.norm2.weight",
    "output_sublayer.norm.b_2": "blocks.0.norm2.bias",
    "intensity_layer.0.weight": "cell.head.weight",
    "intensity_layer.0.bias": "cell.head.bias",
}
EASYTPP = {
    "layer_type_emb.weight": "embedding.types.weight",
    "layer_position_emb.layer_time_delta.weight": "embedding.shift.weight",
    "softplus.log_beta": "cell.log_beta",
}
NORM = {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}


def names(variant: str, layers: int, norm: bool = False) -> dict[str, list[str]]:
    """Our name of each weight -> the published ones of which it is the concatenation along axis 0."""
    if variant == "sahp":
        table = {ours: [theirs] for theirs, ours in OFFICIAL.items()}
        for part in ("weight", "bias"):
            table[f"blocks.0.attention.qkv.{part}"] = [f"attention.linear_layers.{n}.{part}" for n in range(3)]
            table[f"cell.states.{part}"] = [f"{n}_layer.0.{part}" for n in ("start", "converge", "decay")]
        return table
    table = {ours: [theirs] for theirs, ours in {**EASYTPP, **(NORM if norm else {})}.items()}
    for layer in range(layers):
        for part in ("weight", "bias"):
            theirs = [f"stack_layers.{layer}.self_attn.linears.{n}.{part}" for n in range(3)]
            table[f"blocks.{layer}.attention.qkv.{part}"] = theirs
    # eta is where a type starts, mu where it converges
    table["cell.states.weight"] = ["eta.0.weight", "mu.0.weight", "gamma.0.weight"]
    return table


def to_polyhead(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A published state dict -> ours and the arguments of `timeseries.sahp.SAHP` that its shapes tell.

    Heads, and for the authors' files layers, do not show: 8 and 4, their defaults, unless one says otherwise.

    Raises:
        UserError: not such a file; the first key that does not fit is named.
    """
    for wrapper in ("model", "state_dict", "model_state_dict"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    given = {k.removeprefix("module."): v for k, v in state.items()}
    given = {k.removeprefix("model.") if k.startswith("model.layer_") else k: v for k, v in given.items()}
    given = {k: v for k, v in given.items() if not BUFFERS.fullmatch(k)}
    variant = "easytpp" if "layer_type_emb.weight" in given else "sahp"
    layers = len({m[1] for k in given if (m := re.match(r"stack_layers\.(\d+)\.", k))}) or 4
    norm = "norm.weight" in given
    table = names(variant, layers, norm)
    known = {theirs for parts in table.values() for theirs in parts}
    for key, value in given.items():
        if key not in known or not isinstance(value, Tensor):
            raise UserError(f"not a SAHP checkpoint: it has the key {key!r}, which such a network has not")
    missing = sorted(known - given.keys())
    if missing:
        raise UserError(f"not a whole SAHP checkpoint: the key {missing[0]!r} is missing")
    try:
        ours = {name: torch.cat([given[theirs] for theirs in parts]) for name, parts in table.items()}
    except RuntimeError as error:
        raise UserError(f"not a SAHP checkpoint: its weights do not fit each other ({error})") from error
    rows, width = ours["embedding.types.weight"].shape
    config = {"types": rows - 1, "d_model": width, "layers": layers, "variant": variant, "num_classes": rows - 1}
    published = variant == "sahp"
    heads = next(h for h in (8, 4, 2, 1) if width % h == 0) if published else 2 if width % 2 == 0 else 1
    config |= {"heads": heads, "norm": norm, "score": "exp_softmax" if published else "softmax", "name": variant}
    return ours, config


def to_published(state: Mapping[str, Tensor], variant: str, layers: int, norm: bool = False) -> dict[str, Tensor]:
    """The inverse, for weights or gradients of a whole network: our names -> theirs."""
    result: dict[str, Tensor] = {}
    for name, parts in names(variant, layers, norm).items():
        pieces = state[name].chunk(len(parts))
        result |= dict(zip(parts, pieces, strict=True))
    return result


def recipe(config: dict[str, Any], classes: Sequence[str], image_size: int) -> dict[str, Any]:
    """`model` and `data` in recipe form for what `to_polyhead` found; times stay in the data's own unit."""
    model = {k: config[k] for k in ("d_model", "heads", "layers", "variant", "norm", "score")}
    facts = {"types": list(classes), "time_scale": 1.0}
    return {
        "model": {"class_path": "timeseries.EventModel", "init_args": {**model, "rates": 0, "facts": facts}},
        "data": {"class_path": "timeseries.EventData", "init_args": facts},
    }
