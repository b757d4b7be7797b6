"""How far a tensor lies from the expected one, in the unit of an absolute tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tests.parity import Check


def apart(got: Tensor, expected: Tensor, relative: float | Tensor) -> float:
    """max |got - expected| / (1 + relative * |expected|), infinite for other shapes and for NaN."""
    if got.shape != expected.shape:
        return math.inf
    got, expected = got.detach().double(), expected.double()
    if not got.numel():
        return 0.0
    difference = ((got - expected).abs() / (1 + relative * expected.abs())).max().item()
    return math.inf if math.isnan(difference) else difference


def close(case: str, output: str, got: Tensor | None, expected: Tensor, tolerance: Mapping[str, float]) -> Check:
    """A check against `{atol, rtol}`, `{rtol}` or `{scaled_atol}` (of the expected tensor's maximum)."""
    if got is None:
        return Check(case, output, math.inf, 0.0)
    if "scaled_atol" in tolerance:
        largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return Check(case, output, apart(got / largest, expected / largest, 0.0), tolerance["scaled_atol"])
    if "atol" not in tolerance:
        largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return Check(case, output, apart(got / largest, expected / largest, 0.0), tolerance["rtol"])
    relative = tolerance.get("rtol", 0.0) / tolerance["atol"]
    return Check(case, output, apart(got, expected, relative), tolerance["atol"])


def unknown(case: str, output: str) -> Check:
    """An expected output that the adapter has nothing for."""
    return Check(case, output, math.inf, 0.0)
