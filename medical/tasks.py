"""The Lightning modules that medical recipes name."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC

from medical.acmil import ACMIL, bag_attention, losses
from polyhead.classifier import Classifier
from polyhead.columns import make_columns
from polyhead.errors import UserError
from polyhead.system import Signature

# Bags above this are predicted in pieces
LARGE = 16384


class SlideClassifier(Classifier):
    """Classifies bags of instances with ACMIL (or ABMIL: `n_token` 1 and `n_masked_patch` 0).

    Takes `features [B, N, F]` and `present [B, N]` (False where a batch was padded); gives `logits [B, C]`,
    `probabilities [B, C]` and `attention [B, N]`, the mean over branches. Prediction columns: `label`,
    `score`, `probabilities`, `instances` (how many), `top` (indices of the most attended ones, best first).

    Args:
        facts: `classes`, `mean` and `deviation` of the features; linked from the data.
        arch: `ga` (gated attention) or `mha` (learned queries with 8 heads).
        d_inner: inner width.
        n_token: branches; 1 is plain attention MIL.
        n_masked_patch, mask_drop: STKIM masks this share of so many most attended instances in training.
        gate: width of the gated attention.
        dropout: see `medical.acmil.ACMIL`; the published one by default.
        aem: weight of AEM's entropy term.
        smoothing: label smoothing in training.
        input_dropout: share of each instance's features that training leaves out, anew every time.
        system: optimiser, scheduler and the other arguments of `polyhead.system.System`.
    """

    instead_of_explain = ("polyhead heatmap draws where it looks; predict gives the most attended instances",)
    network: ACMIL
    mean: Tensor
    deviation: Tensor

    def __init__(
        self, facts: dict[str, Any] | None = None, arch: Literal["ga", "mha"] = "ga", d_inner: int = 128,
        n_token: int = 5, n_masked_patch: int = 10, mask_drop: float = 0.6, gate: int = 128,
        dropout: float | None = None, aem: float = 0.0, smoothing: float = 0.0, input_dropout: float = 0.0,
        **system: Any,
    ) -> None:  # fmt: skip
        super().__init__(facts, **system)
        mean = torch.tensor(self.facts["mean"])
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", torch.tensor(self.facts["deviation"]), persistent=False)
        for option, value in {"smoothing": smoothing, "input_dropout": input_dropout}.items():
            if not 0 <= value < 1:
                raise UserError(f"model.{option} is {value:g}: it must be at least 0 and below 1")
        self.aem, self.smoothing, self.input_dropout = aem, smoothing, input_dropout
        self.network = ACMIL(
            len(mean), d_inner, len(self.classes), n_token, arch, n_masked_patch, mask_drop, gate, dropout
        )

    def standardise(self, features: Tensor) -> Tensor:
        return (features.to(self.mean.dtype) - self.mean) / self.deviation

    def input_names(self) -> list[str]:
        return ["features", "present"]

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        features = inputs["features"]
        whole = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if not whole and len(features) == 1 and features.shape[1] > LARGE and not self.training:
            output = self.network.stream(StandardisedRows(self, features[0]))
        else:
            output = self.network(self.standardise(features), inputs["present"])
        attention = bag_attention(output)
        return {"logits": output.slide_logits, "probabilities": output.slide_logits.softmax(-1), "attention": attention}

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        wanted = ("probabilities", "attention")
        return make_columns(self._columns(), {k: outputs[k].float().cpu().numpy() for k in wanted})

    def _columns(self) -> dict[str, Any]:
        return {"kind": "bag_classification", "classes": self.classes}

    def signature(self) -> Signature:
        def example(bags: int, instances: int) -> dict[str, Tensor]:
            rows = torch.linspace(-2, 2, bags * instances * self.network.d_feat).view(bags, instances, -1)
            present = torch.ones(bags, instances, dtype=torch.bool)
            present[-1, instances - instances // 3 :] = False
            return {"features": (rows * 7).sin() * self.deviation + self.mean, "present": present}

        return Signature(
            inputs=example(2, 24),
            outputs=["logits", "probabilities", "attention"],
            dynamic={"features": {1: "instances"}, "present": {1: "instances"}},
            checks=[example(1, 7), example(3, 200)],
            columns=self._columns(),
        )

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        features = F.dropout(self.standardise(batch["features"]), self.input_dropout, self.training)
        return losses(self.network(features, batch["present"]), batch["label"], self.aem, self.smoothing)

    def make_metrics(self) -> MetricCollection:
        metrics = super().make_metrics()
        metrics.add_metrics({"instance_auroc": BinaryAUROC()})
        return metrics

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        outputs = self(batch)
        self.measure(metrics, outputs["probabilities"], batch)
        truth = batch.get("instance_label")
        if truth is not None:
            # Of bags with both kinds: where all or none are key instances there is nothing to rank
            relative = outputs["attention"] * batch["present"].sum(-1, keepdim=True)
            for scores, wanted in zip(relative, truth, strict=True):
                known = wanted >= 0
                if 0 < int(wanted[known].sum()) < int(known.sum()):
                    metrics["instance_auroc"].update(scores[known], wanted[known])
        return {"loss": F.cross_entropy(outputs["logits"].float(), batch["label"])}


class StandardisedRows:
    """Rows of a bag, standardised a piece at a time."""

    def __init__(self, system: SlideClassifier, features: Tensor) -> None:
        self.system, self.features = system, features
        self.shape = features.shape

    def __getitem__(self, rows: slice) -> Tensor:
        return self.system.standardise(self.features[rows].to(self.system.device))
