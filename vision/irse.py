"""The IR trunk of face.evoLVe: improved residual units of ArcFace (Deng et al. 2019), as TransFER uses it.

State-dict keys are the published ones. Shapes: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# Units a stage of 64, 128, 256 and 512 channels
FAMILIES: dict[str, tuple[int, ...]] = {
    "ir8": (3,), "ir16": (3, 4), "ir44": (3, 4, 14), "ir50": (3, 4, 14, 3), "ir100": (3, 13, 30, 3),
    "ir152": (3, 8, 36, 3),
}  # fmt: skip
WIDTHS = (64, 64, 128, 256, 512)


class SqueezeExcitation(nn.Module):
    """Global average -> C / 16 -> ReLU -> C -> sigmoid -> scale, `[B, C, H, W]` -> the same."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((-2, -1), keepdim=True)).relu()).sigmoid()


class Unit(nn.Module):
    """BN, conv 3x3, PReLU, conv 3x3 with the stride, BN; and a shortcut. `[B, C, H, W]` -> `[B, C', H', W']`.

    Sizes are halved upwards. Nothing follows the sum.
    """

    def __init__(self, inner: int, outer: int, stride: int, squeeze: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut_layer: nn.Sequential | None = None
        if inner != outer:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, outer, 3, 1, 1, bias=False),
            nn.PReLU(outer),
            nn.Conv2d(outer, outer, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        if squeeze:
            self.res_layer.append(SqueezeExcitation(outer))

    def forward(self, x: Tensor) -> Tensor:
        # A max-pool of one pixel, which the published code has here, is a slice
        kept = x[:, :, :: self.stride, :: self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        return self.res_layer(x) + kept


class IRTrunk(nn.Module):
    """The trunk, `[B, 3, H, W]` -> `[B, C, H / 2^stages, W / 2^stages]`.

    Args:
        units: how many a stage.
        widths: of the stem and of every stage.
        squeeze: squeeze-excitation in every unit (`ir_se`).
    """

    def __init__(
        self, units: Sequence[int] = (3, 4, 14), widths: Sequence[int] = WIDTHS, squeeze: bool = False
    ) -> None:
        super().__init__()
        widths = widths[: len(units) + 1]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        body = []
        inner = widths[0]
        for count, width in zip(units, widths[1:], strict=True):
            for number in range(count):
                body.append(Unit(inner, width, 2 if number == 0 else 1, squeeze))
                inner = width
        self.body = nn.Sequential(*body)
        self.channels, self.stride = inner, 2 ** len(units)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.input_layer(x))
