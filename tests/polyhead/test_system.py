"""The steps all systems share: groups, rates, schedules, averages, metrics."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import nn
from torchmetrics.classification import BinaryAUROC

from polyhead.errors import UserError
from polyhead.schedules import WarmupCosine
from tests.toy import Toy, ToyData

FACTS = {"classes": ["a", "b", "c"]}


class Listed(nn.Sequential):
    def no_weight_decay(self) -> set[str]:
        return {"0.weight"}


def groups(system: Toy) -> dict[tuple[float, bool], set[str]]:
    names = {id(p): n for n, p in system.named_parameters()}
    return {
        (g["factor"], "weight_decay" in g): {names[id(p)].removeprefix("network.") for p in g["params"]}
        for g in system.parameter_groups()
    }


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    fixed = {"accelerator": "cpu", "use_distributed_sampler": False, "default_root_dir": folder}
    return Trainer(**{**quiet, **fixed, "num_sanity_val_steps": 0, **options})


# Groups


def test_biases_norms_and_listed_weights_do_not_decay() -> None:
    assert groups(Toy(FACTS)) == {
        (1.0, False): {"0.weight", "4.weight"},
        (1.0, True): {"0.bias", "1.weight", "1.bias", "4.bias"},
    }
    listed = Toy(FACTS)
    listed.network = Listed(*listed.network)
    assert groups(listed)[1.0, False] == {"4.weight"}
    assert groups(Toy(FACTS, no_decay_1d=False)).keys() == {(1.0, False)}


def test_the_longest_prefix_sets_the_rate_and_zero_freezes() -> None:
    scale = {"network": 0.5, "network.0": 0.1, "network.4.bias": 0.0}
    system = Toy(FACTS, lr_scale=scale)
    assert groups(system) == {
        (0.1, False): {"0.weight"},
        (0.1, True): {"0.bias"},
        (0.5, True): {"1.weight", "1.bias"},
        (0.5, False): {"4.weight"},
    }
    assert not system.network[4].bias.requires_grad  # type: ignore[union-attr]


def test_rates_are_scaled_and_stay_so_under_a_schedule(tmp_path: Path) -> None:
    optimizer, scheduler = partial(torch.optim.SGD, lr=0.1, weight_decay=0.3), partial(WarmupCosine, warmup=0.25)
    system = Toy(FACTS, optimizer=optimizer, scheduler=scheduler, lr_scale={"network.4": 10.0})
    rates: list[list[float]] = []

    class Note(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])

    trainer(tmp_path, max_epochs=2, callbacks=[Note()]).fit(system, datamodule=ToyData())
    assert len(rates) == 16 and all(len(r) == 4 for r in rates)
    body, head = [r[0] for r in rates], [r[2] for r in rates]
    assert head == pytest.approx([10 * r for r in body])
    assert max(body) == pytest.approx(0.1) and body.index(max(body)) == 4
    assert body[0] == pytest.approx(0.1 / 5) and body[-1] < 0.01
    decays = [g["weight_decay"] for g in system.trainer.optimizers[0].param_groups]
    assert sorted(set(decays)) == [0.0, 0.3]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 3}, 24),
        ({"max_epochs": 3, "limit_train_batches": 5}, 15),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9),
        ({"max_epochs": 30, "max_steps": 7}, 7),
    ],
)
def test_a_schedule_spans_the_training_whatever_bounds_it(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    system = Toy(FACTS, scheduler=partial(WarmupCosine, floor=0.5))
    fitted = trainer(tmp_path, **options)
    fitted.fit(system, datamodule=ToyData())
    (config,) = fitted.lr_scheduler_configs
    schedule: Any = config.scheduler
    assert fitted.global_step == steps and schedule.total_steps == steps and config.interval == "step"
    assert schedule.scale(steps) == schedule.scale(10 * steps) == pytest.approx(0.5)


def test_a_schedule_without_a_span_is_stepped_every_epoch(tmp_path: Path) -> None:
    system = Toy(FACTS, scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5))
    fitted = trainer(tmp_path, max_epochs=2)
    fitted.fit(system, datamodule=ToyData())
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001 / 4)


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_a_warm_up_is_a_share(warmup: float) -> None:
    with pytest.raises(UserError, match="a share of the training"):
        WarmupCosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup=warmup)


@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_an_optimiser_that_cannot_be_is_a_line(tmp_path: Path, kind: str) -> None:
    made: Any = partial(torch.optim.SGD, lr=-1) if kind == "optimizer" else partial(WarmupCosine, warmup=3)
    with pytest.raises(UserError, match="Invalid learning rate|share of the training"):
        trainer(tmp_path, max_epochs=1).fit(Toy(FACTS, **{kind: made}), datamodule=ToyData())


# The moving average


def test_the_average_is_what_the_docstring_says(tmp_path: Path) -> None:
    """By hand: mean <- share * mean + (1 - share) * weight, share = min(decay, (1 + n) / (10 + n)) at step n."""
    torch.manual_seed(0)
    system = Toy(FACTS, ema_decay=0.4, optimizer=partial(torch.optim.SGD, lr=0.5))
    mean = {k: v.detach().clone() for k, v in system.state_dict().items()}
    evaluated: list[torch.Tensor] = []

    class ByHand(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            n = trainer.global_step - 1
            # The first step is what the average begins with
            share = min(0.4, (1 + n) / (10 + n)) if n else 0.0
            for k, v in pl_module.state_dict().items():
                mean[k] = share * mean[k] + (1 - share) * v if v.is_floating_point() else v.clone()

        def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            evaluated.append(pl_module.network[0].weight.detach().clone())

    fitted = trainer(tmp_path, max_epochs=1, callbacks=[ByHand()], limit_val_batches=1)
    fitted.fit(system, datamodule=ToyData())
    after = dict(system.state_dict())
    assert all(torch.allclose(v.float(), mean[k].float(), atol=1e-6) for k, v in after.items())
    assert torch.allclose(evaluated[0], mean["network.0.weight"], atol=1e-6)


def test_copies_share_the_factories_and_leave_the_trainer(tmp_path: Path) -> None:
    """Those of a command hold the command, and so the data: the average must not copy them."""
    optimizer = partial(torch.optim.SGD, lr=0.1)
    system = Toy(FACTS, optimizer=optimizer)
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(system, datamodule=ToyData())
    twin = copy.deepcopy(system)
    assert twin.optimizer is optimizer and twin._trainer is None and system._trainer is fitted
    assert all(torch.equal(v, system.state_dict()[k]) for k, v in twin.state_dict().items())
    twin.network[0].weight.data.zero_()
    assert bool(system.network[0].weight.any())
    assert isinstance(twin, Toy) and twin.classes == system.classes and twin.classes is not system.classes


# Metrics


class Partial(Toy):
    """Measures one thing only where a sample has it, which none does."""

    def make_metrics(self) -> Any:
        metrics = super().make_metrics()
        metrics.add_metrics({"rare": BinaryAUROC()})
        return metrics

    def evaluate(self, batch: dict[str, Any], metrics: Any) -> dict[str, torch.Tensor]:
        out = self.outputs(x=batch["x"])
        for name, metric in metrics.items():
            if name != "rare":
                metric.update(out["probabilities"], batch["label"])
        return {"loss": out["logits"].sum() * 0}


def test_a_metric_without_samples_is_left_out(tmp_path: Path) -> None:
    system = Partial(FACTS)
    fitted = trainer(tmp_path, max_epochs=1)
    fitted.fit(system, datamodule=ToyData())
    assert "val/accuracy" in fitted.callback_metrics and "val/rare" not in fitted.callback_metrics
    assert "rare" not in system.named_results("val")


def test_a_batch_without_readable_samples_is_passed_over(tmp_path: Path) -> None:
    class AllBad(ToyData):
        def dataset(self, split: Any) -> Any:
            samples = super().dataset(split)
            if split == "train":
                samples.bad = 1  # type: ignore[attr-defined]
            return samples

    system, data = Toy(FACTS), AllBad(on_error="skip")
    before = {k: v.clone() for k, v in system.state_dict().items()}
    trainer(tmp_path, max_epochs=1).fit(system, datamodule=data)
    assert data.skipped == 64
    assert all(torch.equal(v, before[k]) for k, v in system.state_dict().items())
