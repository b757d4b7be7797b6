"""Whole-slide files: reading at a physical resolution, and `polyhead tile`, from slides to features.

A slide becomes `features/SLIDE.h5` (`features`, `coords`, and attributes that say how they were made), in
TRIDENT's layout, and `qc/SLIDE.png` with the tissue and the grid. What cannot be read stands in
`errors.parquet`, and the cohort goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from medical.tissue import PRESETS, Contour, find_tissue, patch_grid
from polyhead.decoding import decode_image
from polyhead.encoders import create_encoder, normalisation
from polyhead.errors import BadSample, UserError, nearest, reason
from polyhead.files import atomic_write
from polyhead.predictions import PredictionWriter
from polyhead.sources import existing

SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".bif", ".dcm", ".png", ".jpg", ".jpeg"}
PLAIN = {".png", ".jpg", ".jpeg"}
THUMBNAIL = 1536


class Slide:
    """A slide file, or an ordinary picture as a slide of one level.

    Attributes:
        size: width and height at level 0.
        mpp: micrometres a pixel at level 0, or None where the file does not say.
        downsamples: of each level.

    Raises:
        BadSample: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._slide: Any = None
        self._array: np.ndarray | None = None
        try:
            self._open()
        except BadSample:
            raise
        except Exception as error:  # openslide and tifffile raise kinds of their own
            raise BadSample(f"the slide cannot be opened: {reason(error)}") from error

    def _open(self) -> None:
        self.mpp: float | None = None
        if self.path.suffix.lower() in PLAIN:
            self._array = np.asarray(decode_image(self.path.read_bytes()))
        else:
            openslide = _openslide()
            try:
                self._slide = openslide.OpenSlide(str(self.path))
            except openslide.OpenSlideUnsupportedFormatError:
                self._array = _tiff(self.path)
        if self._slide is not None:
            self.size: tuple[int, int] = self._slide.dimensions
            self.downsamples = [float(d) for d in self._slide.level_downsamples]
            said = self._slide.properties
            power = said.get("openslide.objective-power")
            mpp = said.get("openslide.mpp-x")
            self.mpp = float(mpp) if mpp else 10 / float(power) if power else None
        else:
            assert self._array is not None
            self.size, self.downsamples = (self._array.shape[1], self._array.shape[0]), [1.0]

    def read(self, x: int, y: int, side: int, pixels: int) -> np.ndarray:
        """The square of `side` level-0 pixels at (x, y) as RGB uint8 `[pixels, pixels, 3]`.

        Read from the coarsest level that is not coarser than asked, then resampled. Beyond the slide is white.
        """
        wanted = side / pixels
        level = max((i for i, d in enumerate(self.downsamples) if d <= wanted * 1.01), default=0)
        size = max(1, round(side / self.downsamples[level]))
        if self._slide is not None:
            try:
                region = self._slide.read_region((x, y), level, (size, size))
            except Exception as error:
                raise BadSample(f"the slide is damaged at {x}, {y}: {reason(error)}") from error
            ground = Image.new("RGB", region.size, "white")
            ground.paste(region, mask=region.getchannel("A"))
            tile = np.asarray(ground)
        else:
            assert self._array is not None
            tile = np.full((size, size, 3), 255, np.uint8)
            part = self._array[max(y, 0) : y + size, max(x, 0) : x + size]
            tile[: part.shape[0], : part.shape[1]] = part
        if size == pixels:
            return tile
        how = cv2.INTER_AREA if size > pixels else cv2.INTER_CUBIC
        return cv2.resize(tile, (pixels, pixels), interpolation=how)

    def thumbnail(self) -> tuple[np.ndarray, tuple[float, float]]:
        """A small picture of the whole, and level-0 pixels per pixel of it; made here where there is no pyramid."""
        scale = max(1.0, max(self.size) / THUMBNAIL)
        size = (max(1, round(self.size[0] / scale)), max(1, round(self.size[1] / scale)))
        if self._slide is not None:
            picture = np.asarray(self._slide.get_thumbnail(size).convert("RGB"))
        else:
            assert self._array is not None
            picture = cv2.resize(self._array, size, interpolation=cv2.INTER_AREA)
        return picture, (self.size[0] / picture.shape[1], self.size[1] / picture.shape[0])


