"""MVPFormer checkpoints: the official layout (which is ours, less dead weights) and braindecode's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyhead.errors import UserError

PREFIXES = ("state_dict.", "model.", "module.")
# Never used by the published code, or buffers that hold no weight
DEAD = re.compile(r"seizure_embeddings|.*\.ln_2\.weight|.*\.(time_bias|masked_bias)|class_loss\.weight")
RENAMED = (
    (re.compile(r"genie\.(.*)"), r"mvpformer.\1"),
    (re.compile(r"blocks\.(.*)"), r"mvpformer.h.\1"),
    (re.compile(r"(positional_embedding|channel_embedding|ln_f)\.(.*)"), r"mvpformer.\1.\2"),
    (re.compile(r"patch_embed\.(.*)"), r"encoder.\1"),
    (re.compile(r"final_layer\.(?:head\.)?weight"), r"head.head.weight"),
)
KEY = re.compile(
    r"encoder\.(ln|proj)\.weight|mvpformer\.(positional_embedding|channel_embedding|ln_f)\.weight|head\.head\.weight"
    r"|mvpformer\.h\.\d+\.(ln_1\.weight|mlp\.(gate|up|down)_proj\.weight"
    r"|attn\.(attn_bias|(q_attn|c_attn|c_proj|position_net|channel_net)\.weight|(q_attn|c_attn)\.lora_[AB]))"
)
# (width, blocks) of the published sizes, and of ours -> name, heads, which weights do not tell
PUBLISHED = {
    (768, 12): ("mvpformer_s", 12), (2048, 24): ("mvpformer_m", 16), (128, 4): ("mvpformer_mini", 4),
    (32, 2): ("mvpformer_xs", 4), (16, 1): ("mvpformer_micro", 4),
}  # fmt: skip
WAVELET_SIZE, LENGTH = 2610, 2560
SEGMENTS, SEGMENT_SECONDS, RATE = 25, 5.0, 512.0


def rename(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Any of the known layouts -> our keys, without what is dead."""
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    ours = {}
    for key, value in state.items():
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        for pattern, name in RENAMED:
            if pattern.fullmatch(key):
                key = pattern.sub(name, key)
                break
        if not DEAD.fullmatch(key):
            ours[key] = value
    return ours


def to_polyhead(state: Mapping[str, Any], heads: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A published checkpoint -> our state dict and the network's arguments.

    Args:
        heads: query heads, which the weights do not tell; known for the published sizes.

    Raises:
        UserError: not an MVPFormer, or of a size whose heads are not known.
    """
    ours = rename(state)
    for key in ours:
        if not KEY.fullmatch(key):
            raise UserError(f"not an MVPFormer checkpoint: it has the key {key!r}, which such a network has not")

    def shape(key: str) -> list[int]:
        if key not in ours:
            raise UserError(f"not a whole MVPFormer checkpoint: the key {key!r} is missing")
        return list(ours[key].shape)

    layers = len({k.split(".")[2] for k in ours if k.startswith("mvpformer.h.")})
    n_positions, width = shape("mvpformer.positional_embedding.weight")
    name, known = PUBLISHED.get((width, layers), ("mvpformer_mini", 0))
    heads = heads or known
    if not heads:
        raise UserError(f"an MVPFormer of width {width} with {layers} blocks: its number of heads is not known")
    inner = shape("mvpformer.h.0.mlp.gate_proj.weight")[0]
    groups = shape("mvpformer.h.0.attn.c_attn.weight")[0] // 2 * heads // width
    classes = shape("head.head.weight")[0]
    if shape("encoder.ln.weight") != shape("encoder.proj.weight")[1:]:
        raise UserError("not an MVPFormer checkpoint: its encoder's norm and projection differ in width")
    adapter = ours.get("mvpformer.h.0.attn.q_attn.lora_A")
    config = {
        "name": name, "num_classes": classes, "width": width, "layers": layers, "heads": heads, "kv_heads": groups,
        "inner": inner, "n_positions": n_positions, "n_channels": shape("mvpformer.channel_embedding.weight")[0],
        "generative": classes == width, "lora_rank": 0 if adapter is None else adapter.shape[0],
        "coefficients": shape("encoder.ln.weight")[0],
    }  # fmt: skip
    return ours, config


def recipe(config: Mapping[str, Any], classes: list[str], size: int) -> dict[str, Any]:
    """The model and data of a bundle: the published window of 25 segments of 5 s at 512 Hz, in microvolts."""
    if config["coefficients"] != WAVELET_SIZE:
        raise UserError(
            f"this encoder takes {config['coefficients']} coefficients; published segments of {LENGTH} samples "
            f"give {WAVELET_SIZE}"
        )
    rows = {k: config[k] for k in ("n_positions", "n_channels")}
    sizes = {k: config[k] for k in ("width", "layers", "heads", "kv_heads", "inner")}
    model = {
        "size": config["name"], "encoder": "wavelet", "anchor": "end", "trained_segments": SEGMENTS, "network": sizes,
        **rows,
    }  # fmt: skip
    data: dict[str, Any] = {
        "rate": RATE, "segment": SEGMENT_SECONDS, "segments": SEGMENTS, "reference": "median", "scale": "microvolt",
    }  # fmt: skip
    facts = {"rate": RATE, "segment": SEGMENT_SECONDS, "segments": SEGMENTS}
    if config["generative"]:
        return {
            "model": {"class_path": "timeseries.SignalModel", "init_args": {**model, "facts": facts}},
            "data": {"class_path": "timeseries.RecordingData", "init_args": {**data, "labelled": False}},
        }
    names = classes if len(classes) == config["num_classes"] else [str(i) for i in range(config["num_classes"])]
    if config["num_classes"] == 2 and names == ["0", "1"]:
        names = ["background", "seizure"]
    model |= {"head": "mean"}
    if config["lora_rank"]:
        model |= {"train": "lora", "lora_rank": config["lora_rank"]}
    return {
        "model": {
            "class_path": "timeseries.SeizureDetector",
            "init_args": {**model, "facts": {**facts, "classes": names, "channels": None}},
        },
        "data": {"class_path": "timeseries.RecordingData", "init_args": {**data, "classes": names}},
    }
