"""Pictures of what MEDUSA looks at."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F


def maps_picture(image: Tensor, maps: dict[str, Tensor], title: str) -> Any:
    """A radiograph uint8 `[3, S, S]` beside itself under each of its maps `[h, w]`.

    Every map is scaled to its own range, which stands below it: a gate that is open everywhere shows nothing
    but its small differences.
    """
    from matplotlib import pyplot

    side = image.shape[-2:]
    figure, axes = pyplot.subplots(1, len(maps) + 1, figsize=(2.3 * (len(maps) + 1), 2.8), layout="constrained")
    grey = image.float().mean(0).numpy()
    axes[0].imshow(grey, cmap="gray")
    axes[0].set_title(title, fontsize="small")
    for axis, (name, heat) in zip(axes[1:], maps.items(), strict=True):
        full = F.interpolate(heat[None, None], tuple(side), mode="bilinear", align_corners=False)[0, 0]
        axis.imshow(grey, cmap="gray")
        axis.imshow(full.numpy(), cmap="inferno", alpha=0.5)
        axis.set_title(f"{name}\n{float(heat.min()):.2f} to {float(heat.max()):.2f}", fontsize="small")
    for axis in axes:
        axis.set_axis_off()
    return figure
