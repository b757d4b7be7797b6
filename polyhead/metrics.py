"""Metrics that several systems report."""

from __future__ import annotations

import hashlib
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
    MulticlassRecall,
)

RESULTS = ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece", "recall", "confusion")


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


def classification_metrics(classes: int) -> MetricCollection:
    """Metrics of a single-label classifier, updated with probabilities `[B, K]` and labels `[B]`.

    accuracy, balanced_accuracy (mean recall), f1_macro, auroc (one against the rest, macro), ece (expected
    calibration error, 15 bins); and, kept for pictures, recall per class `[K]` and confusion `[K, K]`
    (rows are the truth).
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "balanced_accuracy": MulticlassAccuracy(classes, average="macro"),
            "f1_macro": MulticlassF1Score(classes, average="macro"),
            "auroc": MulticlassAUROC(classes, average="macro"),
            "ece": MulticlassCalibrationError(classes, n_bins=15),
            "recall": MulticlassRecall(classes, average="none"),
            "confusion": MulticlassConfusionMatrix(classes),
        },
        compute_groups=False,
    )
