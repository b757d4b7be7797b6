"""The smallest real system on the frame: classes of noisy vectors, with dropout and random augmentation."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from polyhead.columns import make_columns
from polyhead.data import DataModule, Samples, Split, generator
from polyhead.errors import BadSample
from polyhead.metrics import classification_metrics
from polyhead.system import Signature, System


class Vectors:
    """Vectors `x [8]` around their class's centre; every `bad`-th cannot be read."""

    def __init__(self, count: int, seed: int, offset: int, noise: float = 0.0, bad: int = 0) -> None:
        rng = np.random.default_rng(offset)
        centres = np.random.default_rng(0).normal(size=(3, 8))
        self.labels = rng.integers(0, 3, count)
        self.values = (centres[self.labels] + rng.normal(size=(count, 8))).astype(np.float32)
        self.ids = [f"v{offset}-{i:05d}" for i in range(count)]
        self.seed, self.noise, self.bad = seed, noise, bad

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, epoch: int) -> dict[str, Any]:
        if self.bad and index % self.bad == 0:
            raise BadSample("planted")
        x = torch.from_numpy(self.values[index])
        x = x + self.noise * torch.randn(8, generator=generator(self.seed, epoch, index))
        return {"id": self.ids[index], "x": x, "label": torch.tensor(int(self.labels[index]))}


class ToyData(DataModule):
    """Args: count: training samples; bad: every how-manieth sample of prediction cannot be read."""

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        count: int = 64,
        bad: int = 0,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__(root, batch_size, num_workers, seed, on_error)  # type: ignore[arg-type]
        self.count, self.bad, self.classes = count, bad, classes or ["a", "b", "c"]

    def prepare(self, stage: str) -> None:
        pass

    def dataset(self, split: Split) -> Samples:
        if split == "train":
            return Vectors(self.count, self.seed, 1, noise=0.5)
        return Vectors(40, self.seed, 2, bad=self.bad if split == "predict" else 0)

    def raw_dataset(self, items: Sequence[Any]) -> Samples:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        return {"classes": self.classes}


class Toy(System):
    def __init__(self, facts: dict[str, Any] | None = None, width: int = 16, dropout: float = 0.3, **rest: Any) -> None:
        super().__init__(facts, **rest)
        self.classes = self.facts["classes"]
        self.network = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3)
        )

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.network(batch["x"]), batch["label"])}

    def make_metrics(self) -> MetricCollection:
        return classification_metrics(3)

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        out = self.outputs(x=batch["x"])
        metrics.update(out["probabilities"], batch["label"])
        return {"loss": F.cross_entropy(out["logits"], batch["label"])}

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.network(inputs["x"])
        return {"logits": logits, "probabilities": logits.softmax(-1)}

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        return make_columns(self.signature().columns, {k: v.numpy() for k, v in outputs.items()})

    def signature(self) -> Signature:
        columns = {"kind": "classification", "classes": self.classes}
        return Signature({"x": torch.linspace(-1, 1, 16).view(2, 8)}, ["logits", "probabilities"], columns=columns)


class KillAt(Callback):
    """Ends this very process with SIGKILL, as a machine would: `where` is step, validation or epoch_end."""

    def __init__(self, where: str, step: int) -> None:
        self.where, self.step = where, step

    def _kill(self, where: str, trainer: Trainer) -> None:
        if where == self.where and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._kill("step", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._kill("validation", trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._kill("epoch_end", trainer)
