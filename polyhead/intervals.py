"""Bootstrap intervals of classification results, drawn by group: a patient's samples come and go together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def one_against_rest(label: np.ndarray, scores: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """AUROC of samples `[N]` under each row of weights `[R, N]`; nan where a row has only one kind.

    Ties count half, as in the rank statistic.
    """
    order = np.argsort(scores, kind="stable")
    values, positive, weight = scores[order], label[order].astype(bool), weight[:, order]
    start = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    negatives = np.add.reduceat(weight * ~positive, start, axis=1)
    positives = np.add.reduceat(weight * positive, start, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    total = positives.sum(1) * negatives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, (positives * below).sum(1) / total, np.nan)


def classification_results(label: np.ndarray, probabilities: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Results of weighted samples, one value a row of `weight`.

    accuracy, balanced_accuracy and f1_macro (over the classes a row holds), auroc (mean over classes, one
    against the rest), and `sensitivity.K` and `ppv.K` for every class number K.

    Args:
        label: `[N]`.
        probabilities: `[N, K]`.
        weight: `[R, N]`.
    """
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    true = weight @ np.eye(classes)[label]
    said = weight @ np.eye(classes)[predicted]
    hit = weight @ (np.eye(classes)[label] * (predicted == label)[:, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = hit / true, hit / said
        f1 = 2 * hit / (true + said)
        areas = [one_against_rest(label == k, probabilities[:, k], weight) for k in range(classes)]
        results = {
            "accuracy": hit.sum(1) / true.sum(1),
            "balanced_accuracy": _mean(recall),
            "f1_macro": _mean(f1),
            "auroc": _mean(np.stack(areas, 1)),
        }
    for k in range(classes):
        results[f"sensitivity.{k}"], results[f"ppv.{k}"] = recall[:, k], precision[:, k]
    return results


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of each row without its nans; nan for a row of nans."""
    there = ~np.isnan(values)
    count = there.sum(1)
    return np.where(count > 0, np.where(there, values, 0).sum(1) / np.maximum(count, 1), np.nan)


def bootstrap_weights(groups: Sequence[object] | np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each sample is in each draw, `[draws, N]`: as many groups as there are, drawn with replacement."""
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    count = int(number.max()) + 1
    rng = np.random.default_rng(seed)
    taken = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    return taken[:, number].astype(np.float64)


def intervals(
    label: np.ndarray,
    probabilities: np.ndarray,
    groups: Sequence[object] | np.ndarray,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval of every result of `classification_results`.

    Args:
        label: `[N]`.
        probabilities: `[N, K]`.
        groups: `[N]`, whose samples belong together (patients, subjects).
        draws: bootstrap draws.
        seed: of the draws.
        level: of the interval.
    """
    weight = bootstrap_weights(groups, draws, seed)
    results = classification_results(label, probabilities, weight)
    tail = 100 * (1 - level) / 2
    found = {}
    for name, values in results.items():
        known = values[~np.isnan(values)]
        if len(known):
            low, high = np.percentile(known, [tail, 100 - tail])
            found[name] = (float(low), float(high))
    return found
