"""Calibration finds what was done to probabilities and undoes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from polyhead.calibration import calibrated, fit_calibration


def drawn(count: int, prior: list[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the exact posteriors of Gaussian classes under equal priors."""
    rng = np.random.default_rng(seed)
    label = rng.choice(len(prior), count, p=prior)
    centres = 1.5 * np.eye(len(prior))
    x = centres[label] + rng.normal(size=(count, len(prior)))
    logs = x @ centres.T
    p = np.exp(logs - logs.max(1, keepdims=True))
    return label, p / p.sum(1, keepdims=True)


def test_a_known_distortion_is_undone() -> None:
    label, true = drawn(6000, [0.6, 0.3, 0.1])
    bent = calibrated(torch.from_numpy(true), 2.5, [2.0, -1.2, -0.8]).numpy()
    scale, offsets = fit_calibration(bent, label, balanced=True, penalty=1e-3)
    assert scale == pytest.approx(1 / 2.5, rel=0.1)
    mended = calibrated(torch.from_numpy(bent), scale, offsets).numpy()
    assert np.abs(mended - true).mean() < 0.02
    assert balanced_accuracy_score(label, mended.argmax(1)) > balanced_accuracy_score(label, bent.argmax(1)) + 0.03


def test_plain_calibration_keeps_the_shares_of_the_classes() -> None:
    label, true = drawn(6000, [0.7, 0.2, 0.1])
    plain = calibrated(torch.from_numpy(true), *fit_calibration(true, label, balanced=False, penalty=1e-3)).numpy()
    assert np.abs(plain.mean(0) - np.array([0.7, 0.2, 0.1])).max() < 0.02
    same = calibrated(torch.from_numpy(true), 1.0, [0.0] * 3).numpy()
    assert np.allclose(same, true, atol=1e-7)


def test_a_class_without_samples_changes_nothing() -> None:
    label, true = drawn(50, [0.5, 0.5, 0.0])
    assert fit_calibration(true, label) == (1.0, [0.0, 0.0, 0.0])
