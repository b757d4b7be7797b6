"""Folding batch norms into the convolutions before them, exactly, in any network that can be run once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def fold_batch_norms(network: nn.Module, run: Callable[[nn.Module], Any]) -> nn.Module:
    """A copy for inference whose batch norms are part of their convolutions where nothing lies between.

    A norm is folded when, in one run, its input is the very tensor that one convolution gave, and both ran
    once. A norm with an activation of its own (timm's BatchNormAct2d) leaves the activation in its place.

    Args:
        network: in evaluation mode.
        run: runs a network on an example.
    """
    twin = copy.deepcopy(network).eval()
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    runs: dict[nn.Module, int] = {}
    pairs: list[tuple[nn.Conv2d, nn.Module]] = []

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs[module] = runs.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            # The tensor is kept, so that its id is not given to another
            made[id(output)] = (module, output)
        elif id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    watched = [m for m in twin.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    handles = [m.register_forward_hook(after) for m in watched]
    run(twin)
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in twin.named_modules()}
    shared = [convolution for convolution, _ in pairs]
    for convolution, norm in pairs:
        if shared.count(convolution) > 1:
            continue
        if runs[convolution] == 1 and runs[norm] == 1 and isinstance(norm, nn.BatchNorm2d):
            _fold(convolution, norm)
            parent, _, child = names[norm].rpartition(".")
            rest = [getattr(norm, n) for n in ("drop", "act") if hasattr(norm, n)]
            setattr(twin.get_submodule(parent), child, nn.Sequential(*rest) if rest else nn.Identity())
    # What a convolution gave may have been used elsewhere too
    pairs_of = zip(_tensors(run(network)), _tensors(run(twin)), strict=True)
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max() + 1e-6)) for a, b in pairs_of):
        return copy.deepcopy(network).eval()
    return twin


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for v in values for t in _tensors(v)]


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
    convolution.weight.copy_(convolution.weight * scale.view(-1, 1, 1, 1))
    if convolution.bias is not None:
        shift = shift + convolution.bias * scale
    convolution.bias = nn.Parameter(shift, requires_grad=False)
