"""Explanations of predictions: a picture and its arrays a sample."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyhead.data import DataModule, Unreadable
from polyhead.errors import UserError
from polyhead.files import atomic_write
from polyhead.system import System


def safe_name(name: str) -> str:
    """A sample's id as a file name; separators become double underscores."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name.replace("/", "__"))[:150]


def first(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """The first samples of a batch; what stands under a name may be columns of its own."""
    return {k: first(v, count) if isinstance(v, dict) else v[:count] for k, v in batch.items()}


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def explain(system: System, data: DataModule, folder: Path, limit: int) -> tuple[int, list[Unreadable]]:
    """Write `NAME.png` and `NAME.npz` for the first `limit` samples of prediction.

    Returns:
        How many were explained, and what could not be read.

    Raises:
        UserError: the system has no explanation.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names are a person's, and may hold a $
    from matplotlib import pyplot

    describe = getattr(system, "explain", None)
    if describe is None:
        raise UserError(f"{type(system).__name__} has no explanation", getattr(system, "instead_of_explain", ()))
    system.eval()
    data.setup("predict")
    count = 0
    failed: list[Unreadable] = []
    times: Counter[str] = Counter()  # names that differ may become the same file name
    for batch in data.loader(data.samples("predict"), "predict"):
        if count + len(failed) >= limit:
            break
        failed += batch["errors"]
        if not batch["id"]:
            continue
        room = limit - count
        about = batch.get("about", {})
        if "sample" in about and len(about["sample"]) != len(batch["id"]):
            # Several rows of a sample, each a picture of its own
            rows = zip(about["sample"], about["part"], strict=True)
            names = [f"{batch['id'][sample]}__{part}" for sample, part in rows]
            described = list(zip(names, describe(move(batch, system.device)), strict=True))[:room]
        else:
            batch = first(move(batch, system.device), room)
            described = list(zip(batch["id"], describe(batch), strict=True))
        for name, (figure, arrays) in described:
            stem = safe_name(name)
            times[stem] += 1
            if times[stem] > 1:
                stem = f"{stem}__{times[stem]}"
            with atomic_write(folder / f"{stem}.png") as path:
                figure.savefig(path, dpi=100, bbox_inches="tight")
            with atomic_write(folder / f"{stem}.npz") as path:
                np.savez_compressed(path, **arrays)
            pyplot.close(figure)
            count += 1
    return count, failed
