"""Finding faces in photographs and turning them to the template that expression models are trained on.

The template and the direction of the fit are those of the released code: a similarity is fitted from the
template to the picture (least squares in the picture's pixels) and followed back; fitted the other way round,
published accuracies are missed by ten points.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from polyhead.errors import UserError, reason

# Left eye, right eye, nose, left and right corner of the mouth (as seen), for 112 x 112 pixels
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
SIDE = 112


class Face(NamedTuple):
    """One face: `box` (x, y, width, height) in pixels, `score`, and its points `[n, 2]`, or None.

    Two points are the eyes; five are those of `TEMPLATE`.
    """

    box: tuple[float, float, float, float]
    score: float
    points: np.ndarray | None


class Detector(Protocol):
    """Finds the faces of a picture, uint8 RGB `[H, W, 3]`, the largest first."""

    def __call__(self, picture: np.ndarray) -> list[Face]: ...


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity `[2, 3]` without reflection that takes points `[n, 2]` to others in least squares, n >= 2.

    With z = x + iy it is z -> a z + b (Umeyama 1991, in the plane).
    """
    z, w = source[:, 0] + 1j * source[:, 1], target[:, 0] + 1j * target[:, 1]
    centred = z - z.mean()
    spread = (np.abs(centred) ** 2).sum()
    if spread == 0:
        raise ValueError("the points lie on one another")
    a = (np.conj(centred) * (w - w.mean())).sum() / spread
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align(picture: np.ndarray, points: np.ndarray, size: int) -> np.ndarray:
    """A face turned to the template, uint8 `[size, size, 3]`: bilinear, black beyond the picture's edge.

    Args:
        picture: uint8 RGB `[H, W, 3]`.
        points: `[2, 2]` eyes or `[5, 2]`, in pixels.
        size: side of the result.
    """
    import cv2

    template = TEMPLATE[: len(points)] * (size / SIDE)
    to_picture = similarity(template, np.asarray(points, dtype=np.float64))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(picture, to_picture, (size, size), flags=flags, borderMode=cv2.BORDER_CONSTANT)


def crop(picture: np.ndarray, box: Sequence[float], size: int, margin: float = 0.1) -> np.ndarray:
    """The square about a box with a margin, black beyond the edge, uint8 `[size, size, 3]`."""
    import cv2

    x, y, width, height = box
    side = max(width, height) * (1 + 2 * margin)
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    scale = side / size
    to_picture = np.array([[scale, 0, left], [0, scale, top]])
    if scale > 1:
        # An affine warp does not average: shrink the picture first where it would skip pixels
        picture = cv2.resize(picture, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_AREA)
        to_picture = np.array([[1, 0, left / scale], [0, 1, top / scale]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(picture, to_picture, (size, size), flags=flags, borderMode=cv2.BORDER_CONSTANT)


class Cascades:
    """OpenCV's bundled cascades: frontal faces, and in each the eyes where a pair is found.

    Needs no download; finds upright frontal faces of an eighth of the picture's shorter side and more.
    """

    def __init__(self) -> None:
        import cv2

        folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
        self.face = cv2.CascadeClassifier(f"{folder}haarcascade_frontalface_default.xml")
        self.eye = cv2.CascadeClassifier(f"{folder}haarcascade_eye.xml")
        if self.face.empty() or self.eye.empty():
            raise UserError("this OpenCV has no bundled cascades: install opencv-python-headless>=4.12,<5")

    def __call__(self, picture: np.ndarray) -> list[Face]:
        import cv2

        grey = cv2.equalizeHist(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
        least = max(24, min(grey.shape) // 8)
        boxes, _, scores = self.face.detectMultiScale3(
            grey, scaleFactor=1.1, minNeighbors=6, minSize=(least, least), outputRejectLevels=True
        )
        faces = []
        for (x, y, width, height), score in zip(boxes, np.ravel(scores), strict=True):
            eyes = self._eyes(grey[y : y + height, x : x + width])
            points = None if eyes is None else eyes + np.array([x, y])
            faces.append(Face((float(x), float(y), float(width), float(height)), float(score), points))
        return sorted(faces, key=lambda f: -f.box[2] * f.box[3])

    def _eyes(self, face: np.ndarray) -> np.ndarray | None:
        """A plausible pair of eyes `[2, 2]` in a face, left one first, or None."""
        height, width = face.shape
        found = self.eye.detectMultiScale(face[: int(0.62 * height)], scaleFactor=1.05, minNeighbors=4)
        centres = np.array([[x + w / 2, y + h / 2] for x, y, w, h in found]).reshape(-1, 2)
        # Where eyes are in a frontal face; the pair that is nearest to it
        wanted = np.array([[0.32, 0.4], [0.68, 0.4]]) * [width, height]
        best = None
        for left in centres[centres[:, 0] < width / 2]:
            for right in centres[centres[:, 0] >= width / 2]:
                apart = right - left
                if apart[0] < 0.2 * width or abs(apart[1]) > 0.35 * apart[0]:
                    continue
                cost = np.abs(np.stack([left, right]) - wanted).sum()
                if best is None or cost < best[0]:
                    best = (cost, np.stack([left, right]))
        return None if best is None else best[1]


class YuNet:
    """OpenCV's FaceDetectorYN with a model file of the user's: boxes, scores and five points.

    Args:
        path: the ONNX file of YuNet.
        least_score: faces below are left out.
    """

    def __init__(self, path: str, least_score: float = 0.7) -> None:
        import cv2

        if not Path(path).expanduser().is_file():
            raise UserError(
                f"no YuNet model at {path} (--data.yunet)",
                ["download face_detection_yunet from OpenCV's model zoo, or leave it out for the bundled cascades"],
            )
        try:
            self.network = cv2.FaceDetectorYN.create(str(Path(path).expanduser()), "", (320, 320), least_score)
        except cv2.error as error:
            raise UserError(f"{path} is no YuNet model that OpenCV can read: {reason(error)[:120]}") from error

    def __call__(self, picture: np.ndarray) -> list[Face]:
        import cv2

        height, width = picture.shape[:2]
        self.network.setInputSize((width, height))
        _, found = self.network.detect(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        rows = [] if found is None else found.tolist()
        faces = [Face(tuple(r[:4]), float(r[14]), np.array(r[4:14]).reshape(5, 2)) for r in rows]
        return sorted(faces, key=lambda f: -f.box[2] * f.box[3])


@lru_cache(maxsize=2)
def detector(yunet: str | None) -> Detector:
    """YuNet with the given file, or the bundled cascades. Raises UserError."""
    return Cascades() if yunet is None else YuNet(yunet)
