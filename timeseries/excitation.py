"""Exponential excitation between types of events, for the network beside SAHP and for the classical process."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Up to so many types each has an excitation state of its own; beyond, they share so many
OWN_STATES, SHARED_STATES = 64, 16


class Excitation(nn.Module):
    """Exponential kernels beside the network: types excite types as in the classical Hawkes process.

    Adds `g_k sum_r J_kr exp(-b_r u)` to the intensity of type k, where J sums what all earlier events have left:
    `J_kr = sum_m A_k,k_m,r exp(-b_r (t_i - t_m))`, A >= 0, and g, in (0, 2), is the network's say after each event.
    With g = 1 it is the exponential Hawkes process, and its integral is exact. Not in the paper.

    Args:
        types: K. Above 64 types share 16 states.
        rates: R, kernels of different decay a pair of types.
    """

    own: Tensor

    def __init__(self, d_model: int, types: int, rates: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.linspace(-1.5, 1.5, rates) if rates > 1 else torch.zeros(rates))
        width = types if types <= OWN_STATES else SHARED_STATES
        self.shared = nn.Parameter(torch.randn(types, width)) if types > OWN_STATES else None
        self.register_buffer("own", torch.eye(types + 1, types) if self.shared is None else torch.empty(0),
                             persistent=False)  # fmt: skip
        self.raw = nn.Parameter(torch.full((types, width, rates), inverse_softplus(0.1 / width)))
        self.gate = nn.Linear(d_model, types)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def begin(self, alpha: Tensor, decay: float) -> None:
        """Become a fitted exponential Hawkes process; kernels of other decays start at almost nothing.

        Args:
            alpha: `[K, K]` expected children (row affected, column triggering), or `[K, 2]` (of any event, of its own
                kind) where states are shared.
            decay: of its kernels.
        """
        kinds, width, rates = self.raw.shape
        with torch.no_grad():
            spread = torch.arange(rates) - rates // 2
            self.log_rate.copy_(math.log(decay) + 1.8 * spread)
            height = alpha * decay
            if self.shared is not None:
                height = (alpha[:, :1] * decay / F.softplus(self.shared).sum(1).mean()).expand(-1, width)
            floor = 1e-3 * max(1.0, decay) / width
            raw = torch.full_like(self.raw, floor)
            raw[:, :, rates // 2] = height.clamp(min=floor)
            self.raw.copy_(raw + (-torch.expm1(-raw)).log())

    def values(self, types: Tensor) -> Tensor:
        """What an event of each type leaves `[..., E]`; BOS and padding leave nothing."""
        if self.shared is None:
            return self.own[types].to(self.raw.dtype)
        return F.pad(F.softplus(self.shared), (0, 0, 0, 1))[types]

    def forward(self, x: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
        """The kernels' heights after rows `[..., K, R]` and their decay `[R]`.

        Args:
            x: what the network makes of the rows `[..., D]`.
            trace: `[..., R, E]`, what `traces` gave.
        """
        jump = torch.einsum("...re,ker->...kr", trace, F.softplus(self.raw))
        gate = 2 * self.gate(x).sigmoid()
        return jump * gate[..., None], self.log_rate.exp()

    def traces(self, dt: Tensor, types: Tensor) -> Tensor:
        """The sum over events up to each row of what they left, decayed: `[B, N, R, E]`."""
        left, rate = self.values(types), self.log_rate.exp()
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return _dense(left, dt, rate)
        return scan(left, dt, rate)


def scan(left: Tensor, dt: Tensor, rate: Tensor) -> Tensor:
    """Decayed running sums in log2(N) steps.

    Args:
        left: `[B, N, E]`, what each row leaves.
        dt: `[B, N]`, the gap before each row.
        rate: `[R]`, decay per unit of time.

    Returns:
        `[B, N, R, E]`: `sum_{m <= i} left_m exp(-rate (t_i - t_m))`.
    """
    total = left[:, :, None].expand(-1, -1, len(rate), -1)
    span, step = dt, 1
    while step < dt.shape[1]:
        decay = (-span[:, step:, None] * rate).exp()[..., None]
        total = torch.cat([total[:, :step], total[:, step:] + decay * total[:, :-step]], 1)
        span = torch.cat([span[:, :step], span[:, step:] + span[:, :-step]], 1)
        step *= 2
    return total


def _dense(left: Tensor, dt: Tensor, rate: Tensor) -> Tensor:
    """`scan` without steps, for graphs of any length."""
    time = dt.cumsum(1)
    age = time[:, :, None] - time[:, None, :]
    place = torch.arange(dt.shape[1], device=dt.device)
    past = (place <= place[:, None]).to(dt.dtype)
    kernel = (-age.clamp(min=0)[..., None] * rate).exp() * past[..., None]
    return torch.einsum("bqmr,bme->bqre", kernel, left)


def inverse_softplus(value: float) -> float:
    """x with softplus(x) = value > 0."""
    return value + math.log(-math.expm1(-value))
