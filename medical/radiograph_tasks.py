"""The Lightning module of radiographs."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from medical.medusa import MEDUSA, Attention, Gate, Output, global_view, preset, resize
from polyhead import bundle
from polyhead.calibration import calibrated, fit_calibration
from polyhead.classifier import Classifier
from polyhead.columns import make_columns
from polyhead.encoders import normalisation
from polyhead.errors import UserError
from polyhead.folding import fold_batch_norms
from polyhead.freezing import Freezing
from polyhead.intervals import bootstrap_weights
from polyhead.system import Signature, System


class RadiographClassifier(Freezing, Classifier):
    """Classifies radiographs with MEDUSA: one attention body, a gate at every scale.

    Takes uint8 images `image [B, 3, S, S]`, S the larger of `image_size` and `global_size`; both views are made
    from it inside. Gives `logits [B, K]`, `probabilities [B, K]`, with a body `global_map [B, Hg, Wg]` in 0..1,
    and `gate_J [B, H_J, W_J]` for every attended stage J (the mean over channels). Prediction columns: `label`,
    `score`, `probabilities`, with a `positive` class also `alert` (its probability reaches the threshold), and
    `patient`, `study`, `instance` where files name them.

    Args:
        facts: `classes`; linked from the data.
        variant: `medusa_cxr3`, `medusa_r50` or `medusa_r18` set backbone, sizes and base; None takes the following.
        backbone, base, global_channels, head_width, attention, attention_stages, channel_attention, gate, dropout,
            backbone_options: see `medical.medusa.MEDUSA`.
        image_size, global_size: sides of the classifier view and of the body's view in pixels.
        pretrained: start the backbone from its published weights.
        mean, std: normalisation of the classifier view in 0..1; the backbone's own by default.
        freeze: parameter-name prefixes inside the network that are not trained (`body`, `backbone.blocks.0`).
        unfreeze_at: the epoch from which all is trained.
        freeze_norms: the backbone's batch norms keep their statistics (small batches spoil them); None means those of
            a `pretrained` backbone.
        label_smoothing: share of the target spread over all classes.
        class_weights: `balanced` weighs the loss by inverse class frequency in the training part.
        flip_tta: average over the image and its mirror in evaluation and prediction.
        tta_zooms: average over the centre enlarged by each of these factors there, 1 being the whole image; logits
            and maps are the first one's.
        calibrate: after training, fit a scale and an offset a class on the validation part: `plain` for its class
            shares, `balanced` as if all classes were equally common (see `polyhead.calibration`).
        scale, offsets: of the calibration; found by `calibrate`.
        positive: the class that an alert is about; with a `sensitivity` or a `threshold`.
        sensitivity: after training, the threshold becomes the largest that finds this share of the positives of the
            validation part.
        threshold: probability of `positive` from which a row is an alert.
        system: see `polyhead.system.System`.
    """

    network: MEDUSA
    mean: Tensor
    std: Tensor

    def __init__(
        self, facts: dict[str, Any] | None = None, variant: str | None = None, backbone: str = "resnet18",
        image_size: int = 224, global_size: int = 128, base: int = 24, global_channels: int = 1,
        head_width: int = 32, attention: Attention = "full", attention_stages: list[int] | None = None,
        channel_attention: bool = False, gate: Gate = "mul", dropout: float = 0.0, pretrained: bool = False,
        backbone_options: dict[str, Any] | None = None, mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None, freeze: list[str] | None = None,
        unfreeze_at: int | None = None, freeze_norms: bool | None = None, label_smoothing: float = 0.0,
        class_weights: Literal["none", "balanced"] = "none", flip_tta: bool = False,
        calibrate: Literal["none", "plain", "balanced"] = "none", scale: float = 1.0,
        offsets: list[float] | None = None, positive: str | None = None, sensitivity: float | None = None,
        threshold: float | None = None, tta_zooms: list[float] | None = None, **system: Any,
    ) -> None:  # fmt: skip
        super().__init__(facts, **system)
        if variant is not None:
            chosen = preset(variant)
            backbone, base = chosen["backbone"], chosen["base"]
            image_size, global_size = chosen["image_size"], chosen["global_size"]
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"model.label_smoothing is {label_smoothing:g}: it must be between 0 and 1")
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"model.threshold is {threshold:g}: it must be between 0 and 1")
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout is {dropout:g}: it must be at least 0 and below 1")
        if std is not None and min(std) <= 0:
            raise UserError(f"model.std is {list(std)}: deviations above 0 are needed")
        if tta_zooms is not None and not (tta_zooms and all(1 <= zoom <= 2 for zoom in tta_zooms)):
            raise UserError(f"model.tta_zooms is {tta_zooms}: one factor or more from 1 to 2 is needed")
        if sensitivity is not None and not 0 < sensitivity <= 1:
            raise UserError(f"model.sensitivity is {sensitivity:g}: it must be above 0 and at most 1")
        if positive is not None and positive not in self.classes:
            raise UserError(f"model.positive is {positive!r}, which is none of: {', '.join(self.classes)}")
        if positive is None and (sensitivity is not None or threshold is not None):
            raise UserError("model.sensitivity and model.threshold are about a class: name it by model.positive")
        if positive is not None and sensitivity is None and threshold is None:
            raise UserError("model.positive needs model.sensitivity (or a model.threshold) to raise an alert")
        self.network = MEDUSA(
            len(self.classes), backbone, pretrained, image_size, base, global_channels, head_width, attention,
            attention_stages, channel_attention, gate, dropout, backbone_options,
        )  # fmt: skip
        own_mean, own_std = normalisation(backbone)
        self.register_buffer("mean", torch.tensor(mean or own_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or own_std).view(1, 3, 1, 1), persistent=False)
        self.image_size, self.global_size = image_size, global_size
        self.freeze_norms = pretrained if freeze_norms is None else freeze_norms
        self.label_smoothing, self.class_weights, self.flip_tta = label_smoothing, class_weights, flip_tta
        self.tta_zooms = tta_zooms or [1.0]
        if offsets is not None and len(offsets) != len(self.classes):
            raise UserError(f"model.offsets has {len(offsets)} numbers for {len(self.classes)} classes")
        self.calibrate, self.scale, self.offsets = calibrate, scale, offsets or [0.0] * len(self.classes)
        self.positive, self.sensitivity, self.threshold = positive, sensitivity, threshold
        self._loss_weight: Tensor | None = None
        self.freeze_parts(freeze, unfreeze_at)

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.network.fc.parameters())

    def still_norms(self) -> nn.Module | None:
        return self.network.backbone if self.freeze_norms else None

    # The graph

    @property
    def side(self) -> int:
        """Of the images that the model takes, in pixels."""
        return max(self.image_size, self.global_size)

    def views(self, image: Tensor, zoom: float = 1.0) -> tuple[Tensor, Tensor]:
        """uint8 `[B, 3, S, S]` to the classifier view `[B, 3, H, H]` and the global view `[B, 1, G, G]`.

        With a zoom both show the centre, S / zoom wide.
        """
        whole = image.to(self.mean.dtype) / 255
        if zoom != 1:
            side = self.side
            margin = round((side - side / zoom) / 2)
            whole = resize(whole[..., margin : side - margin, margin : side - margin], (side, side))
        x = (resize(whole, (self.image_size, self.image_size)) - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last), global_view(whole, self.global_size)

    def _run(self, image: Tensor, zoom: float = 1.0) -> Output:
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling() and image.shape[-1] != self.side:
            raise UserError(f"the images are {image.shape[-1]} pixels wide, the model takes {self.side}: "
                            f"set --data.image_size {self.side} or the model's sizes")  # fmt: skip
        return self.network(*self.views(image, zoom))

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        image = inputs["image"]
        output = self._run(image, self.tta_zooms[0])
        logits = [output.logits, *(self._run(image, zoom).logits for zoom in self.tta_zooms[1:])]
        if self.flip_tta:
            logits += [self._run(image.flip(-1), zoom).logits for zoom in self.tta_zooms]
        probabilities = torch.stack([view.softmax(-1) for view in logits]).mean(0)
        probabilities = calibrated(probabilities, self.scale, self.offsets)
        result = {"logits": output.logits, "probabilities": probabilities}
        if output.global_map is not None:
            result["global_map"] = output.global_map.sigmoid().mean(1)
        for stage, gate in zip(self.network.stages, output.gates, strict=True):
            result[f"gate_{stage}"] = gate.mean(1)
        return result

    def input_names(self) -> list[str]:
        return ["image"]

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        probabilities = outputs["probabilities"].float().cpu().numpy()
        return make_columns(self._columns(), {"probabilities": probabilities})

    def _columns(self) -> dict[str, Any]:
        rule: dict[str, Any] = {"kind": "classification", "classes": self.classes}
        if self.positive is not None and self.threshold is not None:
            rule |= {"positive": self.positive, "threshold": self.threshold}
        return rule

    def signature(self) -> Signature:
        side = self.side
        maps = ["global_map"] if self.network.body is not None else []
        maps += [f"gate_{stage}" for stage in self.network.stages]
        ramp = torch.linspace(0, 9, side)
        waves = torch.stack([torch.sin(ramp[:, None] * (b + 1)) * torch.cos(ramp * (b + 2)) for b in range(2)])
        image = ((waves[:, None] + 1) * 127.5).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
        checks = [{"image": image[:1]}, {"image": image[[0, 1, 0]]}]
        return Signature({"image": image}, ["logits", "probabilities", *maps], checks=checks, columns=self._columns())

    def deployed(self) -> System:
        """A copy with the batch norms folded into the convolutions."""
        network, self.network = self.network, nn.Identity()  # type: ignore[assignment]
        try:
            twin = bundle.clone(self)
        finally:
            self.network = network
        example = self.views(self.signature().inputs["image"][:1].to(self.mean.device))
        was = network.training
        twin.network = fold_batch_norms(network.eval(), lambda n: n(*example))
        network.train(was)
        return twin.eval()

    # Training and evaluation

    def on_fit_start(self) -> None:
        # What an earlier training settled says nothing of this one
        self.scale, self.offsets = 1.0, [0.0] * len(self.classes)
        if self.class_weights == "balanced":
            counts = torch.tensor(self.trainer.datamodule.class_counts(), dtype=torch.float32)  # type: ignore[attr-defined]
            self._loss_weight = (counts.sum() / (len(counts) * counts.clamp(min=1))).to(self.device)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits = self._run(batch["image"]).logits
        loss = F.cross_entropy(logits, batch["label"], weight=self._loss_weight, label_smoothing=self.label_smoothing)
        return {"loss": loss}

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        outputs = self.outputs(image=batch["image"])
        self.measure(metrics, outputs["probabilities"], batch)
        return {"loss": F.cross_entropy(outputs["logits"].float(), batch["label"])}

    def settle(self) -> bool:
        rows = self.rows("val")
        if rows is None or (self.calibrate == "none" and self.sensitivity is None):
            return False
        probabilities, label, _ = rows
        settled: dict[str, Any] = {}
        if self.calibrate != "none":
            self.scale, self.offsets = fit_calibration(probabilities, label, self.calibrate == "balanced")
            probabilities = calibrated(torch.from_numpy(probabilities).float(), self.scale, self.offsets).numpy()
            settled |= {"scale": self.scale, "offsets": self.offsets}
        if self.sensitivity is not None and self.positive is not None:
            own = self.classes.index(self.positive)
            scores = np.sort(probabilities[label == own, own])[::-1]
            if len(scores):
                last = float(scores[int(np.ceil(self.sensitivity * len(scores))) - 1])
                # Between that score and the next one below: rounding elsewhere must not lose the last positive
                below = float(probabilities[probabilities[:, own] < last, own].max(initial=0.0))
                self.threshold = max(0.0, min((last + below) / 2, last - 1e-5))
                settled["threshold"] = self.threshold
        self.recipe["init_args"] = {**self.recipe["init_args"], **settled}
        return True

    def named_results(self, stage: str) -> dict[str, float]:
        named = super().named_results(stage)
        rows = self.rows(stage)
        if rows is None or self.positive is None or self.threshold is None:
            return named
        probabilities, label, group = rows
        own = self.classes.index(self.positive)
        alert, true = probabilities[:, own] >= self.threshold, label == own
        found = {"sensitivity": (alert, true), "specificity": (~alert, ~true), "ppv": (true, alert)}
        weight = bootstrap_weights(group, 1000, 0)
        named["threshold"] = self.threshold
        for name, (hit, of) in found.items():
            if of.any():
                named[f"alert.{name}"] = float(hit[of].mean())
                total = weight[:, of].sum(1)
                drawn = np.where(total > 0, (weight[:, of] @ hit[of]) / np.maximum(total, 1), np.nan)
                low, high = np.nanpercentile(drawn, [2.5, 97.5])
                named |= {f"alert.{name}.low": float(low), f"alert.{name}.high": float(high)}
        return named

    def explain(self, batch: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """The radiograph, the global map, the gate of every stage, and Grad-CAM of the last, side by side."""
        from medical.radiograph_pictures import maps_picture

        x, g = self.views(batch["image"])
        with torch.no_grad():
            probabilities = self.outputs(image=batch["image"])["probabilities"]
        with torch.enable_grad():
            features, q, gates = self.network.forward_features(x, g)
            features = features.detach().requires_grad_(True)
            logits = self.network.forward_head(features)
            # Of the class that the title names, which the views and the calibration may have changed
            named = logits.gather(1, probabilities.argmax(1, keepdim=True))
            (gradient,) = torch.autograd.grad(named.sum(), features)
        cam = (features * gradient.mean((-2, -1), keepdim=True)).sum(1).relu().detach()
        described = []
        for i, p in enumerate(probabilities.cpu()):
            maps = {} if q is None else {"global map": q[i].detach().sigmoid().mean(0)}
            maps |= {f"gate {s}": a[i].detach().mean(0) for s, a in zip(self.network.stages, gates, strict=True)}
            maps["Grad-CAM"] = cam[i]
            maps = {k: v.float().cpu() for k, v in maps.items()}
            image = batch["image"][i].cpu()
            arrays = {k.replace(" ", "_").lower().replace("-", "_"): v.numpy() for k, v in maps.items()}
            arrays |= {"image": image.numpy(), "probabilities": p.numpy()}
            title = f"{self.classes[int(p.argmax())]} {float(p.max()):.2f}"
            described.append((maps_picture(image, maps, title), arrays))
        return described
