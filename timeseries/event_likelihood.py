"""What follows from an intensity: the likelihood of events, and when and what the next one is.

Every function takes the network and the states of rows; an interval runs from a row to the next event, or to the end
of observation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timeseries.sahp import SAHP, States

Rule = Literal["quadrature", "monte_carlo", "even", "trapezoid"]
# Numbers of an intermediate tensor beyond which rows are worked off in pieces
PIECE = 2**24
# The quadrature's nodes are even in log(1 + u / KNEE) of the interval, in units of the mean gap: intensities
# change most just after an event, and gaps may be thousands of times longer than the change
KNEE = 0.2
# The grid of the next event's distribution: from this to that, in mean gaps; beyond, the intensity is constant
FINEST, FARTHEST, GRID = 1e-3, 1e4, 192


@lru_cache
def _legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2


def points(gap: Tensor, count: int, rule: Rule = "quadrature", uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Times in intervals `[...]` and weights, both `[..., count]`, with which a sum over the times is an integral.

    Args:
        gap: the intervals' lengths.
        rule: `quadrature` (Gauss-Legendre, deterministic), `monte_carlo` (the published one: uniform draws), or
            EasyTPP's: the plain mean of evenly spaced points with both ends (`even`; it has a bias), and `trapezoid`.
        uniforms: the draws of `monte_carlo` `[..., count]`; new ones when None.
    """
    gap = gap[..., None]
    if rule == "quadrature":
        nodes, weights = (torch.as_tensor(v, dtype=gap.dtype, device=gap.device) for v in _legendre(count))
        stretch = torch.log1p(gap / KNEE)
        grown = (stretch * nodes).exp()
        return KNEE * torch.expm1(stretch * nodes), KNEE * stretch * grown * weights
    if rule == "monte_carlo":
        drawn = torch.rand(*gap.shape[:-1], count, dtype=gap.dtype, device=gap.device) if uniforms is None else uniforms
        return gap * drawn, (gap / count).expand(*gap.shape[:-1], count)
    share = torch.full((count,), 1.0 / count, dtype=gap.dtype, device=gap.device)
    if rule == "trapezoid":
        share = torch.full_like(share, 1.0 / (count - 1))
        share[0] = share[-1] = 0.5 / (count - 1)
    return gap * torch.linspace(0, 1, count, dtype=gap.dtype, device=gap.device), gap * share


class Terms(NamedTuple):
    """Of every interval, 0 where there is none.

    Attributes:
        log_type: log intensity of the type that ended it, just before it did.
        log_total: log of the intensities' sum at that time.
        compensator: the integral of that sum over the interval.
        guess: the type of the highest intensity at that time; -1 where no event ended it.
    """

    log_type: Tensor
    log_total: Tensor
    compensator: Tensor
    guess: Tensor

    @property
    def nll(self) -> Tensor:
        """The sum over all intervals of the negative log likelihood."""
        return self.compensator.sum() - self.log_type.sum()


