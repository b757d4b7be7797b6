"""Class probabilities that fit a validation part: one scale and an offset a class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def calibrated(probabilities: Tensor, scale: float, offsets: list[float]) -> Tensor:
    """softmax(scale * log p + offsets) over the last axis; scale 1 and offsets 0 change nothing."""
    logs = probabilities.clamp(min=1e-9).log()
    return (scale * logs + logs.new_tensor(offsets)).softmax(-1)


def fit_calibration(
    probabilities: np.ndarray, label: np.ndarray, balanced: bool = True, penalty: float = 3.0
) -> tuple[float, list[float]]:
    """The scale and offsets of least cross-entropy (bias-corrected temperature scaling, Alexandari et al. 2020).

    Args:
        probabilities: `[N, K]`.
        label: `[N]`.
        balanced: every class counts equally, however many samples it has: the most probable class is then
            the right choice where all classes matter alike.
        penalty: over the number of samples, on squared offsets and on the squared logarithm of the scale, so
            that a small validation part cannot ask for much.

    Returns:
        The scale, and offsets `[K]` of mean 0. 1 and zeros where a class has no sample.
    """
    classes = probabilities.shape[1]
    counts = np.bincount(label, minlength=classes)
    if (counts == 0).any():
        return 1.0, [0.0] * classes
    logs = torch.from_numpy(np.log(np.maximum(probabilities, 1e-9)))
    target = torch.from_numpy(label)
    share = 1 / (classes * counts) if balanced else np.full(classes, 1 / len(label))
    weight = torch.from_numpy(share)[target]
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    offsets = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, offsets], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = (log_scale.exp() * logs + offsets).log_softmax(-1)
        missed = -(weight * scores.gather(1, target[:, None])[:, 0]).sum()
        value = missed + penalty / len(label) * (offsets.square().sum() + log_scale.square())
        value.backward()
        return value

    optimizer.step(loss)
    found = offsets.detach() - offsets.detach().mean()
    return round(float(log_scale.exp().detach()), 4), [round(float(v), 4) for v in found]
