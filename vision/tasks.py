"""The Lightning modules that vision recipes name."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchvision.transforms import v2

from polyhead import bundle
from polyhead.classifier import Classifier
from polyhead.columns import make_columns
from polyhead.errors import UserError
from polyhead.freezing import Freezing
from polyhead.system import Signature, System
from vision.backbones import create_backbone, normalisation
from vision.explain import class_maps, heat_picture
from vision.token_label import TokenLabelLoss

OUTPUTS = ["logits", "probabilities"]


def example_images(batch: int, height: int, width: int) -> Tensor:
    """Smooth, deterministic pictures, uint8 `[B, 3, H, W]`, that compress well and exercise all grey levels."""
    y = torch.linspace(0, 3, height)[:, None]
    x = torch.linspace(0, 4, width)[None]
    waves = [torch.sin(x * (c + 1) + b) * torch.cos(y * (b + 1) + c) for b in range(batch) for c in range(3)]
    return ((torch.stack(waves).view(batch, 3, height, width) + 1) * 127.5).to(torch.uint8)


class ImageClassifier(Freezing, Classifier):
    """Single-label classification of images with any backbone.

    Takes uint8 RGB images `image [B, 3, H, W]`; gives `logits [B, K]` and `probabilities [B, K]`.
    Prediction columns: `label`, `score` (its probability), `probabilities` (in class order).

    Args:
        facts: `classes`, the class names in order; linked from the data.
        backbone: one of our variants (`shvit_s1`), any timm name, or `encoder:efficientnet_lite0`.
        pretrained: start from published weights where the backbone has a source for them.
        backbone_options: further arguments of the backbone.
        mean, std: normalisation of images scaled to 0..1; the backbone's own by default.
        image_size: side of the images an export is checked with, in pixels.
        label_smoothing: share of the target spread over all classes.
        mixup_alpha, cutmix_alpha: Beta parameters of mixing, 0 is off; with both, each batch draws one.
        class_weights: `balanced` weighs the loss by inverse class frequency in the training split.
        freeze: parameter-name prefixes inside the network that are not trained; `backbone` is all but the
            classifier (a linear probe). Their batch norms keep their statistics.
        unfreeze_at: epoch at which what was frozen is trained again.
        teacher: a checkpoint, bundle or shipped model to distil from (same classes).
        distillation: `hard` learns the teacher's label, `soft` its distribution at `temperature`.
        distillation_weight: share of the distillation loss.
        temperature: of soft distillation.
        flip_tta: average over the image and its mirror in evaluation and prediction.
        system: optimiser, scheduler and the other arguments of `polyhead.system.System`.
    """

    def __init__(
        self,
        facts: dict[str, Any] | None = None,
        backbone: str = "shvit_s1",
        pretrained: bool = False,
        backbone_options: dict[str, Any] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        image_size: int = 224,
        label_smoothing: float = 0.1,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        class_weights: Literal["none", "balanced"] = "none",
        freeze: list[str] | None = None,
        unfreeze_at: int | None = None,
        teacher: str | None = None,
        distillation: Literal["hard", "soft"] = "soft",
        distillation_weight: float = 0.5,
        temperature: float = 3.0,
        flip_tta: bool = False,
        **system: Any,
    ) -> None:
        super().__init__(facts, **system)
        for option, share in {"label_smoothing": label_smoothing, "distillation_weight": distillation_weight}.items():
            if not 0 <= share <= 1:
                raise UserError(f"model.{option} is {share:g}: it must be between 0 and 1")
        for option, strength in {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha}.items():
            if strength < 0:
                raise UserError(f"model.{option} is {strength:g}: it must be 0 or more")
        if temperature <= 0:
            raise UserError(f"model.temperature is {temperature:g}: it must be above 0")
        self.network = create_backbone(
            backbone, len(self.classes), pretrained=pretrained, image_size=image_size, **(backbone_options or {})
        )
        own_mean, own_std = normalisation(backbone)
        self.register_buffer("mean", torch.tensor(mean or own_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or own_std).view(1, 3, 1, 1), persistent=False)
        self.image_size, self.label_smoothing = image_size, label_smoothing
        self.class_weights, self.flip_tta = class_weights, flip_tta
        self.teacher_name, self.distillation = teacher, distillation
        self.distillation_weight, self.temperature = distillation_weight, temperature
        # In a list, so that the teacher is no part of the student's weights
        self._teacher: list[System] = []
        self._loss_weight: Tensor | None = None
        count = len(self.classes)
        mixers: list[nn.Module] = []
        if cutmix_alpha > 0:
            mixers.append(v2.CutMix(alpha=cutmix_alpha, num_classes=count))
        if mixup_alpha > 0:
            mixers.append(v2.MixUp(alpha=mixup_alpha, num_classes=count))
        self.mix = v2.RandomChoice(mixers) if mixers else None
        self.freeze_parts(freeze, unfreeze_at)

    # Network

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 `[B, 3, H, W]` to the network's input, in the channels-last order that convolutions prefer."""
        x = (image.to(self.mean.dtype) / 255 - self.mean) / self.std  # type: ignore[operator, arg-type]
        return x.contiguous(memory_format=torch.channels_last)

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = self.normalise(inputs["image"])
        logits = self.network(x)
        probabilities = logits.softmax(-1)
        if self.flip_tta:
            probabilities = (probabilities + self.network(x.flip(-1)).softmax(-1)) / 2
        return {"logits": logits, "probabilities": probabilities}

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        probabilities = outputs["probabilities"].float().cpu().numpy()
        return make_columns(self._columns(), {"probabilities": probabilities})

    def _columns(self) -> dict[str, Any]:
        return {"kind": "classification", "classes": self.classes}

    def signature(self) -> Signature:
        size = self.image_size
        if not getattr(self.network, "dynamic_size", False):
            return Signature({"image": example_images(2, size, size)}, OUTPUTS, columns=self._columns())
        # Traced on a map that is nowhere one pixel high or wide, which tracers would take for a constant
        high = max(size, 160)
        return Signature(
            inputs={"image": example_images(2, high, high + 64)},
            outputs=OUTPUTS,
            dynamic={"image": {2: "height", 3: "width"}},
            checks=[{"image": example_images(n, s, s)} for n, s in ((1, size), (3, size), (2, size + 32))],
            columns=self._columns(),
            native={"image": example_images(2, size, size)},
        )

    def input_names(self) -> list[str]:
        return ["image"]

    def deployed(self) -> System:
        """A copy whose network has its batch norms folded, where the network offers that."""
        fold = getattr(self.network, "to_deploy", None)
        if fold is None:
            return self.eval()
        network, self.network = self.network, nn.Identity()
        try:
            copy = bundle.clone(self)
        finally:
            self.network = network
        copy.network = fold()
        return copy.eval()

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize what depends on the image size, where the network knows how."""
        adapt = getattr(self.network, "resize_state", None)
        if adapt is None:
            return state
        inner = adapt({k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")})
        return {**state, **{f"network.{k}": v for k, v in inner.items()}}

    def head_parameters(self) -> list[nn.Parameter]:
        heads = self.network.get_classifier()  # type: ignore[operator]
        heads = heads if isinstance(heads, (tuple, list)) else [heads]
        return [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]

    # Losses

    def on_fit_start(self) -> None:
        if self.teacher_name is not None:
            saved = bundle.read(self.teacher_name)
            teacher = bundle.build_model(saved.model)
            bundle.load_weights(teacher, saved)
            if getattr(teacher, "classes", None) != self.classes:
                raise UserError(f"the teacher {self.teacher_name} knows other classes than the data")
            self._teacher = [teacher.eval().to(self.device)]
        if self.class_weights == "balanced":
            counts = torch.tensor(self.trainer.datamodule.class_counts(), dtype=torch.float32)  # type: ignore[attr-defined]
            weight = counts.sum() / (len(counts) * counts.clamp(min=1))
            self._loss_weight = weight.to(self.device)

    def _cross_entropy(self, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        return F.cross_entropy(logits, target, weight=self._loss_weight, label_smoothing=smoothing)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x, target = self.normalise(batch["image"]), batch["label"]
        if self.mix is not None:
            x, target = self.mix(x, target)
        teaching = self._teaching(x)
        result = self.network(x)
        if isinstance(result, tuple) and len(result) == 3:
            # Every token has a label too, and the network may have mixed tokens of two images
            if teaching is not None:
                raise UserError("a teacher does not see what mix-token made: leave model.teacher or token_label out")
            criterion = TokenLabelLoss(smoothing=self.label_smoothing, weight=self._loss_weight)
            return {"loss": criterion(result, target)}
        logits, student = result if isinstance(result, tuple) else (result, result)
        loss = self._cross_entropy(logits, target, self.label_smoothing)
        if teaching is None:
            return {"loss": loss}
        if self.distillation == "hard":
            taught = F.cross_entropy(student, teaching.argmax(1))
        else:
            t = self.temperature
            taught = F.kl_div(
                F.log_softmax(student / t, 1), F.log_softmax(teaching / t, 1), log_target=True, reduction="batchmean"
            ) * (t * t)
        share = self.distillation_weight
        return {"loss": (1 - share) * loss + share * taught, "distillation": taught}

    @torch.no_grad()
    def _teaching(self, x: Tensor) -> Tensor | None:
        """The teacher's logits on the student's input, which it may have been trained to see normalised otherwise."""
        if not self._teacher:
            return None
        teacher: Any = self._teacher[0]
        return teacher.network((x * self.std + self.mean - teacher.mean) / teacher.std)  # type: ignore[operator]

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        outputs = self.outputs(image=batch["image"])
        self.measure(metrics, outputs["probabilities"], batch)
        return {"loss": F.cross_entropy(outputs["logits"].float(), batch["label"])}

    def explain(self, batch: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """A heat map over each image: attention where the backbone has it, else Grad-CAM."""
        maps, kind = class_maps(self.network, self.normalise(batch["image"]))
        with torch.inference_mode():
            probabilities = self.outputs(image=batch["image"])["probabilities"].cpu()
        described = []
        for image, heat, p in zip(batch["image"].cpu(), maps.cpu(), probabilities, strict=True):
            title = f"{self.classes[int(p.argmax())]} {float(p.max()):.2f}"
            arrays = {"image": image.numpy(), "map": heat.numpy(), "probabilities": p.numpy()}
            described.append((heat_picture(image, {kind: heat}, title), arrays))
        return described
