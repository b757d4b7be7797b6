"""Faces with an expression each: from aligned crops, or found and aligned in photographs."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from polyhead.data import Samples, Split, Unreadable, collate
from polyhead.errors import BadSample, UserError
from polyhead.picture_data import Embedded, PictureData
from polyhead.pictures import Files, Raw, Square, to_tensor
from polyhead.sources import Entry, existing
from vision.face_align import Face, align, crop, detector
from vision.face_layouts import Votes, class_order, published_layout

Align = Literal["none", "landmarks", "detect"]
# Aligned faces are made at this many times the model's input, so that random crops lose nothing
FINER = 1.4


def drawn_faces(count: int = 360, side: int = 64, seed: int = 0) -> Embedded:
    """The embedded sample: drawn faces of known expression (happy, sad, surprised, neutral), 64 px.

    Skin, ground, place, size and line width vary; the mouth and the brows tell.
    """
    rng = np.random.default_rng(seed)
    names = ("happy", "sad", "surprised", "neutral")
    pixels = np.empty((count, side, side, 3), dtype=np.uint8)
    for index in range(count):
        ground, skin = rng.integers(40, 160, 3), rng.integers(150, 240, 3)
        image = Image.new("RGB", (side, side), tuple(int(v) for v in ground))
        draw = ImageDraw.Draw(image)
        x, y = rng.uniform(0.44, 0.56, 2) * side
        r = rng.uniform(0.34, 0.42) * side
        draw.ellipse((x - 0.85 * r, y - r, x + 0.85 * r, y + r), fill=tuple(int(v) for v in skin))
        name, wide = names[index % 4], int(rng.integers(1, 4))
        for eye in (-0.35, 0.35):
            size = r * (0.16 if name == "surprised" else 0.1)
            draw.ellipse((x + eye * r - size, y - 0.25 * r - size, x + eye * r + size, y - 0.25 * r + size), fill=0)
        mouth, half = y + 0.45 * r, rng.uniform(0.25, 0.4) * r
        if name == "surprised":
            draw.ellipse((x - 0.5 * half, mouth - 0.6 * half, x + 0.5 * half, mouth + 0.8 * half), fill=(60, 10, 10))
        elif name == "neutral":
            draw.line((x - half, mouth, x + half, mouth), fill=(60, 10, 10), width=wide)
        else:
            box = (x - half, mouth - 0.6 * half, x + half, mouth + 0.6 * half)
            draw.arc(box, *((20, 160) if name == "happy" else (200, 340)), fill=(60, 10, 10), width=wide)
        noisy = np.asarray(image).astype(np.float64) + rng.normal(0, 12, (side, side, 3))
        pixels[index] = np.clip(noisy, 0, 255).astype(np.uint8)
    splits = ["train" if i < count * 2 // 3 else "val" if i < count * 5 // 6 else "test" for i in range(count)]
    return Embedded([f"drawn/{i:04d}" for i in range(count)], pixels, [names[i % 4] for i in range(count)], splits)


def read_landmarks(path: str) -> dict[str, np.ndarray]:
    """Points of pictures from a CSV: a column `file` and x0, y0, x1, y1, ...: five points, or eyes first.

    Five points are left eye, right eye, nose and both corners of the mouth, as seen. Of any other number the
    first two are the eyes.

    Raises:
        UserError: no such columns, or a row without numbers.
    """
    found: dict[str, np.ndarray] = {}
    if not Path(path).is_file():
        raise UserError(f"{path} is no file of landmarks (--data.landmarks)")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        name = next((c for c in ("file", "path", "image", "id") if c in columns), None)
        count = 0
        while f"x{count}" in columns and f"y{count}" in columns:
            count += 1
        if name is None or count < 2:
            raise UserError(f"{path} has no column `file`, or no points x0, y0, x1, y1 in pixels")
        for row in rows:
            try:
                points = np.array([[float(row[f"x{i}"]), float(row[f"y{i}"])] for i in range(count)])
            except (TypeError, ValueError):
                raise UserError(f"{path}: the points of {row[name]} are not all numbers") from None
            if not np.isfinite(points).all() or np.ptp(points, axis=0).max() < 1:
                raise UserError(f"{path}: the points of {row[name]} are not finite or lie on one another")
            eyes = points[:2][np.argsort(points[:2, 0])]
            found[str(row[name])] = points if count == 5 else eyes
    return found


@dataclass
class AlignedFiles:
    """Fetches the one face of each picture, aligned; counts those that were taken as they are.

    Args:
        files: fetches whole pictures.
        names: of the pictures, as landmarks name them.
        side: of the aligned face in pixels.
        landmarks: points by name, or None to look for faces.
        yunet: model file of the detector, or None for the bundled cascades.
        strict: a picture without points is a bad sample, as in prediction.
    """

    files: Files
    names: Sequence[str]
    side: int
    landmarks: dict[str, np.ndarray] | None
    yunet: str | None
    strict: bool = False
    unaligned: set[str] = field(default_factory=set)

    def __call__(self, index: int) -> Image.Image:
        image = self.files(index)
        picture = np.asarray(image)
        name = self.names[index]
        if self.landmarks is not None:
            points = next((self.landmarks[k] for k in self._keys(name) if k in self.landmarks), None)
            if points is not None:
                return Image.fromarray(align(picture, points, self.side))
            if self.strict:
                raise BadSample("its points are not among the landmarks")
        else:
            faces = detector(self.yunet)(picture)
            if faces:
                return Image.fromarray(cut(picture, faces[0], self.side))
        self.unaligned.add(name)
        return image

    @cached_property
    def _bare(self) -> Counter[str]:
        return Counter(Path(n).name for n in self.names)

    def _keys(self, name: str) -> list[str]:
        """What landmarks may call a picture: its path, and its bare name where no other has it."""
        bare = Path(name).name
        return [name, bare, Path(name).stem] if self._bare[bare] == 1 else [name]


def cut(picture: np.ndarray, face: Face, side: int) -> np.ndarray:
    """A face turned to the template by its points, or its box where it has none."""
    return crop(picture, face.box, side) if face.points is None else align(picture, face.points, side)


class FacesInPhotos:
    """Photographs as samples of prediction: `image` uint8 `[F, 3, S, S]`, a row a face, with its box.

    Raises BadSample for a photograph without a face.
    """

    def __init__(
        self, ids: Sequence[str], files: Callable[[int], Image.Image], square: Square, yunet: str | None
    ) -> None:
        self.ids, self.files, self.square, self.yunet = list(ids), files, square, yunet

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        picture = np.asarray(self.files(index))
        faces = detector(self.yunet)(picture)
        if not faces:
            raise BadSample("no face was found in it")
        side = round(FINER * self.square.size)
        found = [to_tensor(self.square(Image.fromarray(cut(picture, f, side)))) for f in faces]
        about = {
            "box": [[round(float(v), 1) for v in f.box] for f in faces],
            "detector_score": [float(f.score) for f in faces],
            "aligned": [f.points is not None for f in faces],
        }
        return {"id": self.ids[index], "image": torch.stack(found), "faces": about}


class FaceData(PictureData):
    """Faces with an expression each; classes in one canonical order whatever the set's own is.

    Reads class folders, tables and lists as `polyhead.picture_data.PictureData` does, and RAF-DB, FERPlus and
    AffectNet as they are published. Without a root: `drawn_faces`. With `align` `detect`, prediction gives a
    row a face, with `box` (x, y, width, height in pixels), `detector_score` and `aligned` (whether eyes were
    found); a photograph without a face goes to the errors table. Training then takes the largest face, and the
    picture as it is where none is found.

    Args:
        root, name, scale, ratio, flip, colour, erase, batch_size: see `polyhead.picture_data.PictureData`; a group
            is a person.
        image_size: side S in pixels.
        align: `none` takes pictures as aligned crops, `landmarks` turns them by points from a table, `detect`
            looks for faces.
        landmarks: that table (see `read_landmarks`).
        yunet: model file of OpenCV's YuNet; None is OpenCV's bundled cascades.
        votes: FERPlus's rule: `majority` as its authors', or `plurality`.
        pictures: the other arguments of `PictureData`.
    """

    def __init__(
        self, root: str | None = None, name: str | None = None, image_size: int = 112, align: Align = "none",
        landmarks: str | None = None, yunet: str | None = None, votes: Votes = "majority",
        scale: tuple[float, float] | None = (0.7, 1.0), ratio: tuple[float, float] = (0.9, 1.1),
        flip: float = 0.5, colour: float = 0.3, erase: float = 0.25, batch_size: int = 32, **pictures: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            root, name, image_size, scale=scale, ratio=ratio, flip=flip, colour=colour, erase=erase,
            batch_size=batch_size, **pictures,
        )  # fmt: skip
        if landmarks is not None and align != "landmarks":
            raise UserError("data.landmarks goes with data.align landmarks: give both")
        if yunet is not None and align != "detect":
            raise UserError("data.yunet is the detector of data.align detect: give that too")
        self.align, self.yunet, self.votes = align, yunet, votes
        if align == "detect":
            detector(yunet)
        self.landmarks = read_landmarks(str(existing(landmarks))) if landmarks is not None else None
        self._aligned: list[AlignedFiles] = []

    def embedded(self) -> Embedded:
        return drawn_faces()

    def find(self, everything: bool) -> list[Entry]:
        if not everything:
            known = published_layout(Path(str(self.root)).expanduser(), self.votes, self.ignored)
            if known is not None:
                return known
        return super().find(everything)

    def parts(self) -> dict[str, np.ndarray]:
        free = self.classes is None
        parts = super().parts()
        if free and self.classes is not None:
            self.classes = class_order(self.classes) or self.classes
        return parts

    def fetch(self, entries: Sequence[Entry], target: int) -> Callable[[int], Image.Image]:
        if self.align == "none":
            return super().fetch(entries, target)
        if self.align == "landmarks" and self.landmarks is None:
            raise UserError("data.align landmarks needs the points of these pictures: give --data.landmarks FILE")
        files = Files([e.location for e in entries], None, self.max_pixels)
        side = round(FINER * self.image_size)
        strict = bool(self._everything) and entries is self._everything
        aligned = AlignedFiles(files, [e.id for e in entries], side, self.landmarks, self.yunet, strict)
        self._aligned.append(aligned)
        return aligned

    def dataset(self, split: Split) -> Samples:
        if split != "predict" or self.align != "detect" or self.root is None:
            return super().dataset(split)
        entries = self._everything
        files = Files([e.location for e in entries], None, self.max_pixels)
        return FacesInPhotos([e.id for e in entries], files, self.square, self.yunet)

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        if self.align != "detect":
            return super().raw_dataset(items)
        raw = Raw(items, None, self.max_pixels)
        return FacesInPhotos(raw.ids(), raw, self.square, self.yunet)

    def collate(self, items: list[dict[str, Any] | Unreadable]) -> dict[str, Any]:
        """Photographs with several faces become one batch of faces; `about` says whose each is."""
        good = [item for item in items if isinstance(item, dict)]
        if not good or "faces" not in good[0]:
            return collate(items)
        faces = [item.pop("faces") for item in good]
        counts = [len(item["image"]) for item in good]
        about: dict[str, Any] = {k: [v for face in faces for v in face[k]] for k in faces[0]}
        about["sample"] = [i for i, n in enumerate(counts) for _ in range(n)]
        about["part"] = [j for n in counts for j in range(n)]
        return {
            "id": [item["id"] for item in good],
            "image": torch.cat([item["image"] for item in good]),
            "about": about,
            "errors": [item for item in items if isinstance(item, Unreadable)],
        }

    def summary(self) -> dict[str, Any]:
        unaligned = {name for files in self._aligned for name in files.unaligned}
        return {**super().summary(), **({"taken as they are": len(unaligned)} if unaligned else {})}
