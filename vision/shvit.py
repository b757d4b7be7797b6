"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (Yun and Ro, CVPR 2024, arXiv
2401.16456).

A convolutional stem of stride 16, then stages of blocks (depthwise convolution, single-head attention on a
part of the channels, feed-forward), each stage halving the map before it. State-dict keys are those of the
published code, so its checkpoints load as they are. Letters in shapes: B batch, C or d channels, N = H*W
tokens, p channels that attend, r width of a query.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import UserError
from vision.common import captured, check_images, pick_variant

# Table 1 of the paper; partial_dim[0] is unused, since the first stage is of type "i"
VARIANTS: dict[str, dict[str, Any]] = {
    "shvit_s1": {"embed_dim": (128, 224, 320), "depth": (2, 4, 5), "partial_dim": (32, 48, 68)},
    "shvit_s2": {"embed_dim": (128, 308, 448), "depth": (2, 4, 5), "partial_dim": (32, 66, 96)},
    "shvit_s3": {"embed_dim": (192, 352, 448), "depth": (3, 5, 5), "partial_dim": (48, 75, 96)},
    "shvit_s4": {"embed_dim": (224, 336, 448), "depth": (4, 7, 6), "partial_dim": (48, 72, 96)},
}


def shvit(name: str, **overrides: Any) -> SHViT:
    """The variant of that name; `overrides` replace arguments of `SHViT`.

    Raises:
        UserError: no such variant.
    """
    return SHViT(**pick_variant(name, VARIANTS, "SHViT") | overrides)


class ConvBN(nn.Module):
    """Convolution without bias, then batch norm: [B, in_dim, H, W] -> [B, out_dim, H', W']."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel: int = 1, stride: int = 1, groups: int = 1, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_dim, out_dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        nn.init.constant_(self.bn.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class BNLinear(nn.Module):
    """Batch norm, then a linear classifier: [B, C] -> [B, classes]."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.l = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


def depthwise(dim: int, scale: float = 1.0) -> Residual:
    """The residual 3x3 depthwise convolution that stands before every mixer."""
    return Residual(ConvBN(dim, dim, 3, groups=dim, scale=scale))


class FFN(nn.Module):
    """Two 1x1 convolutions, expansion 2: [B, d, H, W] -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(dim, 2 * dim)
        self.pw2 = ConvBN(2 * dim, dim, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(F.relu(self.pw1(x)))


class SHSA(nn.Module):
    """Single-head self-attention (section 3.2): the first p channels attend, the others pass by."""

    def __init__(self, dim: int, partial_dim: int, qk_dim: int) -> None:
        super().__init__()
        self.partial, self.qk = partial_dim, qk_dim
        self.pre_norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvBN(partial_dim, 2 * qk_dim + partial_dim)
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, scale=0.0))

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, d, H, W] -> the attention matrix A [B, N, N] (rows sum to 1) and the values [B, p, N]."""
        qkv = self.qkv(self.pre_norm(x[:, : self.partial])).flatten(2)
        q, k, v = qkv.split([self.qk, self.qk, self.partial], dim=1)
        scores = torch.einsum("brn,brm->bnm", q, k) * self.qk**-0.5
        return scores.softmax(-1), v

    def forward(self, x: Tensor) -> Tensor:
        attention, v = self.attention(x)
        rest = x[:, self.partial :]
        y = torch.einsum("bnm,bpm->bpn", attention, v).reshape(x.shape[0], self.partial, *x.shape[2:])
        return self.proj(torch.cat([y, rest], dim=1))


