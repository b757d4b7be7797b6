"""Progress for a person: a bar where there is a terminal, and a line an epoch everywhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

SHOWN = 6


class Progress(TQDMProgressBar):
    """Lightning's bar without its version number, and a line with losses and metrics after every epoch."""

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)
        self._started = 0.0

    @property
    def is_disabled(self) -> bool:
        return super().is_disabled or not sys.stderr.isatty()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        values = super().get_metrics(trainer, pl_module)
        return {k: v for k, v in values.items() if k.endswith("loss")}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero or trainer.progress_bar_callback is not self:
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if v.numel() == 1}
        losses = {k: values[k] for k in ("train/loss", "val/loss") if k in values}
        text = "  ".join(f"{k} {v:.4f}" for k, v in list((losses | values).items())[:SHOWN])
        seconds = time.perf_counter() - self._started
        last = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        line = f"epoch {trainer.current_epoch + 1}{last}  {text}  {seconds:.1f} s"
        if self.is_disabled:
            print(line, file=sys.stderr, flush=True)
        else:
            self.print(line, file=sys.stderr)


class TensorBoard(Logger):
    """Curves for TensorBoard; writes nothing, and imports nothing, before there is a number to write.

    Args:
        save_dir: the run folder; events go to its `tensorboard` folder.
    """

    def __init__(self, save_dir: str = ".") -> None:
        super().__init__()
        self._folder = Path(save_dir) / "tensorboard"
        self._writer: Any = None

    @property
    def name(self) -> str:
        return "tensorboard"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._writer is not None:
            self._writer.flush()
