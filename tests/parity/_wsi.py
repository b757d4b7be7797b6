"""The tiling and the heat maps of a synthetic slide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scipy.special import softmax

from medical.heatmaps import overlay, paint, scaled
from medical.tissue import TissueOptions, find_tissue, patch_grid, tissue_mask
from tests.parity import Check


def tiling_case(folder: Path, meta: dict[str, Any]) -> Iterator[Check]:
    case = meta["case"]
    io = load_file(folder / f"{case}.io.safetensors")
    picture = io["thumbnail"]
    width, height = meta["slide_level0_size"]
    ds = (width / picture.shape[1], height / picture.shape[0])
    seg, keep, grid, heat = (meta[k] for k in ("segmentation", "filter", "patching", "heatmap"))
    assert grid["patch_level"] == 0, "patches of another level"
    options = TissueOptions(
        seg["sthresh"], seg["mthresh"], seg["close"], seg["use_otsu"], keep["a_t"], keep["a_h"],
        keep["max_n_holes"], seg["ref_patch_size"],
    )  # fmt: skip
    contours = find_tissue(picture, ds, options)
    coords, owners = patch_grid(
        contours, (width, height), grid["patch_size"], grid["step_size"], grid["contour_fn"], grid["use_padding"]
    )
    size = (picture.shape[1], picture.shape[0])
    mask = tissue_mask(contours, size, ds)
    logits = io["attention_logits"]
    attention = softmax(logits.astype(np.float64), axis=1).mean(0)
    relative = scaled(attention, "relative", heat["zoom_factor"])
    rank = scaled(io["bag_attention"], "rank")

    def painted(scores: np.ndarray) -> np.ndarray:
        return paint(scores, coords, grid["patch_size"], size, ds[0])

    got = {
        "coords": coords,
        "contour_index": owners,
        "tissue_mask": mask,
        "bag_attention": attention,
        "relative_score": relative,
        "rank_scores": rank,
        "overlay_rank": painted(rank),
        "heatmap_acmil": overlay(picture, painted(relative), heat["cmap_acmil"], heat["alpha"]),
        "heatmap_clam_percentile_segmented": overlay(
            picture, painted(scaled(logits[0], "percentile")), heat["cmap_clam"], heat["alpha"], mask
        ),
    }
    yield Check(case, "contours", abs(len(contours) - meta["counts"]["contours"]), 0.0)
    yield Check(case, "holes", float([len(c.holes) for c in contours] != meta["counts"]["holes"]), 0.0)
    yield Check(case, "patches", abs(len(coords) - meta["counts"]["patches"]), 0.0)
    for name, expected in io.items():
        if name in ("thumbnail", "attention_logits"):
            continue
        if name not in got or got[name].shape != expected.shape:
            yield Check(case, f"{name} is not understood or of another shape", math.inf, 0.0)
            continue
        value, wanted = got[name].astype(np.float64), expected.astype(np.float64)
        hidden = np.isnan(value) & np.isnan(wanted)
        gap = np.where(hidden, 0.0, np.abs(value - wanted)).max()
        exact = name in ("coords", "contour_index", "tissue_mask")
        limit = 0.0 if exact else 2.0 if name.startswith("heatmap") else meta["tolerance"]["overlay_rank"]
        yield Check(case, name, math.inf if np.isnan(gap) else float(gap), limit)
