"""The recipe of a converted image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyhead.errors import UserError

# The share of the shorter side that the published evaluation keeps, where it is not 0.875
CROPS = {
    "halonet26t": 0.95, "sehalonet33ts": 0.94, "halonet50ts": 0.94, "eca_halonext26ts": 0.94, "haloregnetz_b": 0.94,
    "spectformer_h_s": 0.96, "spectformer_h_b": 0.96, "spectformer_h_l": 0.96,
}  # fmt: skip


def recipe(config: dict[str, Any], classes: Sequence[str], image_size: int) -> dict[str, Any]:
    """`model` and `data` in recipe form for what `to_polyhead` found.

    Args:
        config: `name`, `num_classes`, `in_chans` and further arguments of the network.
        classes: a name for every output of the head.
        image_size: side of the evaluation images, in pixels.
    """
    if config.get("in_chans", 3) != 3:
        raise UserError(f"the network takes {config['in_chans']} channels: a classifier here takes colour images")
    if not config["num_classes"]:
        raise UserError("the checkpoint has no classifier: weights with a head are needed")
    options = {k: v for k, v in config.items() if k not in ("name", "num_classes", "in_chans")}
    model: dict[str, Any] = {"backbone": config["name"], "image_size": image_size, "facts": {"classes": list(classes)}}
    if options:
        model["backbone_options"] = options
    # The published evaluation: shorter side to size / share, then the centre
    data = {"image_size": image_size, "crop_fraction": CROPS.get(config["name"], 0.875), "classes": list(classes)}
    return {
        "model": {"class_path": "vision.ImageClassifier", "init_args": model},
        "data": {"class_path": "vision.ImageData", "init_args": data},
    }