def terms(
    network: SAHP,
    states: States,
    gap: Tensor,
    target: Tensor,
    count: int = 8,
    rule: Rule = "quadrature",
    uniforms: Tensor | None = None,
) -> Terms:
    """The parts of the log likelihood (section 3.1 of the paper), an interval a row.

    Rows without an interval (gap 0 and no target) cost nothing.

    Args:
        states: of rows `[B, N]`.
        gap: `[B, N]`, the interval after each row; 0 where none is counted.
        target: `[B, N]`, the type of the event that ends it; -1 where none does.
        count, rule, uniforms: see `points`.
    """
    there = (gap > 0) | (target >= 0)
    packed, gaps, types = states.rows(there), gap[there], target[there]
    draws = None if uniforms is None else uniforms.expand(*gap.shape, count)[there]
    width = (count + 1) * max(network.kinds, network.d_model)
    size = max(1, PIECE // width)
    pieces = []
    for first in range(0, max(1, len(gaps)), size):
        rows = slice(first, first + size)
        arguments = (
            network,
            packed.rows(rows),
            gaps[rows],
            types[rows],
            count,
            rule,
            None if draws is None else draws[rows],
        )
        if len(gaps) > size and torch.is_grad_enabled():
            pieces.append(checkpoint(_piece, *arguments, use_reentrant=False))
        else:
            pieces.append(_piece(*arguments))
    log_type, log_total, compensator, guess = (torch.cat(p) for p in zip(*pieces, strict=True))

    def spread(values: Tensor, blank: float) -> Tensor:
        return torch.full(gap.shape, blank, dtype=values.dtype, device=gap.device).masked_scatter(there, values)

    return Terms(spread(log_type, 0), spread(log_total, 0), spread(compensator, 0), spread(guess, -1))


def _piece(
    network: SAHP, states: States, gap: Tensor, target: Tensor, count: int, rule: Rule, uniforms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`terms` of rows `[V]`."""
    u, weights = points(gap, count, rule, uniforms)
    # The event's time and the nodes in one tensor: half the calls
    rates = network.cell.intensity(states, torch.cat([gap[:, None], u], -1))
    compensator = (rates[:, 1:].sum(-1) * weights).sum(-1)
    at_event = rates[:, 0]
    if states.jump is not None and states.rate is not None:
        at_event = at_event + torch.einsum("vr,vkr->vk", (-gap[:, None] * states.rate).exp(), states.jump)
        shape = -torch.expm1(-gap[:, None] * states.rate) / states.rate
        compensator = compensator + (states.jump.sum(1) * shape).sum(-1)
    ended = target >= 0
    chosen = at_event.gather(1, target.clamp(min=0)[:, None])[:, 0]
    one = torch.ones_like(chosen)
    log_type = torch.where(ended, chosen, one).log()
    log_total = torch.where(ended, at_event.sum(-1), one).log()
    return log_type, log_total, compensator, torch.where(ended, at_event.argmax(-1), -1)


class Waiting(NamedTuple):
    """When and what the next event is.

    Attributes:
        mean: expected waiting time.
        quantiles: `[..., Q]`, of the waiting time.
        types: `[..., K]`, probability that the next event is of each type, whenever it comes.
    """

    mean: Tensor
    quantiles: Tensor
    types: Tensor


def waiting(network: SAHP, states: States, levels: tuple[float, ...] = (0.05, 0.5, 0.95)) -> Waiting:
    """The distribution of the next event after rows `[V]`, by its survival function.

    `E[u] = integral of S`, `S(u) = exp(-integral of the total intensity)`, on a grid that is even in log(1 + u); after
    the grid the intensity stays what it has come to, and everything is exact.
    """
    stretch = float(np.log1p(FARTHEST / FINEST))
    even = torch.linspace(0, 1, GRID, dtype=states.start.dtype, device=states.start.device) * stretch
    u, slope = FINEST * torch.expm1(even), FINEST * even.exp() * (stretch / (GRID - 1))
    rates = network.intensity(states, u.expand(states.start.shape[0], GRID))
    total = rates.sum(-1)

    def running(values: Tensor) -> Tensor:
        """Trapezoid sums from the grid's first point to each."""
        steps = (values[:, 1:] + values[:, :-1]) / 2
        return torch.cat([torch.zeros_like(values[:, :1]), steps.cumsum(1)], 1)

    hazard = running(total * slope)
    survival = (-hazard).exp()
    last, left = total[:, -1], survival[:, -1]
    mean = running(survival * slope)[:, -1] + left / last
    # The chance of each type in a step is its share of what the step takes from the survival
    share = rates / total[..., None]
    lost = survival[:, :-1] - survival[:, 1:]
    types = ((share[:, 1:] + share[:, :-1]) / 2 * lost[..., None]).sum(1) + share[:, -1] * left[:, None]
    wanted = -torch.log1p(-torch.tensor(levels, dtype=u.dtype, device=u.device))
    after = (hazard[:, :, None] < wanted).sum(1).clamp(1, GRID - 1)
    low, high = hazard.gather(1, after - 1), hazard.gather(1, after)
    inside = u[after - 1] + (u[after] - u[after - 1]) * ((wanted - low) / (high - low).clamp(min=1e-20)).clamp(0, 1)
    beyond = u[-1] + (wanted - hazard[:, -1:]) / last[:, None]
    quantiles = torch.where(wanted > hazard[:, -1:], beyond, inside)
    return Waiting(mean, quantiles, types / types.sum(-1, keepdim=True))


def in_pieces(function: Callable[[States], tuple[Tensor, ...]], states: States, width: int) -> tuple[Tensor, ...]:
    """`function` on rows `[V]` of `states`, so many at a time that `rows x width` numbers stay bounded."""
    size = max(1, PIECE // width)
    parts = [function(states.rows(slice(a, a + size))) for a in range(0, len(states.start), size)]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def every_waiting(network: SAHP, states: States, levels: tuple[float, ...] = (0.05, 0.5, 0.95)) -> Waiting:
    """`waiting` of any number of rows, in bounded memory."""
    width = GRID * max(network.kinds, network.d_model)
    return Waiting(*in_pieces(lambda piece: tuple(waiting(network, piece, levels)), states, width))
