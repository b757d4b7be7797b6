"""MEDUSA: one encoder-decoder attention body for all scales of a classifier (Aboutalebi et al. 2021).

arXiv 2110.06063, Frontiers in Medicine 8:821120. No code was ever published: the abstract fixes the idea (a
single body, run once an image, whose map a light head at every scale turns into a gate); widths, layers, the
resize and the initial values here are our reading, fitted to the size of the release (29.2 M parameters,
29.1 GMAC). It is not the released network, and its weights cannot be loaded.

Shapes: B images, C channels, F_j the backbone's map after stage j `[B, C_j, H_j, W_j]`, q the body's map
`[B, c_g, Hg, Wg]`, A_j the gate `[B, 1 or C_j, H_j, W_j]` in (0, 1).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medical.variants import PRESETS
from polyhead.encoders import check_name, create_encoder
from polyhead.errors import UserError, nearest

Attention = Literal["full", "isolated", "global", "none"]
Gate = Literal["mul", "residual"]

SMALLEST = 32


class Output(NamedTuple):
    """What the network gives.

    Attributes:
        logits: `[B, K]`.
        global_map: q `[B, c_g, Hg, Wg]` before any sigmoid, or None without a body.
        gates: A_j of each attended stage, in order.
    """

    logits: Tensor
    global_map: Tensor | None
    gates: list[Tensor]


# Resizing that keeps the mean and commutes with flips


@lru_cache(maxsize=256)
def _overlaps(n: int, m: int) -> Tensor:
    """Area pooling of n pixels to m < n as a matrix `[m, n]`, with overlaps counted in whole numbers."""
    rows = [[max(0, min((s + 1) * m, (i + 1) * n) - max(s * m, i * n)) for s in range(n)] for i in range(m)]
    # Kept for every later call, in training too
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.float64).div(n).float()


def area_matrix(n: int, m: int) -> Tensor:
    """The matrix `[m, n]` that pools n pixels into m by exact areas: its rows sum to 1, its columns to m / n."""
    return _overlaps(n, m)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, C, H, W]` to `[B, C, *size]`: an axis that shrinks is area-pooled, one that grows is interpolated."""
    height, width = int(x.shape[-2]), int(x.shape[-1])
    if size[1] < width:
        x = x @ area_matrix(width, size[1]).to(x).T
    if size[0] < height:
        x = area_matrix(height, size[0]).to(x) @ x
    if size[0] > height or size[1] > width:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    return x


# The body and the heads


