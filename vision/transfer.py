"""TransFER: facial expressions by local maps, some of which are dropped, and a transformer (Xue et al., ICCV 2021).

arXiv 2108.11116; the released code is the authors' later repository APViT, whose PaddlePaddle half holds TransFER.
A trunk makes a map of features; local CNNs (LANets) weigh its pixels, one map of weights each; in training one
map of a sample is dropped (MAD), so that all must find something; the maximum of the maps weighs the features,
which become tokens of a transformer encoder, in whose attention a head of a sample is dropped (MSAD). State-dict
keys are the released ones in PyTorch's spelling. APViT (arXiv 2212.05463), which pools tokens instead, is here too.

Shapes: B images, C channels, K local maps, h x w the trunk's map, N = h w tokens, D width, H heads.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyhead.encoders import create_encoder
from polyhead.errors import UserError, nearest
from vision.irse import FAMILIES, WIDTHS, IRTrunk

DropMode = Literal["head", "token"]
EPS = 1e-6


class Output(NamedTuple):
    """What TransFER gives.

    Attributes:
        logits: `[B, classes]`.
        maps: `[B, K, h, w]` in (0, 1), before any is dropped.
        largest: `[B, 1, h, w]`, their maximum, after the drop.
        feature: `[B, D]`, the class token.
    """

    logits: Tensor
    maps: Tensor
    largest: Tensor
    feature: Tensor


# Dropping


def draw_drop(samples: int, choices: int, probability: float, device: torch.device | None = None) -> Tensor:
    """For each sample an index to drop with the given probability, else -1; `[samples]`, from torch's generator."""
    chosen = torch.randint(choices, (samples,), device=device)
    return torch.where(torch.rand(samples, device=device) < probability, chosen, -1)


def kept(drop: Tensor, choices: int) -> Tensor:
    """Indices to drop `[B]` (-1 is none) as a mask `[B, choices]`, 0 where dropped."""
    return (drop[:, None] != torch.arange(choices, device=drop.device)).float()


