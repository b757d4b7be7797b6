"""Radiographs: DICOM, NIfTI, PNG and JPEG read and augmented through MONAI."""

from __future__ import annotations

import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medical.dicom import DicomReader, Identifiers
from polyhead.data import Samples, Split
from polyhead.decoding import MAX_PIXELS, decode_image
from polyhead.errors import BadSample, UserError, reason
from polyhead.picture_data import Embedded, PictureData
from polyhead.pictures import Resize, Square, to_tensor
from polyhead.sources import IMAGE_SUFFIXES, SPLIT_NAMES, Entry, Location, read_bytes, read_head

NIFTI = (".nii", ".nii.gz")
# Class orders that are not alphabetical in the published label lists
ORDERS = (("negative", "positive"), ("normal", "pneumonia", "COVID-19"), ("level2", "level1"))


def drawn_radiographs(count: int = 360, side: int = 64, seed: int = 0) -> Embedded:
    """The embedded sample: grey noise, and in every second picture a soft disc at a random place.

    Classes `clear` and `disc`; the disc is 0.3 * exp(-d^2 / 32) with d in pixels of the 64 x 64 picture.
    """
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((count, 1, side // 4, side // 4)))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    pixels = 0.25 + 0.25 * smooth[:, 0].numpy() + 0.15 * rng.random((count, side, side))
    centres = rng.uniform(10, side - 10, (count, 2))
    grid = np.arange(side)
    distance = (grid[None, :, None] - centres[:, :1, None]) ** 2 + (grid[None, None] - centres[:, 1:, None]) ** 2
    discs = np.arange(count) % 2 == 1
    pixels += discs[:, None, None] * 0.3 * np.exp(-distance / 32)
    splits = ["train" if i < count * 2 // 3 else "val" if i < count * 5 // 6 else "test" for i in range(count)]
    grey = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return Embedded([f"drawn/{i:04d}" for i in range(count)], grey, ["disc" if d else "clear" for d in discs], splits)


# Reading


class Reading(NamedTuple):
    """A radiograph as grey in RGB, and who and what it is where its file says so."""

    image: Image.Image
    identifiers: Identifiers


@contextmanager
def as_file(location: Location) -> Iterator[Path]:
    """The bytes of a location as a file, for readers that want a path."""
    if location.member is None and location.problem is None:
        yield Path(location.path)
        return
    data = read_bytes(location)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(str(location.member)).name
        path.write_bytes(data)
        yield path


def _is_dicom(head: bytes, name: str) -> bool:
    return head[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom"))


def holds_dicom(location: Location) -> bool:
    """Whether a file is DICOM by its preamble: archives name files by their UID, whose end looks like a suffix."""
    return _is_dicom(read_head(location, 132), "")


def grey_picture(values: np.ndarray) -> Image.Image:
    """Values in 0..1, `[H, W]`, as an RGB picture with equal channels."""
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def deep_grey(image: Image.Image) -> np.ndarray | None:
    """Grey of more than 8 bits as 0..1, `[H, W]`, else None.

    White is the largest number of 8, 10, 12, 14 or 16 bits that holds the picture's values: scanners write
    10 to 14 bits into files of 16 without saying so.
    """
    if not (image.mode in ("I", "F") or image.mode.startswith("I;")):
        return None
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        return None
    bits = next((b for b in (8, 10, 12, 14) if values.max() < 2**b), 16)
    return np.clip(values / (2**bits - 1), 0, 1)


def read_radiograph(location: Location, at: float = 0.5, max_pixels: int = MAX_PIXELS) -> Reading:
    """One radiograph from a file or a member of a zip.

    DICOM goes through `medical.dicom`; of a NIfTI volume the axial slice at the share `at` of its depth is
    taken, between its 0.5 and 99.5 percentiles; other pictures as `polyhead.decoding` reads them.

    Raises:
        BadSample: what cannot be read, with the reason in one line.
    """
    name = location.member or location.path
    data = read_bytes(location)
    try:
        if _is_dicom(data[:132], name):
            with as_file(location) as path:
                values, identifiers = _monai_read(path, DicomReader(max_pixels))
            return Reading(grey_picture(values), identifiers)
        if name.lower().endswith(NIFTI):
            with as_file(location) as path:
                return Reading(grey_picture(_nifti_slice(path, at)), Identifiers())
    except BadSample:
        raise
    except Exception as error:  # readers raise almost anything on damaged files
        raise BadSample(f"the image is damaged: {reason(error)}") from error
    return Reading(_picture(data, max_pixels), Identifiers())


def _picture(data: bytes, max_pixels: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "TIFF", "JPEG2000")) as image:
            if image.mode.startswith("I") and image.width * image.height <= max_pixels:
                grey = deep_grey(image)
                if grey is not None:
                    return grey_picture(grey)
    except Exception:  # the general decoder says what is wrong with it
        pass
    return decode_image(data, max_pixels)


def _monai_read(path: Path, reader: DicomReader) -> tuple[np.ndarray, Identifiers]:
    # Without MONAI's LoadImage, which makes all of its own readers for each picture and warns of those it cannot
    values, _ = reader.get_data(reader.read(str(path)))
    return np.asarray(values, dtype=np.float64).T, reader.identifiers


def _nifti_slice(path: Path, at: float) -> np.ndarray:
    from monai.data import MetaTensor, NibabelReader
    from monai.transforms import EnsureChannelFirstd, Orientationd

    reader = NibabelReader()
    volume = MetaTensor.ensure_torch_and_prune_meta(*reader.get_data(reader.read(str(path))))
    if volume.ndim not in (2, 3):
        raise BadSample(f"a NIfTI file of {volume.ndim} dimensions is no radiograph: 2 or 3 are read")
    if volume.ndim == 2:
        values = np.asarray(volume, dtype=np.float64)
    else:
        # Rows run to the back and columns to the left, as a radiologist looks at an axial slice
        single = EnsureChannelFirstd("image", channel_dim="no_channel")({"image": volume})
        turned = Orientationd("image", axcodes="LPS", labels=None)(single)["image"]
        values = np.asarray(turned[0, ..., min(int(at * turned.shape[-1]), turned.shape[-1] - 1)], dtype=np.float64)
    if not np.isfinite(values).any():
        raise BadSample("the image holds no finite value")
    low, high = np.nanpercentile(np.where(np.isfinite(values), values, np.nan), [0.5, 99.5])
    if high <= low:
        high = low + 1
    return np.nan_to_num((values - low) / (high - low)).T


@dataclass(frozen=True)
class RadiographFiles:
    """Fetches radiographs by their locations; `identify` gives their identifiers too."""

    locations: Sequence[Location]
    at: float
    max_pixels: int

    def identify(self, index: int) -> Reading:
        return read_radiograph(self.locations[index], self.at, self.max_pixels)

    def __call__(self, index: int) -> Image.Image:
        return self.identify(index).image


class Identified:
    """Samples of prediction: `image`, and `about` it `patient`, `study`, `instance` (empty where unnamed)."""

    def __init__(self, ids: Sequence[str], files: RadiographFiles, square: Square) -> None:
        self.ids, self.files, self.square = list(ids), files, square

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        reading = self.files.identify(index)
        image = to_tensor(self.square(reading.image))
        return {"id": self.ids[index], "image": image, "about": reading.identifiers._asdict()}


# Augmenting


@dataclass
class MonaiAugment:
    """MONAI's dictionary transforms on one grey picture, a function of the picture and of its generator.

    Args:
        square: the evaluation transform, which comes first.
        flip: probability of mirroring left and right.
        rotate: degrees either way.
        zoom: range of the scale.
        shift: share of the side either way.
        gamma, contrast: ranges of the exponent and of the factor about the mean.
        brightness: of white, either way.
        blur: largest deviation of a Gaussian blur in pixels, applied to every fourth picture; 0 is off.
        noise: largest deviation of added noise, of white; 0 is off.
    """

    square: Square
    flip: float = 0.5
    rotate: float = 10.0
    zoom: tuple[float, float] = (0.79, 1.23)
    shift: float = 0.06
    gamma: tuple[float, float] = (0.7, 1.4)
    contrast: tuple[float, float] = (0.75, 1.3)
    brightness: float = 0.1
    blur: float = 1.0
    noise: float = 0.03
    _transforms: Any = field(init=False, default=None)

    @cached_property
    def transforms(self) -> Any:
        from monai import transforms as m

        side = self.square.size
        turn = float(np.deg2rad(self.rotate))
        # MONAI scales the sampling grid, so that its factor is the inverse of ours
        scale = (1 / self.zoom[1] - 1, 1 / self.zoom[0] - 1)
        steps: list[Any] = [
            m.RandFlipd("image", prob=self.flip, spatial_axis=1),
            m.RandAffined(
                "image", prob=1.0, rotate_range=(-turn, turn), scale_range=[scale, scale],
                translate_range=[self.shift * side, self.shift * side], mode="bilinear", padding_mode="zeros",
            ),
            m.RandAdjustContrastd("image", prob=1.0, gamma=self.gamma),
            m.RandScaleIntensityFixedMeand(
                "image", prob=1.0, factors=(self.contrast[0] - 1, self.contrast[1] - 1), fixed_mean=True
            ),
            m.RandShiftIntensityd("image", prob=1.0, offsets=self.brightness),
        ]  # fmt: skip
        if self.blur:
            spread = (0.1, self.blur)
            steps.append(m.RandGaussianSmoothd("image", prob=0.25, sigma_x=spread, sigma_y=spread))
        if self.noise:
            steps.append(m.RandGaussianNoised("image", prob=0.5, std=self.noise))
        return m.Compose(steps)

    def __call__(self, image: Image.Image, source: torch.Generator) -> Tensor:
        """uint8 `[3, S, S]`."""
        grey = torch.from_numpy(np.array(self.square(image).convert("L"))).float()[None] / 255
        self.transforms.set_random_state(seed=int(torch.randint(2**31, (1,), generator=source)))
        made = torch.as_tensor(self.transforms({"image": grey})["image"]).clamp(0, 1)
        return (made * 255).round().to(torch.uint8).expand(3, -1, -1).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "transforms"}


# COVIDx


def covidx_lists(root: Path, name: str | None) -> list[Entry] | None:
    """The pictures that COVIDx label lists name (`train*.txt`, `test*.txt`), or None where there are none.

    A line is `patient file label source`; a patient's name may hold blanks, so it is read from the right.
    Files lie in `train/` and `test/` beside the lists, or beside them. A `name` chooses lists that hold it.

    Raises:
        UserError: several lists for one part, or a line that is none.
    """
    if not root.is_dir():
        return None
    lists = sorted(p for p in root.glob("*.txt") if re.match(r"(train|val|test)", p.stem.lower()))
    lists = [p for p in lists if name is None or name.lower() in p.stem.lower()]
    if not lists or not _looks_like_covidx(lists[0]):
        return None
    entries, seen = [], set()
    for path in lists:
        split = SPLIT_NAMES[re.match(r"(train|val|test)", path.stem.lower()).group()]  # type: ignore[union-attr]
        if split in seen:
            raise UserError(
                f"{root} holds several lists of the {split} part: choose by --data.name, such as {path.stem}"
            )
        seen.add(split)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            parts = line.rsplit(None, 3)
            if len(parts) != 4:
                raise UserError(f"{path} line {number} is not `patient file label source`: {line.strip()[:60]}")
            patient, file, label, _ = parts
            # With a blank in the patient's name the file follows its last word
            found = next((p for p in (root / split / file, root / file) if p.is_file()), None)
            problem = None if found else f"no such file: {split}/{file} (named by {path.name} line {number})"
            location = Location(str(found or root / split / file), None, problem)
            entries.append(Entry(f"{split}/{file}", label, split, patient, location))
    return entries


def _looks_like_covidx(path: Path) -> bool:
    """Whether one of the first lines names a file of a picture in its place."""
    lines = [line.rsplit(None, 3) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[:20]]
    return any(len(parts) == 4 and Path(parts[1]).suffix.lower() in IMAGE_SUFFIXES for parts in lines)


def _patient(entry: Entry) -> str | None:
    """PatientID of a DICOM file, None for other files and where there is none."""
    from pydicom import dcmread

    name = entry.location.member or entry.location.path
    if entry.location.problem or Path(name).suffix.lower() in IMAGE_SUFFIXES or name.lower().endswith(NIFTI):
        return None
    try:
        with as_file(entry.location) as path, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"], force=True)
    except Exception:  # what is wrong with it is said when it is read
        return None
    return str(header.get("PatientID", "") or "").strip() or None


class RadiographData(PictureData):
    """Radiographs with a class each: class folders, tables, COVIDx lists; PNG, JPEG, DICOM and NIfTI.

    Samples are `image` uint8 `[3, S, S]`, grey in three channels; both views of the network are made from it,
    so they are always augmented together. Prediction adds `patient`, `study` and `instance` where a DICOM file
    names them. Without a root: `drawn_radiographs`. Parts are cut by patient: of `group_column`, or of a DICOM
    file's own PatientID.

    Args:
        root, name, batch_size: see `polyhead.picture_data.PictureData`.
        image_size: side S in pixels.
        resize: `squash` (as published), `pad` or `crop`.
        slice_at: which axial slice of a volume, as a share of its depth.
        anonymise: leave `patient`, `study` and `instance` out of predictions.
        flip, rotate, zoom, shift, gamma, contrast, brightness, blur, noise: see `MonaiAugment`.
        pictures: the other arguments of `PictureData`, but for its augmentation.
    """

    suffixes = IMAGE_SUFFIXES | {".dcm", ".dicom", ".nii", ".gz", ""}
    known = staticmethod(holds_dicom)

    def __init__(
        self, root: str | None = None, name: str | None = None, image_size: int = 224,
        resize: Resize = "squash", slice_at: float = 0.5, anonymise: bool = False, flip: float = 0.5,
        rotate: float = 10.0, zoom: tuple[float, float] = (0.79, 1.23), shift: float = 0.06,
        gamma: tuple[float, float] = (0.7, 1.4), contrast: tuple[float, float] = (0.75, 1.3),
        brightness: float = 0.1, blur: float = 1.0, noise: float = 0.03, batch_size: int = 32, **pictures: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            root, name, image_size, crop_fraction=1.0, resize=resize, scale=None, ratio=(1.0, 1.0), flip=flip,
            flip_vertical=0.0, policy="none", colour=0.0, erase=0.0, batch_size=batch_size, **pictures,
        )  # fmt: skip
        for option, pair in {"zoom": zoom, "gamma": gamma, "contrast": contrast}.items():
            if not 0 < pair[0] <= pair[1]:
                raise UserError(f"data.{option} is {list(pair)}: 0 < low <= high is needed")
        for option, value in {
            "rotate": rotate,
            "shift": shift,
            "brightness": brightness,
            "blur": blur,
            "noise": noise,
        }.items():
            if value < 0:
                raise UserError(f"data.{option} is {value:g}: it must be 0 or more")
        if not 0 <= slice_at <= 1:
            raise UserError(f"data.slice_at is {slice_at:g}: it must be between 0 and 1")
        self.slice_at, self.anonymise = slice_at, anonymise
        self.augment = MonaiAugment(self.square, flip, rotate, zoom, shift, gamma, contrast, brightness, blur, noise)

    def embedded(self) -> Embedded:
        return drawn_radiographs()

    def find(self, everything: bool) -> list[Entry]:
        listed = None if everything else covidx_lists(Path(str(self.root)).expanduser(), self.name)
        return super().find(everything) if listed is None else listed

    def parts(self) -> dict[str, np.ndarray]:
        free = self.classes is None
        parts = super().parts()
        published = next((o for o in ORDERS if set(o) == set(self.classes or ())), None)
        if free and published is not None:
            self.classes = list(published)
        return parts

    def entries(self) -> list[Entry]:
        """Pictures for training and evaluation; a DICOM file's patient is its group where no column names one."""
        first = self._entries is None
        entries = super().entries()
        if first and self.root is not None and self.columns["group_column"] is None:
            self._entries = [e if e.group else e._replace(group=_patient(e)) for e in entries]
        return self._entries or entries

    def fetch(self, entries: Sequence[Entry], target: int) -> Callable[[int], Image.Image]:
        return RadiographFiles([e.location for e in entries], self.slice_at, self.max_pixels)

    def dataset(self, split: Split) -> Samples:
        if split != "predict" or self.anonymise or self.root is None:
            return super().dataset(split)
        entries = self._everything
        files = RadiographFiles([e.location for e in entries], self.slice_at, self.max_pixels)
        return Identified([e.id for e in entries], files, self.square)

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        """Paths (DICOM and NIfTI too), bytes, Pillow images, arrays and tensors, as in prediction."""
        if not self.anonymise and all(isinstance(item, (str, Path)) for item in items):
            names = [os.fspath(item) for item in items]
            files = RadiographFiles(
                [Location(str(Path(n).expanduser())) for n in names], self.slice_at, self.max_pixels
            )
            return Identified(names, files, self.square)
        return super().raw_dataset(items)
