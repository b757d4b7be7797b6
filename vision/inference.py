"""Faster inference on a CPU with the same numbers: packed weights, and work in parts that fit the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.windows import traced


def unchanged(x: Tensor) -> Tensor:
    return x


BUDGET = 2**21  # numbers of an intermediate result that stay in a core's share of the cache
# what oneDNN calls an activation, and what it is elsewhere
ACTIVATIONS: dict[type[nn.Module], tuple[str, str, Callable[[Tensor], Tensor]]] = {
    nn.Identity: ("none", "", unchanged),
    nn.ReLU: ("relu", "", F.relu),
    nn.SiLU: ("swish", "", F.silu),
    nn.GELU: ("gelu", "none", F.gelu),
}


def by_images(function: Callable[[Tensor], Tensor], x: Tensor, numbers: int) -> Tensor:
    """`function(x)` for a function that treats the images of a batch apart and keeps the shape.

    Args:
        numbers: what the function holds in between, per image.
    """
    if traced() or torch.is_grad_enabled() or x.device.type != "cpu":
        return function(x)
    count = max(1, BUDGET // numbers)
    if len(x) <= count:
        return function(x)
    first = function(x[:count])
    out = first.new_empty(len(x), *first.shape[1:])
    out[:count] = first
    for start in range(count, len(x), count):
        out[start : start + count] = function(x[start : start + count])
    return out


class Packed(nn.Module):
    """A layer, and the activation after it, by oneDNN with weights packed once.

    Only in plain inference on a CPU in float32; anywhere else (exporters, compilers, gradients, other types,
    a torch without the operators) it computes as the layers it was made from. The weight must not change
    afterwards.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias  # type: ignore[assignment]
        self.kind, self.form, self.act = ACTIVATIONS[type(act or nn.Identity())]
        self.packed: Tensor | None = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Packed:
        self.packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # a packed weight can be neither copied nor saved

    def usable(self, x: Tensor) -> bool:
        return (
            not traced()
            and not torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )


class PackedLinear(Packed):
    """A linear layer on the last axis; made from one, or from a 1x1 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.usable(x):
            return self.act(F.linear(x, self.weight.flatten(1), self.bias))
        if self.packed is None:
            matrix = self.weight.detach().flatten(1).contiguous()
            self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix, x.numel() // x.shape[-1])
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.kind, [], self.form)


class PackedConv2d(Packed):
    """A convolution on a channels_last map; `other` is added before the activation."""

    def __init__(self, layer: nn.Conv2d, act: nn.Module | None = None) -> None:
        super().__init__(layer, act)
        assert not isinstance(layer.padding, str)
        self.where = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        padding, stride, dilation, groups = self.where
        if not self.usable(x):
            y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
            return self.act(y if other is None else y + other)
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.detach(), padding, stride, dilation, groups, list(x.shape)
            )
        layer = (self.packed, self.bias, padding, stride, dilation, groups)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *layer, self.kind, [], self.form)
        # after a sum oneDNN has only the rectifier
        fused = self.kind if self.kind == "relu" else None
        y = torch.ops.mkldnn._convolution_pointwise.binary(x, other, *layer, "add", 1.0, fused, [], None)
        return y if fused else self.act(y)


def pack_linears(model: nn.Module) -> None:
    """Put a `PackedLinear` in place of every linear layer; an `Mlp`-like module's `fc1` takes its `act` in."""
    for name, child in list(model.named_children()):
        if type(child) is nn.Linear:
            act = getattr(model, "act", None) if name == "fc1" else None
            setattr(model, name, PackedLinear(child, act))
            if act is not None:
                model.act = nn.Identity()
        else:
            pack_linears(child)
