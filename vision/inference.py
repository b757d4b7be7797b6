"""Faster inference on a CPU with the same numbers: packed weights, and work in parts that fit the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.windows import traced

BUDGET = 2**21  # numbers of an intermediate result that stay in a core's share of the cache


def by_images(function: Callable[[Tensor], Tensor], x: Tensor, numbers: int) -> Tensor:
    """`function(x)` for a function that treats the images of a batch apart and keeps the shape.

    Args:
        numbers: what the function holds in between, per image.
    """
    count = max(1, BUDGET // numbers)
    if traced() or torch.is_grad_enabled() or x.device.type != "cpu" or len(x) <= count:
        return function(x)
    first = function(x[:count])
    out = first.new_empty(len(x), *first.shape[1:])
    out[:count] = first
    for start in range(count, len(x), count):
        out[start : start + count] = function(x[start : start + count])
    return out


class PackedLinear(nn.Linear):
    """A linear layer, and the exact GELU after it, by oneDNN with weights packed once.

    Only in plain inference on a CPU in float32; anywhere else (exporters, compilers, gradients, other types,
    a torch without the operator) it is the layer it was made from. The weight must not change afterwards.
    """

    def __init__(self, layer: nn.Linear, gelu: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.gelu = layer.in_features, layer.out_features, gelu
        self.weight, self.bias = layer.weight, layer.bias
        self.packed: Tensor | None = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        self.packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # a packed weight can be neither copied nor saved

    def plain(self, x: Tensor) -> bool:
        return (
            not traced()
            and not torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain(x):
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y) if self.gelu else y
        if self.packed is None:
            rows = x.numel() // x.shape[-1]
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        kind, form = ("gelu", "none") if self.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, kind, [], form)


def pack_linears(model: nn.Module) -> None:
    """Put a `PackedLinear` in place of every linear layer; an `Mlp`-like module's `fc1` takes its `act` in."""
    for name, child in list(model.named_children()):
        if type(child) is nn.Linear:
            gelu = name == "fc1" and isinstance(getattr(model, "act", None), nn.GELU)
            if gelu:
                model.act = nn.Identity()
            setattr(model, name, PackedLinear(child, gelu))
        else:
            pack_linears(child)
