"""What the vision backbones share: the checks of their input and of their variants' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from polyhead.errors import UserError, nearest

T = TypeVar("T")


def check_images(x: Tensor, in_chans: int, smallest: int, name: str) -> None:
    """Refuse a batch that is not `[B, in_chans, H, W]` with sides of at least `smallest` pixels.

    Tracers and compilers skip it: there the comparison would become a guard on a dynamic size.

    Raises:
        UserError: another rank, another channel count, or a side below the limit.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise UserError(
            f"{name} takes images [B, {in_chans}, H, W], got {list(x.shape)}: "
            f"give {in_chans} channels, or build the model with in_chans={x.shape[1] if x.ndim == 4 else 'C'}"
        )
    height, width = x.shape[-2:]
    if min(height, width) < smallest:
        raise UserError(
            f"{name} needs images of at least {smallest} x {smallest} px, got {height} x {width}: "
            "resize them or choose another backbone"
        )


def pick_variant(name: str, table: Mapping[str, T], family: str) -> T:
    """The table's entry of that name.

    Raises:
        UserError: no such variant; the hints name near ones.
    """
    if name not in table:
        near = nearest(name, table) or list(table)
        raise UserError(f"{family} has no variant {name!r}: choose one of {', '.join(table)}", near)
    return table[name]
