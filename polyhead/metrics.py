"""Metrics that several systems report."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchmetrics.utilities import dim_zero_cat

RESULTS = ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece", "confusion")


class Rows(Metric):
    """All probabilities `[N, K]`, labels `[N]` and groups `[N]` of an evaluation, for intervals and pictures.

    Computes float64 `[N, K + 2]`: the probabilities, the label, and a number that samples of one group share.
    """

    full_state_update = False
    probabilities: list[Tensor]
    label: list[Tensor]
    group: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("probabilities", "label", "group"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, label: Tensor, groups: Sequence[str]) -> None:
        self.probabilities.append(probabilities.detach().double())
        self.label.append(label)
        numbers = [int.from_bytes(hashlib.blake2b(g.encode(), digest_size=6).digest(), "big") for g in groups]
        self.group.append(torch.tensor(numbers, dtype=torch.int64, device=label.device))

    def compute(self) -> Tensor:
        parts = [torch.cat(list(v)) if isinstance(v, list) else v for v in (self.probabilities, self.label, self.group)]
        return torch.cat([parts[0], parts[1].double()[:, None], parts[2].double()[:, None]], 1)


class PresentAUROC(MulticlassAUROC):
    """Mean AUROC of one class against the rest, over the classes that have samples on both sides; 0 with none."""

    def compute(self) -> Tensor:  # type: ignore[override]
        target = dim_zero_cat(self.target)
        counts = torch.bincount(target, minlength=self.num_classes)
        there = (counts > 0) & (counts < len(target))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the others, which are left out
            areas = super().compute()
        return areas[there].mean() if there.any() else areas.new_zeros(())


class BalancedAccuracy(MulticlassConfusionMatrix):
    """Mean recall over the classes that have samples."""

    def compute(self) -> Tensor:
        table = super().compute().double()
        there = table.sum(1) > 0
        return (table.diagonal()[there] / table.sum(1)[there]).mean().float()


def classification_metrics(classes: int) -> MetricCollection:
    """Metrics of a single-label classifier, updated with probabilities `[B, K]` and labels `[B]`.

    accuracy, balanced_accuracy (mean recall) and auroc (one against the rest, macro) over the classes that have
    samples, f1_macro, ece (expected calibration error, 15 bins); and, kept for pictures and for the results of
    each class, confusion `[K, K]` (rows are the truth).
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "balanced_accuracy": BalancedAccuracy(classes),
            "f1_macro": MulticlassF1Score(classes, average="macro"),
            "auroc": PresentAUROC(classes, average="none"),
            "ece": MulticlassCalibrationError(classes, n_bins=15),
            "confusion": MulticlassConfusionMatrix(classes),
        },
        compute_groups=False,
    )