def _openslide() -> Any:
    try:
        import openslide
    except ImportError as error:
        raise UserError('slides need the extra: pip install "polyhead[slides]"') from error
    return openslide


def _tiff(path: Path) -> np.ndarray:
    import tifffile

    array = tifffile.imread(path)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, 2)
    if array.ndim != 3 or array.shape[2] < 3 or array.dtype != np.uint8:
        raise BadSample(f"a TIFF of shape {list(array.shape)} and {array.dtype}: 8-bit RGB is read")
    return np.ascontiguousarray(array[..., :3])


# ---- encoders


def tile_encoder(name: str) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Tiles RGB uint8 `[B, P, P, 3]` -> features float32 `[B, F]`: a timm name, the offline encoder, or a file.

    A TorchScript (`.pt`) or ONNX file takes RGB `[B, 3, P, P]` with ImageNet's normalisation.

    Raises:
        UserError: no such encoder or file.
    """
    if name.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(existing(name)), providers=["CPUExecutionProvider"])
        key = session.get_inputs()[0].name
        mean, std = normalisation("resnet18")
        return lambda tiles: session.run(None, {key: _prepare(tiles, mean, std).numpy()})[0], Path(name).name
    if name.endswith((".pt", ".torchscript")):
        try:
            module: Any = torch.jit.load(str(existing(name)), map_location="cpu").eval()
        except RuntimeError as error:
            raise UserError(f"{name} is no TorchScript file: {reason(error)[:160]}") from error
        mean, std = normalisation("resnet18")
        label = Path(name).name
    else:
        module, (mean, std), label = create_encoder(name, 0).eval(), normalisation(name), name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = module.to(device)

    def encode(tiles: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(_prepare(tiles, mean, std).to(device)).float().cpu().numpy()

    return encode, label


def _prepare(tiles: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# ---- the command


def find_slides(root: str) -> list[Path]:
    """A slide, or all slides in a folder, sorted. Raises UserError when there are none."""
    path = existing(root)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not found:
        raise UserError(f"no slides in {path}", [f"read are: {', '.join(sorted(SUFFIXES))}"])
    stems = [p.stem for p in found]
    double = next((s for s in stems if stems.count(s) > 1), None)
    if double is not None:
        raise UserError(f"two slides in {path} are called {double}: their features would share a file")
    return found


def qc_picture(
    thumbnail: np.ndarray, contours: list[Contour], coords: np.ndarray, patch: int, scale: float
) -> np.ndarray:
    """The thumbnail with tissue outlined in green, holes in blue, and the grid in grey."""
    picture = thumbnail.copy()
    for x, y in coords / scale:
        side = patch / scale
        cv2.rectangle(picture, (int(x), int(y)), (int(x + side), int(y + side)), (90, 90, 90), 1)
    for outline, holes in contours:
        cv2.drawContours(picture, [(outline / scale).astype(np.int32)], -1, (0, 160, 0), 2)
        cv2.drawContours(picture, [(h / scale).astype(np.int32) for h in holes], -1, (0, 0, 220), 2)
    return picture


def _tiles(slide: Slide, coords: np.ndarray, side: int, pixels: int, batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(coords), batch):
        yield np.stack([slide.read(int(x), int(y), side, pixels) for x, y in coords[start : start + batch]])


def write_features(path: Path, batches: Iterator[np.ndarray], coords: np.ndarray, attributes: dict[str, Any]) -> int:
    """Features of a slide as they come, float16, in TRIDENT's layout; the file appears when it is complete."""
    import h5py

    done = 0
    with atomic_write(path) as temporary, h5py.File(temporary, "w") as file:
        data = None
        for features in batches:
            if data is None:
                shape = (len(coords), features.shape[1])
                chunk = (min(2048, len(coords)), features.shape[1])
                data = file.create_dataset("features", shape, np.float16, chunks=chunk)
            data[done : done + len(features)] = features
            done += len(features)
        where = file.create_dataset("coords", data=coords)
        for key, value in attributes.items():
            where.attrs[key] = value
    return done


