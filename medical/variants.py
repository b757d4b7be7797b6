"""What `polyhead models` lists of this domain, without importing a network."""

from __future__ import annotations

from typing import Any

# Backbone and base, sides in pixels, parameters with two classes; `medusa_cxr3` has the size and the inputs of the
# published release, not its layers
PRESETS: dict[str, dict[str, Any]] = {
    "medusa_cxr3": {"backbone": "resnet50", "image_size": 480, "global_size": 256, "base": 27},
    "medusa_r50": {"backbone": "resnet50", "image_size": 224, "global_size": 128, "base": 24},
    "medusa_r18": {"backbone": "resnet18", "image_size": 224, "global_size": 256, "base": 24},
}
PARAMETERS = {"medusa_cxr3": 29_262_320, "medusa_r50": 28_089_911, "medusa_r18": 15_663_159}


def list_variants() -> dict[str, dict[str, Any]]:
    """name -> family, parameters (two classes) and image_size."""
    return {
        name: {"family": "MEDUSA", "parameters": PARAMETERS[name], "image_size": facts["image_size"]}
        for name, facts in PRESETS.items()
    }
