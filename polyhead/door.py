"""The Python door: a trained model that takes raw inputs and gives the command's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead import bundle
from polyhead.columns import rows as by_row
from polyhead.data import DataModule
from polyhead.errors import BadSample
from polyhead.explain import move
from polyhead.system import System


class Model:
    """A model with its preprocessing.

    Attributes:
        system: the Lightning module, in eval mode.
        data: the data module whose preprocessing it was trained with.
    """

    def __init__(self, system: System, data: DataModule) -> None:
        self.system, self.data = system.eval(), data

    @torch.inference_mode()
    def predict(self, inputs: Any, batch_size: int | None = None) -> list[dict[str, Any]]:
        """Predict raw inputs.

        Args:
            inputs: one input or a list of them; for images a path, a PIL image, or an array `[H, W, 3]`; for
                recommendations always a list, of histories.
            batch_size: inputs at a time; the data module's by default.

        Returns:
            A dict a row, with the values that `polyhead predict` writes. An input that cannot be read gives
            a row with its `error`.
        """
        items = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        samples = self.data.raw_dataset(items)
        size = batch_size or self.data.batch_size
        # One input may give several samples, which the data module knows to put together; in order, or not at all
        batches = self.data.batches(samples, "predict", 0)
        if [i for batch in batches for i in batch] != list(range(len(samples))):
            batches = [list(range(len(samples)))]
        rows: list[dict[str, Any]] = []
        for batch in batches:
            for start in range(0, len(batch), size):
                rows += self._batch(samples, batch[start : start + size])
        return rows

    def _batch(self, samples: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        good: list[dict[str, Any]] = []
        bad: dict[int, dict[str, Any]] = {}
        for index in indices:
            try:
                good.append(samples.load(index, 0))
            except BadSample as error:
                bad[index] = {"id": samples.ids[index], "error": str(error)}
        rows: list[dict[str, Any]] = []
        if good:
            batch = move(self.data.collate(list(good)), self.system.device)
            said = {**self.system.columns(batch, self.system(batch)), **batch.get("about", {})}
            columns = by_row(batch["id"], said)
            lists = [_listed(values) for values in columns.values()]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
        for index, row in sorted(bad.items()):
            rows.insert(index - indices[0], row)
        return rows


def _listed(values: Any) -> list[Any]:
    """Column values as Python numbers and strings; rows of a matrix stay arrays."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return values.tolist()
    return list(values)


def load(name: str | Path) -> Model:
    """Load a bundle, a checkpoint, a shipped model by name, or an exported file.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    if Path(name).suffix in (".onnx", ".pt", ".pt2"):
        from polyhead.export import ExportedModel

        exported = ExportedModel(str(name))
        return Model(exported, bundle.build_data(exported.exported.meta["data"]))
    saved = bundle.read(name)
    system = bundle.build_model(saved.model)
    bundle.load_weights(system, saved)
    return Model(system, bundle.build_data({**saved.data, "init_args": {**saved.data["init_args"], "root": None}}))
