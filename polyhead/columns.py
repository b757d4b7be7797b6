"""From output tensors to prediction columns, by name, so that an exported file needs no model code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polyhead.errors import UserError


def classification(outputs: dict[str, np.ndarray], classes: Sequence[str]) -> dict[str, Any]:
    """`label` (the most probable class), `score` (its probability), `probabilities` in class order."""
    probabilities = np.asarray(outputs["probabilities"], dtype=np.float32)
    best = probabilities.argmax(1)
    return {
        "label": [classes[i] for i in best],
        "score": probabilities[np.arange(len(best)), best],
        "probabilities": probabilities,
    }


def bag_classification(outputs: dict[str, np.ndarray], classes: Sequence[str], top: int = 10) -> dict[str, Any]:
    """`classification`, and of each bag `instances` (how many) and `top`, the most attended, best first.

    An instance that is not there has an attention of exactly 0.
    """
    attention = np.asarray(outputs["attention"])
    counts = (attention > 0).sum(1)
    order = np.argsort(-attention, axis=1, kind="stable")[:, :top]
    best = [row[: min(top, count)].tolist() for row, count in zip(order, counts, strict=True)]
    return {**classification(outputs, classes), "instances": counts.astype(np.int64), "top": best}


COLUMNS: dict[str, Callable[..., dict[str, Any]]] = {
    "classification": classification,
    "bag_classification": bag_classification,
}


def make_columns(spec: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """Apply the column rule that a signature names: `{"kind": name, **arguments}`."""
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in COLUMNS:
        raise UserError(f"the model asks for prediction columns of kind {kind!r}, which this version lacks")
    return COLUMNS[kind](outputs, **arguments)
