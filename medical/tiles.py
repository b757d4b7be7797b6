"""One image as a bag: a frozen encoder's maps pooled into a grid of tiles."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from medical.bags import Instances
from polyhead.decoding import decode_image
from polyhead.encoders import create_encoder, normalisation
from polyhead.errors import UserError
from polyhead.pictures import Raw, to_tensor
from polyhead.sources import Location, read_bytes

STRIDES = (8, 16)
# An instance image is shown to the encoder at this side at least
SMALLEST = 96


class TileEncoder:
    """Encodes a picture once and pools its stride-8 and stride-16 maps, mean and maximum, into tiles.

    A tile's features are `[mean of each map, maximum of each map]`. Whole pictures are encoded, so a tile
    sees a little beyond its edge.

    Args:
        name: of the encoder.
        tile: side of a tile in pixels; a picture of W x H has about W/tile x H/tile of them.
        truth: boxes `[n, 4]` by the stem of the picture's name; the tiles they touch are its key instances.

    Raises:
        UserError: the encoder has no maps of stride 8 and 16.
    """

    def __init__(self, name: str, tile: int, truth: dict[str, np.ndarray] | None) -> None:
        if tile < 16:
            raise UserError(f"data.tile is {tile}: 16 pixels or more are needed")
        self.name, self.tile, self.truth = name, tile, truth
        network: Any = create_encoder(name, 0)
        self.network = network.eval()
        info = [f["reduction"] for f in network.feature_info]
        self.indices = [i for i, r in enumerate(info) if r in STRIDES]
        if not self.indices or not hasattr(self.network, "forward_intermediates"):
            raise UserError(f"{name} gives no maps of stride 8 and 16: choose another data.encoder")
        mean, std = normalisation(name)
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        self._kept: dict[tuple[str, int], Instances] = {}

    def read(self, name: str, location: Location, mirror: int = 0) -> Instances:
        """The tiles of a file as seen in a mirror, kept for the next epoch. Raises BadSample."""
        if (name, mirror) not in self._kept:
            self._kept[name, mirror] = self.encode(name, decode_image(read_bytes(location)), mirror)
        return self._kept[name, mirror]

    def read_images(self, name: str, locations: Sequence[Location]) -> Instances:
        """A bag of images, one instance each, in the order given; kept. Raises BadSample."""
        if (name, 0) not in self._kept:
            rows = [self._whole(decode_image(read_bytes(location))) for location in locations]
            files = [Path(where.member or where.path).name for where in locations]
            self._kept[name, 0] = Instances(np.stack(rows), None, {"encoder": self.name, "files": files})
        return self._kept[name, 0]

    def _whole(self, image: Image.Image) -> np.ndarray:
        """The features `[F]` of a picture as one tile, squashed to a square that the encoder can describe."""
        side = max(SMALLEST, self.tile)
        found = self.with_tile(side).encode("", image.resize((side, side), Image.Resampling.BICUBIC))
        return found.features[0]

    def with_tile(self, tile: int) -> TileEncoder:
        """The same encoder with another side of the tile."""
        twin = copy.copy(self)
        twin.tile = tile
        return twin

    def read_raw(self, name: str, item: Any) -> Instances:
        """The tiles of a path, picture or array. Raises BadSample."""
        return self.encode(name, Raw([item], None)(0))

    @torch.inference_mode()
    def encode(self, name: str, image: Image.Image, mirror: int = 0) -> Instances:
        """The tiles of an RGB picture: features float16 `[rows * columns, F]`, top-left corners in pixels.

        `mirror` 1 shows the encoder the picture with left and right exchanged, 2 upside down, 3 both; the
        tiles keep the picture's own order.
        """
        axes = [axis for axis, bit in ((-1, 1), (-2, 2)) if mirror & bit]
        x = (to_tensor(image)[None].float() / 255 - self.mean) / self.std
        x = x.flip(axes)
        height, width = x.shape[-2:]
        # The network halves five times; whole strides keep its maps in register with the picture
        x = F.pad(x, (0, -width % 32, 0, -height % 32), mode="replicate")
        grid = (max(1, round(height / self.tile)), max(1, round(width / self.tile)))
        x = x.contiguous(memory_format=torch.channels_last)
        maps = self.network.forward_intermediates(x, indices=self.indices, intermediates_only=True)
        pooled = []
        for value in maps:
            stride = x.shape[-1] / value.shape[-1]
            seen = value[..., : max(1, round(height / stride)), : max(1, round(width / stride))]
            pooled += [F.adaptive_avg_pool2d(seen, grid), F.adaptive_max_pool2d(seen, grid)]
        features = torch.cat(pooled, 1).flip(axes)[0].flatten(1).T.contiguous().half().numpy()
        rows, columns = np.divmod(np.arange(len(features)), grid[1])
        high, wide = height / grid[0], width / grid[1]
        coords = np.stack([columns * wide, rows * high], 1).astype(np.int64)
        meta: dict[str, Any] = {"encoder": self.name, "grid": list(grid), "size": [width, height]}
        if self.truth is not None:
            boxes = self.truth.get(name.rsplit("/", 1)[-1].rsplit(".", 1)[0], np.zeros((0, 4)))
            x0, y0 = (columns * wide)[:, None], (rows * high)[:, None]
            across = (boxes[:, 0] < x0 + wide) & (boxes[:, 2] > x0)
            down = (boxes[:, 1] < y0 + high) & (boxes[:, 3] > y0)
            meta["key"] = np.flatnonzero((across & down).any(1)).tolist()
        return Instances(features, coords, meta)
