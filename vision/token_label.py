"""Token labelling: mix-token and the loss with a dense part, as SpectFormer's hierarchical models train.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (arXiv 2104.10858).
Letters in shapes: B batch, K classes, N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import UserError

Box = tuple[int, int, int, int]  # rows [0]:[2], columns [1]:[3] of the token grid


def mix_box(lam: float, row: int, column: int, grid: tuple[int, int]) -> Box:
    """The box that covers about 1 - lam of the grid around (row, column), cut at the border."""
    half_rows = int(grid[0] * (1 - lam) ** 0.5) // 2
    half_columns = int(grid[1] * (1 - lam) ** 0.5) // 2

    def clip(value: int, end: int) -> int:
        return min(max(value, 0), end)

    return (
        clip(row - half_rows, grid[0]), clip(column - half_columns, grid[1]),
        clip(row + half_rows, grid[0]), clip(column + half_columns, grid[1]),
    )  # fmt: skip


def random_box(grid: tuple[int, int]) -> Box:
    """A box with lam from Beta(1, 1) and a uniform centre, from torch's generator. One serves a batch."""
    lam = torch.rand(()).item()
    row, column = (int(torch.randint(n, ())) for n in grid)
    return mix_box(lam, row, column, grid)


def mix(x: Tensor, box: Box, scale: int = 1) -> Tensor:
    """Take the box of `x` `[B, H, W, C]` from the batch in reverse; the box's unit is `scale` positions."""
    top, left, bottom, right = (edge * scale for edge in box)
    inside = torch.zeros(x.shape[1:3], dtype=torch.bool, device=x.device)
    inside[top:bottom, left:right] = True
    return torch.where(inside[None, :, :, None], x.flip(0), x)


class TokenLabelLoss(nn.Module):
    """Cross-entropy of the classifier plus `dense_weight` times that of every token.

    The model's output in training is (logits `[B, K]`, token logits `[B, N, K]`, box). Targets are class
    numbers `[B]`, soft labels `[B, K]`, which serve for every token too, or `[B, K, 2 + N]`: the truth, the
    image's soft label, the tokens' soft labels. The image's label is mixed with the reversed batch's by the
    box's share of the tokens.

    Args:
        weight: of the classes, `[K]`.
        blend_truth: mix the soft label with the truth, by 0.9 where both name another class and by 0.5
            where they agree (in the published code, unused there).

    Raises:
        UserError: a target of another shape.
    """

    def __init__(
        self, dense_weight: float = 0.5, cls_weight: float = 1.0, smoothing: float = 0.0,
        weight: Tensor | None = None, blend_truth: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = weight
        self.dense_weight, self.cls_weight = dense_weight, cls_weight
        self.smoothing, self.blend_truth = smoothing, blend_truth

    def forward(self, output: tuple[Tensor, Tensor, Box], target: Tensor) -> Tensor:
        logits, tokens, box = output
        count, classes = tokens.shape[1:]
        if target.ndim == 1:
            target = F.one_hot(target, classes).to(logits.dtype)
            target = target * (1 - self.smoothing) + self.smoothing / classes
        if target.shape == logits.shape:
            image, dense = target, target[:, None].expand(-1, count, -1)
        elif target.shape == (*logits.shape, 2 + count):
            image, dense = target[:, :, 1], target[:, :, 2:].transpose(1, 2)
            if self.blend_truth:
                truth = target[:, :, 0]
                share = 0.9 - 0.4 * (truth.argmax(1) == image.argmax(1)).to(image.dtype)[:, None]
                image = share * image + (1 - share) * truth
        else:
            raise UserError(
                f"token labels must be [B], [B, {classes}] or [B, {classes}, {2 + count}], got {list(target.shape)}"
            )
        top, left, bottom, right = box
        share_of_box = (bottom - top) * (right - left) / count
        if share_of_box > 0:
            image = (1 - share_of_box) * image + share_of_box * image.flip(0)
        loss = self.cls_weight * F.cross_entropy(logits, image, self.weight)
        return loss + self.dense_weight * F.cross_entropy(tokens.flatten(0, 1), dense.flatten(0, 1), self.weight)
