"""MVPFormer on recordings: a seizure detector, or a classifier of other states."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from polyhead.bundle import clone
from polyhead.classifier import Classifier
from polyhead.columns import make_columns
from polyhead.errors import UserError
from polyhead.system import Signature, System
from timeseries.mvpformer import Anchor, Encoder, MVPFormer, band_sizes, create_mvpformer
from timeseries.seizures import Post, Track, alarmed, choose_threshold, kappa, total

# Share of a window's channels that learn its label where an annotation does not name channels
WEAK = 0.25
SCORES = ("sensitivity", "false_alarms_per_hour", "latency_seconds", "kappa", "episode_f1", "seizures", "found",
          "false_alarms", "hours")  # fmt: skip


class Tracks(Metric):
    """Every window of an evaluation, by recording; computes `SCORES` at the model's threshold.

    Args:
        post: how scores become events.
        threshold: the model's.
        stride, segment: see `timeseries.seizures.Track`.
    """

    full_state_update = False
    table: list[Tensor]
    marked: list[Tensor]

    def __init__(self, post: Post, threshold: float, stride: float, segment: float) -> None:
        super().__init__()
        self.post, self.threshold, self.stride, self.segment = post, threshold, stride, segment
        self.add_state("table", default=[], dist_reduce_fx="cat")
        self.add_state("marked", default=[], dist_reduce_fx="cat")
        self._known: set[int] = set()

    def update(self, scores: Tensor, batch: dict[str, Any]) -> None:
        columns = [batch["recording"], batch["stop"], scores, batch["label"] > 0]
        self.table.append(torch.stack([c.detach().double().cpu() for c in columns], 1))
        for number, intervals in batch["truth"].items():
            if number not in self._known:
                self._known.add(number)
                rows = [[number, a, b] for a, b in intervals]
                self.marked.append(torch.tensor(rows, dtype=torch.float64).view(-1, 3))

    def tracks(self) -> list[Track]:
        """The windows of each recording in order of time."""
        table, marked = (torch.cat(list(s)).numpy() if isinstance(s, list) else s.cpu().numpy()
                         for s in (self.table, self.marked))  # fmt: skip
        marked = np.unique(marked, axis=0)
        found = []
        for number in np.unique(table[:, 0]):
            own = table[table[:, 0] == number]
            own = own[np.unique(own[:, 1], return_index=True)[1]]
            truth = [(float(a), float(b)) for n, a, b in marked if n == number]
            # Only what the windows reach can be found
            seen = [(a, b) for a, b in truth if b >= own[0, 1] - self.segment and a <= own[-1, 1]]
            found.append(Track(own[:, 1], own[:, 2], own[:, 3], seen, self.stride, self.segment))
        return found

    def compute(self) -> Tensor:
        tracks = self.tracks()
        sums = total(tracks, self.threshold, self.post)
        labels, states = alarmed(tracks, self.threshold, self.post)
        latency = float(np.mean(sums.latencies)) if sums.latencies else float("nan")
        return torch.tensor([
            sums.sensitivity, sums.per_hour, latency, kappa(labels, states), sums.f1, sums.seizures, sums.found,
            sums.false_alarms, sums.hours,
        ], dtype=torch.float64)  # fmt: skip


class SeizureDetector(Classifier):
    """MVPFormer on windows of recordings: a seizure detector, or a classifier of other states.

    Takes `x [B, T, C, L]` as the data module prepares it (any C, and with sliding windows any T) and, where the
    data standardise, `energy_mean` and `energy_deviation [B, C, bands]`; gives `logits [B, K]`, `probabilities
    [B, K]` and `relevance [B, C]`: what each channel says by itself (head `channel`), or its share of the logit of
    the last class over the first. Prediction columns: `probability` (of any class but the first), `label`,
    `probabilities`, `relevance`, `threshold`, `alarm` (whether the probability of this one window reaches it);
    beside them what the data know: recording, start, stop, since (from where to `stop` the window speaks of),
    channels, padded (a clip shorter than a window, continued by its mirror image), notes.

    With sliding windows an evaluation also gives event scores after smoothing (see `timeseries.seizures`):
    sensitivity, false alarms an hour, latency, kappa of alarmed and marked windows, F1 over episodes. The
    threshold is chosen on the validation part in training and kept with the weights.

    Args:
        facts: `classes`, `rate`, `segment`, `segments`, `stride`, `channels`, `standardise`, `windows`; linked
            from the data.
        size: a name in `timeseries.mvpformer.VARIANTS`.
        head: `mean` (published), `channel`, or `named` for a fixed set of channels; see `MVPFormer`.
        rank: of the head `channel`.
        encoder: `wavelet` (published) or `energy`.
        anchor: which codebook rows distances take; `end` is published, `zero` fits other numbers of channels.
        n_positions, n_channels: rows of the codebooks.
        dropout, structured, init: see `MVPFormer`.
        network: other arguments of `MVPFormer` than those here.
        trained_segments: segments a window had in training, where weights come from elsewhere: with `anchor` end
            another number changes what the rows mean, and is said.
        train: `full`, `head`, or `lora` (adapters and head).
        lora_rank, lora_alpha: of the adapters.
        feature_noise: in training, noise on standardised energies.
        channel_dropout: in training, each window's channels are silenced with a probability from 0 to this.
        smooth, join, shortest, tolerance: see `timeseries.seizures.Post`.
        false_alarms: an hour, that the choice of the threshold allows.
        system: optimiser, scheduler and the other arguments of `polyhead.system.System`.
    """

    network: MVPFormer
    threshold: Tensor

    def __init__(
        self, facts: dict[str, Any] | None = None, size: str = "mvpformer_xs",
        head: Literal["mean", "channel", "named"] = "mean", rank: int = 2, encoder: Encoder = "wavelet",
        anchor: Anchor = "zero", n_positions: int = 110, n_channels: int = 128, dropout: float = 0.1,
        structured: bool = False, init: float = 0.02, network: dict[str, Any] | None = None,
        trained_segments: int | None = None, train: Literal["full", "head", "lora"] = "full",
        lora_rank: int = 8, lora_alpha: float = 16.0, feature_noise: float = 0.0, channel_dropout: float = 0.0,
        smooth: int = 3, join: float = 15.0, shortest: float = 6.0, tolerance: float = 5.0,
        false_alarms: float = 0.1, **system: Any,
    ) -> None:  # fmt: skip
        super().__init__(facts, **system)
        self.length = round(self.facts["rate"] * self.facts["segment"])
        self.channels: list[str] | None = self.facts.get("channels")
        self.standardise = bool(self.facts.get("standardise"))
        self.sliding = self.facts.get("windows", "sliding") == "sliding"
        self.post = Post(smooth, join, shortest, tolerance)
        self.false_alarms = false_alarms
        self.feature_noise, self.channel_dropout = feature_noise, channel_dropout
        if head == "named" and not self.channels:
            raise UserError("the head `named` needs a fixed set of channels", ["--data.fixed_channels true"])
        if self.standardise and encoder != "energy":
            raise UserError("data.standardise measures band energies: it needs --model.encoder energy")
        for name, value in {"smooth": smooth, "join": join, "shortest": shortest, "tolerance": tolerance}.items():
            if value < (1 if name == "smooth" else 0):
                raise UserError(f"model.{name} is {value:g}: at least {1 if name == 'smooth' else 0} is needed")
        self.network = create_mvpformer(
            size, **{
                "length": self.length, "classes": len(self.classes), "head": head, "rank": rank, "encoder": encoder,
                "channels": len(self.channels or []), "n_positions": n_positions, "n_channels": n_channels,
                "anchor": anchor, "dropout": dropout, "structured": structured, "init": init, **(network or {}),
            },
        )  # fmt: skip
        segments = self.facts["segments"]
        if anchor == "end" and trained_segments and segments != trained_segments:
            print(f"note: windows of {segments} segments, these weights were trained on {trained_segments}: rows of "
                  "the codebook mean other distances now")  # fmt: skip
        if train == "lora":
            self.network.adapt(lora_rank, lora_alpha)
        elif train == "head":
            self.network.requires_grad_(False)
            self.network.head.requires_grad_(True)
        self.register_buffer("threshold", torch.tensor(0.5))

    # The graph

    def input_names(self) -> list[str]:
        return ["x", "energy_mean", "energy_deviation"] if self.standardise else ["x"]

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        embeddings = self.network.embed(*(inputs[name] for name in self.input_names()))
        return self._outputs(embeddings)

    def _outputs(self, embeddings: Tensor) -> dict[str, Tensor]:
        logits, channels = self.network.classify(embeddings)
        if self.network.kind == "channel":
            relevance = 1 - channels.softmax(-1)[..., 0]
        else:
            relevance = channels[..., -1] - channels[..., 0]
        return {"logits": logits, "probabilities": logits.softmax(-1), "relevance": relevance}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """As `outputs`; segments that windows of one recording share are encoded once."""
        if self.training or not self._one_recording(batch):
            return super().forward(batch)
        x = batch["x"]
        steps = torch.arange(x.shape[1], device=x.device) * self.length
        places, inverse = torch.unique(batch["first"][:, None] + steps, return_inverse=True)
        if len(places) > 0.7 * inverse.numel():
            return super().forward(batch)
        chosen = torch.empty(len(places), dtype=torch.long, device=x.device)
        chosen[inverse.flatten()] = torch.arange(inverse.numel(), device=x.device)
        names = self.input_names()[1:]
        measured = [batch[n][:1] for n in names]
        embeddings = self.network.embed(x.flatten(0, 1)[chosen][None], *measured)[0]
        return self._outputs(embeddings[inverse])

    @staticmethod
    def _one_recording(batch: dict[str, Any]) -> bool:
        numbers = batch.get("recording")
        return numbers is not None and len(numbers) > 1 and bool((numbers == numbers[0]).all())

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        wanted = ("probabilities", "relevance")
        return make_columns(self._columns(), {k: outputs[k].float().cpu().numpy() for k in wanted})

    def _columns(self) -> dict[str, Any]:
        return {"kind": "windows", "classes": self.classes, "threshold": float(self.threshold)}

    def signature(self) -> Signature:
        steps, count = self.facts["segments"], len(self.channels or []) or 6

        def example(windows: int, segments: int, channels: int) -> dict[str, Tensor]:
            rows = torch.linspace(-2, 2, windows * segments * channels * self.length) * 977
            x = {"x": rows.sin().view(windows, segments, channels, self.length)}
            if self.standardise:
                bands = len(band_sizes(self.length))
                x["energy_mean"] = torch.linspace(-1, 1, windows * channels * bands).view(windows, channels, bands)
                x["energy_deviation"] = 1 + x["energy_mean"].square()
            return x

        free = not self.channels
        dynamic: dict[str, dict[int, str]] = {"x": {1: "segments", **({2: "channels"} if free else {})}}
        if self.standardise and free:
            dynamic |= {k: {1: "channels"} for k in ("energy_mean", "energy_deviation")}
        return Signature(
            inputs=example(2, max(2, steps), count),
            outputs=["logits", "probabilities", "relevance"],
            dynamic=dynamic,
            checks=[example(1, max(2, steps) + 1, count + 3 * free), example(3, max(2, steps) + 9, count + 9 * free)],
            columns=self._columns(),
            native=example(2, max(2, steps), count),
        )

    def deployed(self) -> System:
        """Adapters go into the weights."""
        twin = clone(self).eval()
        twin.network.merge()
        return twin

    # Training

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "label" not in batch:
            raise UserError("the windows have no labels: data.labelled is false")
        embeddings = self._augmented(batch)
        logits, channels = self.network.classify(embeddings)
        if self.network.kind != "channel" or "channel_label" not in batch:
            return {"loss": F.cross_entropy(logits, batch["label"])}
        # Where annotations name channels, each learns for itself; else the most suspicious ones stand for the rest
        known = (batch["channel_label"] >= 0).all(1)
        parts = []
        if known.any():
            parts.append((F.cross_entropy(channels[known].flatten(0, 1), batch["channel_label"][known].flatten()),
                          int(known.sum())))  # fmt: skip
        if not known.all():
            own = channels[~known]
            count = min(own.shape[1], max(self.network.rank, round(WEAK * own.shape[1])))
            top = (own[..., -1] - own[..., 0]).topk(count, dim=1).indices
            chosen = own.gather(1, top[..., None].expand(-1, -1, own.shape[-1])).flatten(0, 1)
            target = batch["label"][~known].repeat_interleave(count)
            parts.append((F.cross_entropy(chosen, target), len(own)))
        return {"loss": torch.stack([loss * count for loss, count in parts]).sum() / len(logits)}

    def _augmented(self, batch: dict[str, Any]) -> Tensor:
        """Embeddings of a training batch, with noise on its energies and silenced channels where asked for."""
        x, mean, deviation = batch["x"], batch.get("energy_mean"), batch.get("energy_deviation")
        if not (self.feature_noise or self.channel_dropout):
            return self.network.embed(x, mean, deviation)
        encoder: Any = self.network.encoder
        features = encoder.features(x, mean, deviation)
        features = features + self.feature_noise * torch.randn_like(features)
        if self.channel_dropout:
            windows, _, channels, _ = features.shape
            share = torch.rand(windows, 1, device=x.device) * self.channel_dropout
            heard = torch.rand(windows, channels, device=x.device) >= share
            features = features * heard[:, None, :, None]
        return encoder.proj(features)

    # Evaluation

    def make_metrics(self) -> MetricCollection:
        metrics = super().make_metrics()
        if self.sliding:
            # One row a window would be a great many; recordings are what differs, and events what counts
            metrics = MetricCollection({k: m for k, m in metrics.items() if k != "rows"}, compute_groups=False)
            tracks = Tracks(self.post, float(self.threshold), self.facts["stride"], self.facts["segment"])
            metrics.add_metrics({"events": tracks, "auprc": BinaryAveragePrecision(), "window_auroc": BinaryAUROC()})
        return metrics

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        outputs = self(batch)
        if "label" not in batch:
            raise UserError("the windows have no labels: data.labelled is false")
        self.measure(metrics, outputs["probabilities"], batch)
        if "events" in metrics:
            scores = 1 - outputs["probabilities"][:, 0].float()
            metrics["events"].update(scores, batch)
            for name in ("auprc", "window_auroc"):
                metrics[name].update(scores, (batch["label"] > 0).long())
        return {"loss": F.cross_entropy(outputs["logits"].float(), batch["label"])}

    def on_validation_epoch_end(self) -> None:
        metrics = self.metrics["val"]
        if "events" in metrics and metrics["events"].update_called and self.trainer.state.fn == "fit":
            events: Any = metrics["events"]
            self.threshold.fill_(choose_threshold(events.tracks(), self.post, self.false_alarms))
            events.threshold = float(self.threshold)
        super().on_validation_epoch_end()

    def named_results(self, stage: str) -> dict[str, float]:
        named = super().named_results(stage)
        events = self.results.get(stage, {}).get("events")
        if events is not None:
            scores = zip(SCORES, events.tolist(), strict=True)
            named |= {name: value for name, value in scores if value == value}
            named["threshold"] = float(self.threshold)
        return named

    def figures(self, stage: str) -> dict[str, Any]:
        from timeseries.recording_pictures import tracks_picture

        pictures = super().figures(stage)
        events: Any = dict(self.metrics[stage].items()).get("events") if stage in self.metrics else None
        if events is not None and events.update_called:
            pictures["Probability over time"] = tracks_picture(events.tracks(), float(self.threshold), self.post)
        return pictures

    @torch.no_grad()
    def explain(self, batch: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """A window's traces, its channels' relevance, and where its last segment attends."""
        from timeseries.recording_pictures import window_picture

        outputs = self(batch)
        names = batch.get("about", {}).get("channels")
        drawn = []
        for i in range(len(batch["x"])):
            attended = self.network.attended(*(batch[k][i : i + 1] for k in self.input_names()))[0]
            x = batch["x"][i].transpose(0, 1).flatten(1)
            probability = 1 - float(outputs["probabilities"][i, 0])
            start = float(batch["start"][i]) if "start" in batch else 0.0
            own = names[i] if names else [f"CH{c + 1}" for c in range(len(x))]
            arrays = {"x": x.cpu().numpy(), "relevance": outputs["relevance"][i].cpu().numpy(),
                      "attention": attended.cpu().numpy(), "channels": np.array(own)}  # fmt: skip
            figure = window_picture(batch["id"][i], arrays, self.facts["rate"], start, probability)
            drawn.append((figure, arrays))
        return drawn

    # Starting from other weights

    def head_prefixes(self) -> list[str]:
        return ["network.head"]

    def adapt_state_dict(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What another task's weights lack: the threshold, and adapters, which then begin at zero."""
        own = self.state_dict()
        return {k: v for k, v in own.items() if k == "threshold" or ".lora_" in k} | given
