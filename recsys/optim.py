"""Adam as TensorFlow 1 has it."""

from __future__ import annotations

import math
from typing import Any

import torch


class TensorFlowAdam(torch.optim.Adam):
    """Adam whose epsilon stands beside the uncorrected second moment, as in TensorFlow 1.

    w -= lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), which is torch's form with eps / sqrt(1 - b2^t).
    Gradients of rare items are so small that the place matters. The arguments are those of `torch.optim.Adam`;
    `weight_decay` is an L2 term in the gradient.
    """

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["epsilon"] = group.get("epsilon", group["eps"])
            group["taken"] = group.get("taken", 0) + 1
            group["eps"] = group["epsilon"] / math.sqrt(1 - group["betas"][1] ** group["taken"])
        return super().step(closure)
