"""MQSA-TED checkpoints: the variables of the published TensorFlow graph, by their names there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyhead.catalogue import Catalogue
from polyhead.errors import UserError

ITEM, POSITION = "item_embedding/item_embedding", "positional_embedding/position_embedding"
LAYERS = ("query", "key", "value", "fc1", "fc2")
BRANCHES = ("short", "long")


def names(blocks: int) -> dict[str, str]:
    """Our name -> the graph's, for networks of `blocks` blocks a branch.

    Norms are numbered in their branch, the bias first; dense layers through the short branch, then the long one.
    """
    found = {"item": ITEM, "position": POSITION}
    for side, branch in enumerate(BRANCHES):
        ours = f"branches.{branch}"
        norms = [f"{ours}.blocks.{b}.norm{n}" for b in range(blocks) for n in (1, 2)] + [f"{ours}.norm"]
        variables = [f"{norm}.{part}" for norm in norms for part in ("bias", "weight")]
        found |= {v: _numbered(f"block_{branch}_query/Variable", n) for n, v in enumerate(variables)}
        for b in range(blocks):
            for n, layer in enumerate(LAYERS):
                theirs = _numbered("dense", 5 * (side * blocks + b) + n)
                found |= {f"{ours}.blocks.{b}.{layer}.weight": f"{theirs}/kernel",
                          f"{ours}.blocks.{b}.{layer}.bias": f"{theirs}/bias"}  # fmt: skip
    return found


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def to_polyhead(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The graph's variables -> our state dict and the sizes, arguments of `recsys.mqsa_ted.MQSATED`.

    Heads, window, mix and temperature leave no trace in the weights. `num_classes` is the number of items.

    Raises:
        UserError: not such variables, or not all of them.
    """
    given = {key.removesuffix(":0"): value for key, value in state.items()}
    for key in given:
        if not re.fullmatch(
            rf"{ITEM}|{POSITION}|block_(short|long)_query/Variable(_\d+)?|dense(_\d+)?/(kernel|bias)", key
        ):
            raise UserError(f"not an MQSA-TED checkpoint: it has the key {key!r}, which that graph has not")
    blocks = sum(key.endswith("/kernel") for key in given) // (2 * len(LAYERS))
    wanted = names(blocks)
    missing = sorted(set(wanted.values()) - set(given))
    if missing or not blocks:
        raise UserError(f"not a whole MQSA-TED checkpoint: {missing[0] if missing else 'dense/kernel'} is missing")
    extra = sorted(set(given) - set(wanted.values()))
    if extra:
        raise UserError(f"an MQSA-TED checkpoint of {blocks} blocks has no {extra[0]}")
    ours = {our: given[their].T.contiguous() if their.endswith("kernel") else given[their]
            for our, their in wanted.items()}  # fmt: skip
    items, dim = given[ITEM].shape
    sizes = {"items": items, "max_len": given[POSITION].shape[0], "dim": dim, "blocks": blocks, "num_classes": items}
    return ours, sizes


def recipe(config: Mapping[str, Any], classes: list[str], image_size: int) -> dict[str, Any]:
    """Model and data in recipe form; `classes` are the item ids, numbers from 0 where nobody gave them.

    What weights do not say stands as published: one head, window 3, equal mix.
    """
    ids: list[Any] = [int(c) for c in classes] if all(c.isdigit() for c in classes) else classes
    facts = {"items": Catalogue(ids).pack(), "transitions": 0, "max_len": config["max_len"], "extend": None}
    sizes = {k: config[k] for k in ("dim", "blocks")}
    return {
        "model": {"class_path": "recsys.NextItem", "init_args": {**sizes, "facts": facts}},
        "data": {"class_path": "recsys.Interactions", "init_args": {"root": None, **facts}},
    }
