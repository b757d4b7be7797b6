"""TiC checkpoints: networks of ours by the shapes, and the published MSA-Conv layer for the Python door."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyhead.errors import UserError

NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
AFFINE = r"(weight|bias)"
KEY = re.compile(
    rf"stages\.\d+\.(down\.\d\.{NORM}|blocks\.\d+\.((norm[12]|proj|mlp\.fc[12]|attn\.qkv_conv)\.{AFFINE}))"
    rf"|(norm|head)\.{AFFINE}"
)
LAYER = {"qkv_conv.weight", "qkv_conv.bias", "mlp.weight", "mlp.bias"}
# channels and blocks of each stage
VARIANTS: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((24, 48, 96, 192), (1, 1, 2, 1)): "tic_xs",
    ((32, 64, 128, 256), (1, 1, 2, 1)): "tic_mini",
    ((64, 128, 256, 512), (2, 2, 6, 2)): "tic_small",
}


def to_polyhead(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A network's state dict, or a checkpoint that holds it -> the same and `{"name", "num_classes", "in_chans"}`.

    Raises:
        UserError: not a TiC of ours. No network was ever published, only a layer: see `layer`.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    ours = {key.removeprefix("module."): value for key, value in state.items()}
    if ours and set(ours) <= LAYER:
        raise UserError(
            "this is one MSA-Conv layer and no network",
            hints=["checkpoints.converters.tic.layer(state) gives the arguments of vision.tic.MSAConvBlock"],
        )
    for key in ours:
        if not KEY.fullmatch(key):
            raise UserError(f"not a TiC checkpoint: it has the key {key!r}, which such a network has not")
    places = {(int(m[1]), m[2]) for k in ours if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", k))}
    depths = tuple(sum(stage == n for stage, _ in places) for n in range(4))
    try:
        dims = tuple(ours[f"stages.{n}.blocks.0.proj.weight"].shape[0] for n in range(4))
        in_chans = ours["stages.0.down.0.weight"].shape[1]
    except KeyError as error:
        raise UserError(f"not a whole TiC checkpoint: the key {error} is missing") from error
    if (dims, depths) not in VARIANTS:
        raise UserError(f"a TiC of no known variant: {dims} channels, {depths} blocks")
    classes = ours["head.weight"].shape[0] if "head.weight" in ours else 0
    return ours, {"name": VARIANTS[dims, depths], "num_classes": classes, "in_chans": in_chans}


def layer(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The published layer's state dict -> the same and the arguments of `vision.tic.MSAConvBlock` (with `mlp.*`)
    or `MSAConvAttention`. The attention-only layer's kernel is not in its weights: give it beside these.

    Raises:
        UserError: other keys.
    """
    if not {"qkv_conv.weight", "qkv_conv.bias"} <= set(state) <= LAYER:
        raise UserError(f"not an MSA-Conv layer: it has the keys {', '.join(sorted(state)) or '(none)'}")
    config: dict[str, Any] = {"input_channel": state["qkv_conv.weight"].shape[1]}
    if "mlp.weight" in state:
        out, _, *kernel = state["mlp.weight"].shape
        config |= {"output_channel": out, "kernel_size": kernel, "bias": "mlp.bias" in state}
    return dict(state), config
