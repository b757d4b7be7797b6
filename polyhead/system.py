"""System: the training, evaluation and prediction steps that all ten systems share, written once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection

from polyhead.errors import UserError, reason

# As `monitor`: keep the weights of the last epoch
LAST = "val/epoch"


@dataclass
class Signature:
    """What an exported file takes and gives.

    Attributes:
        inputs: the batch keys it takes, each with an example tensor (batch of at least 2).
        outputs: names of the tensors it gives.
        dynamic: input -> the axes (beside the batch, axis 0) that may vary.
        checks: further example inputs of other sizes, on which an export is compared with the eager model.
        columns: how outputs become prediction columns: a name in `polyhead.columns` and its arguments.
        tolerance: the largest allowed difference between an export and the eager model.
        native: an example of the sizes to fix where a format cannot vary them as `checks` ask.
    """

    inputs: dict[str, Tensor]
    outputs: list[str]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    checks: list[dict[str, Tensor]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4
    native: dict[str, Tensor] = field(default_factory=dict)

    def fixed(self) -> Signature:
        """The same with its native sizes, of which only the batch varies."""
        return replace(self, inputs=self.native, dynamic={}, checks=[])


class EMA(WeightAveraging):
    """Exponential moving average of weights and buffers, quick at first, then at `decay`.

    Evaluated and saved in place of the raw weights; both travel in a training checkpoint.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._average)
        self.decay, self._share = decay, 0.0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None:
            return False
        self._share = min(self.decay, (1 + step_idx) / (10 + step_idx))
        return True

    def _average(self, mean: Any, current: Any, count: Any) -> None:
        # All tensors of a kind at once: one by one takes longer than a small network's step
        if mean[0].is_floating_point():
            torch._foreach_lerp_(mean, current, 1 - self._share)
        else:
            torch._foreach_copy_(mean, current)

    def on_validation_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            super().on_validation_epoch_end(trainer, pl_module)


