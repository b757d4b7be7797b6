"""Learning-rate schedules that span the whole training, whatever its length."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from polyhead.errors import UserError


class WarmupCosine(LRScheduler):
    """Linear warm-up, then half a cosine to a floor, stepped every optimiser step.

    Args:
        optimizer: wrapped optimiser.
        warmup: the share of all steps spent warming up, 0 to 1.
        floor: the last rate as a share of the first.
        total_steps: all optimiser steps; the training loop fills it in.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.05, floor: float = 0.01, total_steps: int = 1) -> None:
        if not 0 <= warmup < 1:
            raise UserError(f"scheduler warmup is {warmup}: a share of the training from 0 to 1 is needed")
        self.warmup, self.floor, self.total_steps = warmup, floor, total_steps
        super().__init__(optimizer)

    def scale(self, step: int) -> float:
        """The factor on the base rate at a step; defined beyond the end, where it stays at the floor."""
        warm = self.warmup * self.total_steps
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = min(1.0, (step - warm) / max(1.0, self.total_steps - warm))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def get_lr(self) -> list[float | Tensor]:
        return [base * self.scale(self.last_epoch) for base in self.base_lrs]

    def set_total_steps(self, total_steps: int) -> None:
        """Stretch the schedule over the training and start it anew."""
        self.total_steps = max(1, total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
