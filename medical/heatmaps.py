"""Attention over a slide: scores, pictures, and files that QuPath opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import matplotlib
import numpy as np
from scipy.stats import rankdata

from polyhead.files import write_text

Scale = Literal["relative", "percentile", "rank", "minmax"]


def scaled(attention: np.ndarray, how: Scale, zoom: float = 1.0) -> np.ndarray:
    """Scores of patches for drawing, `[N]` -> `[N]`.

    `relative` is attention x N x zoom, so that 1 is uniform attention; `percentile` and `rank` are the average
    rank over N; `minmax` runs from 0 to 1.
    """
    if how == "relative":
        return attention * len(attention) * zoom
    if how == "minmax":
        low, high = attention.min(), attention.max()
        return (attention - low) / max(high - low, 1e-30)
    return rankdata(attention) / len(attention)


def paint(scores: np.ndarray, coords: np.ndarray, patch: int, size: tuple[int, int], downsample: float) -> np.ndarray:
    """Scores of patches as a map `[h, w]` float64, averaged where patches overlap, NaN where none is.

    Args:
        scores: `[N]`.
        coords: level-0 top-left corners `[N, 2]`.
        patch: side in level-0 pixels.
        size: width and height of the map.
        downsample: level-0 pixels a map pixel.
    """
    total, count = np.zeros((size[1], size[0])), np.zeros((size[1], size[0]), np.int32)
    side = int(np.ceil(patch / downsample))
    for (x, y), score in zip(np.ceil(coords / downsample).astype(int), scores, strict=True):
        total[y : y + side, x : x + side] += score
        count[y : y + side, x : x + side] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def overlay(
    picture: np.ndarray, heat: np.ndarray, colours: str = "jet", alpha: float = 0.4, mask: np.ndarray | None = None
) -> np.ndarray:
    """A map over a picture, RGB uint8 `[h, w, 3]`: clipped to 0..1, coloured, blended.

    Args:
        picture: RGB uint8 of the map's size.
        heat: of `paint`; where it is NaN the picture shows.
        colours: a colour map of matplotlib.
        alpha: share of the colour.
        mask: where it is 0 the picture shows.
    """
    drawn = ~np.isnan(heat) if mask is None else ~np.isnan(heat) & (mask > 0)
    coloured = (matplotlib.colormaps[colours](np.clip(heat[drawn], 0, 1))[:, :3] * 255).astype(np.uint8)
    layer = picture.copy()
    layer[drawn] = coloured
    return cv2.addWeighted(layer, alpha, picture, 1 - alpha, 0)


def write_geojson(path: Path, coords: np.ndarray, patch: int, columns: dict[str, np.ndarray]) -> None:
    """Patches as squares with their scores as measurements: QuPath reads it as detections."""
    features = []
    for index, (x, y) in enumerate(coords.tolist()):
        ring = [[x, y], [x + patch, y], [x + patch, y + patch], [x, y + patch], [x, y]]
        features.append({
            "type": "Feature",
            "id": f"patch-{index}",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "detection", "measurements": {k: float(v[index]) for k, v in columns.items()}},
        })  # fmt: skip
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}))


def contact_sheet(tiles: Sequence[np.ndarray], titles: Sequence[str], columns: int = 5) -> Any:
    """The top tiles beside each other, a title above each, as a matplotlib figure."""
    from matplotlib import pyplot

    rows = -(-len(tiles) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.6 * columns, 1.8 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, tile, title in zip(axes.flat, tiles, titles, strict=False):
        axis.imshow(tile)
        axis.set_title(title, fontsize="small")
    figure.tight_layout()
    return figure
