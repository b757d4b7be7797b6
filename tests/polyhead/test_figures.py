"""Pictures of reports for parts that lack classes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib import pyplot

from polyhead.figures import precision_picture, roc_picture


@pytest.mark.parametrize("picture", [roc_picture, precision_picture])
@pytest.mark.parametrize(("label", "named"), [([2, 2, 2, 2], 0), ([0, 0, 2, 2], 2), ([0, 1, 2, 2], 3)])
def test_classes_without_a_curve_are_left_out_without_a_word(picture, label: list[int], named: int) -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = picture(np.array(label), probabilities, ["a", "b", "c"])
    legend = figure.axes[0].get_legend()
    assert (len(legend.get_texts()) if legend else 0) == named
    pyplot.close(figure)
