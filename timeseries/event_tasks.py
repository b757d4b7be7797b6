"""The Lightning module that event recipes name."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import CatMetric, MeanAbsoluteError, MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from polyhead.columns import make_columns
from polyhead.errors import UserError
from polyhead.system import Signature, System
from timeseries.event_likelihood import Rule, Terms, every_waiting, terms, waiting
from timeseries.event_sampling import counts_ahead
from timeseries.sahp import SAHP, Score, States, TanhCell, Variant

Alignment = Literal["causal", "official"]
INPUTS = ("dt", "types", "length", "ahead")
# The interval given with every predicted time
LEVELS = (0.05, 0.5, 0.95)
# What the kernels begin with of the fitted Hawkes process; the rest begins as constant rates
SHARE = 0.5
# Between epochs of a fit, the next event's distribution is found for every so many'th event
FEWER = 8


def inverse_softplus(value: Tensor) -> Tensor:
    return value + (-torch.expm1(-value)).log()


class EventModel(System):
    """Models when the next event comes and of which type it is, with SAHP.

    Takes `dt` and `types` `[B, N]` (row 0 is BOS: gap 0, type K), `length` `[B]` (rows, BOS included) and `ahead`
    `[B, G]`; gives, for what follows the last event, `type_probabilities` `[B, K]`, `wait` `[B, 4]` (mean and the 5,
    50 and 95 % quantiles of the waiting time) and `intensity` `[B, G, K]` at the times `ahead`. All times are in the
    unit in which the data report them.

    Prediction columns: `next_type`, `next_score` (its probability), `type_probabilities`, `wait_mean`, `wait_low`,
    `wait_median`, `wait_high` (5, 50 and 95 %, after the last event); with `horizon` also `count_mean`, `count_low`,
    `count_high` (5 and 95 %) of the events in that time, and `counts_by_type`, their mean by type. With `every_event`
    there is a row an event, `part` being its number from 0, of what was to be expected after it.

    Results are negative log likelihoods in nats an event: `nll`, of which `nll_time` and `nll_type`; `type_accuracy`
    and `type_f1_macro` of the type of highest intensity at the true time; `next_type_accuracy` without knowing the
    time; `time_rmse` of the mean and `time_mae` of the median waiting time; `coverage` of the 90 % interval; `ks`, the
    Kolmogorov-Smirnov distance of rescaled times from what they would be under a true model. Beside them `hawkes_nll`
    and `poisson_nll`, classical processes fitted to the same training part.

    Args:
        facts: `types`, `labels`, `time_scale`, `window`, `first_event`; linked from the data.
        d_model, heads, layers, dropout, attention_dropout, score, variant, norm: see `timeseries.sahp.SAHP`.
        rates: exponential kernels beside the network, which begin as the fitted Hawkes process; 0 is published SAHP.
        alignment: `official` trains on the published score, whose state has seen the event (not a likelihood).
        integral: how training integrates the intensity: `quadrature`, or `monte_carlo` as published.
        nodes: points an interval in training.
        eval_nodes: points of the quadrature in evaluation.
        position_offset: training shifts positions of a sequence by a random whole number up to this.
        horizon: how far ahead prediction counts events, in the reported unit.
        samples: futures drawn a sequence for `horizon`.
        every_event: predict after every event, in one pass, and not only after the last.
        system: optimiser, scheduler and the other arguments of `polyhead.system.System`.
    """

    network: SAHP

    def __init__(
        self, facts: dict[str, Any] | None = None, d_model: int = 16, heads: int = 4, layers: int = 4,
        dropout: float = 0.0, attention_dropout: float = 0.0, score: Score = "softmax",
        variant: Variant = "sahp", norm: bool = False, rates: int = 3, alignment: Alignment = "causal",
        integral: Rule = "quadrature", nodes: int = 8, eval_nodes: int = 32, position_offset: int = 0,
        horizon: float | None = None, samples: int = 200, every_event: bool = False, **system: Any,
    ) -> None:  # fmt: skip
        super().__init__(facts, **system)
        for name, value in {"nodes": nodes, "eval_nodes": eval_nodes, "samples": samples, "heads": heads}.items():
            if value < 1:
                raise UserError(f"model.{name} is {value}: at least 1 is needed")
        for name, number in {"rates": rates, "position_offset": position_offset}.items():
            if number < 0:
                raise UserError(f"model.{name} is {number}: 0 or more is needed")
        if horizon is not None and not 0 < horizon < math.inf:
            raise UserError(f"model.horizon is {horizon}: a time above 0 is needed")
        if every_event and horizon is not None:
            raise UserError("model.horizon counts what comes after the last event: leave model.every_event out")
        if alignment == "official":
            if rates:
                raise UserError("model.alignment official is the published model: give --model.rates 0 with it")
            warnings.warn(
                "alignment official lets a state see the event it scores: its loss is no likelihood", stacklevel=2
            )
        self.types: list[str] = list(self.facts.get("types") or ["event"])
        self.labels: list[str] = list(self.facts.get("labels") or self.types)
        self.scale = float(self.facts.get("time_scale") or 1.0)
        self.alignment, self.integral, self.nodes, self.eval_nodes = alignment, integral, nodes, eval_nodes
        self.position_offset, self.horizon, self.samples = position_offset, horizon, samples
        self.every_event = every_event
        self.network = SAHP(
            len(self.types), d_model, heads, layers, dropout, attention_dropout, score, variant, rates, norm
        )

    def begin(self, data: Any) -> None:
        """Start new weights from the training part: base rates, and kernels as in the fitted Hawkes process.

        The network begins with an equal share of the intensity, or it would hardly come to have any.
        """
        fitted = data.baseline() if hasattr(data, "baseline") else None
        network = self.network
        if fitted is None or not isinstance(network.cell, TanhCell):
            return
        base = torch.as_tensor(data.rates(), dtype=torch.float32)
        if network.excitation is not None:
            base = (1 - SHARE) * base + SHARE * torch.as_tensor(fitted.mu_, dtype=torch.float32)
            alpha = SHARE * torch.as_tensor(fitted.alpha_, dtype=torch.float32)
            network.excitation.begin(alpha, fitted.decay_ * self.scale)
        with torch.no_grad():
            network.cell.head.bias.copy_(inverse_softplus((base * self.scale).clamp(min=1e-6)))

    # Training and evaluation

    def states(self, batch: dict[str, Any], shift: Tensor | int = 0) -> States:
        """States of all rows; `shift` is added to their positions."""
        return self.network(batch["dt"] / self.scale, batch["types"], None, batch["first"] + shift)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        shift: Tensor | int = 0
        if self.position_offset:
            size = (len(batch["dt"]),)
            shift = torch.randint(0, self.position_offset + 1, size, device=batch["dt"].device)
        states = self.states(batch, shift)
        gap, target = batch["gap"] / self.scale, batch["target"]
        if self.alignment == "official":
            # The state after event i is used on the interval that event i ends
            states = states.rows((slice(None), slice(1, None)))
            gap, target = gap[:, :-1], target[:, :-1]
        got = terms(self.network, states, gap, target, self.nodes, self.integral)
        return {"loss": got.nll / (target >= 0).sum().clamp(min=1)}

    def score(self, batch: dict[str, Any]) -> tuple[States, Terms]:
        """States, and the likelihood's terms by quadrature, whatever the training used."""
        states = self.states(batch)
        return states, terms(self.network, states, batch["gap"] / self.scale, batch["target"], self.eval_nodes)

    def make_metrics(self) -> MetricCollection:
        kinds = len(self.types)
        metrics: dict[str, Any] = {
            "nll": MeanMetric(), "nll_time": MeanMetric(), "nll_type": MeanMetric(),
            "time_rmse": MeanSquaredError(squared=False), "time_mae": MeanAbsoluteError(), "coverage": MeanMetric(),
            "compensators": CatMetric(), "ended": CatMetric(),
        }  # fmt: skip
        if kinds > 1:
            metrics |= {
                "type_accuracy": MulticlassAccuracy(kinds, average="micro"),
                "type_f1_macro": MulticlassF1Score(kinds, average="macro"),
                "next_type_accuracy": MulticlassAccuracy(kinds, average="micro"),
            }
        return MetricCollection(metrics, compute_groups=False)

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        states, got = self.score(batch)
        target, gap = batch["target"], batch["gap"]
        ended = target >= 0
        events = ended.sum()
        there = ended | (gap > 0)
        metrics["compensators"].update(got.compensator[there])
        metrics["ended"].update(ended[there])
        if not events:
            return {"loss": got.nll}
        time = (got.compensator.sum() - got.log_total.sum()) / events + math.log(self.scale)
        kind = (got.log_total.sum() - got.log_type.sum()) / events
        metrics["nll"].update(time + kind, events)
        metrics["nll_time"].update(time, events)
        metrics["nll_type"].update(kind, events)
        if len(self.types) > 1:
            metrics["type_accuracy"].update(got.guess[ended], target[ended])
            metrics["type_f1_macro"].update(got.guess[ended], target[ended])
        if self._trainer is not None and self._trainer.state.fn == "fit":
            # Most of the work: between epochs a part of the events will do
            place = torch.arange(ended.numel(), device=ended.device).view(ended.shape)
            ended = ended & (place % FEWER == 0)
        next_event = every_waiting(self.network, states.rows(ended), LEVELS)
        waited, quantiles = gap[ended], next_event.quantiles * self.scale
        metrics["time_rmse"].update(next_event.mean * self.scale, waited)
        metrics["time_mae"].update(quantiles[:, 1].contiguous(), waited)
        inside = (waited >= quantiles[:, 0]) & (waited <= quantiles[:, 2])
        metrics["coverage"].update(inside.float())
        if len(self.types) > 1:
            metrics["next_type_accuracy"].update(next_event.types.argmax(-1), target[ended])
        return {"loss": got.nll / events}

    def named_results(self, stage: str) -> dict[str, float]:
        named = super().named_results(stage)
        named = {k: v for k, v in named.items() if k not in ("compensators", "ended")}
        times = self._rescaled(stage)
        if times is not None and len(times):
            from timeseries.event_pictures import ks_distance

            named["ks"] = ks_distance(times)
        data: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "baseline_scores"):
            named |= data.baseline_scores(stage)
        return named

    def _rescaled(self, stage: str) -> Tensor | None:
        """Compensators between events, running on over the ends of sequences: Exp(1) under a true model."""
        found = self.results.get(stage, {})
        if "compensators" not in found:
            return None
        total = found["compensators"].double().reshape(-1).cumsum(0)
        at = total[found["ended"].reshape(-1) > 0]
        return at.diff(prepend=at.new_zeros(1))

    def figures(self, stage: str) -> dict[str, Any]:
        times = self._rescaled(stage)
        if times is None or len(times) < 2:
            return {}
        from timeseries.event_pictures import calibration_picture

        return {"Calibration of time (rescaled waiting times)": calibration_picture(times)}

    # Prediction and export

    def input_names(self) -> list[str]:
        return list(INPUTS)

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        states = self.network(inputs["dt"] / self.scale, inputs["types"])
        row = torch.arange(inputs["length"].shape[0], device=inputs["length"].device)
        last = states.rows((row, inputs["length"] - 1))
        found = waiting(self.network, last, LEVELS)
        wait = torch.cat([found.mean[:, None], found.quantiles], -1) * self.scale
        rates = self.network.intensity(last, inputs["ahead"] / self.scale) / self.scale
        return {"type_probabilities": found.types, "wait": wait, "intensity": rates}

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        if self.every_event:
            return self._every(batch)
        wanted = ("type_probabilities", "wait")
        made = make_columns(self._columns(), {k: outputs[k].float().cpu().numpy() for k in wanted})
        if self.horizon is not None:
            made |= counts_ahead(self.network, batch, self.scale, self.horizon, self.samples)
        return made

    def _every(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns of what was to be expected after each event, with the `id` of its sequence."""
        row = torch.arange(batch["types"].shape[1], device=batch["length"].device)
        events = (row > 0) & (row < batch["length"][:, None])
        found = every_waiting(self.network, self.states(batch).rows(events), LEVELS)
        wait = torch.cat([found.mean[:, None], found.quantiles], -1) * self.scale
        outputs = {"type_probabilities": found.types, "wait": wait}
        made = make_columns(self._columns(), {k: v.float().cpu().numpy() for k, v in outputs.items()})
        owner, place = (v.tolist() for v in events.nonzero(as_tuple=True))
        return {"id": [batch["id"][b] for b in owner], "part": [p - 1 for p in place], **made}

    def _columns(self) -> dict[str, Any]:
        return {"kind": "next_event", "types": self.labels}

    def signature(self) -> Signature:
        kinds = len(self.types)

        def example(batch: int, rows: int, points: int) -> dict[str, Tensor]:
            place = torch.arange(batch * rows).view(batch, rows)
            dt = ((place * 7.0).sin() + 1.2) * self.scale * 0.5
            types = (place * 3 + place // 5) % kinds
            dt[:, 0], types[:, 0] = 0.0, kinds
            length = torch.tensor([max(1, rows - 2 * b) for b in range(batch)])
            types[torch.arange(rows) >= length[:, None]] = kinds
            ahead = torch.linspace(0, 3, points).expand(batch, -1) * self.scale
            return {"dt": dt, "types": types, "length": length, "ahead": ahead.contiguous()}

        return Signature(
            inputs=example(2, 12, 6),
            outputs=["type_probabilities", "wait", "intensity"],
            dynamic={"dt": {1: "rows"}, "types": {1: "rows"}, "ahead": {1: "points"}},
            checks=[example(1, 5, 3), example(3, 70, 9)],
            columns=self._columns(),
        )

    def explain(self, batch: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """A picture a sequence: intensities with events, attention over history, influence between types."""
        from timeseries.event_explain import explain

        return explain(self, batch)
