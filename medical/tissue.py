"""Where a slide has tissue, and which patches of a grid lie on it: CLAM-style, in level-0 pixels.

The rules are those of the published segmentation and patching (CLAM, also used by ACMIL), rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np

from polyhead.errors import UserError

ContourTest = Literal["four_pt", "four_pt_hard", "center", "basic"]


@dataclass(frozen=True)
class TissueOptions:
    """How tissue is found on a thumbnail.

    Args:
        threshold: of the saturation, 0 to 255; not used with `otsu`.
        blur: side of the median filter, odd.
        close: side of the box that closes gaps; 0 is none.
        otsu: choose the threshold from the picture.
        area: smallest contour less its holes, in reference patches of `reference` pixels at level 0.
        hole_area: smallest hole, in the same unit.
        max_holes: the largest so many holes of a contour count.
        reference: side of a reference patch in level-0 pixels.
    """

    threshold: int = 8
    blur: int = 7
    close: int = 4
    otsu: bool = False
    area: float = 1.0
    hole_area: float = 1.0
    max_holes: int = 8
    reference: int = 512


# The published presets; areas of 100 patches keep nothing of a small slide
PRESETS = {
    "clam": TissueOptions(8, 7, 4, False, 100, 16, 8),
    "bwh_biopsy": TissueOptions(15, 11, 2, False, 1, 1, 2),
    "bwh_resection": TissueOptions(15, 11, 4, False, 100, 16, 8),
    "tcga": TissueOptions(8, 7, 4, False, 16, 4, 8),
    "small": TissueOptions(8, 7, 4, False, 1, 1, 8),
}


class Contour(NamedTuple):
    """A piece of tissue: its outline `[n, 1, 2]` and its holes, int32 level-0 pixels."""

    outline: np.ndarray
    holes: list[np.ndarray]


def find_tissue(thumbnail: np.ndarray, downsample: tuple[float, float], options: TissueOptions) -> list[Contour]:
    """Tissue on a thumbnail, in OpenCV's order of contours.

    Args:
        thumbnail: RGB uint8 `[h, w, 3]`.
        downsample: level-0 pixels per thumbnail pixel, horizontally and vertically.
        options: see there.

    Raises:
        UserError: an even median filter.
    """
    if options.blur % 2 == 0:
        raise UserError(f"the median filter of {options.blur} pixels must be odd")
    saturation = cv2.medianBlur(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1].copy(), options.blur)
    level, kind = (0, cv2.THRESH_OTSU) if options.otsu else (options.threshold, 0)
    _, binary = cv2.threshold(saturation, level, 255, cv2.THRESH_BINARY + kind)
    if options.close > 0:
        binary = cv2.morphologyEx(binary, cv2.MORPH_CLOSE, np.ones((options.close, options.close), np.uint8))
    outlines, hierarchy = cv2.findContours(binary, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if hierarchy is None:
        return []
    unit = int(options.reference**2 / (downsample[0] * downsample[1]))
    scale = np.array(downsample)
    found = []
    for index, parent in enumerate(hierarchy[0, :, 3]):
        if parent != -1:
            continue
        holes = [outlines[int(i)] for i in np.flatnonzero(hierarchy[0, :, 3] == index)]
        area = cv2.contourArea(outlines[index]) - sum(cv2.contourArea(h) for h in holes)
        if area <= 0 or area <= options.area * unit:
            continue
        largest = sorted(holes, key=cv2.contourArea, reverse=True)[: options.max_holes]
        kept = [h for h in largest if cv2.contourArea(h) > options.hole_area * unit]
        found.append(Contour((outlines[index] * scale).astype(np.int32), [(h * scale).astype(np.int32) for h in kept]))
    return found


def tissue_mask(contours: Sequence[Contour], size: tuple[int, int], downsample: tuple[float, float]) -> np.ndarray:
    """The contours drawn on a thumbnail of `size` (width, height): uint8 `[h, w]`, 1 on tissue."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    scale = 1 / np.array(downsample)
    for outline, holes in sorted(contours, key=lambda c: cv2.contourArea(c.outline), reverse=True):
        cv2.drawContours(mask, [(outline * scale).astype(np.int32)], -1, 1, -1)
        small = [(h * scale).astype(np.int32) for h in holes]
        if small:
            cv2.drawContours(mask, small, -1, 0, -1)
    return mask


def _inside(contour: np.ndarray, point: tuple[float, float]) -> float:
    return cv2.pointPolygonTest(contour, point, False)


def _on_tissue(contour: Contour, x: int, y: int, patch: int, test: ContourTest) -> bool:
    centre = (float(x + patch // 2), float(y + patch // 2))
    if test == "basic":
        kept = _inside(contour.outline, (float(x), float(y))) >= 0
    elif test == "center":
        kept = _inside(contour.outline, centre) >= 0
    else:
        shift = patch // 4
        points = [(centre[0] + dx, centre[1] + dy) for dx in (-shift, shift) for dy in (-shift, shift)]
        inside = [_inside(contour.outline, p) >= 0 for p in points]
        kept = all(inside) if test == "four_pt_hard" else any(inside)
    return kept and not any(_inside(hole, centre) > 0 for hole in contour.holes)


def patch_grid(
    contours: Sequence[Contour],
    size: tuple[int, int],
    patch: int,
    step: int,
    test: ContourTest = "four_pt",
    padding: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Patches on tissue: top-left corners `[n, 2]` and the contour of each `[n]`, both int64.

    Args:
        contours: of `find_tissue`.
        size: width and height of the slide at level 0.
        patch, step: side and step of the grid in level-0 pixels.
        test: which points of a patch must lie on tissue.
        padding: let the last patches reach beyond the slide.
    """
    coords: list[tuple[int, int]] = []
    owners: list[int] = []
    for number, contour in enumerate(contours):
        x0, y0, width, height = cv2.boundingRect(contour.outline)
        stop_x, stop_y = x0 + width, y0 + height
        if not padding:
            stop_x, stop_y = min(stop_x, size[0] - patch + 1), min(stop_y, size[1] - patch + 1)
        for x in range(x0, stop_x, step):
            for y in range(y0, stop_y, step):
                if _on_tissue(contour, x, y, patch, test):
                    coords.append((x, y))
                    owners.append(number)
    return np.array(coords, dtype=np.int64).reshape(-1, 2), np.array(owners, dtype=np.int64)
