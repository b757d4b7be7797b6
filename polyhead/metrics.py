"""Metrics that several systems report."""

from __future__ import annotations

from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassRecall,
)


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