class LANet(nn.Module):
    """One local CNN, `[B, C, h, w]` -> weights `[B, 1, h, w]` in (0, 1)."""

    def __init__(self, channels: int, ratio: int = 16) -> None:
        super().__init__()
        self.LA_conv1 = nn.Conv2d(channels, channels // ratio, 1)
        self.bn1 = nn.BatchNorm2d(channels // ratio)
        self.LA_conv2 = nn.Conv2d(channels // ratio, 1, 1)
        self.bn2 = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.LA_conv2(self.bn1(self.LA_conv1(x)).relu())).sigmoid()


class LocalCNNs(nn.Module):
    """K local CNNs, `[B, C, h, w]` -> `[B, K, h, w]`."""

    def __init__(self, channels: int, count: int = 2, ratio: int = 16) -> None:
        super().__init__()
        self.las = nn.ModuleList([LANet(channels, ratio) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.las], 1)


class MapTokens(nn.Module):
    """MAD, the maximum of the maps, and the projection of the weighted features to tokens `[B, N, D]`.

    Args:
        channels, width: C and D.
        probability: of dropping one of a sample's maps in training (0.6 as published).
        after: weigh after the projection, its bias too, as the PyTorch half of the released code does. The
            published numbers are those of weighing before.
    """

    def __init__(self, channels: int, width: int, probability: float = 0.6, after: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 1)
        self.probability, self.after = probability, after

    def forward(self, x: Tensor, maps: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and the maximum `[B, 1, h, w]`. `drop [B]`: which map to drop; drawn in training when None."""
        if drop is None and self.training and self.probability > 0:
            drop = draw_drop(len(x), maps.shape[1], self.probability, x.device)
        if drop is not None:
            maps = maps * kept(drop, maps.shape[1])[..., None, None].to(maps.dtype)
        largest = maps.amax(1, keepdim=True)
        weighed = self.proj(x) * largest if self.after else self.proj(x * largest)
        return weighed.flatten(2).transpose(1, 2), largest


# The encoder


class Attention(nn.Module):
    """Multi-head self-attention with MSAD, `[B, N, D]` -> `[B, N, D]`.

    Args:
        width, heads: D and H.
        qkv_bias: published without.
        probability: of dropping in training (0.3 as published).
        mode: `head` drops one head's output, as the paper says; `token` wipes q, k and v of one of the first H
            tokens, as the released code does.
    """

    def __init__(
        self, width: int, heads: int, qkv_bias: bool = False, probability: float = 0.3, mode: DropMode = "head"
    ) -> None:
        super().__init__()
        self.heads, self.probability, self.mode = heads, probability, mode
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        """`[B, N, 3 D]` -> `[3, B, H, N, D / H]`."""
        return x.unflatten(-1, (-1, self.heads, self.proj.in_features // self.heads)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """`drop [B]`: the head or token to drop, -1 for none; drawn in training when None."""
        if drop is None and self.training and self.probability > 0:
            drop = draw_drop(len(x), self.heads, self.probability, x.device)
        qkv = self.qkv(x)
        if drop is not None and self.mode == "token":
            qkv = qkv * kept(drop, x.shape[1])[..., None].to(qkv.dtype)
        q, k, v = self._split(qkv)
        mixed = F.scaled_dot_product_attention(q, k, v)
        if drop is not None and self.mode == "head":
            mixed = mixed * kept(drop, self.heads)[..., None, None].to(mixed.dtype)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def first(self, x: Tensor) -> Tensor:
        """The output of the first token alone, `[B, 1, D]`: all that the last block is asked for."""
        width = x.shape[-1]
        q = F.linear(x[:, :1], self.qkv.weight[:width], None if self.qkv.bias is None else self.qkv.bias[:width])
        kv = F.linear(x, self.qkv.weight[width:], None if self.qkv.bias is None else self.qkv.bias[width:])
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.heads, width // self.heads)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def class_scores(self, x: Tensor) -> Tensor:
        """Scores of the first token's query with all keys before softmax, `[B, H, N]`."""
        q, k, _ = self._split(self.qkv(x))
        return (q[:, :, :1] @ k.transpose(-1, -2))[:, :, 0] / math.sqrt(q.shape[-1])


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), x + mlp(norm(x)); APViT keeps a share of the patch tokens in between."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 3.0, **attention: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, **attention)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, drop: Tensor | None = None, keep: float = 1.0) -> Tensor:
        seen = self.norm1(x)
        x = x + self.attn(seen, drop)
        if keep < 1:
            count = x.shape[1] - 1
            best = self.attn.class_scores(seen).sum(1)[:, 1:].topk(max(int(keep * count), 1)).indices
            x = torch.cat([x[:, :1], take(x[:, 1:], best.sort(-1).values)], 1)
        return x + self.mlp(self.norm2(x))

    def first(self, x: Tensor) -> Tensor:
        """The first token's output alone, `[B, 1, D]`."""
        x = x[:, :1] + self.attn.first(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, n]` of `[B, N, D]`, `[B, n, D]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Encoder(nn.Module):
    """A class token and tokens `[B, N, D]` -> class features `[B, D]`.

    Args:
        width, depth, heads, mlp_ratio: D, blocks, H, and the MLP's inner width over D.
        grid: side of the map that tokens come from.
        attention: see `Attention`.
    """

    def __init__(self, width: int, depth: int, heads: int, grid: int, mlp_ratio: float = 3.0, **attention: Any) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"TransFER's width {width} is no multiple of its {heads} heads")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        self.blocks = nn.ModuleList([Block(width, heads, mlp_ratio, **attention) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=EPS)
        draw_encoder(self, self.cls_token, self.pos_embed)

    def embed(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] + 1 != self.pos_embed.shape[1]:
            found, side = tokens.shape[1], math.isqrt(self.pos_embed.shape[1] - 1)
            raise UserError(f"TransFER was built for a map of {side} x {side}, this one has {found} pixels")
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.pos_embed

    def forward(self, tokens: Tensor) -> Tensor:
        x, last = self._before_last(tokens)
        # In training the last block drops too, which the shortcut leaves out
        return self.norm(last(x) if self.training else last.first(x))[:, 0]

    def _before_last(self, tokens: Tensor) -> tuple[Tensor, Any]:
        x = self.embed(tokens)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return x, last

    def class_attention(self, tokens: Tensor) -> Tensor:
        """Attention of the class token to the N tokens in the last block, mean over heads, `[B, N]`."""
        x, last = self._before_last(tokens)
        return last.attn.class_scores(last.norm1(x)).softmax(-1).mean(1)[:, 1:]


def draw_encoder(encoder: nn.Module, *tokens: nn.Parameter) -> None:
    """Initial values as released: truncated normal 0.02 for linear weights and learned tokens."""
    for token in tokens:
        nn.init.trunc_normal_(token, std=0.02)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Head(nn.Module):
    """A linear layer that starts at zero."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class EncoderTrunk(nn.Module):
    """A timm network's map of a stride in place of the IR trunk, `[B, 3, H, W]` -> `[B, C, H / stride, W / stride]`."""

    def __init__(self, name: str, stride: int, pretrained: bool) -> None:
        super().__init__()
        at = {8: 2, 16: 3, 32: 4}.get(stride)
        if at is None:
            raise UserError(f"a trunk's stride is 8, 16 or 32, not {stride}")
        network: Any = create_encoder(name, 0, pretrained=pretrained, features_only=True, out_indices=(at,))
        if network.feature_info.reduction() != [stride]:
            raise UserError(f"{name} has no map of stride {stride} where TransFER looks for it")
        last = network.feature_info.module_name()[-1]
        if last.startswith("blocks."):
            # timm runs this family to its end whatever map is asked for
            network.blocks = nn.Sequential(*list(network.blocks)[: int(last.split(".")[1]) + 1])
        self.network, self.stride = network, stride
        self.channels: int = network.feature_info.channels()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


def make_trunk(name: str, units: Any, widths: Any, squeeze: bool, stride: int, pretrained: bool) -> Any:
    if units is not None or name in FAMILIES:
        return IRTrunk(units or FAMILIES[name], widths or WIDTHS, squeeze)
    return EncoderTrunk(name, stride, pretrained)


class TransFER(nn.Module):
    """The whole network, aligned faces `[B, 3, S, S]` -> `Output`.

    Args:
        num_classes: expressions.
        trunk: `ir44` (the published trunk: IR-50 without its last stage), another of `vision.irse.FAMILIES`, a
            timm name or `encoder:efficientnet_lite0`.
        units, widths, squeeze: an IR trunk of other sizes.
        stride: of the map that is taken from a timm network.
        pretrained: load a timm network's published weights.
        image_size: S.
        branches, ratio: local CNNs and their reduction.
        width, depth, heads, mlp_ratio, qkv_bias: of the encoder.
        mad: probability of dropping a map.
        msad: probability of dropping in attention.
        drop_mode: see `Attention`.
        mask_after_projection: see `MapTokens`.

    Raises:
        UserError: sizes that do not fit.
    """

    def __init__(
        self, num_classes: int = 7, trunk: str = "ir44", units: tuple[int, ...] | list[int] | None = None,
        widths: tuple[int, ...] | list[int] | None = None, squeeze: bool = False, stride: int = 16,
        pretrained: bool = False, image_size: int = 112, branches: int = 2, ratio: int = 16, width: int = 768,
        depth: int = 8, heads: int = 8, mlp_ratio: float = 3.0, qkv_bias: bool = False, mad: float = 0.6,
        msad: float = 0.3, drop_mode: DropMode = "head", mask_after_projection: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in {"mad": mad, "msad": msad}.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value:g}: a probability from 0 to 1 is needed")
        if branches < 1:
            raise UserError(f"TransFER needs one local CNN or more, not {branches}")
        self.extractor = make_trunk(trunk, units, widths, squeeze, stride, pretrained)
        self.image_size, grid = image_size, -(-image_size // self.extractor.stride)
        channels = self.extractor.channels
        self.attention = LocalCNNs(channels, branches, ratio)
        self.convert = MapTokens(channels, width, mad, mask_after_projection)
        self.vit = Encoder(width, depth, heads, grid, mlp_ratio, qkv_bias=qkv_bias, probability=msad, mode=drop_mode)
        self.head = Head(width, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        return {"vit.cls_token", "vit.pos_embed"}

    def forward(self, x: Tensor) -> Output:
        features = self.extractor(x)
        maps = self.attention(features)
        tokens, largest = self.convert(features, maps)
        feature = self.vit(tokens)
        return Output(self.head(feature), maps, largest, feature)

    def resize_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose position embeddings are of another grid, with them interpolated to this one."""
        key = "vit.pos_embed"
        if key in state and state[key].shape != self.vit.pos_embed.shape and state[key].ndim == 3:
            state = {**state, key: resize_positions(state[key], self.vit.pos_embed.shape[1] - 1)}
        return state


def resize_positions(table: Tensor, tokens: int) -> Tensor:
    """Position embeddings `[1, 1 + n, D]` of a square map for another one of `tokens` pixels, bilinear."""
    side, wanted = math.isqrt(table.shape[1] - 1), math.isqrt(tokens)
    if side * side != table.shape[1] - 1 or wanted * wanted != tokens:
        raise UserError("only position embeddings of square maps can be resized")
    grid = table[:, 1:].transpose(1, 2).unflatten(-1, (side, side))
    grid = F.interpolate(grid, (wanted, wanted), mode="bilinear", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)


class APViT(nn.Module):
    """The sibling with attentive pooling of tokens, aligned faces `[B, 3, S, S]` -> logits `[B, classes]`.

    Args:
        num_classes, units, widths, squeeze, image_size, width, depth, heads, mlp_ratio, qkv_bias: see `TransFER`.
        keep_num: tokens with the largest sum of magnitudes that enter the encoder.
        keep_rates: the share of patch tokens that every block keeps, by the class token's scores.
    """

    def __init__(
        self, num_classes: int = 7, units: tuple[int, ...] | list[int] = (3, 4, 14),
        widths: tuple[int, ...] | list[int] = WIDTHS, squeeze: bool = False, image_size: int = 112,
        width: int = 768, depth: int = 8, heads: int = 8, mlp_ratio: float = 3.0, qkv_bias: bool = False,
        keep_num: int = 160,
        keep_rates: tuple[float, ...] | list[float] = (1.0, 1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.9),
    ) -> None:  # fmt: skip
        super().__init__()
        if len(keep_rates) != depth:
            raise UserError(f"APViT has {depth} blocks and {len(keep_rates)} keep_rates")
        self.extractor = IRTrunk(units, widths, squeeze)
        tokens = (-(-image_size // self.extractor.stride)) ** 2
        if not 0 < keep_num <= tokens:
            raise UserError(f"APViT's keep_num is {keep_num}: 1 to {tokens} tokens are there")
        self.image_size, self.keep_num, self.keep_rates = image_size, keep_num, tuple(keep_rates)
        self.proj = nn.Conv2d(self.extractor.channels, width, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_pos_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(
            [Block(width, heads, mlp_ratio, qkv_bias=qkv_bias, probability=0.0) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = Head(width, num_classes)
        draw_encoder(self.blocks, self.cls_token, self.cls_pos_embed, self.patch_pos_embed)

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "cls_pos_embed", "patch_pos_embed"}

    def embed(self, x: Tensor) -> Tensor:
        tokens = self.proj(self.extractor(x)).flatten(2).transpose(1, 2)
        # Scored before the position is added
        best = tokens.abs().sum(-1).topk(self.keep_num).indices.sort(-1).values
        patches = take(tokens + self.patch_pos_embed, best)
        return torch.cat([(self.cls_token + self.cls_pos_embed).expand(patches.shape[0], -1, -1), patches], 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        for block, keep in zip(self.blocks, self.keep_rates, strict=True):
            tokens = block(tokens, keep=keep)
        return self.head(self.norm(tokens)[:, 0])


# Sizes by name; the modest ones are ours
VARIANTS: dict[str, dict[str, Any]] = {
    "transfer": {},
    "transfer_small": {"trunk": "ir", "units": (2, 2, 6), "widths": (32, 32, 64, 128), "width": 192, "depth": 4,
                       "heads": 4, "ratio": 8},
    "transfer_lite": {"trunk": "encoder:efficientnet_lite0", "stride": 16, "image_size": 160, "width": 128,
                      "depth": 2, "heads": 4},
    "apvit": {},
}  # fmt: skip


def create_transfer(name: str, **options: Any) -> TransFER | APViT:
    """A network by the name of its variant. Raises UserError for an unknown one or an option that does not fit."""
    if name not in VARIANTS:
        near = nearest(name, VARIANTS) or list(VARIANTS)
        raise UserError(f"unknown TransFER variant {name!r}", [f"there are {', '.join(near)}"])
    build: Any = APViT if name == "apvit" else TransFER
    try:
        return build(**{**VARIANTS[name], **options})
    except TypeError as error:
        raise UserError(f"an option of {name} does not fit: {error}") from error
