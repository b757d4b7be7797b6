"""Published checkpoints into ours: one module a family with the map of its keys.

A converter has `to_polyhead(state) -> (state dict of our network, config)`; it builds no network.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from polyhead.errors import UserError, nearest

FAMILIES = ("shvit", "halonet", "spectformer", "tic", "acmil", "transfer", "sahp", "mvpformer", "mqsa_ted")
CONVERTERS = {name: f"checkpoints.converters.{name}" for name in FAMILIES}

Converter = Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]


def find_converter(family: str) -> Converter:
    """The `to_polyhead` of a family.

    Raises:
        UserError: there is no converter for the family.
    """
    if family not in CONVERTERS:
        raise UserError(
            f"no converter for {family!r}: there are {', '.join(CONVERTERS)}",
            hints=nearest(family, CONVERTERS),
        )
    return importlib.import_module(CONVERTERS[family]).to_polyhead
