"""Where a backbone looks: attention received by each position, or Grad-CAM where there is no attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_heat(maps: dict[str, Tensor]) -> Tensor:
    """Attention matrices of several blocks as one map `[B, h, w]`.

    A matrix `[B, N, N]` (queries by keys of a square map) becomes the attention that each position receives;
    a map `[B, h, w]` stands for itself. All are brought to the finest size, each scaled to a mean of 1, and
    averaged.
    """
    heats = []
    for value in maps.values():
        received = value if value.shape[-1] != value.shape[-2] or not _is_matrix(value) else _received(value)
        heats.append(received / received.mean((-2, -1), keepdim=True).clamp(min=1e-12))
    size = max((h.shape[-2:] for h in heats), key=lambda s: s[0] * s[1])
    resized = [F.interpolate(h[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0] for h in heats]
    return torch.stack(resized).mean(0)


def _is_matrix(value: Tensor) -> bool:
    """Rows of an attention matrix sum to 1; a map of received attention does not in every row."""
    return bool(torch.allclose(value.float().sum(-1), torch.ones(()).to(value.device), atol=1e-2))


def _received(matrix: Tensor) -> Tensor:
    received = matrix.mean(1)
    side = round(received.shape[-1] ** 0.5)
    return received.view(-1, side, side)


def grad_cam(network: nn.Module, x: Tensor) -> Tensor:
    """Grad-CAM `[B, h, w]` of the most probable class on the last feature map (Selvaraju et al. 2017, eq. 2)."""
    with torch.enable_grad():
        features = network.forward_features(x)  # type: ignore[operator]
        features = features.detach().requires_grad_(True)
        logits = network.forward_head(features)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), features)
    return (features * gradient.mean((-2, -1), keepdim=True)).sum(1).relu().detach()


def class_maps(network: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """The heat map `[B, h, w]` of normalised images `[B, 3, H, W]`, and what kind it is."""
    attention: Any = getattr(network, "attention_maps", None)
    if attention is not None:
        with torch.no_grad():
            maps = attention(x)
        if maps:
            return attention_heat(maps), "attention"
    return grad_cam(network, x), "Grad-CAM"


def heat_picture(image: Tensor, heats: dict[str, Tensor], title: str) -> Any:
    """The image `[3, H, W]` uint8 beside itself under each of its heat maps `[h, w]`, by name."""
    from matplotlib import pyplot

    height, width = image.shape[-2:]
    picture = image.permute(1, 2, 0).numpy()
    wide = len(heats) + 1
    figure, (left, *others) = pyplot.subplots(1, wide, figsize=(3 * wide, 3.2), layout="constrained")
    left.imshow(picture)
    left.set_title(title, fontsize="medium")
    for axis, (name, heat) in zip(others, heats.items(), strict=True):
        full = F.interpolate(heat[None, None].float(), (height, width), mode="bilinear", align_corners=False)[0, 0]
        axis.imshow(picture)
        axis.imshow(full.numpy(), cmap="jet", alpha=0.45)
        axis.set_title(name, fontsize="medium")
    for axis in (left, *others):
        axis.set_axis_off()
    return figure
