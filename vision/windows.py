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


def count_tiles(size: int, tile: int) -> int:
    """How many tiles cover an axis."""
    # (n + b - 1) // b and not -(-n // b): integer division truncates in ONNX
    count = (size + tile - 1) // tile
    if isinstance(count, torch.SymInt) and not torch.onnx.is_in_onnx_export():
        # torch.export fixes whether an axis of unknown length has length 1; with a tile of padding it has not
        return count + 1
    return count


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
        return add_windows(grads[0], ctx.shape[1:3], ctx.step), None, None


def add_windows(windows: Tensor, size: Pair, step: int) -> Tensor:
    """The transpose of `cut_windows`: `[B, n, m, wy, wx, C]` summed into `[B, H, W, C]` of that size."""
    batch, n, m, wy, wx, channels = windows.shape
    over_y, over_x = (wy - 1) // step, (wx - 1) // step  # further blocks that a window reaches into
    out = windows.new_zeros(batch, n + over_y, step, m + over_x, step, channels)
    for y in range(over_y + 1):
        for x in range(over_x + 1):
            piece = windows[:, :, :, y * step : (y + 1) * step, x * step : (x + 1) * step].transpose(2, 3)
            out[:, y : y + n, : piece.shape[2], x : x + m, : piece.shape[4]] += piece
    out = out.view(batch, (n + over_y) * step, (m + over_x) * step, channels)[:, : size[0], : size[1]]
    # pixels beyond the last window have no share
    below, right = size[0] - out.shape[1], size[1] - out.shape[2]
    return F.pad(out, (0, 0, 0, right, 0, below)) if below or right else out


def attention_gradient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of softmax(scale * q k^T + bias) v for q, k, v and the logits, all of them `[M, ., .]`."""
    p = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1)
    share = (grad * out).sum(-1, keepdim=True)
    d_logits = torch.baddbmm(share, grad, v.transpose(1, 2), beta=-1).mul_(p)
    scaled = scale * q
    return scale * (d_logits @ k), d_logits.transpose(1, 2) @ scaled, p.transpose(1, 2) @ grad, d_logits
