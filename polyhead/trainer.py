"""The Trainer behind the command: Lightning's, and what a run folder gets beside it."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from polyhead import bundle, predictions
from polyhead.callbacks import WholeCheckpoints, WritePredictions, merge_json
from polyhead.data import DataModule
from polyhead.errors import UserError
from polyhead.files import atomic_write
from polyhead.progress import Progress
from polyhead.report import write_report
from polyhead.safe import read_checkpoint
from polyhead.system import LAST, System


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _explained(error: Exception, ckpt_path: str | None) -> UserError | None:
    """The person's error behind one of Lightning's or torch's, if there is one."""
    text = str(error)
    found = re.search(r"conditioned on metric `(.*?)`|monitor='?(.*?)'?\) could not find", text)
    if found:
        monitor = found[1] or found[2]
        known = dict.fromkeys(k for k in re.findall(r"[`'](\w+/[\w.]+)[`']", text) if k != monitor)
        if monitor.startswith("val/") and not any(k.startswith("val/") for k in known):
            return UserError(
                f"--monitor {monitor} was never measured: an epoch ended without a validation",
                ["see --trainer.max_steps, --trainer.val_check_interval and --trainer.limit_val_batches"],
            )
        return UserError(f"--monitor {monitor} is not measured by this model", [f"measured are: {', '.join(known)}"])
    if ckpt_path and "parameter group" in text:
        return UserError(
            f"{ckpt_path} cannot be continued: its optimiser has other parameter groups than these settings make",
            ["continue with the run's own settings, or start anew from its weights with --init_from"],
        )
    return None


