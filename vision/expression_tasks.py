"""The Lightning module of facial expressions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from polyhead import bundle
from polyhead.classifier import Classifier
from polyhead.columns import make_columns
from polyhead.encoders import IMAGENET, NORMALISATION
from polyhead.errors import UserError
from polyhead.folding import fold_batch_norms
from polyhead.freezing import Freezing
from polyhead.system import Signature, System
from vision.explain import heat_picture
from vision.tasks import example_images
from vision.transfer import VARIANTS, TransFER, create_transfer


class MeanMaps(Metric):
    """The mean map of each class, `[K, h, w]`, of what is updated with maps `[B, h, w]` and labels `[B]`."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, classes: int, side: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(classes, side, side), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(classes), dist_reduce_fx="sum")

    def update(self, maps: Tensor, label: Tensor) -> None:
        self.total.index_add_(0, label, maps.float())
        self.count += torch.bincount(label, minlength=len(self.count))

    def compute(self) -> Tensor:
        return self.total / self.count.clamp(min=1)[:, None, None]


class ExpressionClassifier(Freezing, Classifier):
    """Classifies aligned faces with TransFER (or APViT).

    Takes uint8 images `image [B, 3, S, S]`; gives `logits [B, K]`, `probabilities [B, K]` and, for TransFER,
    `map [B, h, w]`, the largest of the local maps in 0..1. Prediction columns: `label`, `score`,
    `probabilities`, and where the data find faces in photographs a row a face with `part`, `box` (x, y, width,
    height in pixels), `detector_score` and `aligned`.

    Args:
        facts: `classes`; linked from the data.
        variant: `transfer`, `transfer_small`, `transfer_lite` or `apvit`.
        network_options: further arguments of the network (`mad`, `msad`, `drop_mode`, sizes, ...).
        image_size: side S in pixels; the variant's own by default.
        pretrained: start a trunk from timm or the offline encoder from its published weights.
        mean, std: normalisation of images in 0..1; the trunk's own (ImageNet's for an IR trunk) by default.
        label_smoothing: share of the target spread over all classes.
        class_weights: `balanced` weighs the loss by inverse class frequency in the training part.
        freeze: parameter-name prefixes inside the network that are not trained.
        unfreeze_at: the epoch from which all is trained.
        freeze_norms: the trunk's batch norms keep their statistics.
        flip_tta: average over the face and its mirror in evaluation and prediction.
        system: see `polyhead.system.System`.
    """

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self, facts: dict[str, Any] | None = None, variant: str = "transfer",
        network_options: dict[str, Any] | None = None, image_size: int | None = None, pretrained: bool = False,
        mean: tuple[float, float, float] | None = None, std: tuple[float, float, float] | None = None,
        label_smoothing: float = 0.0, class_weights: Literal["none", "balanced"] = "none",
        freeze: list[str] | None = None, unfreeze_at: int | None = None, freeze_norms: bool = False,
        flip_tta: bool = False, **system: Any,
    ) -> None:  # fmt: skip
        super().__init__(facts, **system)
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"model.label_smoothing is {label_smoothing:g}: it must be between 0 and 1")
        options: dict[str, Any] = {"num_classes": len(self.classes), **(network_options or {})}
        own = VARIANTS.get(variant, {})
        trunk = str(options.get("trunk", own.get("trunk", "ir44")))
        if image_size is not None:
            options["image_size"] = image_size
        if pretrained:
            options["pretrained"] = True
        self.network = create_transfer(variant, **options)
        self.image_size: int = self.network.image_size
        own_mean, own_std = NORMALISATION.get(trunk, IMAGENET)
        self.register_buffer("mean", torch.tensor(mean or own_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or own_std).view(1, 3, 1, 1), persistent=False)
        self.label_smoothing, self.class_weights = label_smoothing, class_weights
        self.freeze_norms, self.flip_tta = freeze_norms, flip_tta
        self._loss_weight: Tensor | None = None
        self.freeze_parts(freeze, unfreeze_at)

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.network.head.parameters())

    def still_norms(self) -> nn.Module | None:
        return self.network.extractor if self.freeze_norms else None

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Position embeddings of another image size are interpolated."""
        if not isinstance(self.network, TransFER):
            return state
        inner = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        return {**state, **{f"network.{k}": v for k, v in self.network.resize_state(inner).items()}}

    # The graph

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 `[B, 3, S, S]` to the network's input, channels last."""
        side = self.image_size
        if not torch.jit.is_tracing() and not torch.compiler.is_compiling() and image.shape[-1] != side:
            raise UserError(f"the images are {image.shape[-1]} pixels wide, the model takes {side}: "
                            f"set --data.image_size {side} or --model.image_size")  # fmt: skip
        x = (image.to(self.mean.dtype) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        result = self.network(x)
        return (result, None) if isinstance(result, Tensor) else (result.logits, result.largest[:, 0])

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        x = self.normalise(inputs["image"])
        logits, largest = self._logits(x)
        probabilities = logits.softmax(-1)
        if self.flip_tta:
            probabilities = (probabilities + self._logits(x.flip(-1))[0].softmax(-1)) / 2
        result = {"logits": logits, "probabilities": probabilities}
        return result if largest is None else {**result, "map": largest}

    def input_names(self) -> list[str]:
        return ["image"]

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        return make_columns(self._columns(), {"probabilities": outputs["probabilities"].float().cpu().numpy()})

    def _columns(self) -> dict[str, Any]:
        return {"kind": "classification", "classes": self.classes}

    def signature(self) -> Signature:
        image = example_images(3, self.image_size, self.image_size)
        names = ["logits", "probabilities", *(["map"] if isinstance(self.network, TransFER) else [])]
        return Signature(
            {"image": image[:2]}, names, checks=[{"image": image[:1]}, {"image": image}], columns=self._columns()
        )

    def deployed(self) -> System:
        """A copy with the batch norms folded into the convolutions before them."""
        network, self.network = self.network, nn.Identity()
        try:
            twin = bundle.clone(self)
        finally:
            self.network = network
        example = self.normalise(self.signature().inputs["image"][:1].to(self.mean.device))
        was = network.training
        twin.network = fold_batch_norms(network.eval(), lambda n: n(example))
        network.train(was)
        return twin.eval()

    # Training and evaluation

    def on_fit_start(self) -> None:
        if self.class_weights == "balanced":
            counts = torch.tensor(self.trainer.datamodule.class_counts(), dtype=torch.float32)  # type: ignore[attr-defined]
            self._loss_weight = (counts.sum() / (len(counts) * counts.clamp(min=1))).to(self.device)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits, _ = self._logits(self.normalise(batch["image"]))
        loss = F.cross_entropy(logits, batch["label"], weight=self._loss_weight, label_smoothing=self.label_smoothing)
        return {"loss": loss}

    def make_metrics(self) -> MetricCollection:
        metrics = super().make_metrics()
        if isinstance(self.network, TransFER):
            side = -(-self.image_size // self.network.extractor.stride)
            metrics.add_metrics({"maps": MeanMaps(len(self.classes), side)})
        return metrics

    def evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Tensor]:
        outputs = self.outputs(image=batch["image"])
        self.measure(metrics, outputs["probabilities"], batch)
        if "map" in outputs:
            metrics["maps"].update(outputs["map"], batch["label"])
        return {"loss": F.cross_entropy(outputs["logits"].float(), batch["label"])}

    def figures(self, stage: str) -> dict[str, Any]:
        pictures = super().figures(stage)
        maps = self.results.get(stage, {}).get("maps")
        if maps is not None:
            pictures["Mean map of each class"] = class_maps_picture(maps, self.classes)
        return pictures

    def explain(self, batch: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
        """The largest local map and the class token's attention over each face."""
        if not isinstance(self.network, TransFER):
            raise UserError("APViT has no local maps to show: explain takes TransFER")
        network = self.network
        with torch.no_grad():
            features = network.extractor(self.normalise(batch["image"]))
            tokens, largest = network.convert(features, network.attention(features))
            attention = network.vit.class_attention(tokens).unflatten(1, features.shape[-2:]).cpu()
            probabilities = self.outputs(image=batch["image"])["probabilities"].cpu()
        described = []
        for i, p in enumerate(probabilities):
            title = f"{self.classes[int(p.argmax())]} {float(p.max()):.2f}"
            image, local = batch["image"][i].cpu(), largest[i, 0].cpu()
            figure = heat_picture(image, {"local maps": local, "class token": attention[i]}, title)
            arrays = {"image": image.numpy(), "map": local.numpy(), "attention": attention[i].numpy()}
            described.append((figure, {**arrays, "probabilities": p.numpy()}))
        return described


def class_maps_picture(maps: Tensor, classes: list[str]) -> Any:
    """Mean maps `[K, h, w]` in a row, on one scale."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(classes), figsize=(1.9 * len(classes), 2.2), squeeze=False,
                                   layout="constrained")  # fmt: skip
    for axis, heat, name in zip(axes[0], maps, classes, strict=True):
        shown = axis.imshow(heat.numpy(), cmap="inferno", vmin=float(maps.min()), vmax=float(maps.max()))
        axis.set_title(name, fontsize="small")
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.7)
    return figure
