"""Generative pre-training of MVPFormer on recordings without labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection

from polyhead.columns import make_columns
from polyhead.errors import UserError
from polyhead.system import Signature, System
from timeseries.generative import contrastive, contrastive_logits, draw_negatives
from timeseries.mvpformer import Anchor, Encoder, MVPFormer, create_mvpformer


class Surprise(Metric):
    """Contrastive losses of an evaluation: the model's, and those of simpler predictions on the same negatives.

    Computes mean losses `[4]`: the model, repeating the last segment, extrapolating the last two, and a linear
    prediction from the last two that is fitted to one half of the windows and judged on the other, both ways.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.add_state("sums", default=torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")
        self._kept: list[tuple[Tensor, Tensor]] = []

    def update(self, loss: Tensor, embeddings: Tensor, index: Tensor) -> None:
        repeat = self._loss(embeddings, embeddings, index)
        before = torch.cat([embeddings[:, :1], embeddings[:, :-1]], 1)
        further = self._loss(2 * embeddings - before, embeddings, index)
        self.sums += torch.stack([loss, repeat, further, loss.new_zeros(()), loss.new_ones(())]).double()
        self._kept.append((embeddings.detach().cpu(), index.cpu()))

    def _loss(self, predicted: Tensor, embeddings: Tensor, index: Tensor) -> Tensor:
        return contrastive(contrastive_logits(predicted, embeddings, index, self.temperature))[0]

    @staticmethod
    def _pairs(e: Tensor) -> Tensor:
        return torch.cat([e, torch.cat([e[:, :1], e[:, :-1]], 1), torch.ones_like(e[..., :1])], -1)

    def _linear(self) -> float:
        losses = []
        for part in (0, 1):
            fitted = [e for i, (e, _) in enumerate(self._kept) if i % 2 == part]
            judged = [k for i, k in enumerate(self._kept) if i % 2 != part]
            if not fitted or not judged:
                continue
            x = torch.cat([self._pairs(e)[:, :-1].flatten(0, 2) for e in fitted]).double()
            y = torch.cat([F.normalize(e[:, 1:], dim=-1).flatten(0, 2) for e in fitted]).double()
            ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
            weight = torch.linalg.solve(x.T @ x + ridge, x.T @ y).float()
            losses += [float(self._loss(self._pairs(e) @ weight, e, index)) for e, index in judged]
        return float(np.mean(losses)) if losses else float("nan")

    def compute(self) -> Tensor:
        means = self.sums[:3] / self.sums[4]
        return torch.cat([means, torch.tensor([self._linear()], dtype=torch.float64)])

    def reset(self) -> None:
        super().reset()
        self._kept = []


class SignalModel(System):
    """Generative pre-training: which of K + 1 embeddings is each channel's next segment's (contrastive).

    Takes `x [B, T, C, L]`; gives `predicted` and `embeddings [B, T, C, D]` and `similarity [B, C]`, the cosine
    of the last segment's embedding and its prediction. Prediction columns: `similarity`, and `surprise`, one less
    its mean over channels; beside them what the data know.

    An evaluation gives the loss beside that of repeating the last segment (`repeat_loss`), of extrapolating the
    last two (`extrapolated_loss`), and of a linear prediction fitted to the other half (`linear_loss`).

    Args:
        facts: `rate`, `segment`, `segments`; linked from the data.
        size, encoder, anchor, n_positions, n_channels, dropout, structured, init, network: see `SeizureDetector`.
        negatives: K.
        temperature: cosines are divided by it.
        system: optimiser, scheduler and the other arguments of `polyhead.system.System`.
    """

    network: MVPFormer

    def __init__(
        self, facts: dict[str, Any] | None = None, size: str = "mvpformer_xs", encoder: Encoder = "wavelet",
        anchor: Anchor = "zero", n_positions: int = 110, n_channels: int = 128, dropout: float = 0.1,
        structured: bool = False, init: float = 0.02, network: dict[str, Any] | None = None,
        negatives: int = 30, temperature: float = 0.1, **system: Any,
    ) -> None:  # fmt: skip
        super().__init__(facts, **system)
        if negatives < 1 or temperature <= 0:
            raise UserError(f"model.negatives {negatives} and model.temperature {temperature:g} must be above 0")
        if self.facts["segments"] < 2:
            raise UserError("data.segments is 1: a next segment needs windows of 2 or more")
        if self.facts.get("standardise"):
            raise UserError("data.standardise has no use in pre-training: leave it out")
        self.length = round(self.facts["rate"] * self.facts["segment"])
        self.negatives, self.temperature = negatives, temperature
        self.network = create_mvpformer(
            size, **{
                "length": self.length, "head": "generative", "encoder": encoder, "n_positions": n_positions,
                "n_channels": n_channels, "anchor": anchor, "dropout": dropout, "structured": structured,
                "init": init, **(network or {}),
            },
        )  # fmt: skip

    def input_names(self) -> list[str]:
        return ["x"]

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        embeddings = self.network.embed(inputs["x"])
        predicted = self.network.predict_next(embeddings)
        similarity = F.cosine_similarity(predicted[:, -2], embeddings[:, -1], dim=-1)
        return {"predicted": predicted, "embeddings": embeddings, "similarity": similarity}

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        return make_columns({"kind": "surprise"}, {"similarity": outputs["similarity"].float().cpu().numpy()})

    def signature(self) -> Signature:
        def example(windows: int, segments: int, channels: int) -> dict[str, Tensor]:
            rows = torch.linspace(-2, 2, windows * segments * channels * self.length) * 977
            return {"x": rows.sin().view(windows, segments, channels, self.length)}

        steps = self.facts["segments"]
        return Signature(
            inputs=example(2, steps, 6), outputs=["predicted", "embeddings", "similarity"],
            dynamic={"x": {1: "segments", 2: "channels"}},
            checks=[example(1, steps + 1, 9), example(3, steps + 9, 15)], columns={"kind": "surprise"},
            native=example(2, steps, 6),
        )  # fmt: skip

    def _loss(self, batch: dict[str, Any], source: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        embeddings = self.network.embed(batch["x"])
        windows, steps, channels, _ = embeddings.shape
        if windows * steps * channels < 3:
            raise UserError("a batch of one window with one channel has no negatives: raise --data.batch_size")
        index = draw_negatives(windows, steps, channels, self.negatives, source).to(embeddings.device)
        logits = contrastive_logits(self.network.predict_next(embeddings), embeddings, index, self.temperature)
        return *contrastive(logits), embeddings, index

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        # Negatives come from the global generator, whose state travels in a checkpoint
        source = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
        loss, accuracy, _, _ = self._loss(batch, source)
        return {"loss": loss, "accuracy": accuracy}

    def make_metrics(self) -> MetricCollection:
        return MetricCollection(
            {"surprise": Surprise(self.temperature), "generative_loss": MeanMetric()}, compute_groups=False
        )

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(int(batch["first"].sum()) % 2**31)
        loss, accuracy, embeddings, index = self._loss(batch, source)
        metrics["surprise"].update(loss, embeddings, index)
        metrics["generative_loss"].update(loss)
        return {"loss": loss, "accuracy": accuracy}

    def named_results(self, stage: str) -> dict[str, float]:
        values = self.results.get(stage, {}).get("surprise")
        if values is None:
            return {}
        names = ("generative_loss", "repeat_loss", "extrapolated_loss", "linear_loss")
        return {n: v for n, v in zip(names, values.tolist(), strict=True) if v == v}
