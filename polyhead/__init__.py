"""Polyhead: what all systems stand on. `load` is the Python door; torch is imported only when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from polyhead.door import Model


def load(name: str) -> Model:
    """A trained model that takes raw inputs: `load(PATH or NAME).predict(inputs)`. See `polyhead.door`."""
    from polyhead.door import load

    return load(name)
