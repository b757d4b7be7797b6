"""What an event model looks at: intensities, attention over history, influence of types on each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from timeseries.event_pictures import as_numbers, matrix_panel
from timeseries.sahp import SAHP, States

if TYPE_CHECKING:
    from timeseries.event_tasks import EventModel

# A picture shows so many of the last events and of the most frequent types
EVENTS, TYPES, CURVES = 80, 24, 4
POINTS = 600


def attention_influence(weights: Tensor, types: Tensor, length: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    """How much rows of one type attend to rows of another.

    Args:
        weights: `[B, N, N]`, attention, mean over layers and heads.
        types: `[B, N]`, K for BOS and padding.
        length: `[B]`.

    Returns:
        `[K, K]` (row: the type that looks, column: the type looked at): mean of attention times the number of keys
        there were, so that 1 is even attention; and the plain mean.
    """
    rows = torch.arange(types.shape[1], device=types.device)
    event = (rows < length[:, None]) & (types < kinds)
    pair = event[:, :, None] & event[:, None, :] & (rows[:, None] >= rows)
    query = types[:, :, None].expand_as(pair)[pair]
    key = types[:, None, :].expand_as(pair)[pair]
    keys = (rows + 1.0)[:, None].expand_as(pair[0]).expand_as(pair)[pair]
    place = query * kinds + key
    total, plain, count = (torch.zeros(kinds * kinds, device=types.device) for _ in range(3))
    total.index_add_(0, place, weights[pair] * keys)
    plain.index_add_(0, place, weights[pair])
    count.index_add_(0, place, torch.ones_like(keys))
    shape = (kinds, kinds)
    return (total / count.clamp(min=1)).view(shape), (plain / count.clamp(min=1)).view(shape)


def _log_rates(
    network: SAHP, dt: Tensor, types: Tensor, length: Tensor, without: int | None, given: bool
) -> tuple[Tensor, Tensor]:
    """Log intensity of each event's own type just before it, with all events of a type taken from the history.

    Returns log intensities and types of all events, flat; without the first of each sequence where it is given.
    """
    kinds, owner = [], []
    shorter_dt, shorter_types, places, waits = [], [], [], []
    for b, n in enumerate(length.tolist()):
        time = dt[b, :n].double().cumsum(0)
        kept = torch.ones(n, dtype=torch.bool, device=dt.device) if without is None else types[b, :n] != without
        index = kept.cumsum(0)[:-1] - 1
        own = time[kept]
        shorter_dt.append(own.diff(prepend=own[:1]).float())
        shorter_types.append(types[b, :n][kept])
        places.append(index)
        waits.append((time[1:] - own[index]).float())
        kinds.append(types[b, 1:n])
        owner.append(torch.full((n - 1,), b, device=dt.device))
    pad = torch.nn.utils.rnn.pad_sequence
    states = network(
        pad(shorter_dt, batch_first=True), pad(shorter_types, batch_first=True, padding_value=network.kinds)
    )
    scored = torch.cat([torch.arange(len(k), device=k.device) >= given for k in kinds])
    row, place, kind = torch.cat(owner)[scored], torch.cat(places)[scored], torch.cat(kinds)[scored]
    rates = network.intensity(states.rows((row, place)), torch.cat(waits)[scored, None])[:, 0]
    return rates.gather(1, kind[:, None])[:, 0].log(), kind


def removal_influence(
    network: SAHP, dt: Tensor, types: Tensor, length: Tensor, chosen: list[int], given: bool = False
) -> np.ndarray:
    """How much types matter to each other by what the model says without them.

    Args:
        chosen: the types that are removed; others stay 0.
        given: leave the first event of each sequence out.

    Returns:
        `[K, K]`: how much lower the log intensity of type i (row) is at its events, had no event of type j (column)
        happened before; above 0 means that j excites i.
    """
    kinds = network.kinds
    full, kind = _log_rates(network, dt, types, length, None, given)
    table = torch.zeros(kinds, kinds, dtype=torch.float64)
    count = torch.bincount(kind, minlength=kinds).clamp(min=1)
    for j in chosen:
        less, _ = _log_rates(network, dt, types, length, j, given)
        change = torch.zeros(kinds, device=dt.device).index_add_(0, kind, full - less)
        table[:, j] = (change / count).cpu().double()
    return table.numpy()


def kernel_influence(network: SAHP) -> np.ndarray | None:
    """`[K, K]`: expected direct children of type i (row) of an event of type j by the exponential kernels alone.

    The network's gates, 1 on average at the start of training, scale them; None without kernels.
    """
    excitation = network.excitation
    if excitation is None:
        return None
    weight = (F.softplus(excitation.raw) / excitation.log_rate.exp()).sum(-1)
    every = torch.arange(network.kinds, device=weight.device)
    return as_numbers(weight @ excitation.values(every).T)


def _curve(network: SAHP, states: States, time: np.ndarray, grid: np.ndarray, row: int) -> np.ndarray:
    """Intensities `[P, K]` at times `grid`, from the states of one sequence."""
    place = np.searchsorted(time, grid, side="right") - 1
    index = torch.from_numpy(place).to(states.start.device)
    own = states.rows((torch.full_like(index, row), index))
    u = torch.from_numpy((grid - time[place]).astype(np.float32)).to(states.start.device)
    return as_numbers(network.intensity(own, u[:, None])[:, 0])


@torch.no_grad()
def explain(system: EventModel, batch: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """A figure and arrays a sequence. The influence matrices are over all sequences of the batch."""
    network, scale = system.network, system.scale
    dt, types, length = batch["dt"] / scale, batch["types"], batch["length"]
    weights: list[Tensor] = []
    states = network(dt, types, None, 0, weights)
    attention = torch.stack([w.mean(1) for w in weights]).mean(0)
    scaled, plain = attention_influence(attention, types, length, network.kinds)
    frequency = torch.bincount(types.flatten(), minlength=network.kinds + 1)[: network.kinds]
    present = [int(k) for k in frequency.argsort(descending=True)[:TYPES] if frequency[k]]
    given = system.facts.get("first_event") == "given"
    removal = removal_influence(network, dt, types, length, present, given)
    kernels = kernel_influence(network)
    shared: dict[str, Any] = {"influence_attention": as_numbers(scaled), "attention_by_type": as_numbers(plain),
                              "influence_removal": removal, "types": np.array(system.labels)}  # fmt: skip
    if kernels is not None:
        shared["influence_kernels"] = kernels
    result = []
    for b, n in enumerate(length.tolist()):
        time = as_numbers(dt[b, :n].double().cumsum(0))
        # The row of BOS has no time of its own where the first event is given
        first = max(0, n - EVENTS)
        grid = np.linspace(time[first], time[-1] + 2.0, POINTS)
        curve = _curve(network, states, time, grid, b) / scale
        arrays = {**shared, "attention": as_numbers(attention[b, :n, :n]), "event_times": time[1:] * scale,
                  "event_types": as_numbers(types[b, 1:n]).astype(np.int64), "times": grid * scale,
                  "intensity": curve}  # fmt: skip
        result.append((_picture(system, arrays, first, present, batch["id"][b]), arrays))
    return result


def _picture(system: EventModel, arrays: dict[str, Any], first: int, present: list[int], name: str) -> Any:
    from matplotlib import pyplot

    matrices = [("influence_removal", "removal: change of log intensity")]
    if "influence_kernels" in arrays:
        matrices.append(("influence_kernels", "kernels: expected children"))
    matrices.append(("influence_attention", "attention, 1 is even"))
    figure = pyplot.figure(figsize=(4 * (len(matrices) + 1), 7.2), layout="constrained")
    grid = figure.add_gridspec(2, len(matrices) + 1, height_ratios=[1, 1.25])
    top = figure.add_subplot(grid[0, :])
    own = arrays["event_types"]
    shown = np.bincount(own, minlength=len(system.labels)).argsort()[::-1][:CURVES]
    visible = slice(max(0, first - 1), None)
    for k in shown:
        top.plot(arrays["times"], arrays["intensity"][:, k], linewidth=1, label=system.labels[k])
    if len(system.labels) > len(shown):
        top.plot(arrays["times"], arrays["intensity"].sum(1), "k", linewidth=0.6, label="all types")
    top.set_ylim(bottom=0)
    floor = -0.04 * top.get_ylim()[1]
    for n, k in enumerate(shown):
        at = arrays["event_times"][visible][own[visible] == k]
        top.plot(at, np.full(len(at), floor), "|", color=f"C{n}", markersize=9)
    rest = arrays["event_times"][visible][~np.isin(own[visible], shown)]
    top.plot(rest, np.full(len(rest), floor), "|", color="0.6", markersize=9)
    top.set_ylim(bottom=1.8 * floor)
    top.legend(fontsize="x-small", ncols=3)
    top.set_xlabel("time")
    top.set_ylabel("intensity")
    top.set_title(f"{name}: {len(own)} events" + (f", the last {EVENTS}" if first else ""), fontsize="medium")
    looks = figure.add_subplot(grid[1, 0])
    corner = arrays["attention"][first:, first:]
    place = np.arange(first, first + len(corner) + 1) - 0.5
    looks.pcolormesh(place, place, corner, cmap="magma", vmin=0, vmax=float(np.quantile(corner, 0.99)) or 1.0)
    looks.invert_yaxis()
    looks.set_xlabel("history (0 is the beginning)")
    looks.set_ylabel("after event")
    looks.set_title("attention, mean of layers and heads", fontsize="medium")
    ranked = sorted(present)
    for column, (key, title) in enumerate(matrices, 1):
        axis = figure.add_subplot(grid[1, column])
        if ranked:
            matrix_panel(axis, arrays[key][np.ix_(ranked, ranked)], [system.labels[k] for k in ranked], title)
    return figure
