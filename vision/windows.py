"""Overlapping windows of a map with channels innermost, shared by the local attentions.

Letters in shapes: B batch, C channels, n x m windows of side(s) w, cut every b pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def pad_pixels(pixels: Tensor, height: int, width: int, border: Pair = (0, 0)) -> Tensor:
    """`[B, H, W, C]` -> zeros below and to the right up to height x width, then a border on every side."""
    below, right = height - pixels.shape[1], width - pixels.shape[2]
    if border == (0, 0) and nothing(below, right):
        return pixels
    return F.pad(pixels, (0, 0, border[1], border[1] + right, border[0], border[0] + below))


def crop_pixels(pixels: Tensor, height: int, width: int) -> Tensor:
    """`[B, H, W, C]` -> the upper left `[B, height, width, C]`."""
    if nothing(pixels.shape[1] - height, pixels.shape[2] - width):
        return pixels
    if isinstance(height, int) and isinstance(width, int):
        return pixels[:, :height, :width]
    # gathered, not sliced: an exporter would fix the sizes to know whether a slice is still dense
    pixels = pixels.index_select(1, torch.arange(height, device=pixels.device))
    return pixels.index_select(2, torch.arange(width, device=pixels.device))


def nothing(below: int, right: int) -> bool:
    """Whether there is certainly nothing to pad or crop. A tracer's sizes are no ints: it keeps the step."""
    return isinstance(below, int) and isinstance(right, int) and below == right == 0


def cut_windows(pixels: Tensor, window: Pair, step: int) -> Tensor:
    """`[B, H, W, C]` -> `[B, n, m, wy, wx, C]`, contiguous; n = (H - wy) / step + 1, m alike."""
    if pixels.requires_grad and torch.is_grad_enabled() and not traced():
        return _Windows.apply(pixels, window, step)
    return _cut(pixels, window, step)


def traced() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _cut(pixels: Tensor, window: Pair, step: int) -> Tensor:
    windows = pixels.unfold(1, window[0], step).unfold(2, window[1], step)
    return windows.permute(0, 1, 2, 4, 5, 3).contiguous()


class _Windows(torch.autograd.Function):
    """`_cut` with a gradient that adds whole blocks; that of `Tensor.unfold` adds number by number."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, window: Pair, step: int) -> Tensor:
        ctx.shape, ctx.step = pixels.shape, step
        return _cut(pixels, window, step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        batch, height, width, channels = ctx.shape
        n, m, wy, wx = grad.shape[1:5]
        b = ctx.step
        over_y, over_x = (wy - 1) // b, (wx - 1) // b  # further blocks that a window reaches into
        out = grad.new_zeros(batch, n + over_y, b, m + over_x, b, channels)
        for y in range(over_y + 1):
            for x in range(over_x + 1):
                piece = grad[:, :, :, y * b : (y + 1) * b, x * b : (x + 1) * b].transpose(2, 3)
                out[:, y : y + n, : piece.shape[2], x : x + m, : piece.shape[4]] += piece
        out = out.view(batch, (n + over_y) * b, (m + over_x) * b, channels)[:, :height, :width]
        # pixels beyond the last window have no gradient
        missing = (height - out.shape[1], width - out.shape[2])
        return F.pad(out, (0, 0, 0, missing[1], 0, missing[0])) if any(missing) else out, None, None
