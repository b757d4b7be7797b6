"""HaloNet: residual networks whose spatial mixing is blocked local attention with a halo.

Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens, "Scaling Local Self-Attention for Parameter
Efficient Visual Backbones", CVPR 2021 (arXiv 2103.12731), and the family of timm's `byoanet` models, whose
state-dict layout is used here, so that their weights load as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from polyhead.errors import UserError
from vision.common import captured, check_images, init_convolution, pick_variant
from vision.halo_attention import HaloAttention, round_channels
from vision.inference import PackedConv2d

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class ConvNormAct(nn.Module):
    """Convolution without bias, padding k // 2; BatchNorm; activation."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: str | None = None
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(cout)
        self.act = ACTIVATIONS[act](inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def pack(self) -> None:
        """For a deployed copy: one convolution in place of the three."""
        assert isinstance(self.conv, nn.Conv2d) and isinstance(self.bn, nn.BatchNorm2d)
        self.conv = PackedConv2d(fuse_conv_bn_eval(self.conv, self.bn), self.act)
        self.bn = self.act = nn.Identity()


class SqueezeExcite(nn.Module):
    """Channel attention: mean over the map, two 1x1 layers, sigmoid gate."""

    def __init__(self, channels: int, rd_ratio: float = 1 / 16) -> None:
        super().__init__()
        hidden = round_channels(channels * rd_ratio, floor=0.0)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class EfficientChannelAttention(nn.Module):
    """Channel attention: mean over the map, one convolution along the channels, sigmoid gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel = int((math.log2(channels) + 1) / 2)
        kernel = max(kernel + (kernel + 1) % 2, 3)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3))[:, None])[:, 0].sigmoid()
        return x * gate[:, :, None, None]


CHANNEL_ATTENTION: dict[str, type[nn.Module]] = {"se": SqueezeExcite, "eca": EfficientChannelAttention}


class Block(nn.Module):
    """act(shortcut(x) + 1x1(mix(1x1(x)))): the residual frame; a subclass's `mix` mixes the pixels.

    The shortcut is the identity, a strided 1x1 convolution where the shape changes, or there nothing at
    all (`project=False`).
    """

    shortcut: nn.Module | None

    def __init__(
        self, cin: int, cout: int, mid: int, mixed: int, stride: int, act: str,
        project: bool, linear_out: bool, drop_path: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1_1x1 = ConvNormAct(cin, mid, act=act)
        self.conv3_1x1 = ConvNormAct(mixed, cout)
        if cin == cout and stride == 1:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = ConvNormAct(cin, cout, stride=stride) if project else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act = nn.Identity() if linear_out else ACTIVATIONS[act](inplace=True)

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.conv1_1x1(x))
        if isinstance(self.conv3_1x1.conv, PackedConv2d):  # with the sum and the activation in it
            return self.conv3_1x1.conv(mixed, None if self.shortcut is None else self.shortcut(x))
        out = self.drop_path(self.conv3_1x1(mixed))
        return self.act(out if self.shortcut is None else out + self.shortcut(x))


class BottleneckBlock(Block):
    """The pixels are mixed by a 3x3 convolution, then channel attention if there is one."""

    def __init__(
        self, *args: Any, group_size: int, attn: str | None, attn_kwargs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        mid = kwargs["mid"]
        if group_size and mid % group_size:
            raise UserError(f"halonet: {mid} channels cannot be split into groups of {group_size}")
        groups = mid // group_size if group_size else 1
        self.conv2_kxk = ConvNormAct(mid, mid, 3, kwargs["stride"], groups, kwargs["act"])
        self.attn = CHANNEL_ATTENTION[attn](mid, **attn_kwargs) if attn else nn.Identity()

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(self.conv2_kxk(x))


class HaloBlock(Block):
    """The pixels are mixed by halo attention, BatchNorm and activation."""

    def __init__(self, *args: Any, attention: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mid, mixed = kwargs["mid"], kwargs["mixed"]
        self.self_attn = HaloAttention(mid, mixed, stride=kwargs["stride"], **attention)
        self.post_attn = nn.BatchNorm2d(mixed)
        self.post_act = ACTIVATIONS[kwargs["act"]](inplace=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.post_act(self.post_attn(self.self_attn(x)))


class Stem(nn.Sequential):
    """`tiered`: three 3x3 convolutions to 3/8, 1/2 and all of the channels; otherwise one. A pool if any."""

    def __init__(self, kind: str, cin: int, channels: int, pool: bool, act: str) -> None:
        super().__init__()
        if kind == "tiered":
            widths = [cin, 3 * channels // 8, channels // 2, channels]
            for n in range(3):
                stride = 2 if n == 0 or (n == 2 and not pool) else 1
                self.add_module(f"conv{n + 1}", ConvNormAct(widths[n], widths[n + 1], 3, stride, act=act))
        else:
            self.add_module("conv1", ConvNormAct(cin, channels, int(kind[0]), 2, act=act))
        if pool:
            self.add_module("pool", nn.MaxPool2d(3, 2, 1))


class Head(nn.Module):
    """Global average pool, dropout, linear classifier."""

    def __init__(self, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)


class HaloNet(nn.Module):
    """A stem, four stages of bottleneck and halo-attention blocks, a classifier.

    `[B, in_chans, H, W]` normalised RGB, sides of 32 px or more -> logits `[B, num_classes]`.
    Feature maps have strides 2, 4, 8, 16, 32 (`feature_info`). The arguments are timm's vocabulary.

    Args:
        stages: per stage its entries in order: dicts with `type` (bottle, self_attn), `depth`,
            `out_channels`, `stride` (of the stage's first block), `bottle_ratio`, and optionally
            `group_size`, `v_ratio` (values this much wider than keys, H5 to H7) and a `self_attn_kwargs`
            of its own in place of the network's.
        stem_type: tiered, 7x7 or 3x3.  stem_pool: maxpool or "".
        width_factor: multiplies all widths.  num_features: channels of a final 1x1 convolution, 0 for none.
        downsample: conv1x1, or "" for no shortcut where the shape changes.
        attn: channel attention of the bottleneck blocks: se, eca or None.
        block_kwargs: `bottle_in` (the inner width follows the input), `linear_out` (no act after the sum).
        self_attn_kwargs: arguments of `HaloAttention`.
        drop_path_rate: linear over the blocks from 0 to this.

    Raises:
        UserError: sides or channels that the network cannot take.
    """

    dynamic_size = True

    def __init__(
        self,
        stages: Sequence[Sequence[Mapping[str, Any]]],
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_type: str = "tiered",
        stem_pool: str = "maxpool",
        stem_chs: int = 64,
        width_factor: float = 1.0,
        num_features: int | None = 0,
        act: str = "relu",
        downsample: str = "conv1x1",
        attn: str | None = None,
        attn_kwargs: Mapping[str, Any] | None = None,
        block_kwargs: Mapping[str, Any] | None = None,
        self_attn_kwargs: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        options = {"stem_type": (stem_type, ("tiered", "7x7", "3x3")), "act": (act, tuple(ACTIVATIONS)),
                   "attn": (attn, (None, *CHANNEL_ATTENTION)), "stem_pool": (stem_pool, ("maxpool", "")),
                   "downsample": (downsample, ("conv1x1", ""))}  # fmt: skip
        for option, (value, allowed) in options.items():
            if value not in allowed:
                raise UserError(f"halonet: {option}={value!r} is unknown, choose one of {allowed}")
        self.num_classes, self.in_chans = num_classes, in_chans
        block_options = {"bottle_in": False, "linear_out": False} | dict(block_kwargs or {})
        width = int(round(stem_chs * width_factor))
        stem = Stem(stem_type, in_chans, width, bool(stem_pool), act)
        # a stem of one convolution alone has no inner name in the published layout
        self.stem: nn.Module = stem[0] if len(stem) == 1 else stem
        half = width // 2 if stem_type == "tiered" and not stem_pool else width
        stride = 4 if stem_pool or stem_type == "tiered" else 2
        self.feature_info = [{"num_chs": half, "reduction": 2, "module": "stem"}]

        count = sum(entry["depth"] for entries in stages for entry in entries)
        rates = [drop_path_rate * n / max(count - 1, 1) for n in range(count)]
        groups: list[nn.Module] = []
        for number, entries in enumerate(stages):
            blocks: list[nn.Module] = []
            for entry in (e for e in entries for _ in range(e["depth"])):
                step = entry["stride"] if not blocks else 1
                out = round_channels(entry["out_channels"] * width_factor)
                inner = width if block_options["bottle_in"] else out
                mid = round_channels(inner * entry["bottle_ratio"])
                mixed = int(round(mid * entry.get("v_ratio", 1)))
                common: dict[str, Any] = dict(
                    cin=width, cout=out, mid=mid, mixed=mixed, stride=step, act=act, drop_path=rates.pop(0),
                    project=downsample != "", linear_out=block_options["linear_out"],
                )  # fmt: skip
                own = entry.get("self_attn_kwargs")
                attention = (self_attn_kwargs or {}) if own is None else own
                gate = dict(group_size=entry.get("group_size", 0), attn=attn, attn_kwargs=attn_kwargs or {})
                if entry["type"] == "self_attn":
                    blocks.append(HaloBlock(attention=attention, **common))
                else:
                    blocks.append(BottleneckBlock(**gate, **common))
                width, stride = out, stride * step
            groups.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": stride, "module": f"stages.{number}"})
        self.stages = nn.Sequential(*groups)
        self.num_features = int(round(num_features * width_factor)) if num_features else width
        self.final_conv = ConvNormAct(width, self.num_features, act=act) if num_features else nn.Identity()
        if num_features:
            self.feature_info[-1] |= {"num_chs": self.num_features, "module": "final_conv"}
        self.head = Head(self.num_features, num_classes, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block) and module.shortcut is not None:
                nn.init.zeros_(module.conv3_1x1.bn.weight)  # type: ignore[arg-type]
            if isinstance(module, HaloAttention):
                module.init_weights()

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The maps of `feature_info`, `[B, C_i, ceil(H/s), ceil(W/s)]`, the last one after `final_conv`."""
        check_images(x, self.in_chans, 32, "HaloNet")
        maps, pooled = [], x
        for layer in self.stem if isinstance(self.stem, Stem) else [self.stem]:
            half, pooled = pooled, layer(pooled)
        # the stride-2 map: before the layer that halves it again, if there is one
        maps.append(half if isinstance(self.stem, Stem) else pooled)
        x = pooled
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        maps[-1] = self.final_conv(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` -> `[B, num_features, ceil(H/32), ceil(W/32)]`."""
        check_images(x, self.in_chans, 32, "HaloNet")
        return self.final_conv(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits `[B, num_classes]`, or the pooled `[B, num_features]`."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(fc, nn.Linear):
            nn.init.normal_(fc.weight, std=0.01)
            nn.init.zeros_(fc.bias)
        self.head.fc = fc.to(next(self.parameters()).device)

    def no_weight_decay(self) -> set[str]:
        """Biases, norms and the position tables."""
        return {n for n, p in self.named_parameters() if p.ndim <= 1 or n.endswith("_rel")}

    @torch.no_grad()
    def attention_maps(self, x: Tensor) -> dict[str, Tensor]:
        """Per attention layer, by its name, the attention each of its pixels receives: `[B, h, w]`."""
        return captured(self, x, HaloAttention, lambda layer, x: layer.received(x))

    def to_deploy(self) -> HaloNet:
        """A copy for inference and export, in eval mode: BatchNorm, activations and sums folded into the
        convolutions, their weights packed, channels_last."""
        model = copy.deepcopy(self).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, Block):
                module.conv3_1x1.act, module.act = module.act, nn.Identity()
        for module in model.modules():
            if isinstance(module, ConvNormAct | HaloAttention):
                module.pack()
        return model.to(memory_format=torch.channels_last)


def stage(
    letters: str, out: int, stride: int, ratio: float = 0.25, group_size: int = 0, **attention: Any
) -> list[dict[str, Any]]:
    """ "BBS" -> the entries of two bottleneck blocks and a self-attention block."""
    common = dict(depth=1, out_channels=out, stride=stride, bottle_ratio=ratio)
    kinds = {"B": dict(type="bottle", group_size=group_size), "S": dict(type="self_attn", **attention)}
    return [common | kinds[letter] for letter in letters]


def paper(b: int, h: int, rv: float, rb: float, l3: int, final: int = 0) -> dict[str, Any]:
    """A row of the paper's table of H0 to H7. Heads 4, 8, 8, 8; queries and keys keep the base width."""
    stages = []
    for g, depth in enumerate((3, 3, l3, 3)):
        base = 64 * 2**g
        own = dict(block_size=b, halo_size=h, num_heads=4 if g == 0 else 8, qk_ratio=1 / rv)
        stages.append(stage("S" * depth, int(base * rb), 1 + (g > 0), 1 / rb, v_ratio=rv, self_attn_kwargs=own))
    return dict(stages=stages, stem_type="7x7", num_features=final)


VARIANTS: dict[str, dict[str, Any]] = {
    # the paper's table; its H1 has 4 heads in the first stage, timm's halonet_h1 has 8 in all of them
    "halonet_h0": paper(8, 3, 1, 0.5, 7),
    "halonet_h1_paper": paper(8, 3, 1, 1, 10),
    "halonet_h2": paper(8, 3, 1, 1.25, 11),
    "halonet_h3": paper(10, 3, 1, 1.5, 12, 1024),
    "halonet_h4": paper(12, 2, 1, 3, 12, 1280),
    "halonet_h5": paper(14, 2, 2.5, 2, 23, 1536),
    "halonet_h6": paper(8, 4, 3, 2.75, 24, 1536),
    "halonet_h7": paper(10, 3, 4, 3.5, 26, 2048),
    # timm's family
    "halonet_h1": dict(
        stages=[stage("S" * d, c, s, 1) for d, c, s in ((3, 64, 1), (3, 128, 2), (10, 256, 2), (3, 512, 2))],
        stem_type="7x7", self_attn_kwargs=dict(block_size=8, halo_size=3),
    ),
    "halonet26t": dict(
        stages=[stage("BB", 256, 1), stage("BB", 512, 2), stage("BS", 1024, 2), stage("SS", 2048, 2)],
        self_attn_kwargs=dict(block_size=8, halo_size=2),
    ),
    "sehalonet33ts": dict(
        stages=[
            stage("BB", 256, 1),
            stage("BBS", 512, 2),
            stage("BBS", 1024, 2),
            stage("SS", 1536, 2, 0.333),
        ],
        stem_pool="", act="silu", num_features=1280, attn="se",
        self_attn_kwargs=dict(block_size=8, halo_size=3),
    ),
    "halonet50ts": dict(
        stages=[
            stage("BBB", 256, 1),
            stage("BBBS", 512, 2, self_attn_kwargs=dict(block_size=8, halo_size=3, num_heads=4)),
            stage("BSBSBS", 1024, 2),
            stage("BSB", 2048, 2),
        ],
        act="silu", self_attn_kwargs=dict(block_size=8, halo_size=3),
    ),
    "eca_halonext26ts": dict(
        stages=[
            stage("BB", 256, 1, group_size=16),
            stage("BB", 512, 2, group_size=16),
            stage("BS", 1024, 2, group_size=16),
            stage("SS", 2048, 2),
        ],
        act="silu", attn="eca", self_attn_kwargs=dict(block_size=8, halo_size=2, dim_head=16),
    ),
    "haloregnetz_b": dict(
        stages=[
            stage("BB", 48, 2, 3, 16),
            stage("BBBBBB", 96, 2, 3, 16),
            stage("BBBS" * 3, 192, 2, ratio=3, group_size=16),
            stage("SS", 288, 2, 3),
        ],
        stem_type="3x3", stem_pool="", stem_chs=32, num_features=1536, act="silu", downsample="",
        attn="se", attn_kwargs=dict(rd_ratio=0.25), block_kwargs=dict(bottle_in=True, linear_out=True),
        self_attn_kwargs=dict(block_size=7, halo_size=2, qk_ratio=0.33),
    ),
    # presets of ours for training from scratch on small photographs (128 px)
    "halonet_xs": dict(
        stages=[stage("B", 64, 1), stage("B", 128, 2), stage("BS", 256, 2), stage("S", 512, 2)],
        stem_chs=32, act="silu", self_attn_kwargs=dict(block_size=4, halo_size=2, num_heads=4),
    ),
    "halonet_small": dict(
        stages=[stage("BB", 64, 1), stage("BB", 128, 2), stage("BSBS", 256, 2), stage("SS", 512, 2)],
        stem_chs=32, act="silu", self_attn_kwargs=dict(block_size=4, halo_size=2, num_heads=4),
    ),
}  # fmt: skip


def halonet(name: str, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> HaloNet:
    """The variant of that name; `overrides` replace arguments of `HaloNet`.

    Raises:
        UserError: no such variant.
    """
    options = pick_variant(name, VARIANTS, "HaloNet") | overrides
    return HaloNet(**options, num_classes=num_classes, in_chans=in_chans)
