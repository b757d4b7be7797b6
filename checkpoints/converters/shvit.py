"""SHViT checkpoints: the official layout (which is ours) and timm's.

`layout` lists what a network has, by key and shape, so that a file can be checked without building one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import UserError

Shapes = dict[str, tuple[int, ...]]

# what tells the published variants apart: embed_dim, depth, partial_dim of the stages with attention
VARIANTS = {
    ((128, 224, 320), (2, 4, 5), (48, 68)): "shvit_s1",
    ((128, 308, 448), (2, 4, 5), (66, 96)): "shvit_s2",
    ((192, 352, 448), (3, 5, 5), (75, 96)): "shvit_s3",
    ((224, 336, 448), (4, 7, 6), (72, 96)): "shvit_s4",
}
DOWNSAMPLE = ("0.0", "0.1", "1", "2.0", "2.1")  # timm's downsample.0 to .4


def to_polyhead(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An official training checkpoint, its bare state dict, or timm's -> our state dict and the network.

    1x1 convolution weights may be 2-D. The config is `{"name", "num_classes", "in_chans", "distillation"}`,
    arguments of `vision.shvit.shvit`; for widths that were not published the name is S1's and all the lists
    stand beside it.

    Raises:
        UserError: not a SHViT; the first key that does not fit is named.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if state and all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    ours = {official_key(k): _four_dimensional(k, v) for k, v in state.items()}
    shapes = layout(infer(ours))
    for key, value in ours.items():
        if key not in shapes:
            raise UserError(f"not a SHViT checkpoint: it has the key {key!r}, which such a network has not")
        if tuple(value.shape) != shapes[key]:
            raise UserError(
                f"not a SHViT checkpoint: {key} has the shape {list(value.shape)}, the rest of the file asks "
                f"for {list(shapes[key])}"
            )
    for key in shapes.keys() - ours.keys():
        if key.endswith("num_batches_tracked"):  # counts are often stripped, and have no use after training
            ours[key] = torch.zeros((), dtype=torch.int64)
    missing = [key for key in shapes if key not in ours]
    if missing:
        raise UserError(f"not a whole SHViT checkpoint: the key {missing[0]!r} is missing")
    return {key: ours[key] for key in shapes}, _config(infer(ours))


def official_key(key: str) -> str:
    """timm's name of a tensor -> the official one; official names stay."""
    found = re.fullmatch(r"stages\.(\d+)\.(blocks|downsample)\.(\d+)\.(.+)", key)
    if not found:
        return key
    stage, part, index, rest = int(found[1]), found[2], int(found[3]), found[4]
    if part == "blocks":
        place = str(index + 3 if stage else index)
    elif index < len(DOWNSAMPLE):
        place = DOWNSAMPLE[index]
    else:
        return key
    return f"blocks{stage + 1}.{place}.{rest}"


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments from the shapes of a state dict in the official layout."""

    def size(key: str, axis: int) -> int:
        value = state.get(key)
        if value is None or value.ndim <= axis:
            odd = odd_key(state)
            raise UserError(f"not a SHViT checkpoint: it {f'has the key {odd}' if odd else f'lacks {key!r}'}")
        return value.shape[axis]

    dims, depths, partials, queries, types = [size("patch_embed.6.c.weight", 0)], [], [], [], []
    stages = {int(m[1]) for k in state if (m := re.match(r"blocks(\d+)\.", k))}
    for stage in range(1, max(stages, default=1) + 1):
        offset = 3 if stage > 1 else 0
        if stage > 1:
            dims.append(size(f"blocks{stage}.1.conv3.c.weight", 0))
        prefix = rf"blocks{stage}\.(\d+)\.conv\.m\.c\.weight"
        depth = len({m[1] for k in state if (m := re.fullmatch(prefix, k))})
        mixer = f"blocks{stage}.{offset}.mixer.m"
        attends = f"{mixer}.pre_norm.weight" in state
        partial = size(f"{mixer}.pre_norm.weight", 0) if attends else 0
        queries.append((size(f"{mixer}.qkv.c.weight", 0) - partial) // 2 if attends else 16)
        depths.append(depth)
        partials.append(partial)
        types.append("s" if attends else "i")
    return {
        "embed_dim": dims,
        "depth": depths,
        "partial_dim": partials,
        "qk_dim": queries,
        "types": types,
        "num_classes": size("head.l.weight", 0) if "head.l.weight" in state else 0,
        "in_chans": size("patch_embed.0.c.weight", 1),
        "distillation": "head_dist.l.weight" in state,
    }


def odd_key(state: Mapping[str, Any]) -> str | None:
    """The first key, quoted, that no SHViT of any size has."""
    known = re.compile(r"(patch_embed\.[0246]|blocks\d+\.\d+|head|head_dist)\..*")
    return next((repr(k) for k in state if not known.fullmatch(k)), None)


def layout(config: Mapping[str, Any]) -> Shapes:
    """Every key of a network with these arguments, and its shape."""
    shapes: Shapes = {}

    def norm(prefix: str, dim: int) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.{name}"] = (dim,)
        shapes[f"{prefix}.num_batches_tracked"] = ()

    def conv(prefix: str, out_dim: int, in_dim: int, kernel: int = 1) -> None:
        shapes[f"{prefix}.c.weight"] = (out_dim, in_dim, kernel, kernel)
        norm(f"{prefix}.bn", out_dim)

    def ffn(prefix: str, dim: int) -> None:
        conv(f"{prefix}.m.pw1", 2 * dim, dim)
        conv(f"{prefix}.m.pw2", dim, 2 * dim)

    widths = [config["in_chans"], *(config["embed_dim"][0] // n for n in (8, 4, 2, 1))]
    for i, (before, dim) in enumerate(zip(widths, widths[1:], strict=False)):
        conv(f"patch_embed.{2 * i}", dim, before, 3)
    for i, dim in enumerate(config["embed_dim"]):
        stage = f"blocks{i + 1}"
        if i:
            before = config["embed_dim"][i - 1]
            hidden = 4 * before
            gate = max(8, (hidden // 4 + 4) // 8 * 8)
            for place, width in (("0", before), ("2", dim)):
                conv(f"{stage}.{place}.0.m", width, 1, 3)
                ffn(f"{stage}.{place}.1", width)
            conv(f"{stage}.1.conv1", hidden, before)
            conv(f"{stage}.1.conv2", hidden, 1, 3)
            conv(f"{stage}.1.conv3", dim, hidden)
            shapes[f"{stage}.1.se.fc1.weight"] = (gate, hidden, 1, 1)
            shapes[f"{stage}.1.se.fc1.bias"] = (gate,)
            shapes[f"{stage}.1.se.fc2.weight"] = (hidden, gate, 1, 1)
            shapes[f"{stage}.1.se.fc2.bias"] = (hidden,)
        for number in range(config["depth"][i]):
            block = f"{stage}.{number + 3 if i else number}"
            conv(f"{block}.conv.m", dim, 1, 3)
            if config["types"][i] == "s":
                partial, query = config["partial_dim"][i], config["qk_dim"][i]
                shapes[f"{block}.mixer.m.pre_norm.weight"] = (partial,)
                shapes[f"{block}.mixer.m.pre_norm.bias"] = (partial,)
                conv(f"{block}.mixer.m.qkv", 2 * query + partial, partial)
                conv(f"{block}.mixer.m.proj.1", dim, dim)
            ffn(f"{block}.ffn", dim)
    for head in ("head", "head_dist") if config["distillation"] else ("head",):
        if config["num_classes"]:
            norm(f"{head}.bn", config["embed_dim"][-1])
            shapes[f"{head}.l.weight"] = (config["num_classes"], config["embed_dim"][-1])
            shapes[f"{head}.l.bias"] = (config["num_classes"],)
    return shapes


def _four_dimensional(key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise UserError(f"not a SHViT checkpoint: {key!r} is a {type(value).__name__}, not a tensor")
    convolution = key.endswith((".c.weight", ".se.fc1.weight", ".se.fc2.weight"))
    return value[:, :, None, None] if convolution and value.ndim == 2 else value


def _config(full: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: full[k] for k in ("num_classes", "in_chans", "distillation")}
    lists = {k: list(full[k]) for k in ("embed_dim", "depth", "partial_dim", "qk_dim", "types")}
    signature = (tuple(full["embed_dim"]), tuple(full["depth"]), tuple(full["partial_dim"][1:]))
    name = VARIANTS.get(signature)
    if name and full["types"] == ["i", "s", "s"] and full["qk_dim"] == [16, 16, 16]:
        return {"name": name, **found}
    return {"name": "shvit_s1", **lists, **found}
