"""From output tensors to prediction columns, by name, so that an exported file needs no model code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polyhead.errors import UserError


def classification(
    outputs: dict[str, np.ndarray], classes: Sequence[str], positive: str | None = None, threshold: float = 0.5
) -> dict[str, Any]:
    """`label` (the most probable class), `score` (its probability), `probabilities` in class order.

    With a `positive` class also `alert`: whether its probability reaches the threshold.
    """
    probabilities = np.asarray(outputs["probabilities"], dtype=np.float32)
    best = probabilities.argmax(1)
    columns = {
        "label": [classes[i] for i in best],
        "score": probabilities[np.arange(len(best)), best],
        "probabilities": probabilities,
    }
    if positive is not None:
        columns["alert"] = probabilities[:, list(classes).index(positive)] >= threshold
    return columns


def bag_classification(outputs: dict[str, np.ndarray], classes: Sequence[str], top: int = 10) -> dict[str, Any]:
    """`classification`, and of each bag `instances` (how many) and `top`, the most attended, best first.

    An instance that is not there has an attention of exactly 0.
    """
    attention = np.asarray(outputs["attention"])
    counts = (attention > 0).sum(1)
    order = np.argsort(-attention, axis=1, kind="stable")[:, :top]
    best = [row[: min(top, count)].tolist() for row, count in zip(order, counts, strict=True)]
    return {**classification(outputs, classes), "instances": counts.astype(np.int64), "top": best}


def next_event(outputs: dict[str, np.ndarray], types: Sequence[str]) -> dict[str, Any]:
    """`next_type`, `next_score` (its probability), `type_probabilities`, `wait_mean`, `wait_low`, `wait_median`,
    `wait_high` of what `wait` holds: the mean and the 5, 50 and 95 % quantiles of the waiting time."""
    named = classification({"probabilities": outputs["type_probabilities"]}, types)
    wait = np.asarray(outputs["wait"], dtype=np.float32)
    kinds = {"next_type": named["label"], "next_score": named["score"], "type_probabilities": named["probabilities"]}
    return kinds | {f"wait_{name}": wait[:, i] for i, name in enumerate(("mean", "low", "median", "high"))}


def windows(outputs: dict[str, np.ndarray], classes: Sequence[str], threshold: float = 0.5) -> dict[str, Any]:
    """`probability` of any class but the first, `threshold`, `alarm` (it is reached), `label`, `probabilities`,
    and `relevance`, a list whose length is the window's number of channels."""
    named = classification(outputs, classes)
    probability = 1 - named["probabilities"][:, 0]
    return {
        "probability": probability,
        "threshold": np.full(len(probability), threshold, np.float32),
        "alarm": probability >= threshold,
        "label": named["label"],
        "probabilities": named["probabilities"],
        "relevance": list(np.asarray(outputs["relevance"], dtype=np.float32)),
    }


def surprise(outputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """`surprise`, one less the mean of `similarity`, which is a list as long as the window's channels are many."""
    similarity = np.asarray(outputs["similarity"], dtype=np.float32)
    return {"surprise": 1 - similarity.mean(1), "similarity": list(similarity)}


def ranked(outputs: dict[str, np.ndarray], names: Sequence[Any]) -> dict[str, Any]:
    """A row for each of a sample's `items` `[B, K]`, best first: `part` (place from 0), `item`, `score`, `fallback`.

    Places that hold no item, having the number `len(names)`, give no row.
    """
    items, scores = np.asarray(outputs["items"]), np.asarray(outputs["scores"], dtype=np.float32)
    sample, place = np.nonzero(items < len(names))
    return {
        "sample": sample,
        "part": place.astype(np.int32),
        "item": [names[i] for i in items[sample, place]],
        "score": scores[sample, place],
        "fallback": np.asarray(outputs["fallback"])[sample],
    }


def rows(ids: Sequence[str], columns: dict[str, Any]) -> dict[str, Any]:
    """Columns with their `id`. Where a sample gives several rows (or none), `sample` says which one each is of."""
    columns = dict(columns)
    sample = columns.pop("sample", None)
    return {"id": list(ids) if sample is None else [ids[i] for i in sample], **columns}


COLUMNS: dict[str, Callable[..., dict[str, Any]]] = {
    "classification": classification,
    "bag_classification": bag_classification,
    "ranked": ranked,
    "windows": windows,
    "surprise": surprise,
    "next_event": next_event,
}


def make_columns(spec: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
    """Apply the column rule that a signature names: `{"kind": name, **arguments}`."""
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in COLUMNS:
        raise UserError(f"the model asks for prediction columns of kind {kind!r}, which this version lacks")
    return COLUMNS[kind](outputs, **arguments)
