"""`polyhead vectors`: items and users as vectors, for an index of nearest neighbours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import polyhead
from polyhead import bundle
from polyhead.errors import UserError
from polyhead.files import atomic_write
from polyhead.sources import existing
from recsys.interactions import Interactions
from recsys.tasks import NextItem


def vectors(
    ckpt_path: str, output: str, root: str | None = None, name: str | None = None,
    user_column: str | None = None, item_column: str | None = None, time_column: str | None = None,
    separator: str | None = None, list_separator: str | None = None,
    order: Literal["time", "rows"] | None = None, duplicates: Literal["drop", "keep"] | None = None,
    overwrite: bool = False,
) -> None:  # fmt: skip
    """Write a recommender's items and users as vectors whose inner product is the score.

    Args:
        ckpt_path: the model: a checkpoint, a bundle or a shipped model.
        output: gets items.npy `[N, d]` and items.parquet (row, item), and with a log users.npy `[U, d]` and
            users.parquet (row, user, known events).
        root: a log; its users' vectors are written too.
        name, user_column, item_column, time_column, separator, list_separator, order, duplicates: of the log, as
            for `fit --data...`; those of the model's own data if left out.
        overwrite: replace files that are there.
    """
    model = polyhead.load(ckpt_path)
    system: Any = model.system
    if not isinstance(system, NextItem):
        raise UserError(f"{ckpt_path} is no recommender of items")
    folder = Path(output)
    there = [p for p in (folder / f"{what}.npy" for what in ("items", "users")) if p.exists()]
    if there and not overwrite:
        raise UserError(f"{there[0]} is there already: add --overwrite, or choose another --output")
    columns = {"user_column": user_column, "item_column": item_column, "time_column": time_column,
               "separator": separator, "list_separator": list_separator, "duplicates": duplicates}  # fmt: skip
    users = None
    if root is not None:
        users = _users(system, model, {**columns, "root": str(existing(root)), "name": name, "order": order})
    items = system.network.item.detach().cpu().numpy()
    _write(folder, "items", items, {"item": system.catalogue.ids})
    told = f"{len(items):,} items"
    if users is not None:
        _write(folder, "users", users[0], users[1])
        told += f" and {len(users[0]):,} users"
    print(f"{told} as vectors of {items.shape[1]} in {folder}: score = inner product", file=sys.stderr)


@torch.inference_mode()
def _users(system: NextItem, model: Any, options: dict[str, str | None]) -> tuple[np.ndarray, dict[str, Any]]:
    recipe = model.data.recipe
    given = {k: v for k, v in options.items() if v is not None}
    data = bundle.build_data({**recipe, "init_args": {**recipe["init_args"], **given}})
    assert isinstance(data, Interactions)
    data.setup("predict")
    samples: Any = data.samples("predict")
    found = np.zeros((len(samples), system.network.dim), dtype=np.float32)
    for indices in data.batches(samples, "predict", 0):
        history = samples.load_batch(indices, 0)["history"].to(system.device)
        found[indices] = system.users(history).float().cpu().numpy()
    return found, {"user": data.everything.users, "events": samples.lengths}


def _write(folder: Path, what: str, values: np.ndarray, names: dict[str, Any]) -> None:
    with atomic_write(folder / f"{what}.npy") as path, open(path, "wb") as file:
        np.save(file, values)
    with atomic_write(folder / f"{what}.parquet") as path:
        pq.write_table(pa.table({"row": np.arange(len(values)), **names}), path)
