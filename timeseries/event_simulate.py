"""`polyhead simulate`: new event sequences from a trained model, as a file that is data again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import torch

import polyhead
from polyhead.errors import UserError, nearest
from polyhead.files import atomic_write
from timeseries.event_data import EventData
from timeseries.event_sampling import HELD, continued
from timeseries.event_tasks import EventModel

SUFFIXES = (".parquet", ".csv", ".npz")


def simulate(
    ckpt_path: str, output: str, window: float, sequences: int = 100, history: str | None = None,
    first: str | None = None, seed: int = 0, most: int = 10_000, overwrite: bool = False,
) -> None:  # fmt: skip
    """Draw event sequences from a trained model, by thinning with a proven bound.

    Args:
        ckpt_path: the model: a checkpoint, a bundle or a shipped model.
        output: a `.parquet`, `.csv` or `.npz` file, which `--data.root` takes: sequence, time, type, window.
        window: the end of observation, in the unit in which the model reports times; with history, how far after
            its last event.
        sequences: how many; with history, how many futures of each of its sequences.
        history: sequences to continue; the file then says which events were `simulated`.
        first: the type of the first event, at time 0, of a model whose data gave the first event.
        seed: of all draws.
        most: events a sequence at most.
        overwrite: replace the file.
    """
    path = Path(output)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output {output} must end in {', '.join(SUFFIXES)}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already", ["add --overwrite, or choose another --output"])
    for name, value in {"window": window, "sequences": sequences, "most": most}.items():
        if not 0 < value < float("inf"):
            raise UserError(f"--{name} is {value}: a number above 0 is needed")
    model = polyhead.load(ckpt_path)
    system, data = model.system, model.data
    if not isinstance(system, EventModel) or not isinstance(data, EventData):
        raise UserError(f"{ckpt_path} is no model of event sequences")
    batch, known = _histories(system, data, history, first)
    histories = len(batch["dt"])
    generator = torch.Generator().manual_seed(seed)
    held = 2 * system.network.layers * system.network.d_model * (batch["dt"].shape[1] + 100)
    size = max(1, HELD // held)
    columns: dict[str, list[Any]] = {"sequence": [], "time": [], "type": [], "window": [], "simulated": []}
    sizes: list[int] = []
    ends: list[float] = []
    cut = total = 0
    for begin in range(0, histories * sequences, size):
        flat = torch.arange(begin, min(begin + size, histories * sequences))
        limit = torch.full((len(flat),), window / system.scale)
        futures = continued(system.network, batch["dt"] / system.scale, batch["types"], batch["length"],
                            flat // sequences, limit, generator, most)  # fmt: skip
        cut += len(futures.cut)
        total += len(futures.times)
        order = np.lexsort((futures.times, futures.owner))
        bounds = np.searchsorted(futures.owner[order], np.arange(len(flat) + 1))
        for k, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            name, times, types = known[int(flat[k]) // sequences]
            number = (begin + k) % sequences
            label = f"simulated-{begin + k:05d}" if history is None else f"{name}-{number:03d}"
            last = float(times[-1]) if len(times) else 0.0
            own = order[a:b]
            sizes.append(len(times) + len(own))
            ends.append(last + window)
            _append(columns, label, np.r_[times, last + futures.times[own] * system.scale],
                    [system.types[t] for t in (*types, *futures.types[own])], last + window, len(times))  # fmt: skip
    _write(path, columns, sizes, ends, system.types)
    print(f"{path}: {histories * sequences:,} sequences, {total:,} new events", file=sys.stderr)
    if cut:
        print(f"{cut} sequences reached --most {most} events before the end", file=sys.stderr)


def _histories(
    system: EventModel, data: EventData, history: str | None, first: str | None
) -> tuple[dict[str, Any], list[tuple[str, np.ndarray, np.ndarray]]]:
    """The rows that are continued, and (name, times, types) of each."""
    given = system.facts.get("first_event") == "given"
    if history is not None and first is not None:
        raise UserError("--history and --first both say how sequences begin: give one of them")
    if history is not None:
        samples: Any = data.raw_dataset([history])
        pieces = [p for p in samples.pieces if p.problem is None]
        if not pieces:
            raise UserError(f"no sequence of {history} can be continued: {samples.pieces[0].problem}")
        samples.pieces = pieces
        batch = data.collate([samples.load(i, 0) for i in range(len(pieces))])
        return batch, [(p.id, p.span.times, p.span.types) for p in pieces]
    if first is None and given:
        hint = f"types: {', '.join(system.types[:8])}"
        raise UserError(
            "the first event of this model's sequences is given: name its --first TYPE or a --history", [hint]
        )
    names = {label: i for i, label in enumerate(system.labels)} | {name: i for i, name in enumerate(system.types)}
    if first is not None and first not in names:
        near = nearest(first, names)
        raise UserError(
            f"--first {first}: the model has no such type", [f"did you mean {', '.join(near)}?"] if near else []
        )
    kinds = len(system.types)
    events = [] if first is None else [names[first]]
    rows = 1 + len(events)
    batch = {"dt": torch.zeros(1, rows), "types": torch.tensor([[kinds, *events]]), "length": torch.tensor([rows])}
    return batch, [("simulated", np.zeros(len(events)), np.array(events, dtype=np.int64))]


def _append(
    columns: dict[str, list[Any]], name: str, times: np.ndarray, types: list[str], end: float, old: int
) -> None:
    columns["sequence"] += [name] * len(times)
    columns["time"] += times.tolist()
    columns["type"] += types
    columns["window"] += [end] * len(times)
    columns["simulated"] += [i >= old for i in range(len(times))]


def _write(path: Path, columns: dict[str, list[Any]], sizes: list[int], ends: list[float], types: list[str]) -> None:
    """A row an event; npz keeps sequences without events too."""
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".parquet":
            pq.write_table(pa.table(columns), temporary)
        elif path.suffix.lower() == ".csv":
            pa_csv.write_csv(pa.table(columns), temporary)
        else:
            number = {name: i for i, name in enumerate(types)}
            np.savez_compressed(
                temporary,
                times=np.array(columns["time"], dtype=np.float64),
                types=np.array([number[t] for t in columns["type"]], dtype=np.int64),
                offsets=np.r_[0, np.cumsum(sizes)],
                window=np.array(ends),
            )
