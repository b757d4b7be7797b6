"""Slides: tissue and grid where the fixture is silent, reading, and the commands on a real file."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medical.heatmaps import paint, scaled
from medical.slides import Slide
from medical.tissue import TissueOptions, find_tissue, patch_grid
from tests.command import polyhead

ONE = (1.0, 1.0)


def drawn(*holes: tuple[int, int, int]) -> np.ndarray:
    """Saturated tissue of 300 x 200 on white, with square holes (x, y, side)."""
    picture = np.full((300, 400, 3), 255, np.uint8)
    cv2.rectangle(picture, (40, 40), (339, 239), (200, 30, 120), -1)
    for x, y, side in holes:
        cv2.rectangle(picture, (x, y), (x + side - 1, y + side - 1), (255, 255, 255), -1)
    return picture


def options(**changes: object) -> TissueOptions:
    plain = {"blur": 1, "close": 0, "area": 0.0, "hole_area": 0.0, "reference": 10}
    return TissueOptions(**{**plain, **changes})  # type: ignore[arg-type]


def test_holes_count_from_their_area_and_the_largest_stay() -> None:
    picture = drawn((60, 60, 20), (120, 60, 40), (200, 60, 30))
    (all_holes,) = find_tissue(picture, ONE, options())
    assert len(all_holes.holes) == 3
    (above,) = find_tissue(picture, ONE, options(hole_area=8.0))
    assert len(above.holes) == 2
    (largest,) = find_tissue(picture, ONE, options(max_holes=1))
    assert cv2.boundingRect(largest.holes[0])[2] > 38


def test_the_area_of_holes_is_not_tissue() -> None:
    hole = (80, 60, 150)
    tissue = 300 * 200 - 150 * 150
    limit = tissue / 100
    assert find_tissue(drawn(hole), ONE, options(area=limit * 0.95))
    assert not find_tissue(drawn(hole), ONE, options(area=limit * 1.1))
    assert find_tissue(drawn(), ONE, options(area=limit * 1.1))


def test_padding_lets_the_last_patches_leave_the_slide() -> None:
    picture = np.full((100, 100, 3), (200, 30, 120), np.uint8)
    contours = find_tissue(picture, ONE, options())
    beyond, _ = patch_grid(contours, (100, 100), 40, 40, padding=True)
    within, _ = patch_grid(contours, (100, 100), 40, 40, padding=False)
    assert beyond.max() == 80 and within.max() == 40
    assert len(within) == 4 and len(beyond) == 9


@pytest.mark.parametrize(("test", "count"), [("four_pt", 9), ("four_pt_hard", 4), ("center", 4), ("basic", 9)])
def test_contour_tests(test: str, count: int) -> None:
    picture = np.full((90, 90, 3), 255, np.uint8)
    cv2.rectangle(picture, (0, 0), (49, 49), (200, 30, 120), -1)
    contours = find_tissue(picture, ONE, options())
    coords, _ = patch_grid(contours, (90, 90), 20, 20, test)  # type: ignore[arg-type]
    assert len(coords) == count


def test_overlapping_patches_are_averaged() -> None:
    heat = paint(np.array([0.0, 1.0]), np.array([[0, 0], [5, 0]]), 10, (20, 10), 1.0)
    assert heat[0, 2] == 0 and heat[0, 7] == 0.5 and heat[0, 12] == 1 and np.isnan(heat[0, 17])


def test_scales_of_attention() -> None:
    attention = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(scaled(attention, "relative"), 4 * attention)
    np.testing.assert_allclose(scaled(attention, "percentile"), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(scaled(attention, "minmax"), [0, 1 / 3, 2 / 3, 1])


def test_a_region_is_resampled_and_white_beyond_the_slide(shared: Path) -> None:
    slide = Slide(shared / "data/wsi-sample/CMU-1-Small-Region.svs")
    assert slide.size == (2220, 2967) and slide.mpp == pytest.approx(0.499)
    fine, coarse = slide.read(800, 800, 512, 512), slide.read(800, 800, 512, 128)
    shrunk = cv2.resize(fine, (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(int) - coarse).max() <= 1
    assert (slide.read(2200, 2900, 512, 64)[-8:, -8:] == 255).all()


def test_tile_a_cohort_and_draw_a_heat_map(shared: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "real.svs").symlink_to(shared / "data/wsi-sample/CMU-1-Small-Region.svs")
    (slides / "broken.svs").write_bytes(b"nothing of a slide")
    Image.new("RGB", (300, 300), "white").save(slides / "empty.png")
    words = ("tile", "--slides", slides, "--output", tmp_path / "out", "--mpp", 1.0)
    done = polyhead(*words)
    assert done.status == 0, done.err
    errors = {r["id"]: r["reason"] for r in pq.read_table(tmp_path / "out/errors.parquet").to_pylist()}
    assert set(errors) == {"broken.svs", "empty.png"} and "no tissue" in errors["empty.png"]
    file = tmp_path / "out/features/real.h5"
    with h5py.File(file) as content:
        count, width = content["features"].shape
        said = dict(content["coords"].attrs)
    assert width == 1280 and count > 4
    assert said["patch_size_level0"] == round(224 * 1.0 / 0.499) and said["encoder"] == "encoder:efficientnet_lite0"
    assert (tmp_path / "out/qc/empty.png").is_file()
    before = file.stat().st_mtime_ns
    again = polyhead(*words)
    assert again.status == 0 and "1 were done before" in again.err
    assert file.stat().st_mtime_ns == before

    rng = np.random.default_rng(0)
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    for index in range(8):
        with h5py.File(cohort / f"train_{index}.h5", "w") as content:
            content["features"] = rng.normal(size=(12, width)).astype(np.float32) + index % 2
    rows = "\n".join(f"train_{i},{i % 2},{'train' if i < 4 else 'val'}" for i in range(8))
    (cohort / "labels.csv").write_text(f"slide_id,label,split\n{rows}\n")
    fit = polyhead("fit", "--config", "medical/acmil", "--data.root", cohort, "--trainer.max_epochs", 1,
                   "--output", tmp_path / "fit")  # fmt: skip
    assert fit.status == 0, fit.err
    words = ("heatmap", "--slide", slides / "real.svs", "--features", file, "--output", tmp_path / "maps")
    mapped = polyhead(*words, "--ckpt_path", tmp_path / "fit/bundle")
    assert mapped.status == 0, mapped.err
    names = {p.name for p in (tmp_path / "maps").iterdir()}
    assert {"real.png", "real_branch1.png", "real_top.png", "real.geojson", "real.ome.tif", "real.parquet"} <= names
    squares = json.loads((tmp_path / "maps/real.geojson").read_text())["features"]
    assert len(squares) == count
    table = pq.read_table(tmp_path / "maps/real.parquet")
    assert sum(table["attention"].to_pylist()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tile", "--slides", "none", "--output", "o"), "none"),
        (("tile", "--slides", ".", "--output", "o"), "no slides in"),
        (("tile", "--slides", ".", "--output", "o", "--preset", "bwh"), "no tissue preset 'bwh'"),
        (("heatmap", "--slide", "none.svs", "--ckpt_path", "x", "--output", "o"), "none.svs"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = polyhead(*words, cwd=tmp_path)
    assert done.status == 2 and says in done.err, done.err
    assert len(done.err.splitlines()) <= 5
