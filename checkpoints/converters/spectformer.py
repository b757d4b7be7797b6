"""SpectFormer checkpoints, vanilla and hierarchical: the published layouts are ours, sizes come from shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyhead.errors import UserError

AFFINE = r"(weight|bias)"
VANILLA = re.compile(
    rf"pos_embed|patch_embed\.proj\.{AFFINE}|(norm|head)\.{AFFINE}|blocks\.\d+\.(norm[12]\.{AFFINE}"
    rf"|filter\.complex_weight|attn\.(qkv|proj)\.{AFFINE}|mlp\.fc[12]\.{AFFINE})"
)
HIERARCHICAL = re.compile(
    rf"patch_embed[1-4]\.((proj|norm)\.{AFFINE}|conv\.\d\.(weight|bias|running_mean|running_var|num_batches_tracked))"
    rf"|block[1-4]\.\d+\.(norm[12]\.{AFFINE}|attn\.(complex_weight|(q|kv|proj)\.{AFFINE})"
    rf"|mlp\.(fc[12]|dwconv\.dwconv)\.{AFFINE})|norm[1-4]\.{AFFINE}|(aux_)?head\.{AFFINE}"
    rf"|post_network\.0\.(norm[12]|attn\.(q|kv|proj)|mlp\.fc[12])\.{AFFINE}"
)
# width, depth -> name
PLAIN = {
    (256, 12): "spectformer_t",
    (384, 12): "spectformer_xs",
    (384, 19): "spectformer_s",
    (512, 19): "spectformer_b",
}
# widths, depths -> name, image side of its own grid
STAGED: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[str, int]] = {
    ((64, 128, 320, 448), (3, 4, 6, 3)): ("spectformer_h_s", 224),
    ((64, 128, 320, 512), (3, 4, 12, 3)): ("spectformer_h_b", 224),
    ((96, 192, 384, 512), (3, 6, 18, 3)): ("spectformer_h_l", 224),
    ((32, 64, 160, 224), (1, 1, 2, 1)): ("spectformer_hxs", 128),
}


def to_polyhead(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A published training checkpoint, or its bare state dict -> the same state dict and the network.

    The config has `name`, `num_classes`, `in_chans`, and `img_size` or `token_label` where they differ from
    the variant's: arguments of `vision.spectformer.spectformer`.

    Raises:
        UserError: not a SpectFormer (the first key that does not fit is named), or of no known variant.
    """
    for wrapper in ("model", "state_dict"):  # either may hold the other
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    ours = {key.removeprefix("module."): value for key, value in state.items()}
    vanilla = "pos_embed" in ours
    for key in ours:
        if not (VANILLA if vanilla else HIERARCHICAL).fullmatch(key):
            raise UserError(f"not a SpectFormer checkpoint: it has the key {key!r}, which such a network has not")
    try:
        config = _vanilla(ours) if vanilla else _hierarchical(ours)
    except KeyError as error:
        raise UserError(f"not a whole SpectFormer checkpoint: the key {error} is missing") from error
    config["num_classes"] = ours["head.weight"].shape[0] if "head.weight" in ours else 0
    return ours, config


def _vanilla(state: Mapping[str, Tensor]) -> dict[str, Any]:
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    name = PLAIN.get((dim, depth))
    if name is None or patch != 16 or hidden != 4 * dim:
        raise UserError(
            f"a SpectFormer of no known variant: {dim} channels, {depth} blocks, patches of {patch} px, "
            f"{hidden} hidden channels"
        )
    rows = state["blocks.0.filter.complex_weight"].shape[0]
    columns = state["pos_embed"].shape[1] // rows
    return {"name": name, "in_chans": in_chans} | _size(rows * patch, columns * patch, 224)


def _hierarchical(state: Mapping[str, Tensor]) -> dict[str, Any]:
    widths = tuple(state[f"patch_embed{n}.proj.weight"].shape[0] for n in range(1, 5))
    depths = tuple(len({k.split(".")[1] for k in state if k.startswith(f"block{n}.")}) for n in range(1, 5))
    if (widths, depths) not in STAGED:
        raise UserError(f"a hierarchical SpectFormer of no known variant: widths {widths}, depths {depths}")
    name, side = STAGED[widths, depths]
    rows, half = state["block1.0.attn.complex_weight"].shape[:2]
    # a half of w columns is that of 2w - 2 or of 2w - 1; the next stage's tells which, if anything does
    next_half = state["block2.0.attn.complex_weight"].shape[1]
    fits = [n for n in (2 * half - 2, 2 * half - 1) if math.ceil(n / 2) // 2 + 1 == next_half]
    columns = fits[0] if fits else 2 * half - 2
    config = {"name": name, "in_chans": state["patch_embed1.conv.0.weight"].shape[1]}
    config |= _size(4 * rows, 4 * columns, side)
    return config | ({"token_label": True} if "aux_head.weight" in state else {})


def _size(height: int, width: int, own: int) -> dict[str, Any]:
    if height == width:
        return {} if height == own else {"img_size": height}
    return {"img_size": [height, width]}
