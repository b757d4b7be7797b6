"""Pictures of event models, and the test that one of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def ks_distance(times: Tensor) -> float:
    """Largest distance between the distribution of rescaled waiting times `[n]` and Exp(1)."""
    n = len(times)
    share = -torch.expm1(-times.double().sort().values)
    place = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(place[1:] - share, share - place[:-1]).max())


def calibration_picture(times: Tensor) -> Any:
    """Quantiles of rescaled waiting times against those of Exp(1), and the distance between the distributions."""
    from matplotlib import pyplot

    n = len(times)
    found = times.double().sort().values.numpy()
    place = (np.arange(n) + 0.5) / n
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
    left.plot(-np.log1p(-place), found, ".", markersize=3)
    largest = float(-np.log1p(-place[-1]))
    left.plot([0, largest], [0, largest], "k-", linewidth=0.8)
    # A few waiting times far out of line would squeeze the rest into a corner
    beyond = int((found > 2 * largest).sum())
    left.set_ylim(-0.05 * largest, min(float(found[-1]), 2 * largest) * 1.05)
    if beyond:
        left.set_title(f"{beyond} of {n} lie beyond", fontsize="medium")
    left.set_xlabel("quantile of Exp(1)")
    left.set_ylabel("quantile found")
    right.plot(place, -np.expm1(-found) - place, linewidth=1)
    limit = 1.358 / np.sqrt(n)
    for y in (-limit, limit):
        right.axhline(y, color="k", linestyle="--", linewidth=0.8)
    right.axhline(0, color="k", linewidth=0.8)
    right.set_xlabel("share of waiting times")
    right.set_ylabel("under the model, less that share")
    right.set_title(f"KS {ks_distance(times):.4f}; dashed: 5 % limit {limit:.4f}", fontsize="medium")
    return figure


def matrix_panel(axis: Any, matrix: np.ndarray, labels: Sequence[str], title: str) -> None:
    """A matrix with a row an affected type and a column a triggering one."""
    shown = axis.imshow(matrix, cmap="viridis", aspect="equal")
    short = [label if len(label) <= 14 else label[:13] + "." for label in labels]
    step = max(1, len(labels) // 24)
    places = range(0, len(labels), step)
    axis.set_xticks(places, [short[i] for i in places], rotation=90 if len(labels) > 4 else 0, fontsize="x-small")
    axis.set_yticks(places, [short[i] for i in places], fontsize="x-small")
    axis.set_xlabel("triggering type")
    axis.set_ylabel("affected type")
    axis.set_title(title, fontsize="medium")
    axis.figure.colorbar(shown, ax=axis, fraction=0.046)
    if len(labels) <= 4:
        for i in range(len(labels)):
            for j in range(len(labels)):
                light = matrix[i, j] > (matrix.max() + matrix.min()) / 2
                axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color="k" if light else "w")


def as_numbers(values: Tensor) -> np.ndarray:
    return values.detach().to(torch.float64).cpu().numpy()
