"""The recipe of a converted image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def recipe(config: dict[str, Any], classes: Sequence[str], image_size: int) -> dict[str, Any]:
    """`model` and `data` in recipe form for what `to_polyhead` found.

    Args:
        config: `name`, `num_classes`, `in_chans` and further arguments of the network.
        classes: a name for every output of the head.
        image_size: side of the evaluation images, in pixels.
    """
    options = {k: v for k, v in config.items() if k not in ("name", "num_classes", "in_chans")}
    model: dict[str, Any] = {"backbone": config["name"], "image_size": image_size, "facts": {"classes": list(classes)}}
    if options:
        model["backbone_options"] = options
    # The published evaluation: shorter side to size / 0.875, then the centre
    data = {"image_size": image_size, "crop_fraction": 0.875, "classes": list(classes)}
    return {
        "model": {"class_path": "vision.ImageClassifier", "init_args": model},
        "data": {"class_path": "vision.ImageData", "init_args": data},
    }
