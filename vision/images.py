"""Images with a class each."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from polyhead.picture_data import Embedded, PictureData
from polyhead.splits import split_indices


class ImageData(PictureData):
    """Images from a folder, a zip, a list or a table; without a root, scikit-learn's handwritten digits.

    The digits are 1,797 grey images of 8 x 8 pixels in 10 classes (`digits/0000` ...), with a fixed split
    into 70 % training, 15 % validation and 15 % test. They are not mirrored unless asked for.
    See `polyhead.picture_data.PictureData` for all arguments.
    """

    embedded_flip = 0.0

    def embedded(self) -> Embedded:
        digits = load_digits()
        labels = [str(t) for t in digits.target]
        parts = split_indices(labels, None, {"train": 0.7, "val": 0.15, "test": 0.15}, seed=0)
        where = {int(i): name for name, indices in parts.items() for i in indices}
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        ids = [f"digits/{i:04d}" for i in range(len(labels))]
        return Embedded(ids, pixels, labels, [where[i] for i in range(len(labels))])