class PolyheadTrainer(Trainer):
    """Lightning's Trainer with the run folder's contract; the command's options come from its methods.

    Attributes:
        command: the command line, for the report.
        config_text: the resolved recipe, for the report.
    """

    command: str = ""
    config_text: str = ""

    def __init__(
        self,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        plugins: Any = None,
        callbacks: list[Callback] | Callback | None = None,
        enable_progress_bar: bool | None = None,
        **others: Any,
    ) -> None:
        # A bar of ours unless there is another or none is wanted; it may not stand in trainer.yaml, whose list a
        # person replaces when they ask for a callback
        shown = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks is not None else []
        if enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in shown):
            shown = [*shown, Progress()]
        given = plugins if isinstance(plugins, list) else [plugins] if plugins is not None else []
        if not any(isinstance(p, CheckpointIO) for p in given):
            given = [*given, WholeCheckpoints()]
        # Lightning's own annotations come out as float before int once any library has named that union first
        # (`typing` keeps one of two equal unions), and then `--trainer.limit_train_batches 1` would mean all
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            plugins=given,
            callbacks=shown,
            enable_progress_bar=enable_progress_bar,
            **others,
        )

    @property
    def folder(self) -> Path:
        return Path(self.default_root_dir)

    def fit(  # type: ignore[override]
        self,
        model: System,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | None = None,
        init_from: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Train, keep the best weights as a bundle, and write a report.

        Args:
            model: the system.
            train_dataloaders: not used by the command.
            val_dataloaders: not used by the command.
            datamodule: the data.
            ckpt_path: continue exactly from this Lightning checkpoint; `last` is that of --output.
            init_from: start from the weights of a checkpoint, a bundle or a shipped model; the optimiser is new.
            resume: continue from checkpoints/last.ckpt of --output.
            overwrite: replace the results of an earlier fit in --output.
        """
        if init_from is not None:
            self.start_from(model, init_from)
        if datamodule is None:
            super().fit(model, train_dataloaders, val_dataloaders, None, ckpt_path)
            return
        datamodule.trainer = self
        datamodule.setup("fit")
        self._check_monitor(model, datamodule)
        if self.is_global_zero and not ckpt_path:
            self._plan(model, datamodule)
        try:
            super().fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        except (RuntimeError, ValueError, MisconfigurationException) as error:
            found = _explained(error, ckpt_path)
            if found is None:
                raise
            raise found from error
        if self.interrupted or self.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = self._best()
        if best is None and self.checkpoint_callbacks:
            # Ended before the first validation: the last weights are the best there are
            best = self.folder / "checkpoints" / "best.ckpt"
            self.save_checkpoint(best)
        if best is not None:
            model.load_state_dict(read_checkpoint(best)["state_dict"])
        validated = len(datamodule.samples("val")) > 0
        if validated:
            super().validate(model, datamodule=datamodule, verbose=False)
            if torch.isnan(self.callback_metrics.get("val/loss", torch.zeros(()))):
                text = "the training diverged: val/loss of the weights it would keep is not a number"
                raise UserError(text, ["lower --model.optimizer.init_args.lr, or set --trainer.gradient_clip_val 1"])
        if validated and model.settle():
            super().validate(model, datamodule=datamodule, verbose=False)
            if best is not None and self.is_global_zero:
                checkpoint = read_checkpoint(best)
                checkpoint[bundle.CHECKPOINT_KEY]["model"] = model.recipe
                with atomic_write(best) as temporary:
                    torch.save(checkpoint, temporary)
        if not self.is_global_zero:
            return
        metrics = self._store(model, "val")
        bundle.save_bundle(
            self.folder / "bundle",
            model.state_dict(),
            model.recipe,
            model.data_recipe,
            bundle.card(self.folder.name, model.recipe, model.data_recipe, metrics, self.command),
        )
        report = write_report(self.folder, model, "val", self.command, self.config_text)
        if datamodule.skipped:
            say(f"{datamodule.skipped} samples could not be read and were left out")
        say(f"report: {report}")
        say(f"next: polyhead test --output {self.folder} --ckpt_path best")

    def _check_monitor(self, model: System, datamodule: DataModule) -> None:
        """Refuse a misspelt metric now, and one of a missing part; Lightning does after the first epoch."""
        names = [f"val/{name}" for name in ("loss", "epoch", *model.make_metrics())]
        for monitor in {c.monitor for c in self.checkpoint_callbacks if isinstance(c, ModelCheckpoint)}:
            near = difflib.get_close_matches(monitor or "", names, n=1, cutoff=0.75)
            if monitor and monitor not in names and near:
                text = f"--monitor {monitor} is no metric of {type(model).__name__}"
                raise UserError(text, [f"did you mean {near[0]}?"])
            if (monitor or "").startswith("val/") and monitor != LAST and not len(datamodule.samples("val")):
                text = f"--monitor {monitor} needs a validation part, and these data have none"
                raise UserError(text, ["cut one with --data.val_fraction 0.15, or keep the last weights: "
                                       f"--monitor {LAST} --mode max"])  # fmt: skip

    def start_from(self, model: System, name: str) -> None:
        """Take the weights of a checkpoint, a bundle or a shipped model. Raises UserError when they do not fit."""
        new = bundle.init_weights(model, bundle.read(name))
        if self.is_global_zero:
            say(f"started from {name}" + (f"; new: {', '.join(new[:4])}" if new else ""))

    def _best(self) -> Path | None:
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
                return Path(callback.best_model_path)
        return None

    def _plan(self, model: System, datamodule: DataModule) -> None:
        """What is about to happen, in about ten lines."""
        count = sum(p.numel() for p in model.parameters())
        length = f"{self.max_epochs} epochs of {datamodule.steps_per_epoch()} steps"
        stop = [c for c in self.early_stopping_callbacks if isinstance(c, EarlyStopping)]
        lines = {
            "model": f"{type(model).__name__}, {count / 1e6:.2f} M parameters",
            "data": datamodule.root or "embedded sample",
            **datamodule.plan(),
            "batch": f"{datamodule.batch_size}, {datamodule.num_workers} workers",
            "length": (f"{self.max_steps} steps" if self.max_steps > 0 else length)
            + (f", stopped early on {stop[0].monitor}" if stop else ""),
            "device": f"{self.strategy.root_device}, precision {self.precision}, {torch.get_num_threads()} threads",
            "output": str(self.folder),
        }
        for key, value in lines.items():
            say(f"  {key:<10} {value}")

    def _store(self, model: System, stage: str) -> dict[str, float]:
        metrics = model.named_results(stage)
        logged = {k: float(v) for k, v in self.callback_metrics.items() if k.startswith(f"{stage}/") and k != LAST}
        losses = {k.split("/", 1)[1]: v for k, v in logged.items()}
        metrics = {**losses, **metrics}
        merge_json(self.folder / "metrics.json", stage, metrics)
        for name, value in metrics.items():
            say(f"  {stage}/{name:<24} {value:.4f}")
        return metrics

    def _evaluate(self, model: System, datamodule: DataModule, stage: Literal["val", "test"]) -> Any:
        run = super().validate if stage == "val" else super().test
        result = run(model, datamodule=datamodule, verbose=False)
        if self.is_global_zero and not self.fast_dev_run:  # type: ignore[attr-defined]
            self._store(model, stage)
            # In the folder of a training its settings are what made the model
            made = self.folder / "config.yaml"
            text = made.read_text(encoding="utf-8") if made.is_file() else self.config_text
            say(f"report: {write_report(self.folder, model, stage, self.command, text)}")
        return result

    def validate(  # type: ignore[override]
        self,
        model: System,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | None = None,
        overwrite: bool = False,
    ) -> Any:
        """Evaluate on the validation split.

        Args:
            model: the system.
            dataloaders: not used by the command.
            datamodule: the data.
            ckpt_path: the weights: a checkpoint, a bundle, a shipped model, or `best`/`last` of --output.
            overwrite: replace the results of an earlier validate in --output.
        """
        if datamodule is None:
            return super().validate(model, dataloaders, ckpt_path)
        return self._evaluate(model, datamodule, "val")

    def test(  # type: ignore[override]
        self, model: System, dataloaders: Any = None, datamodule: DataModule | None = None,
        ckpt_path: str | None = None, overwrite: bool = False,
    ) -> Any:  # fmt: skip
        if datamodule is None:
            return super().test(model, dataloaders, ckpt_path)
        return self._evaluate(model, datamodule, "test")

    # The command's help is the docstring
    test.__doc__ = str(validate.__doc__).replace("validation", "test").replace("validate", "test")

    def predict(  # type: ignore[override]
        self,
        model: System,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
        strict: bool = False,
    ) -> None:
        """Write a row for every sample to predictions/, and what could not be read to errors.parquet.

        Args:
            model: the system.
            dataloaders: not used by the command.
            datamodule: the data.
            ckpt_path: the weights: a checkpoint, a bundle, a shipped model, an exported file; `best`, `last`.
            resume: go on where an earlier predict in --output stopped.
            overwrite: replace the predictions in --output.
            strict: exit with status 2 when a sample could not be read.
        """
        if datamodule is None:
            super().predict(model, dataloaders, return_predictions=False)
            return
        if overwrite and self.is_global_zero:
            predictions.remove(self.folder)
        self.strategy.barrier()
        datamodule.done = predictions.done_ids(self.folder) if resume else set()
        rank = self.global_rank if self.world_size > 1 else None
        with predictions.PredictionWriter(self.folder, resume=resume, rank=rank) as writer:
            callback = WritePredictions(writer)
            self.callbacks.append(callback)  # type: ignore[attr-defined]
            try:
                super().predict(model, datamodule=datamodule, return_predictions=False)
            finally:
                self.callbacks.remove(callback)  # type: ignore[attr-defined]
        self.strategy.barrier()
        if rank == 0:
            predictions.join_errors(self.folder)
        samples, errors = (self._sum(n) for n in (callback.samples, callback.errors))
        before = f" ({len(datamodule.done):,} were done before)" if datamodule.done else ""
        if self.is_global_zero:
            where = f" in {self.folder / 'predictions'}" if samples or datamodule.done else ""
            say(f"{samples:,} samples predicted{where}{before}")
        if errors:
            text = f"{errors:,} samples could not be read: {self.folder / 'errors.parquet'} says why"
            if strict:
                raise UserError(text)
            if self.is_global_zero:
                say(text)

    def _sum(self, count: int) -> int:
        """A count of all processes."""
        return int(self.strategy.reduce(torch.tensor(count, device=self.strategy.root_device), reduce_op="sum"))

    def export(
        self,
        model: System,
        datamodule: DataModule | None = None,
        ckpt_path: str | None = None,
        format: Literal["onnx", "torchscript", "pt2"] = "onnx",
        overwrite: bool = False,
    ) -> None:
        """Write the model as one file that needs no code of ours, compared with the model before it is kept.

        Args:
            model: the system.
            datamodule: the data whose preprocessing and names travel in the file.
            ckpt_path: the weights: a checkpoint, a bundle, a shipped model, or `best`/`last` of --output.
            format: the kind of file.
            overwrite: replace the file of that format in --output.
        """
        from polyhead.export import SUFFIX, export

        path = self.folder / f"model{SUFFIX[format]}"
        largest, varies = export(model, path, format)
        sizes = "any batch and size" if varies else "any batch"
        megabytes = path.stat().st_size / 1e6
        say(f"{path}: {megabytes:.1f} MB, {sizes}, largest difference from the model {largest:.2g}")
        if format == "onnx":
            say(f"next: polyhead predict --ckpt_path {path} --data.root DIR")

    def explain(
        self,
        model: System,
        datamodule: DataModule | None = None,
        ckpt_path: str | None = None,
        limit: int = 16,
        overwrite: bool = False,
    ) -> None:
        """Draw what the model looks at, a picture and an array a sample, into explain/.

        Args:
            model: the system.
            datamodule: the data; its prediction samples are explained.
            ckpt_path: the weights: a checkpoint, a bundle, a shipped model, or `best`/`last` of --output.
            limit: samples to explain, from the first.
            overwrite: replace the pictures in --output.
        """
        from polyhead.explain import explain

        assert datamodule is not None
        if limit < 1:
            raise UserError(f"--limit is {limit}: at least 1 is needed")
        count, failed = explain(model, datamodule, self.folder / "explain", limit)
        say(f"{count} samples explained" + (f" in {self.folder / 'explain'}" if count else ""))
        for sample in failed:
            say(f"  could not be read: {sample.id}: {sample.reason}")
        left = len(datamodule.samples("predict")) - count - len(failed)
        if left > 0:
            say(f"  {left} more were left out: --limit takes more than {limit}")
