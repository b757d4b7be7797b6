"""Futures of event sequences by thinning, many at a time.

Ogata (1981): candidates come at the rate of an upper bound and are kept with probability intensity / bound. The bound
of `SAHP.bound` holds for all later times (see `TanhCell.bound`), so every kept event is an exact draw.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from timeseries.sahp import SAHP, Cache, States

# Numbers in the keys and values that are held at once
HELD = 2**26


class Futures(NamedTuple):
    """Events drawn, in order of drawing.

    Attributes:
        owner: `[M]`, which future an event is of.
        times: `[M]`, since the end of its history.
        types: `[M]`.
        cut: `[S]`, futures that reached the most events before the end.
    """

    owner: np.ndarray
    times: np.ndarray
    types: np.ndarray
    cut: np.ndarray


class _Walk:
    """Sequences that are extended an event at a time, with keys, values and traces of what they have been."""

    def __init__(self, network: SAHP, dt: Tensor, types: Tensor, length: Tensor, owner: Tensor) -> None:
        """Encode histories once, then copy them: future i continues history `owner[i]`."""
        self.network = network
        self.caches = [Cache(length) for _ in range(network.layers)]
        x = network.hidden(dt, types, None, 0, None, self.caches)
        at = torch.arange(len(dt), device=dt.device), length - 1
        self.trace = None
        if network.excitation is not None:
            self.trace = network.excitation.traces(dt, types)[at]
        self.x = x[at]
        self.rows = length
        self.keep(owner)

    def keep(self, index: Tensor) -> None:
        """Go on with some of the sequences, or with several copies of them."""
        self.x, self.rows = self.x[index], self.rows[index]
        self.trace = None if self.trace is None else self.trace[index]
        for cache in self.caches:
            cache.keep(index, self.rows)

    def states(self) -> States:
        states = self.network.cell(self.x)
        if self.network.excitation is None or self.trace is None:
            return states
        jump, rate = self.network.excitation(self.x, self.trace)
        return states._replace(jump=jump, rate=rate)

    def add(self, dt: Tensor, types: Tensor) -> None:
        """Append an event `[S]` to every sequence."""
        excitation = self.network.excitation
        if excitation is not None and self.trace is not None:
            decay = (-dt[:, None] * excitation.log_rate.exp()).exp()[..., None]
            self.trace = self.trace * decay + excitation.values(types)[:, None]
        for cache in self.caches:
            cache.rows = self.rows
        self.x = self.network.hidden(dt[:, None], types[:, None], None, self.rows, None, self.caches)[:, 0]
        self.rows = self.rows + 1


def next_events(
    network: SAHP, states: States, limit: Tensor, generator: torch.Generator | None = None, begin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the next event after each of the rows `[S]`: waiting time (infinite beyond `limit`) and type."""
    device = states.start.device
    u = torch.zeros_like(limit) if begin is None else begin.clone()
    types = torch.zeros(len(limit), dtype=torch.int64, device=device)
    open_ = torch.arange(len(limit), device=device)
    while len(open_):
        own = states.rows(open_)
        bound = network.bound(own, u[open_]).sum(-1)
        draws = torch.rand(2, len(open_), generator=generator).to(device)
        time = u[open_] - torch.log1p(-draws[0]) / bound
        rates = network.intensity(own, time[:, None])[:, 0]
        total = rates.sum(-1)
        late = time > limit[open_]
        kept = (draws[1] * bound < total) & ~late
        u[open_] = torch.where(late, torch.inf, time)
        if kept.any():
            share = torch.rand(int(kept.sum()), 1, generator=generator).to(device) * total[kept, None]
            types[open_[kept]] = (rates[kept].cumsum(-1) < share).sum(-1).clamp(max=network.kinds - 1)
        open_ = open_[~kept & ~late]
    return u, types


@torch.no_grad()
def continued(
    network: SAHP,
    dt: Tensor,
    types: Tensor,
    length: Tensor,
    owner: Tensor,
    horizon: Tensor,
    generator: torch.Generator | None = None,
    most: int = 10_000,
    waited: Tensor | None = None,
) -> Futures:
    """Futures of histories up to a horizon.

    Args:
        dt, types, length: histories as rows, see `SAHP.forward`; `length` counts them.
        owner: `[S]`, which history each future continues.
        horizon: `[S]`, how far, from the history's last row.
        generator: of the draws, on the CPU.
        most: events a future at most.
        waited: `[S]`, time since the last row in which nothing has happened.
    """
    walk = _Walk(network, dt, types, length, owner)
    name = np.arange(len(owner))
    clock = torch.zeros_like(horizon)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for _ in range(most):
        wait, kinds = next_events(network, walk.states(), horizon - clock, generator, waited)
        waited = None
        alive = wait.isfinite()
        index = alive.nonzero()[:, 0]
        name = name[alive.cpu().numpy()]
        if not len(index):
            break
        wait, kinds, clock, horizon = wait[index], kinds[index], clock[index] + wait[index], horizon[index]
        found.append((name, clock.cpu().numpy(), kinds.cpu().numpy()))
        if len(index) < len(alive):
            walk.keep(index)
        walk.add(wait, kinds)
    parts = [np.concatenate([f[i] for f in found]) if found else np.zeros(0) for i in range(3)]
    return Futures(parts[0].astype(np.int64), parts[1].astype(np.float64), parts[2].astype(np.int64), name)


@torch.no_grad()
def counts_ahead(network: SAHP, batch: dict[str, Any], scale: float, horizon: float, samples: int) -> dict[str, Any]:
    """Prediction columns of how many events come within `horizon`, from `samples` futures a sequence.

    The draws are those of a generator of their own: the same batch gives the same numbers.
    """
    generator = torch.Generator().manual_seed(0)
    dt, types, length = batch["dt"] / scale, batch["types"], batch["length"]
    held = 2 * network.layers * network.d_model * dt.shape[1]
    size = max(1, HELD // held)
    counts = np.zeros((len(dt) * samples, network.kinds), dtype=np.int64)
    for first in range(0, len(counts), size):
        flat = torch.arange(first, min(first + size, len(counts)))
        own, owner = (flat // samples).unique(return_inverse=True)
        own, owner = own.to(dt.device), owner.to(dt.device)
        limit = torch.full((len(flat),), horizon / scale, dtype=dt.dtype, device=dt.device)
        futures = continued(network, dt[own], types[own], length[own], owner, limit, generator)
        np.add.at(counts, (first + futures.owner, futures.types), 1)
    table = counts.reshape(len(dt), samples, network.kinds)
    total = table.sum(-1)
    return {
        "count_mean": total.mean(1).astype(np.float32),
        "count_low": np.quantile(total, 0.05, axis=1).astype(np.float32),
        "count_high": np.quantile(total, 0.95, axis=1).astype(np.float32),
        "counts_by_type": table.mean(1).astype(np.float32),
    }
