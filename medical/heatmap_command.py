"""`polyhead heatmap`: where a bag classifier looked on a slide or a photograph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import polyhead
from medical.bags import Instances, read_h5
from medical.heatmaps import Scale, contact_sheet, overlay, paint, scaled, write_geojson
from medical.slides import Slide
from medical.tasks import SlideClassifier, StandardisedRows
from polyhead.errors import BadSample, UserError
from polyhead.files import atomic_write
from polyhead.sources import existing

TILE_PICTURE = 160


def _attention(system: SlideClassifier, instances: Instances) -> tuple[np.ndarray, np.ndarray]:
    """Attention of every branch `[K, N]` (mean of its heads), and class probabilities `[C]`."""
    rows = torch.from_numpy(np.array(instances.features))
    if rows.shape[1] != system.network.d_feat:
        found, wanted = rows.shape[1], system.network.d_feat
        raise UserError(f"the features have {found} columns, the model takes {wanted}: of another encoder?")
    output = system.network.stream(StandardisedRows(system, rows))
    weights = output.attention_logits[0].double().softmax(-1).mean(0)
    return weights.numpy(), output.slide_logits.softmax(-1)[0].numpy()


def _write_raster(path: Path, heat: np.ndarray, pixel: float | None) -> None:
    """A map as OME-TIFF, float32, with its pixel size in micrometres: QuPath opens it beside the slide."""
    try:
        import tifffile
    except ImportError as error:
        raise UserError('heat maps need the extra: pip install "polyhead[slides]"') from error
    size = {"PhysicalSizeX": pixel, "PhysicalSizeY": pixel} if pixel else {}
    with atomic_write(path) as temporary:
        tifffile.imwrite(temporary, heat.astype(np.float32), ome=True, metadata={"axes": "YX", **size})


def heatmap(
    slide: str,
    ckpt_path: str,
    output: str,
    features: str | None = None,
    scale: Scale = "percentile",
    alpha: float = 0.4,
    top: int = 10,
) -> None:
    """Draw a bag classifier's attention over a slide or photograph, and write it for QuPath.

    Args:
        slide: the slide or picture.
        ckpt_path: the model: a checkpoint, a bundle or a shipped model.
        output: gets NAME.png (all branches), NAME_branch1.png ..., NAME_top.png, NAME.geojson, NAME.ome.tif
            and NAME.parquet with the scores.
        features: of `polyhead tile`; not needed where the model encodes pictures itself.
        scale: percentile, rank, minmax, or relative (1 is uniform attention).
        alpha: share of the colour in the overlay.
        top: tiles in the contact sheet.
    """
    path = existing(slide)
    model = polyhead.load(ckpt_path)
    system: Any = model.system
    if not isinstance(system, SlideClassifier):
        raise UserError(f"{ckpt_path} is no bag classifier")
    try:
        source = Slide(path)
        if features is not None:
            instances = read_h5(existing(features))
            patch = int(instances.meta.get("patch_size_level0", 0))
        elif getattr(model.data, "encoder_name", None):
            instances = model.data.raw_dataset([str(path)]).bags[0].read()  # type: ignore[attr-defined]
            patch = round(source.size[0] / instances.meta["grid"][1])
        else:
            raise UserError(f"{ckpt_path} takes features: give --features FILE, which `polyhead tile` writes")
    except BadSample as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if instances.coords is None or not patch:
        raise UserError(f"{features} has no coordinates or does not say its patch size: `polyhead tile` writes both")
    branches, probabilities = _attention(system, instances)
    best = int(probabilities.argmax())
    picture, downsample = source.thumbnail()
    size = (picture.shape[1], picture.shape[0])
    folder, name = Path(output), path.stem
    bag = branches.mean(0)

    def drawn(attention: np.ndarray) -> np.ndarray:
        return paint(scaled(attention, scale), instances.coords, patch, size, downsample[0])  # type: ignore[arg-type]

    pictures = {name: bag} | {f"{name}_branch{k + 1}": row for k, row in enumerate(branches) if len(branches) > 1}
    for stem, attention in pictures.items():
        with atomic_write(folder / f"{stem}.png") as temporary:
            Image.fromarray(overlay(picture, drawn(attention), alpha=alpha)).save(temporary)
    write_geojson(folder / f"{name}.geojson", instances.coords, patch,
                  {"attention": bag, "rank": scaled(bag, "rank")})  # fmt: skip
    _write_raster(folder / f"{name}.ome.tif", drawn(bag), source.mpp and source.mpp * downsample[0])
    order = np.argsort(-bag, kind="stable")[:top]
    pixels = min(patch, TILE_PICTURE)
    tiles = [source.read(int(x), int(y), patch, pixels) for x, y in instances.coords[order]]
    figure = contact_sheet(tiles, [f"{bag[i] * len(bag):.1f} x" for i in order])
    with atomic_write(folder / f"{name}_top.png") as temporary:
        figure.savefig(temporary, dpi=110)
    table = {"x": instances.coords[:, 0], "y": instances.coords[:, 1], "attention": bag,
             **{f"branch{k + 1}": row for k, row in enumerate(branches)}}  # fmt: skip
    with atomic_write(folder / f"{name}.parquet") as temporary:
        pq.write_table(pa.table(table), temporary)
    verdict = f"{system.classes[best]} {probabilities[best]:.3f}"
    print(f"{name}: {verdict}, {len(bag)} tiles; maps in {folder}", file=sys.stderr)
