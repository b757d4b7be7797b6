"""What all single-label classifiers share: classes from the data, their metrics, names and pictures."""

from __future__ import annotations

from typing import Any

from torchmetrics import MetricCollection

from polyhead.errors import UserError
from polyhead.metrics import classification_metrics
from polyhead.report import confusion_picture
from polyhead.system import System


class Classifier(System):
    """A System whose `facts` hold `classes`, the class names in order.

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
        return classification_metrics(len(self.classes))

    def named_results(self, stage: str) -> dict[str, float]:
        named = super().named_results(stage)
        recall = self.results.get(stage, {}).get("recall")
        if recall is not None:
            named |= {f"recall.{c}": float(r) for c, r in zip(self.classes, recall, strict=True)}
        return named

    def figures(self, stage: str) -> dict[str, Any]:
        matrix = self.results.get(stage, {}).get("confusion")
        return {} if matrix is None else {"Confusion matrix": confusion_picture(matrix, self.classes)}