def tile(
    slides: str,
    output: str,
    encoder: str = "encoder:efficientnet_lite0",
    mpp: float = 0.5,
    pixels: int = 224,
    overlap: int = 0,
    preset: str = "small",
    slide_mpp: float | None = None,
    batch_size: int = 32,
    save_tiles: bool = False,
    strict: bool = False,
) -> None:
    """Cut slides into tiles on tissue and describe each by an encoder; slides that are done are left alone.

    Args:
        slides: a slide or a folder of them.
        output: gets features/, qc/ and errors.parquet.
        encoder: encoder:efficientnet_lite0, a timm name, or a TorchScript or ONNX file.
        mpp: micrometres a pixel of the tiles.
        pixels: side of a tile.
        overlap: pixels that neighbouring tiles share.
        preset: how tissue is found (clam, bwh_biopsy, bwh_resection, tcga, small).
        slide_mpp: resolution of slides whose file does not say theirs; without it they are taken at level 0.
        batch_size: tiles encoded together.
        save_tiles: also write the tiles as PNG files.
        strict: exit with status 2 when a slide could not be read.
    """
    if preset not in PRESETS:
        near = nearest(preset, PRESETS) or list(PRESETS)
        raise UserError(f"no tissue preset {preset!r}", [f"did you mean {', '.join(near)}?"])
    if not 0 <= overlap < pixels:
        raise UserError(f"overlap is {overlap}: it must be smaller than the tile of {pixels} pixels")
    if mpp <= 0 or pixels < 1:
        raise UserError(f"mpp {mpp:g} and pixels {pixels} must be above 0")
    paths = find_slides(slides)
    encode, label = tile_encoder(encoder)
    folder = Path(output)
    made = failed = 0
    with PredictionWriter(folder, resume=True) as errors:
        for path in tqdm(paths, "slides", disable=len(paths) < 2 or not sys.stderr.isatty()):
            target = folder / "features" / f"{path.stem}.h5"
            if target.exists():
                continue
            try:
                count = _one(path, folder, target, encode, label, mpp, slide_mpp, pixels, overlap, preset, batch_size,
                             save_tiles)  # fmt: skip
            except BadSample as error:
                failed += 1
                errors.add_error(path.name, str(error))
                continue
            made += 1
            print(f"{path.name}: {count} tiles", file=sys.stderr)
    print(f"{made} slides in {folder / 'features'}, {len(paths) - made - failed} were done before", file=sys.stderr)
    if failed:
        text = f"{failed} slides could not be read: {folder / 'errors.parquet'} says why"
        if strict:
            raise UserError(text)
        print(text, file=sys.stderr)


def _one(
    path: Path, folder: Path, target: Path, encode: Callable[[np.ndarray], np.ndarray], label: str, mpp: float,
    slide_mpp: float | None, pixels: int, overlap: int, preset: str, batch: int, save_tiles: bool,
) -> int:  # fmt: skip
    slide = Slide(path)
    own = slide.mpp or slide_mpp
    scale = mpp / own if own else 1.0
    side, step = max(1, round(pixels * scale)), max(1, round((pixels - overlap) * scale))
    thumbnail, downsample = slide.thumbnail()
    options = PRESETS[preset]
    contours = find_tissue(thumbnail, downsample, options)
    coords, _ = patch_grid(contours, slide.size, side, step)
    picture = qc_picture(thumbnail, contours, coords, side, downsample[0])
    with atomic_write(folder / "qc" / f"{path.stem}.png") as temporary:
        Image.fromarray(picture).save(temporary)
    if not len(coords):
        raise BadSample(f"no tissue found with the preset {preset}")
    attributes: dict[str, Any] = {
        "name": path.stem, "encoder": label, "patch_size": pixels, "patch_size_level0": side,
        "overlap": overlap, "mpp": mpp if own else 0.0, "level0_mpp": own or 0.0,
        "level0_width": slide.size[0], "level0_height": slide.size[1],
        **{f"tissue_{k}": v for k, v in asdict(options).items()},
    }  # fmt: skip

    def batches() -> Iterator[np.ndarray]:
        done = 0
        for tiles in _tiles(slide, coords, side, pixels, batch):
            if save_tiles:
                for picture, (x, y) in zip(tiles, coords[done : done + len(tiles)], strict=True):
                    with atomic_write(folder / "tiles" / path.stem / f"{x}_{y}.png") as temporary:
                        Image.fromarray(picture).save(temporary)
            done += len(tiles)
            yield encode(tiles)

    return write_features(target, batches(), coords, attributes)
