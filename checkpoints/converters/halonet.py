"""HaloNet checkpoints in timm's layout, which is ours: the variant is told from the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyhead.errors import UserError

NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
LAYER = rf"(conv\.weight|bn\.{NORM})"
BLOCK = (
    rf"(conv1_1x1|conv2_kxk|conv3_1x1|shortcut)\.{LAYER}|attn\.(fc[12]\.(weight|bias)|conv\.weight)"
    rf"|self_attn\.((q|kv)\.(weight|bias)|pos_embed\.(height|width)_rel)|post_attn\.{NORM}"
)
KEY = re.compile(
    rf"stem\.(conv[123]\.)?{LAYER}|stages\.\d+\.\d+\.({BLOCK})|final_conv\.{LAYER}|head\.fc\.(weight|bias)"
)

# what tells the variants apart: blocks of each stage (bottleneck or self-attention), output channels of each
# stage, shape of the first position table, channels of the last map
VARIANTS: dict[tuple[str, tuple[int, ...], tuple[int, ...], int], str] = {
    ("SSS/SSS/SSSSSSS/SSS", (32, 64, 128, 256), (27, 16), 256): "halonet_h0",
    ("SSS/SSS/SSSSSSSSSS/SSS", (64, 128, 256, 512), (27, 16), 512): "halonet_h1_paper",
    ("SSS/SSS/SSSSSSSSSSS/SSS", (80, 160, 320, 640), (27, 16), 640): "halonet_h2",
    ("SSS/SSS/SSSSSSSSSSSS/SSS", (96, 192, 384, 768), (31, 16), 1024): "halonet_h3",
    ("SSS/SSS/SSSSSSSSSSSS/SSS", (192, 384, 768, 1536), (31, 16), 1280): "halonet_h4",
    ("SSS/SSS/SSSSSSSSSSSSSSSSSSSSSSS/SSS", (128, 256, 512, 1024), (35, 16), 1536): "halonet_h5",
    ("SSS/SSS/SSSSSSSSSSSSSSSSSSSSSSSS/SSS", (176, 352, 704, 1408), (31, 16), 1536): "halonet_h6",
    ("SSS/SSS/SSSSSSSSSSSSSSSSSSSSSSSSSS/SSS", (224, 448, 896, 1792), (31, 16), 2048): "halonet_h7",
    ("SSS/SSS/SSSSSSSSSS/SSS", (64, 128, 256, 512), (27, 8), 512): "halonet_h1",
    ("BB/BB/BS/SS", (256, 512, 1024, 2048), (23, 32), 2048): "halonet26t",
    ("BB/BBS/BBS/SS", (256, 512, 1024, 1536), (27, 16), 1280): "sehalonet33ts",
    ("BBB/BBBS/BSBSBS/BSB", (256, 512, 1024, 2048), (27, 32), 2048): "halonet50ts",
    ("BB/BB/BS/SS", (256, 512, 1024, 2048), (23, 16), 2048): "eca_halonext26ts",
    ("BB/BBBBBB/BBBSBBBSBBBS/SS", (48, 96, 192, 288), (21, 24), 1536): "haloregnetz_b",
    ("B/B/BS/S", (64, 128, 256, 512), (15, 16), 512): "halonet_xs",
    ("BB/BB/BSBS/SS", (64, 128, 256, 512), (15, 16), 512): "halonet_small",
}


def to_polyhead(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """timm's state dict, or a checkpoint that holds it -> the same state dict and the network.

    The config is `{"name", "num_classes", "in_chans"}`, arguments of `vision.halonet.halonet`.

    Raises:
        UserError: not a HaloNet (the first key that does not fit is named), or none of the known variants.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    ours = {key.removeprefix("module."): value for key, value in state.items()}
    for key in ours:
        if not KEY.fullmatch(key):
            raise UserError(f"not a HaloNet checkpoint: it has the key {key!r}, which such a network has not")
    found = signature(ours)
    if found not in VARIANTS:
        blocks, channels, table, features = found
        raise UserError(
            f"a HaloNet of no known variant: blocks {blocks}, channels {channels}, table {table}, {features} features"
        )
    stem = next(key for key in ours if re.fullmatch(r"stem\.(conv1\.)?conv\.weight", key))
    classes = ours["head.fc.weight"].shape[0] if "head.fc.weight" in ours else 0
    return ours, {"name": VARIANTS[found], "num_classes": classes, "in_chans": ours[stem].shape[1]}


def signature(state: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    """The key of `VARIANTS` for a state dict; raises a UserError where something it needs is missing."""
    blocks: dict[tuple[int, int], str] = {}
    for key in state:
        if place := re.match(r"stages\.(\d+)\.(\d+)\.", key):
            at = int(place[1]), int(place[2])
            blocks[at] = "S" if ".self_attn." in key or blocks.get(at) == "S" else "B"
    stages = range(max((stage for stage, _ in blocks), default=-1) + 1)
    try:
        channels = tuple(state[f"stages.{stage}.0.conv3_1x1.conv.weight"].shape[0] for stage in stages)
        table = next(v for k, v in sorted(state.items()) if k.endswith("height_rel"))
        next(key for key in state if re.fullmatch(r"stem\.(conv1\.)?conv\.weight", key))
    except (KeyError, StopIteration) as error:
        raise UserError(f"not a whole HaloNet checkpoint: stem, attention or {error} is missing") from error
    letters = "/".join("".join(blocks[at] for at in sorted(blocks) if at[0] == stage) for stage in stages)
    features = state["final_conv.conv.weight"].shape[0] if "final_conv.conv.weight" in state else channels[-1]
    return letters, channels, tuple(table.shape), features
