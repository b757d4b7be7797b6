"""Generative pre-training of MVPFormer: which of K + 1 embeddings is the next segment's (section 3.1 of the sheet).

Shapes: B windows, T segments, C channels, D width, K negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def draw_negatives(windows: int, steps: int, channels: int, negatives: int, source: torch.Generator) -> Tensor:
    """`[B, T, C, K]` indices into the flattened (b, t, c) embeddings, uniform over all but a position's own.

    The published code never draws from the last window of a batch and fails on a batch of one; here every other
    position is as likely as any.
    """
    total = windows * steps * channels
    drawn = torch.randint(total - 1, (total, negatives), generator=source)
    drawn += drawn >= torch.arange(total)[:, None]
    return drawn.view(windows, steps, channels, negatives)


def contrastive_logits(predicted: Tensor, embeddings: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Cosines over temperature, `[B*(T-1)*C, K + 1]`, column 0 the true next segment.

    Gradients flow into predictions and true embeddings, not into negatives. A negative that equals the true
    embedding gets -inf.

    Args:
        predicted, embeddings: `[B, T, C, D]`.
        index: of `draw_negatives`; the entries of t = 0 are not used.
    """
    width = embeddings.shape[-1]
    guess = predicted[:, :-1].reshape(-1, 1, width)
    true = embeddings[:, 1:].reshape(-1, 1, width)
    others = embeddings.detach().reshape(-1, width)[index[:, 1:].flatten(0, 2).long()]
    same = (others - true.detach()).norm(dim=-1) < 1e-8 + 1e-5 * true.detach().norm(dim=-1)
    logits = torch.cat([F.cosine_similarity(guess, true, dim=-1), F.cosine_similarity(guess, others, dim=-1)], 1)
    logits = logits / temperature
    return torch.cat([logits[:, :1], logits[:, 1:].masked_fill(same, -torch.inf)], 1)


def contrastive(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy against column 0, and the share of rows where it is the largest."""
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target), (logits.argmax(1) == 0).float().mean()
