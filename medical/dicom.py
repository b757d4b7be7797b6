"""DICOM radiographs as grey pictures, in the order that the standard prescribes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from monai.data import ImageReader

from polyhead.errors import BadSample, reason


class Identifiers(NamedTuple):
    """PatientID, StudyInstanceUID and SOPInstanceUID; empty where a file has none."""

    patient: str = ""
    study: str = ""
    instance: str = ""


def grey_values(dataset: Any) -> np.ndarray:
    """The pixels of a radiograph as 0..1, `[H, W]`, white being dense.

    Modality LUT or rescale, then VOI LUT or window (the first of several), then to 0..1, and inversion of
    MONOCHROME1 last (DICOM PS3.3 C.11.1, C.11.2; PS3.4 N.2). Without VOI values the range is that of the
    pixels. Padding is black.

    Raises:
        BadSample: no pixels, several frames, or a kind of picture that is no radiograph.
    """
    from pydicom.pixels import apply_modality_lut, apply_windowing

    if "PixelData" not in dataset:
        raise BadSample("the DICOM file holds no picture")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise BadSample(f"the DICOM file holds {frames} frames: one picture a file is read, export them singly")
    kind = str(dataset.get("PhotometricInterpretation", ""))
    pixels = dataset.pixel_array
    if int(dataset.get("SamplesPerPixel", 1)) == 3:
        return (pixels[..., :3] @ np.array([0.299, 0.587, 0.114])) / (2 ** int(dataset.BitsStored) - 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadSample(f"a DICOM file of kind {kind or 'unknown'} is no radiograph")
    padding = _padding(dataset, pixels)
    values = np.asarray(apply_modality_lut(pixels, dataset), dtype=np.float64)
    if dataset.get("VOILUTSequence"):
        values, high = _look_up(values, dataset.VOILUTSequence[0], signed=bool(values.min() < 0))
        low = 0.0
    elif dataset.get("WindowCenter") not in (None, "") and dataset.get("WindowWidth") not in (None, ""):
        values = np.asarray(apply_windowing(values, dataset), dtype=np.float64)
        low, high = _window_range(dataset)
    else:
        seen = values if padding is None else values[~padding]
        low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    if not (np.isfinite(values).all() and np.isfinite([low, high]).all()):
        raise BadSample("the DICOM file's window or rescale gives values that are not finite")
    grey = np.clip((values - low) / (high - low if high > low else 1.0), 0, 1)
    if kind == "MONOCHROME1":
        grey = 1 - grey
    if padding is not None:
        grey[padding] = 0
    return grey


def _look_up(values: np.ndarray, item: Any, signed: bool) -> tuple[np.ndarray, float]:
    """A VOI table's entries for whole values, and its white.

    pydicom's own look-up wraps at 256 for tables of 8-bit entries with more rows than that.
    """
    count, first, bits = (int(v) for v in item.LUTDescriptor)
    count = count or 2**16
    if signed and first >= 2**15:
        first -= 2**16
    data = item.LUTData
    if isinstance(data, bytes):
        # 8-bit entries of an odd number have a byte of padding
        data = np.frombuffer(data, np.uint8 if len(data) in (count, count + 1) else np.uint16)
    table = np.asarray(data, dtype=np.float64)[:count]
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)], float(2**bits - 1)


def _padding(dataset: Any, pixels: np.ndarray) -> np.ndarray | None:
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit", value)
    low, high = sorted((int(value), int(limit)))
    return (pixels >= low) & (pixels <= high)


def _window_range(dataset: Any) -> tuple[float, float]:
    """What a window is stretched to: the range of the stored values after the modality's step."""
    from pydicom.pixels import apply_modality_lut

    if dataset.get("ModalityLUTSequence"):
        return 0.0, float(2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
    bits = int(dataset.BitsStored)
    stored = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if int(dataset.PixelRepresentation) else (0, 2**bits - 1)
    ends = np.asarray(apply_modality_lut(np.array(stored), dataset), dtype=np.float64)
    return float(ends.min()), float(ends.max())


@contextmanager
def _silently() -> Iterator[None]:
    """pydicom warns of odd headers with lines of its source; what matters of them is refused with a reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _text(value: Any) -> str:
    """An identifier as it stands in the file, in which a backslash separates values."""
    parts = value if isinstance(value, Sequence) and not isinstance(value, str) else [value or ""]
    return "\\".join(str(part) for part in parts).strip()


class DicomReader(ImageReader):
    """MONAI reader of single radiographs; remembers the identifiers of the last one it read.

    Args:
        max_pixels: refuse larger ones.
    """

    def __init__(self, max_pixels: int) -> None:
        super().__init__()
        self.max_pixels = max_pixels
        self.identifiers = Identifiers()

    def verify_suffix(self, filename: Any) -> bool:
        return True

    def read(self, data: Any, **kwargs: Any) -> Any:
        import pydicom

        (path,) = data if isinstance(data, Sequence) and not isinstance(data, str) else (data,)
        with _silently():
            dataset = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:  # old archives leave the preamble out
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        height, width = int(dataset.get("Rows", 0) or 0), int(dataset.get("Columns", 0) or 0)
        if height * width > self.max_pixels:
            raise BadSample(f"too many pixels: {width} x {height} is more than {self.max_pixels:,}")
        return dataset

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        names = ("PatientID", "StudyInstanceUID", "SOPInstanceUID")
        try:
            with _silently():
                self.identifiers = Identifiers(*(_text(img.get(n, "")) for n in names))
                grey = grey_values(img)
        except BadSample:
            raise
        except Exception as error:  # decoders of compressed pixels raise almost anything
            raise BadSample(f"the pixels of the DICOM file cannot be decoded: {reason(error)}") from error
        # MONAI's first axis runs across
        return grey.T, {"affine": np.eye(4), "original_channel_dim": float("nan"), "spatial_shape": grey.T.shape}
