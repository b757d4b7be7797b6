"""What `polyhead models` lists of this domain, without importing a network."""

from __future__ import annotations

from typing import Any

from vision.backbones import list_backbones

# Seven classes
EXPRESSIONS = {
    "transfer": (65_217_869, 112), "transfer_small": (3_428_045, 112), "transfer_lite": (1_061_061, 160),
    "apvit": (65_209_543, 112),
}  # fmt: skip


def list_variants() -> dict[str, dict[str, Any]]:
    """name -> family, parameters, image_size."""
    faces = {n: {"family": "TransFER", "parameters": p, "image_size": s} for n, (p, s) in EXPRESSIONS.items()}
    return {**list_backbones(), **faces}
