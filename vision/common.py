"""What the vision backbones share: the checks of their input and of their variants' names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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


def captured(
    model: nn.Module, x: Tensor, kind: type[nn.Module] | tuple[type[nn.Module], ...],
    look: Callable[[Any, Tensor], Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """What `look(module, its input)` gives for every module of a kind, by the module's name, in one pass over x."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs: found.__setitem__(name, look(module, inputs[0]))

    hooks = [m.register_forward_pre_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, kind)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def init_convolution(conv: nn.Conv2d) -> None:
    """Normal weights of variance 2 / fan-out (groups apart), bias 0."""
    fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act: nn.Module = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