class System(LightningModule):
    """Base of the Lightning modules a recipe names.

    A subclass builds `self.network` and says: `losses`, `evaluate`, `outputs`, `columns`, `make_metrics`,
    `signature`; and, where it has them, `figures` and `explain`.

    Args:
        facts: what the data decide (class names, item counts, ...); linked from the data module.
        optimizer: called with parameter groups.
        scheduler: called with the optimiser; stepped every optimiser step when it spans the training.
        no_decay_1d: no weight decay on biases, norms and whatever the network lists in `no_weight_decay`.
        lr_scale: parameter-name prefix -> factor on the learning rate; the longest matching prefix counts,
            0 freezes.
        ema_decay: decay of the moving average of the weights, which is then what is evaluated and saved.
    """

    network: nn.Module

    def __init__(
        self,
        facts: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        no_decay_1d: bool = True,
        lr_scale: dict[str, float] | None = None,
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise UserError(f"model.ema_decay is {ema_decay:g}: it must be between 0 and 1")
        self.facts = facts or {}
        self.optimizer, self.scheduler = optimizer, scheduler
        self.no_decay_1d, self.lr_scale, self.ema_decay = no_decay_1d, lr_scale or {}, ema_decay
        # How to build this model and its data again, plain values; filled in by whoever built them
        self.recipe: dict[str, Any] = {}
        self.data_recipe: dict[str, Any] = {}
        self.metrics: dict[str, MetricCollection] = {}
        self.results: dict[str, dict[str, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The factories hold the command that made them, and with it the trainer and all data: copies share them
        memo |= {id(shared): shared for shared in (self.optimizer, self.scheduler)}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    # What a subclass says

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Training losses of a batch, `loss` being what is minimised."""
        raise NotImplementedError

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        """Update `metrics` with a labelled batch; returns losses like `losses`."""
        raise NotImplementedError

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The graph that prediction runs and export writes: named inputs to named outputs."""
        raise NotImplementedError

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        """Prediction columns beside `id`, one entry a row."""
        raise NotImplementedError

    def make_metrics(self) -> MetricCollection:
        """Metrics of an evaluation; scalars are logged, others are kept for `figures`."""
        raise NotImplementedError

    def signature(self) -> Signature:
        raise NotImplementedError

    def begin(self, data: Any) -> None:
        """Set new weights by what the data module's training part tells, before a training that starts from none."""

    def deployed(self) -> System:
        """A copy for inference: folded where that is exact. The default is itself in eval mode."""
        return self.eval()

    def named_results(self, stage: str) -> dict[str, float]:
        """The scalar results of the last evaluation, with per-class ones named."""
        return {k: float(v) for k, v in self.results.get(stage, {}).items() if v.numel() == 1}

    def settle(self) -> bool:
        """Decide settings from the last validation once training has ended; whether there were any.

        They go into `recipe`, and with it into the best checkpoint and the bundle.
        """
        return False

    def figures(self, stage: str) -> dict[str, Any]:
        """Pictures for the report: title -> matplotlib figure."""
        return {}

    # Steps

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.outputs(**{name: batch[name] for name in self.input_names()})

    def input_names(self) -> list[str]:
        return list(self.signature().inputs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        if not batch["id"]:
            return None
        losses = self.losses(batch)
        self.log_dict(
            {f"train/{k}": v.detach() for k, v in losses.items()},
            on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch["id"]),
        )  # fmt: skip
        return losses["loss"]

    def _evaluation_step(self, batch: dict[str, Any], stage: str) -> None:
        if not batch["id"]:
            return
        losses = self.evaluate(batch, self.metrics[stage])
        self.log_dict(
            {f"{stage}/{k}": v for k, v in losses.items()},
            on_epoch=True, batch_size=len(batch["id"]), prog_bar=True, sync_dist=True,
        )  # fmt: skip

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if not batch["id"]:
            return {}
        # What the data know about each sample stands beside what the model says
        return {**self.columns(batch, self(batch)), **batch.get("about", {})}

    def _keeps_last(self) -> bool:
        return any(getattr(c, "monitor", None) == LAST for c in self.trainer.checkpoint_callbacks)

    def _start(self, stage: str) -> None:
        self.metrics[stage] = self.make_metrics().to(self.device)

    def _finish(self, stage: str) -> None:
        # A metric of something that no sample of this evaluation had says nothing; ranks must agree on what they sync
        everywhere = self.trainer.world_size > 1
        values = {k: m.compute() for k, m in self.metrics[stage].items() if everywhere or m.update_called}
        self.results[stage] = {k: v.detach().cpu() for k, v in values.items()}
        scalars: dict[str, Any] = {f"{stage}/{k}": v for k, v in values.items() if v.numel() == 1}
        # The last epoch is the best where the validation part is too small to choose by
        if stage == "val" and self._keeps_last():
            scalars[LAST] = float(self.current_epoch)
        self.log_dict(scalars, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        # Without a validation part an epoch ends here
        if not sum(self.trainer.num_val_batches) and self._keeps_last():
            self.log(LAST, float(self.current_epoch))

    def on_validation_epoch_start(self) -> None:
        self._start("val")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_start(self) -> None:
        self._start("test")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    # Optimiser

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        """Trainable parameters by (decayed or not, rate factor), in a fixed order. A factor of 0 freezes."""
        listed: set[str] = getattr(self.network, "no_weight_decay", set)()
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            prefixes = [p for p in self.lr_scale if name.startswith(p)]
            factor = self.lr_scale[max(prefixes, key=len)] if prefixes else 1.0
            if factor == 0:
                parameter.requires_grad_(False)
            if not parameter.requires_grad:
                continue
            bare = self.no_decay_1d and (parameter.ndim <= 1 or name.removeprefix("network.") in listed)
            groups.setdefault((bare, factor), []).append(parameter)
        for prefix in self.lr_scale:
            if not any(name.startswith(prefix) for name, _ in self.named_parameters()):
                raise UserError(f"model.lr_scale names {prefix!r}, with which no weight's name begins")
        for (bare, factor), parameters in groups.items():
            yield {"params": parameters, "factor": factor, **({"weight_decay": 0.0} if bare else {})}

    def configure_optimizers(self) -> Any:
        try:
            optimizer = self.optimizer(self.parameter_groups())
        except (TypeError, ValueError) as error:
            raise UserError(f"model.optimizer cannot be made: {reason(error)}") from error
        for group in optimizer.param_groups:
            group["lr"] *= group["factor"]
        if self.scheduler is None:
            return optimizer
        try:
            scheduler: Any = self.scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise UserError(f"model.scheduler cannot be made: {reason(error)}") from error
        spans = hasattr(scheduler, "set_total_steps")
        if spans:
            scheduler.set_total_steps(self._total_steps())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step" if spans else "epoch"},
        }

    def _total_steps(self) -> int:
        # Lightning's estimated_stepping_batches builds the loader early and loses its state on resume
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        batches = trainer.datamodule.steps_per_epoch()  # type: ignore[attr-defined]
        return -(-batches // trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["polyhead"] = {"model": self.recipe, "data": self.data_recipe}

    def configure_callbacks(self) -> list[Callback]:
        return [] if self.ema_decay is None else [EMA(self.ema_decay)]
