"""Pictures of a classifier's results for the report."""

from __future__ import annotations

from typing import Any

import numpy as np


def roc_picture(label: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> Any:
    """ROC curves, a class against the rest; for two classes the second alone."""
    from matplotlib import pyplot
    from sklearn.metrics import roc_auc_score, roc_curve

    figure, axis = pyplot.subplots(figsize=(4, 4), layout="constrained")
    for k in _shown(label, classes):
        false, true, _ = roc_curve(label == k, probabilities[:, k])
        axis.plot(false, true, label=f"{classes[k]} ({roc_auc_score(label == k, probabilities[:, k]):.3f})")
    axis.plot([0, 1], [0, 1], "k:", linewidth=1)
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01))
    _legend(axis, "area", "lower right")
    return figure


def precision_picture(label: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> Any:
    """Precision over recall, a class against the rest; for two classes the second alone."""
    from matplotlib import pyplot
    from sklearn.metrics import average_precision_score, precision_recall_curve

    figure, axis = pyplot.subplots(figsize=(4, 4), layout="constrained")
    for k in _shown(label, classes):
        precision, recall, _ = precision_recall_curve(label == k, probabilities[:, k])
        area = average_precision_score(label == k, probabilities[:, k])
        axis.plot(recall, precision, label=f"{classes[k]} ({area:.3f})", drawstyle="steps-post")
    axis.set(xlabel="sensitivity", ylabel="positive predictive value", xlim=(0, 1), ylim=(0, 1.01))
    _legend(axis, "average precision", "lower left")
    return figure


def calibration_picture(label: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> Any:
    """How often the predicted class was right, by how probable the model held it."""
    from matplotlib import pyplot

    confidence, right = probabilities.max(1), probabilities.argmax(1) == label
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    figure, axis = pyplot.subplots(figsize=(4, 4), layout="constrained")
    for b in range(bins):
        inside = which == b
        if inside.any():
            axis.bar((b + 0.5) / bins, right[inside].mean(), 0.9 / bins, color="C0", alpha=0.7)
            axis.text((b + 0.5) / bins, 0.01, str(inside.sum()), ha="center", fontsize="x-small")
    axis.plot([0, 1], [0, 1], "k:", linewidth=1)
    axis.set(xlabel="probability of the predicted class", ylabel="share that was right", xlim=(0, 1), ylim=(0, 1))
    return figure


def _shown(label: np.ndarray, classes: list[str]) -> list[int]:
    wanted = [1] if len(classes) == 2 else list(range(len(classes)))
    return [k for k in wanted if 0 < (label == k).sum() < len(label)]


def _legend(axis: Any, title: str, place: str) -> None:
    """A legend, where something was drawn: a part may lack whole classes."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(title=title, fontsize="small", loc=place)