class Block(nn.Module):
    """Depthwise convolution, mixer (SHSA for kind "s", nothing for "i"), FFN; each with its residual."""

    def __init__(self, dim: int, partial_dim: int, qk_dim: int, kind: str) -> None:
        super().__init__()
        self.conv = depthwise(dim, scale=0.0)
        self.mixer = Residual(SHSA(dim, partial_dim, qk_dim)) if kind == "s" else nn.Identity()
        self.ffn = Residual(FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Channel gate from the spatial mean; the inner width is a quarter, rounded to a multiple of 8."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = max(8, int(dim * 0.25 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(dim, inner, 1)
        self.fc2 = nn.Conv2d(inner, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class PatchMerging(nn.Module):
    """Halves the map: [B, a, H, W] -> [B, b, ceil(H/2), ceil(W/2)] through 4a channels."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * in_dim
        self.conv1 = ConvBN(in_dim, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, stride=2, groups=hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvBN(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(F.relu(self.conv2(F.relu(self.conv1(x))))))


class SHViT(nn.Module):
    """The whole network, [B, in_chans, H, W] -> logits [B, num_classes]; any height and width from 1 pixel.

    Every list has one entry a stage. With `distillation`, training returns the pair (logits, distillation
    logits) and evaluation their mean. `num_classes=0` returns the pooled features [B, embed_dim[-1]].

    Args:
        in_chans: channels of the image.
        embed_dim: channels C of each stage.
        partial_dim: channels that attend, used where the type is "s".
        qk_dim: width of a query and a key.
        depth: blocks of each stage.
        types: "s" for blocks with attention, "i" for blocks without.

    Raises:
        UserError: lists of different lengths, an unknown type, a partial_dim larger than embed_dim; on the
            forward pass, an image of another shape or number of channels.
    """

    dynamic_size = True  # exports take any height and width

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: Sequence[int] = VARIANTS["shvit_s1"]["embed_dim"],
        partial_dim: Sequence[int] = VARIANTS["shvit_s1"]["partial_dim"],
        qk_dim: Sequence[int] = (16, 16, 16),
        depth: Sequence[int] = VARIANTS["shvit_s1"]["depth"],
        types: Sequence[str] = ("i", "s", "s"),
        num_classes: int = 1000,
        distillation: bool = False,
    ) -> None:
        super().__init__()
        lists = {"embed_dim": embed_dim, "partial_dim": partial_dim, "qk_dim": qk_dim}
        lists |= {"depth": depth, "types": types}  # type: ignore[dict-item]
        if not embed_dim or len({len(v) for v in lists.values()}) > 1:
            found = ", ".join(f"{k} has {len(v)}" for k, v in lists.items())
            raise UserError(f"SHViT takes one entry a stage in every list, but {found}")
        for dim, partial, kind in zip(embed_dim, partial_dim, types, strict=True):
            if kind not in ("i", "s"):
                raise UserError(f"SHViT knows the stage types 'i' and 's', not {kind!r}")
            if kind == "s" and not 0 < partial <= dim:
                raise UserError(f"SHViT: partial_dim {partial} must lie between 1 and embed_dim {dim}")
        if embed_dim[0] < 8:
            raise UserError(f"SHViT: the first stage needs 8 channels or more, not {embed_dim[0]}")

        self.in_chans, self.distillation = in_chans, distillation
        self.head: nn.Module
        self.head_dist: nn.Module
        self.num_features = self.head_hidden_size = embed_dim[-1]
        width = embed_dim[0]
        self.patch_embed = nn.Sequential(
            ConvBN(in_chans, width // 8, 3, stride=2),
            nn.ReLU(),
            ConvBN(width // 8, width // 4, 3, stride=2),
            nn.ReLU(),
            ConvBN(width // 4, width // 2, 3, stride=2),
            nn.ReLU(),
            ConvBN(width // 2, width, 3, stride=2),
        )
        self.feature_info: list[dict[str, Any]] = []
        for i, dim in enumerate(embed_dim):
            layers: list[nn.Module] = []
            if i:
                before = embed_dim[i - 1]
                layers = [
                    nn.Sequential(depthwise(before), Residual(FFN(before))),
                    PatchMerging(before, dim),
                    nn.Sequential(depthwise(dim), Residual(FFN(dim))),
                ]
            layers += [Block(dim, partial_dim[i], qk_dim[i], types[i]) for _ in range(depth[i])]
            self.add_module(f"blocks{i + 1}", nn.Sequential(*layers))
            self.feature_info.append({"num_chs": dim, "reduction": 16 * 2**i, "module": f"blocks{i + 1}"})
        self.reset_classifier(num_classes)

    def stages(self) -> list[nn.Sequential]:
        """The stages in order."""
        return [self.get_submodule(info["module"]) for info in self.feature_info]  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The map after every stage, [B, embed_dim[i], H/s, W/s] (rounded up) for s = 16, 32, 64, ..."""
        check_images(x, self.in_chans, 1, "SHViT")
        x = self.patch_embed(x)
        return list(itertools.accumulate(self.stages(), lambda x, stage: stage(x), initial=x))[1:]

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, [B, num_features, H', W']."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """The last map -> logits, or the pooled features with `pre_logits`."""
        x = x.mean((2, 3))
        if pre_logits:
            return x
        if not self.distillation:
            return self.head(x)
        logits, logits_dist = self.head(x), self.head_dist(x)
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def attention_maps(self, x: Tensor) -> dict[str, Tensor]:
        """The attention matrix A [B, N, N] of every "s" block, by the block's name (`blocks2.3`).

        Row n says how token n (row-major over the stage's map) spreads its attention.
        """
        maps = captured(self, x, SHSA, lambda mixer, x: mixer.attention(x)[0])
        return {name.removesuffix(".mixer.m"): matrix for name, matrix in maps.items()}

    def get_classifier(self) -> Any:
        """The linear classifier, a pair with `distillation`, the identity without classes."""
        heads = (self.head, self.head_dist) if self.distillation else (self.head,)
        found = tuple(head.l if isinstance(head, BNLinear) else head for head in heads)
        return found if self.distillation else found[0]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head(s) by fresh ones; 0 classes leave the pooled features."""
        like = next(self.parameters())
        self.num_classes = num_classes
        for name in ("head", "head_dist") if self.distillation else ("head",):
            head = BNLinear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
            self.add_module(name, head.to(like.device, like.dtype).train(self.training))

    def no_weight_decay(self) -> set[str]:
        """Parameters that the published recipe does not decay: biases and scales."""
        return {name for name, p in self.named_parameters() if p.ndim <= 1}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters into layers for layer-wise learning rates."""
        return {"stem": r"^patch_embed", "blocks": r"^blocks(\d+)" if coarse else r"^blocks(\d+)\.(\d+)"}

    @torch.no_grad()
    def to_deploy(self) -> DeployedSHViT:
        """A copy for inference with the same outputs in eval mode: folded and in channels-last order."""
        return DeployedSHViT(self)


# ---- the deployed form -------------------------------------------------------------------------------------
# Activations are [B, H, W, C] and contiguous, so a 1x1 convolution is one matrix product on [B*H*W, C] and a
# depthwise one runs on a permuted view without reordering. All is folded in float64 and cast at the end.


def wide(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.detach().to("cpu", torch.float64)


def affine(bn: nn.BatchNorm2d | nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """The scale and shift that a batch norm applies in eval mode."""
    scale = wide(bn.weight) / (wide(bn.running_var) + bn.eps).sqrt()
    return scale, wide(bn.bias) - wide(bn.running_mean) * scale


def matrix(conv: ConvBN) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a 1x1 convolution with its batch norm."""
    scale, shift = affine(conv.bn)
    return wide(conv.c.weight).flatten(1) * scale[:, None], shift


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], dtype=torch.float64)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


def convolution(conv: ConvBN, residual: bool = False) -> nn.Conv2d:
    """A 3x3 convolution with its batch norm and, where it is a residual depthwise one, with the sum."""
    c = conv.c
    scale, shift = affine(conv.bn)
    weight = wide(c.weight) * scale[:, None, None, None]
    if residual:
        weight[:, 0, 1, 1] += 1
    layer = nn.utils.skip_init(
        nn.Conv2d, c.in_channels, c.out_channels, 3, c.stride, 1, groups=c.groups, dtype=torch.float64
    )
    layer.weight.copy_(weight)
    layer.bias.copy_(shift)
    return layer


class DeployedDepthwise(nn.Module):
    """A depthwise convolution on [B, H, W, C], with its residual where it has one."""

    def __init__(self, conv: ConvBN, residual: bool) -> None:
        super().__init__()
        self.conv = convolution(conv, residual)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DeployedSHSA(nn.Module):
    """x + SHSA(x) on [B, H, W, d], the norm's affine and the scale of the scores folded into qkv."""

    def __init__(self, mixer: SHSA) -> None:
        super().__init__()
        self.partial, self.qk, self.eps = mixer.partial, mixer.qk, mixer.pre_norm.eps
        weight, bias = matrix(mixer.qkv)
        bias += weight @ wide(mixer.pre_norm.bias)
        weight *= wide(mixer.pre_norm.weight)
        weight[: self.qk] *= self.qk**-0.5
        bias[: self.qk] *= self.qk**-0.5
        self.qkv = linear(weight, bias)
        self.proj = linear(*matrix(mixer.proj[1]))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        part, rest = x.tensor_split([self.partial], dim=-1)
        # one group over the whole map is a layer norm over the flattened sample
        flat = torch.group_norm(part.reshape(x.shape[0], 1, -1), 1, eps=self.eps)
        qkv = self.qkv(flat.reshape(x.shape[0], -1, self.partial))
        q, k, v = qkv.split([self.qk, self.qk, self.partial], dim=-1)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.proj(F.relu_(torch.cat([y.reshape(part.shape), rest], dim=-1))).add_(x)


class DeployedFFN(nn.Module):
    """x + FFN(x) on [B, H, W, d], where x is fresh and is overwritten.

    The product W2 h accumulates straight onto x. Its bias b2 has no place there, so the layer before adds it
    in its own bias, and b1 takes back what that changes: W1 (x + b2) + (b1 - W1 b2).
    """

    def __init__(self, ffn: FFN, before: DeployedDepthwise | DeployedSHSA) -> None:
        super().__init__()
        (w1, b1), (w2, b2) = matrix(ffn.pw1), matrix(ffn.pw2)
        last = before.conv if isinstance(before, DeployedDepthwise) else before.proj
        assert last.bias is not None
        last.bias.add_(b2)
        self.pw1 = linear(w1, b1 - w1 @ b2)
        self.weight = nn.Parameter(w2.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.weight.shape[1])
        return rows.addmm_(F.relu_(self.pw1(rows)), self.weight).view(x.shape)


class DeployedMerging(nn.Module):
    """Patch merging, [B, H, W, a] -> [B, ceil(H/2), ceil(W/2), b]."""

    def __init__(self, merging: PatchMerging) -> None:
        super().__init__()
        self.conv1 = linear(*matrix(merging.conv1))
        self.conv2 = DeployedDepthwise(merging.conv2, residual=False)
        self.fc1, self.fc2 = (
            linear(wide(fc.weight).flatten(1), wide(fc.bias)) for fc in (merging.se.fc1, merging.se.fc2)
        )
        self.conv3 = linear(*matrix(merging.conv3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv2(F.relu_(self.conv1(x))))
        gate = self.fc2(F.relu_(self.fc1(x.mean((1, 2))))).sigmoid()
        return self.conv3(x * gate[:, None, None])


def deployed(stage: nn.Sequential) -> nn.Sequential:
    """The deployed layers of a stage, in order."""
    layers: list[Any] = []
    for module in stage.modules():
        if isinstance(module, PatchMerging):
            layers.append(DeployedMerging(module))
        elif isinstance(module, Residual):
            m: Any = module.m
            if isinstance(m, FFN):
                layers.append(DeployedFFN(m, before=layers[-1]))
            else:
                layers.append(DeployedSHSA(m) if isinstance(m, SHSA) else DeployedDepthwise(m, residual=True))
    return nn.Sequential(*layers)


class DeployedSHViT(nn.Module):
    """What `SHViT.to_deploy` returns: [B, in_chans, H, W] -> logits, weights frozen, no batch norm left.

    The methods are those of `SHViT`; maps have its shapes, in channels-last order.
    """

    def __init__(self, model: SHViT) -> None:
        super().__init__()
        self.in_chans, self.num_classes = model.in_chans, model.num_classes
        self.num_features = self.head_hidden_size = model.num_features
        self.feature_info = [dict(info, module=f"stages.{i}") for i, info in enumerate(model.feature_info)]
        self.stem = nn.ModuleList(convolution(m) for m in model.patch_embed if isinstance(m, ConvBN))
        self.stages = nn.ModuleList(deployed(stage) for stage in model.stages())
        self.head: nn.Module = nn.Identity()
        if model.num_classes > 0:
            heads: list[Any] = [model.head, model.head_dist] if model.distillation else [model.head]
            folded = []
            for head in heads:
                (scale, shift), weight = affine(head.bn), wide(head.l.weight)
                folded.append((weight * scale, wide(head.l.bias) + weight @ shift))
            self.head = linear(*(sum(parts) / len(heads) for parts in zip(*folded, strict=True)))
        like = next(model.parameters())
        # convolution weights in channels-last order too: 3 % of a pass on a CPU
        self.to(memory_format=torch.channels_last).to(like.device, like.dtype).requires_grad_(False).eval()

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        check_images(x, self.in_chans, 1, "SHViT")
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.stem[:-1]:
            x = F.relu_(conv(x))
        x = self.stem[-1](x).permute(0, 2, 3, 1)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
