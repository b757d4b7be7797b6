"""What all single-label classifiers share: classes from the data, their metrics, intervals, names and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torchmetrics import MetricCollection

from polyhead.errors import UserError
from polyhead.figures import calibration_picture, precision_picture, roc_picture
from polyhead.intervals import intervals, one_against_rest
from polyhead.metrics import RESULTS, Rows, classification_metrics
from polyhead.report import confusion_picture
from polyhead.system import System

# With more classes than this a report would drown in rows and curves
FEW = 12


class Classifier(System):
    """A System whose `facts` hold `classes`, the class names in order.

    Results name each class's sensitivity (recall), positive predictive value (precision) and AUROC against the rest.
    After a test, every result but these areas and the calibration error has a 95 % bootstrap interval
    (`accuracy.low`, `accuracy.high`, ...), drawn by the batch's `group` (a patient, a subject) where the data
    name one, else by sample.

    Args:
        facts: see `System`.
        system: the other arguments of `System`.

    Raises:
        UserError: fewer than two classes.
    """

    def __init__(self, facts: dict[str, Any] | None = None, **system: Any) -> None:
        super().__init__(facts, **system)
        self.classes: list[str] = list(self.facts.get("classes") or [])
        if len(self.classes) < 2:
            named = ", ".join(self.classes) or "none"
            raise UserError(f"a classifier needs at least two classes; the data name {named}")

    def make_metrics(self) -> MetricCollection:
        metrics = classification_metrics(len(self.classes))
        if len(self.classes) <= FEW:
            metrics.add_metrics({"rows": Rows()})
        return metrics

    def measure(self, metrics: MetricCollection, probabilities: Tensor, batch: dict[str, Any]) -> None:
        """Update the classification metrics with a labelled batch; other metrics are left to the subclass.

        Raises:
            UserError: the batch has no labels.
        """
        if "label" not in batch:
            raise UserError("the data have no labels: put the files in class folders or name a table of labels")
        probabilities, label = probabilities.float(), batch["label"]
        for name in RESULTS:
            metrics[name].update(probabilities, label)
        if "rows" in metrics:
            metrics["rows"].update(probabilities, label, batch.get("group") or batch["id"])

    def rows(self, stage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Probabilities `[N, K]`, labels `[N]` and group numbers `[N]` of the last evaluation."""
        table = self.results.get(stage, {}).get("rows")
        if table is None:
            return None
        values = table.numpy()
        return values[:, :-2], values[:, -2].astype(np.int64), values[:, -1]

    def named_results(self, stage: str) -> dict[str, float]:
        named = super().named_results(stage)
        results = self.results.get(stage, {})
        if "confusion" in results:
            matrix = results["confusion"].double()
            true, said, hit = matrix.sum(1), matrix.sum(0), matrix.diagonal()
            named |= {f"sensitivity.{c}": float(h / t) for c, h, t in zip(self.classes, hit, true, strict=True) if t}
            named |= {f"ppv.{c}": float(h / s) for c, h, s in zip(self.classes, hit, said, strict=True) if s}
        rows = self.rows(stage)
        if rows is None:
            return named
        probabilities, label, group = rows
        for k, name in enumerate(self.classes):
            area = float(one_against_rest(label == k, probabilities[:, k], np.ones((1, len(label))))[0])
            named |= {} if np.isnan(area) else {f"auroc.{name}": area}
        if stage == "test":
            for name, (low, high) in intervals(label, probabilities, group).items():
                what, _, number = name.partition(".")
                shown = f"{what}.{self.classes[int(number)]}" if number else what
                named |= {f"{shown}.low": low, f"{shown}.high": high}
        return named

    def figures(self, stage: str) -> dict[str, Any]:
        matrix = self.results.get(stage, {}).get("confusion")
        pictures = {} if matrix is None else {"Confusion matrix": confusion_picture(matrix, self.classes)}
        rows = self.rows(stage)
        if rows is not None and len(rows[1]):
            probabilities, label, _ = rows
            pictures["ROC"] = roc_picture(label, probabilities, self.classes)
            pictures["Precision and recall"] = precision_picture(label, probabilities, self.classes)
            pictures["Calibration"] = calibration_picture(label, probabilities)
        return pictures