def convolution(inner: int, outer: int, kernel: int, bias: bool = False) -> nn.Conv2d:
    layer = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Sequential):
    """(conv 3x3, batch norm, ReLU) twice."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(
            convolution(inner, outer, 3), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
            convolution(outer, outer, 3), nn.BatchNorm2d(outer), nn.ReLU(inplace=True),
        )  # fmt: skip


class Body(nn.Module):
    """The encoder-decoder, a five-level U-Net: grey view `[B, 1, Hg, Wg]` -> q `[B, out, Hg, Wg]`.

    Args:
        base: width of the first level; each further one has twice as many channels.
        out: c_g, maps in q.

    Raises:
        UserError: a view below 32 pixels.
    """

    def __init__(self, base: int = 24, out: int = 1) -> None:
        super().__init__()
        widths = [base * 2**i for i in range(5)]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.encoder = nn.ModuleList([Block(1, base), *(Block(a, b) for a, b in pairs)])
        self.decoder = nn.ModuleList([Block(a + b, a) for a, b in reversed(pairs)])
        self.output = convolution(base, out, 1, bias=True)

    def forward(self, g: Tensor) -> Tensor:
        height, width = int(g.shape[-2]), int(g.shape[-1])
        if min(height, width) < SMALLEST:
            raise UserError(f"MEDUSA's global view is {width} x {height}: {SMALLEST} x {SMALLEST} pixels are needed")
        down, right = -height % 16, -width % 16
        x = F.pad(g, (0, right, 0, down), mode="reflect") if down or right else g
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([skips.pop(), x], 1))
        return self.output(x)[..., :height, :width]


class Head(nn.Module):
    """L_j, from a stage's map and the global map (None for isolated attention) to gate logits.

    `[B, C_j, H_j, W_j]` and `[B, c_g, H_j, W_j]` -> `[B, out, H_j, W_j]`.
    """

    def __init__(self, channels: int, global_channels: int, width: int, out: int, bias: float) -> None:
        super().__init__()
        self.reduce = nn.Sequential(convolution(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.mix = nn.Sequential(
            convolution(width + global_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.gate = nn.Conv2d(width, out, 1)
        # Gates start almost open; with exact zeros no gradient would reach the body in the first step
        nn.init.normal_(self.gate.weight, std=0.01)
        nn.init.constant_(self.gate.bias, bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, q: Tensor | None) -> Tensor:
        x = self.reduce(features)
        if q is not None:
            x = torch.cat([x, q], 1)
        return self.gate(self.mix(x))


# The backbone, stage by stage


class Step(NamedTuple):
    """One module of a backbone, and the stage (from 1) that ends with it, if one does."""

    name: str
    stage: int | None


def stage_backbone(
    name: str, image_size: int, pretrained: bool, options: dict[str, Any]
) -> tuple[nn.Module, list[Step], list[int], bool]:
    """A backbone whose modules can be run one after the other.

    Returns:
        The network, its steps, the channels of its stages, and whether its maps are `[B, H, W, C]`.

    Raises:
        UserError: a network whose stages cannot be replayed.
    """
    check_name(name)
    import timm
    from timm.models._features import FeatureListNet

    entry = "tf_efficientnet_lite0" if name.startswith("encoder:") else name.split(".")[0]
    source = timm.models.model_entrypoint(entry).__module__
    if source.endswith(".efficientnet"):
        # timm's own feature extractor of this family cannot be cut between stages; the plain model can
        plain: Any = create_encoder(name, 0, pretrained=pretrained, **options)
        ends = {i["module"]: (i["num_chs"], i["reduction"]) for i in plain.feature_info}
        names = ["conv_stem", "bn1", *(f"blocks.{i}" for i in range(len(plain.blocks))), "conv_head", "bn2"]
        nhwc = False
        network: nn.Module = plain
    else:
        if ".swin" in source:
            options = {"img_size": image_size, **options}
        network = create_encoder(name, 0, pretrained=pretrained, features_only=True, **options)
        if not isinstance(network, FeatureListNet):
            near = "resnet, convnext, regnet, swin and efficientnet are among those that can"
            raise UserError(f"the stages of {name} cannot be run one by one, which MEDUSA needs: {near}")
        info: Any = network.feature_info
        pairs = zip(info.channels(), info.reduction(), strict=True)
        ends = dict(zip(network.return_layers, pairs, strict=True))
        names = list(network.keys())
        nhwc = str(getattr(network, "output_fmt", "")).endswith("NHWC")
    stages = [n for n in names if n in ends and ends[n][1] >= 4]
    steps = [Step(n, stages.index(n) + 1 if n in stages else None) for n in names]
    return network, steps, [ends[n][0] for n in stages], nhwc


class MEDUSA(nn.Module):
    """The whole network: classifier view `[B, 3, H, W]` and global view `[B, 1, Hg, Wg]` -> `Output`.

    Args:
        num_classes: K.
        backbone: a timm name or `encoder:efficientnet_lite0`.
        pretrained: start the backbone from its published weights.
        image_size: side of the classifier view that the backbone is built for (only swin depends on it).
        base: width of the body.
        global_channels: c_g.
        head_width: r, inner width of the heads.
        attention: `full`; `isolated` (heads without a body), `global` (one gate, sigmoid(q), without heads) and
            `none` (the plain backbone) are the ablations.
        attention_stages: which stages are gated, from 1; None is all.
        channel_attention: a gate for every channel in place of one for all.
        gate: `mul` is F A, `residual` F (1 + A).
        dropout: before the classifier.
        backbone_options: further arguments of the backbone.

    Raises:
        UserError: a backbone that cannot be cut into stages, stages that it has not, options that exclude
            each other.
    """

    def __init__(
        self,
        num_classes: int = 2,
        backbone: str = "resnet50",
        pretrained: bool = False,
        image_size: int = 224,
        base: int = 24,
        global_channels: int = 1,
        head_width: int = 32,
        attention: Attention = "full",
        attention_stages: tuple[int, ...] | list[int] | None = None,
        channel_attention: bool = False,
        gate: Gate = "mul",
        dropout: float = 0.0,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for option, width in {"base": base, "global_channels": global_channels, "head_width": head_width}.items():
            if width < 1:
                raise UserError(f"MEDUSA: {option} is {width}: at least 1 is needed")
        options = dict(backbone_options or {})
        self.backbone, self.steps, channels, self.nhwc = stage_backbone(backbone, image_size, pretrained, options)
        everything = tuple(range(1, len(channels) + 1))
        stages = everything if attention_stages is None else tuple(sorted(set(attention_stages)))
        if attention != "none" and (not stages or not set(stages) <= set(everything)):
            raise UserError(f"attention_stages is {list(stages)}: {backbone} has the stages 1 to {len(channels)}")
        if attention == "global" and (channel_attention or global_channels != 1):
            raise UserError("attention `global` has one gate for all channels: no channel_attention, global_channels 1")
        self.stages = stages if attention != "none" else ()
        self.attention, self.residual = attention, gate == "residual"
        start = -2.0 if self.residual else 2.0
        self.body = Body(base, global_channels) if attention in ("full", "global") else None
        self.heads = nn.ModuleDict()
        if attention in ("full", "isolated"):
            seen = global_channels if self.body is not None else 0
            for j in self.stages:
                out = channels[j - 1] if channel_attention else 1
                self.heads[str(j)] = Head(channels[j - 1], seen, head_width, out, start)
        elif self.body is not None:
            nn.init.constant_(self.body.output.bias, start)  # type: ignore[arg-type]
        self.num_features = _last_width(self.backbone, self.steps, channels)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(self.num_features, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def _gate(self, stage: int, features: Tensor, q: Tensor | None, gates: list[Tensor]) -> Tensor:
        if stage not in self.stages:
            return features
        x = features.permute(0, 3, 1, 2) if self.nhwc else features
        own = None if q is None else resize(q, (int(x.shape[-2]), int(x.shape[-1])))
        if self.heads:
            logits = self.heads[str(stage)](x, own)
        else:
            assert own is not None
            logits = own
        gate = logits.sigmoid()
        gates.append(gate)
        factor = 1 + gate if self.residual else gate
        return features * (factor.permute(0, 2, 3, 1) if self.nhwc else factor)

    def forward_features(self, x: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The last map `[B, C, h, w]`, q and the gates."""
        q = self.body(g) if self.body is not None else None
        gates: list[Tensor] = []
        for name, stage in self.steps:
            x = self.backbone.get_submodule(name)(x)
            if stage is not None:
                x = self._gate(stage, x, q, gates)
        return x.permute(0, 3, 1, 2) if self.nhwc else x, q, gates

    def forward_head(self, features: Tensor) -> Tensor:
        return self.fc(self.drop(features.mean((-2, -1))))

    def forward(self, x: Tensor, g: Tensor | None = None) -> Output:
        features, q, gates = self.forward_features(x, g)
        return Output(self.forward_head(features), q, gates)


def _last_width(backbone: Any, steps: list[Step], channels: list[int]) -> int:
    return channels[-1] if steps[-1].stage is not None else int(backbone.num_features)


# The two views


def global_view(image: Tensor, size: int) -> Tensor:
    """RGB `[B, 3, H, W]` in 0..1 to the body's grey view `[B, 1, size, size]`, each image standardised.

    A constant image becomes zeros: a deviation counts as a quarter of a grey level at least. Values end at 10
    standard deviations, so that half precision holds them.
    """
    weights = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = resize((image * weights).sum(1, keepdim=True), (size, size))
    mean = grey.mean((-2, -1), keepdim=True)
    deviation = (grey - mean).square().mean((-2, -1), keepdim=True).sqrt()
    return ((grey - mean) / deviation.clamp(min=1e-3)).clamp(-10, 10)


def preset(name: str) -> dict[str, Any]:
    """Arguments of a named variant: `backbone`, `image_size`, `global_size`, `base`. Raises UserError."""
    if name not in PRESETS:
        near = nearest(name, PRESETS) or list(PRESETS)
        raise UserError(f"unknown MEDUSA variant {name!r}", [f"there are {', '.join(near)}"])
    return dict(PRESETS[name])
