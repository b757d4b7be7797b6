"""From pictures to model input: one evaluation transform, seeded augmentation, and samples that remember.

Everything here takes and gives Pillow RGB images or uint8 arrays; scaling to 0..1 and normalisation are the
model's. Randomness comes from the generator of one sample alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from polyhead.data import generator
from polyhead.decoding import MAX_PIXELS, decode_image, to_rgb
from polyhead.errors import BadSample, UserError, reason
from polyhead.sources import Location, read_bytes

Resize = Literal["crop", "squash", "pad"]
# The training transform: a picture and one sample's generator -> uint8 [3, S, S]
Transform = Callable[[Image.Image, torch.Generator], Tensor]
BICUBIC = Image.Resampling.BICUBIC
# Side of a remembered training picture, in units of the model's input
MARGIN = 1.15


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """uint8 `[3, H, W]`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Square:
    """The evaluation transform: any picture to `size` x `size`, bicubic with antialiasing.

    Args:
        size: side in pixels.
        crop_fraction: for `crop`, the share of the shorter side that is kept.
        resize: `crop` scales the shorter side to size / crop_fraction and cuts out the centre (what does not
            fit is not seen); `squash` ignores the aspect ratio; `pad` shows all of it on black.
    """

    size: int
    crop_fraction: float = 1.0
    resize: Resize = "crop"

    @property
    def needed(self) -> int:
        """The shorter side a picture must have for nothing to be lost."""
        return round(self.size / self.crop_fraction) if self.resize == "crop" else self.size

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        size = self.size
        if self.resize == "squash":
            return image.resize((size, size), BICUBIC)
        if self.resize == "pad":
            scale = size / max(width, height)
            inner = (max(1, round(width * scale)), max(1, round(height * scale)))
            ground = Image.new("RGB", (size, size))
            ground.paste(image.resize(inner, BICUBIC), ((size - inner[0]) // 2, (size - inner[1]) // 2))
            return ground
        # Resize and centre crop in one step: no large picture between, however long and thin the given one
        short = self.needed
        wide = (int(short * width / height), short) if width >= height else (short, int(short * height / width))
        left, top = round((wide[0] - size) / 2), round((wide[1] - size) / 2)
        x, y = width / wide[0], height / wide[1]
        box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
        return image.resize((size, size), BICUBIC, box=box)


@contextmanager
def seeded(source: torch.Generator) -> Iterator[None]:
    """Seed torch's global generator, which torchvision draws from, and give it back untouched."""
    seed = int(torch.randint(2**62, (1,), generator=source))
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@dataclass
class Augment:
    """The training transform, a function of the picture and of one sample's generator.

    Args:
        square: the evaluation transform; its size is that of training too.
        scale: range of the share of the area that a random crop keeps; None takes `square` instead.
        ratio: range of its aspect ratio (width / height) before it is scaled to a square.
        flip, flip_vertical: probability of mirroring.
        policy: `trivial` is TrivialAugmentWide (Müller and Hutter 2021), `rand` is RandAugment (Cubuk et al.
            2020) with two operations of magnitude 9.
        colour: strength of random brightness, contrast and saturation (0.4: factors 0.6 to 1.4).
        erase: probability of filling a random rectangle with black.
    """

    square: Square
    scale: tuple[float, float] | None = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    flip_vertical: float = 0.0
    policy: Literal["none", "trivial", "rand"] = "none"
    colour: float = 0.0
    erase: float = 0.0
    _operations: list[Callable[[Image.Image], Image.Image]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.policy == "trivial":
            self._operations.append(v2.TrivialAugmentWide())
        elif self.policy == "rand":
            self._operations.append(v2.RandAugment(num_ops=2, magnitude=9))
        if self.colour:
            self._operations.append(v2.ColorJitter(self.colour, self.colour, self.colour))
        self._eraser = v2.RandomErasing(p=self.erase) if self.erase else None

    def __call__(self, image: Image.Image, source: torch.Generator) -> Tensor:
        """uint8 `[3, S, S]`."""
        draws = torch.rand(44, generator=source, dtype=torch.float64).tolist()
        if self.scale is None:
            image = self.square(image)
        else:
            size = (self.square.size, self.square.size)
            image = image.resize(size, BICUBIC, box=self._box(image.size, draws[4:]))
        if draws[0] < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draws[1] < self.flip_vertical:
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if not self._operations and self._eraser is None:
            return to_tensor(image)
        with seeded(source):
            for operation in self._operations:
                image = operation(image)
            tensor = to_tensor(image)
            return tensor if self._eraser is None else self._eraser(tensor)

    def _box(self, size: tuple[int, int], draws: list[float]) -> tuple[float, float, float, float]:
        """A random resized crop: ten tries for one that fits, else the largest allowed one in the centre."""
        assert self.scale is not None
        width, height = size
        low, high = (math.log(r) for r in self.ratio)
        for k in range(0, 40, 4):
            area = width * height * (self.scale[0] + draws[k] * (self.scale[1] - self.scale[0]))
            aspect = math.exp(low + draws[k + 1] * (high - low))
            w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if w <= width and h <= height:
                left, top = draws[k + 2] * (width - w), draws[k + 3] * (height - h)
                return left, top, min(left + w, width), min(top + h, height)
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, height * aspect), min(height, width / aspect)
        left, top = (width - w) / 2, (height - h) / 2
        return left, top, min(left + w, width), min(top + h, height)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """The picture with its shorter side at most `side`."""
    short = min(image.size)
    if short <= side:
        return image
    width, height = (max(side, round(s * side / short)) for s in image.size)
    return image.resize((width, height), BICUBIC)


class Budget:
    """Memory that several sets of samples share, in bytes."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True


class Pictures:
    """Samples of pictures: fetched, made ready, and in training augmented.

    A sample is `{"id", "image": uint8 [3, S, S]}` and, where labels are known, `label`: int64 [].

    Args:
        ids: a name a sample.
        fetch: index -> RGB picture; raises BadSample.
        ready: the part of the transform that is the same in every epoch and can be remembered; None is none.
        labels: int64 `[N]`, or None.
        augment: applied to what `ready` gives, in training.
        seed: of the augmentation.
        budget: what may be remembered, or None for nothing. What is remembered never changes a sample.
        groups: what each sample belongs to (a patient), or None; becomes `group`.
    """

    def __init__(
        self,
        ids: Sequence[str],
        fetch: Callable[[int], Image.Image],
        ready: Callable[[Image.Image], Image.Image] | None,
        labels: np.ndarray | None = None,
        augment: Transform | None = None,
        seed: int = 0,
        budget: Budget | None = None,
        groups: Sequence[str] | None = None,
    ) -> None:
        self.ids, self.labels, self.groups = ids, labels, groups
        self._fetch, self._ready, self._augment = fetch, ready, augment
        self._seed, self._budget = seed, budget
        self._memory: list[np.ndarray | None] = [None] * (len(ids) if budget is not None else 0)

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process starts empty; forked workers share the pages without a copy
        return {**self.__dict__, "_memory": [None] * len(self._memory)}

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        remembered = self._memory[index] if self._memory else None
        image = Image.fromarray(remembered) if remembered is not None else self._read(index)
        if self._augment is not None:
            tensor = self._augment(image, generator(self._seed, epoch, index))
        else:
            tensor = to_tensor(image)
        sample: dict[str, Any] = {"id": self.ids[index], "image": tensor}
        if self.labels is not None:
            sample["label"] = torch.tensor(self.labels[index], dtype=torch.int64)
        if self.groups is not None:
            sample["group"] = self.groups[index]
        return sample

    def _read(self, index: int) -> Image.Image:
        image = self._fetch(index)
        if self._ready is not None:
            image = self._ready(image)
        if self._budget is not None and self._memory[index] is None:
            width, height = image.size
            # A very long and thin picture would take the place of many
            if max(width, height) <= 16 * min(width, height) and self._budget.take(width * height * 3):
                self._memory[index] = np.array(image)
        return image

    def remember(self) -> None:
        """Fill the memory now, before workers are forked that would each fill one of their own."""

        def read(index: int) -> None:
            try:
                if self._budget is not None and self._budget.left >= 3 * 2**10:
                    self._read(index)
            except BadSample:  # said when it is asked for
                pass

        missing = [i for i, image in enumerate(self._memory) if image is None]
        if missing:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            with ThreadPoolExecutor(min(16, threads)) as pool:
                for _ in tqdm(pool.map(read, missing), "decode", len(missing), leave=False, delay=2):
                    pass


@dataclass(frozen=True)
class Files:
    """Fetches pictures by their locations.

    Args:
        locations: where they are, one a sample.
        target: the shorter side that is needed (see `decode_image`).
        max_pixels: refuse larger ones.
    """

    locations: Sequence[Location]
    target: int | None
    max_pixels: int = MAX_PIXELS

    def __call__(self, index: int) -> Image.Image:
        return decode_image(read_bytes(self.locations[index]), self.max_pixels, self.target)


@dataclass(frozen=True)
class Arrays:
    """Fetches pictures from an array, uint8 `[N, H, W]` or `[N, H, W, 3]`."""

    pixels: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")


@dataclass(frozen=True)
class Raw:
    """Fetches pictures from what a program holds: paths, bytes, Pillow images, arrays and tensors."""

    items: Sequence[Any]
    target: int | None
    max_pixels: int = MAX_PIXELS

    def ids(self) -> list[str]:
        """Paths name themselves, other things their place."""
        return [os.fspath(item) if isinstance(item, (str, Path)) else f"input-{i}" for i, item in enumerate(self.items)]

    def __call__(self, index: int) -> Image.Image:
        item = self.items[index]
        if isinstance(item, (str, Path)):
            item = read_bytes(Location(os.fspath(Path(item).expanduser())))
        if isinstance(item, (bytes, bytearray, memoryview)):
            return decode_image(bytes(item), self.max_pixels, self.target)
        if isinstance(item, Tensor):
            if item.dtype != torch.uint8 or item.ndim != 3 or item.shape[0] not in (1, 3):
                raise UserError(f"a tensor must be uint8 [3, H, W] or [1, H, W], not {item.dtype} {list(item.shape)}")
            array = item.detach().cpu().permute(1, 2, 0).numpy()
            item = array[..., 0] if array.shape[2] == 1 else array
        if isinstance(item, np.ndarray):
            item = _from_array(item)
        if not isinstance(item, Image.Image):
            kinds = "a path, bytes, a PIL image, an array [H, W, 3] or a tensor [3, H, W]"
            raise UserError(f"an input of type {type(item).__name__} is no picture: give {kinds}")
        if item.width * item.height > self.max_pixels:
            raise BadSample(f"too many pixels: {item.width} x {item.height} is more than {self.max_pixels:,}")
        try:
            item.load()
            return to_rgb(item)
        except Exception as error:  # a file that Pillow opened and has not read yet
            raise BadSample(f"the image is damaged: {reason(error)}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    shape = array.shape
    grey = array.ndim == 2
    if 0 in shape or array.dtype not in (np.uint8, np.uint16, np.bool_) or not (
        grey or (array.ndim == 3 and shape[2] in (1, 3, 4) and array.dtype == np.uint8)
    ):  # fmt: skip
        wanted = "uint8 [H, W], [H, W, 3] or [H, W, 4]"
        raise UserError(f"an array must be {wanted}, not {array.dtype} {list(shape)}")
    return Image.fromarray(np.ascontiguousarray(array if grey or shape[2] > 1 else array[..., 0]))
