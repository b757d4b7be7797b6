"""Callbacks that keep the run folder's contract: curves, exact resume, predictions."""

from __future__ import annotations

import csv
import io
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins import TorchCheckpointIO

from polyhead.columns import rows
from polyhead.errors import UserError
from polyhead.files import atomic_write, write_text
from polyhead.predictions import PredictionWriter

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.csv; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Curves(Callback):
    """`metrics.csv`: a row an epoch with the losses, metrics and learning rate.

    A resumed run keeps the rows up to the step of its checkpoint and goes on from there.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str = ".") -> None:
        self.path = Path(folder) / "metrics.csv"
        self.rows: list[Row] = []
        self._validated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows = [r for r in read_rows(self.path) if int(r["step"]) <= trainer.global_step]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        row: Row = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        # What an earlier epoch's validation measured stays there and is not this epoch's
        fresh = [k for k in trainer.callback_metrics if self._validated or not k.startswith("val/")]
        row |= {k: f"{float(trainer.callback_metrics[k]):.6g}" for k in fresh}
        self._validated = False
        row["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.6g}"
        self.rows.append(row)
        names = list(dict.fromkeys(k for r in self.rows for k in r))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all.

    Lightning writes one in the system's temporary folder and moves it, which is a copy where that is another
    disk: a kill or a full disk then leaves half a checkpoint under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)


class LastCheckpoint(Checkpoint):
    """`last.ckpt`, every n steps and at the end of every epoch (or every few).

    Never on an epoch's last batch: Lightning would take such a checkpoint for a finished epoch whose end
    has run and skip the next one on resume.

    Args:
        dirpath: the folder of checkpoints.
        every_n_steps: optimiser steps between checkpoints inside an epoch.
        every_n_epochs: epochs between checkpoints at an epoch's end; the last epoch always has one.
    """

    def __init__(self, dirpath: str = ".", every_n_steps: int = 200, every_n_epochs: int = 1) -> None:
        for name, value in {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs}.items():
            if value < 1:
                raise UserError(f"last.{name} is {value}: at least 1 is needed")
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self._saved_at = -1

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(self.path)
        self._saved_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._saved_at and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        if last or epoch % self.every_n_epochs == 0:
            self._save(trainer)


def generator_state() -> dict[str, Any]:
    """The state of every global generator as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *[float(r) for r in rest]],
        "python": list(random.getstate()[1]),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_generator_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    random.setstate((3, tuple(state["python"]), None))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class GeneratorState(Callback):
    """Carries the global generators through a checkpoint, so that dropout goes on where it stopped."""

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return generator_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restore = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Only here: everything before the first batch, the loaders' start included, may draw numbers
        if self._restore is not None:
            set_generator_state(self._restore)
            self._restore = None


class WritePredictions(Callback):
    """Streams what `predict_step` returns into the run folder and counts it; nothing is kept.

    Args:
        writer: where it goes.
        every_seconds: a part is written after this time at the latest, full or not: what a kill costs.
    """

    def __init__(self, writer: PredictionWriter, every_seconds: float = 60.0) -> None:
        self.writer, self.every_seconds = writer, every_seconds
        self.samples = self.errors = 0
        self._written = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for name, why in batch["errors"]:
            self.writer.add_error(name, why)
        self.errors += len(batch["errors"])
        self.samples += len(batch["id"])
        if outputs:
            self.writer.add(rows(batch["id"], outputs))
        if time.monotonic() - self._written > self.every_seconds:
            self.writer.flush()
            self._written = time.monotonic()


def merge_json(path: Path, prefix: str, values: dict[str, Any]) -> None:
    """Replace the entries under `prefix/` in a metrics.json and keep the others."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = {k: v for k, v in known.items() if not k.startswith(f"{prefix}/")}
    known |= {f"{prefix}/{k}": v for k, v in values.items()}
    write_text(path, json.dumps(known, indent=2, sort_keys=True) + "\n")
