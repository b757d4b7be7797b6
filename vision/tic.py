"""TiC: attention as a convolution. The published MSA-Conv layer and block, and a network built from them.

Zhang, Wang, Bian, Xiong, "TiC: Exploring Vision Transformer in Convolution" (arXiv 2310.04134). Published in
code is one layer: `MSAConvAttention` with one head and `MSAConvBlock` are that layer, number for number.
EVERYTHING ELSE HERE IS OUR READING of the abstract: several heads and the depthwise form, the
Multi-Directional Cyclic Shift, Inter-Pooling, and the whole network. Variant names and results are ours and
stand for no model of the paper. Letters in shapes: B batch, C channels, H x W pixels, h heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from polyhead.errors import UserError
from vision.common import Mlp, captured, check_images, pick_variant
from vision.inference import PackedLinear, by_images, pack_linears
from vision.window_attention import attend_simply, centred, window_attention
from vision.windows import Pair, crop_pixels

DIRECTIONS = ((0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))  # of the cyclic shift: rows, columns


def pair(size: int | Sequence[int]) -> Pair:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def rolled(x: Tensor, down: Any, right: Any) -> Tensor:
    """`[B, H, W, C]` rolled along H and W; a shift may exceed the map."""
    if isinstance(down, int):
        return x.roll((down, right), (1, 2))
    # the ONNX exporter has neither a roll nor a remainder by a dynamic number; such a shift is no longer
    # than the side
    for axis, shift in ((1, down), (2, right)):
        size = x.shape[axis]
        at = torch.arange(size, device=x.device) - shift
        at = torch.where(at < 0, at + size, at)
        x = x.index_select(axis, torch.where(at >= size, at - size, at))
    return x


class MSAConvAttention(nn.Module):
    """A 1x1 projection to q, k, v and attention of every pixel to its own window, `[B, C, H, W]` -> the same.

    Positions outside the map have key and value zero, also where the projection has a bias, and stay in the
    softmax. With `heads` = C it is the depthwise form: one map of weights a channel.

    Args:
        kernel_size: the window, an int or (height, width).
        dilation: of the window.
        dropout: on the attention weights.
        im2col_step: accepted for the published signature; it has no effect.
        heads: groups of channels with weights of their own; 1 is the published layer.
        shift: Multi-Directional Cyclic Shift (our reading): head g of block `index` rolls its keys and values
            by `shift` pixels in the direction (g + index) % 5 of none and four diagonals; None shifts by a
            quarter of the map's shorter side, 0 not at all.
        inter_pool: Inter-Pooling (our reading): keys and values are averaged over cells of this side, and a
            query sees the window around its own cell: a field so much wider at the same cost. 1 is off.
        wide: attend in float32 whatever the input's type, as the published operator does.

    Raises:
        UserError: heads that do not divide the channels.
    """

    def __init__(
        self, input_channel: int, kernel_size: int | Sequence[int], dilation: int = 1, dropout: float = 0.1,
        im2col_step: int = 7, heads: int = 1, shift: int | None = 0, inter_pool: int = 1, index: int = 0,
        wide: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if input_channel % heads:
            raise UserError(f"MSA-Conv: {input_channel} channels cannot be split into {heads} heads")
        if inter_pool not in (1, 2, 4):
            raise UserError(f"MSA-Conv: inter_pool is {inter_pool}: 1, 2 or 4 is needed")
        if min(*pair(kernel_size), dilation) < 1:
            raise UserError(f"MSA-Conv: kernel {kernel_size} and dilation {dilation} must be 1 or more")
        self.kernel, self.dilation, self.dropout = pair(kernel_size), dilation, dropout
        self.heads, self.shift, self.inter_pool, self.index, self.wide = heads, shift, inter_pool, index, wide
        self.qkv_conv: nn.Conv2d | PackedLinear = nn.Conv2d(input_channel, 3 * input_channel, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attend(self, pixels: Tensor) -> Tensor:
        """The layer with channels innermost, `[B, H, W, C]` -> `[B, H, W, C]`."""
        q, k, v = self.project(pixels)
        dtype = q.dtype
        if self.wide and dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        dropout = self.dropout if self.training else 0.0
        with torch.autocast(pixels.device.type, enabled=False):
            out = window_attention(q, k, v, self.kernel, self.dilation, self.heads, self.inter_pool, dropout=dropout)
        # under autocast the published operator leaves float32
        return out if self.wide and torch.is_autocast_enabled(pixels.device.type) else out.to(dtype)

    def project(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, and k and v shifted and pooled."""
        q, k, v = self.qkv(pixels).split(pixels.shape[-1], dim=-1)
        step = self.step(pixels.shape[1], pixels.shape[2])
        return q, self.inter(self.roll(k, step)), self.inter(self.roll(v, step))

    def qkv(self, pixels: Tensor) -> Tensor:
        """`[B, H, W, C]` -> `[B, H, W, 3C]`."""
        if isinstance(self.qkv_conv, PackedLinear):
            return self.qkv_conv(pixels)
        return F.linear(pixels, self.qkv_conv.weight[:, :, 0, 0], self.qkv_conv.bias)

    def step(self, height: int, width: int) -> Any:
        if self.shift is not None:
            return self.shift
        if isinstance(height, Tensor):  # sizes in torch.jit.trace: Python's min would fix which one is less
            return torch.minimum(height, width).div(4, rounding_mode="floor").clamp(min=1)
        return torch.sym_max(1, torch.sym_min(height, width) // 4)

    def roll(self, x: Tensor, step: Any) -> Tensor:
        """Roll each head of `[B, H, W, C]` by `step` in its direction."""
        if isinstance(step, int) and step == 0:
            return x
        parts = []
        for number, head in enumerate(x.chunk(self.heads, dim=-1)):
            down, right = DIRECTIONS[(number + self.index) % len(DIRECTIONS)]
            parts.append(rolled(head, down * step, right * step) if down else head)
        return torch.cat(parts, dim=-1) if self.heads > 1 else parts[0]

    def inter(self, x: Tensor) -> Tensor:
        """Average over cells; those at the border average what they hold of the map."""
        if self.inter_pool == 1:
            return x
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.inter_pool, ceil_mode=True, count_include_pad=False)
        return pooled.permute(0, 2, 3, 1)

    def weights(self, pixels: Tensor) -> dict[str, Tensor]:
        """`qkv` `[B, 3C, H, W]`, and, each `[B, h, kh*kw, H, W]`, `logits` (unscaled), `scaled_logits`, `attn`."""
        q, k, v = self.project(pixels)
        _, logits, attn = attend_simply(q, k, v, self.kernel, self.dilation, self.heads, self.inter_pool)
        qkv = self.qkv(pixels).permute(0, 3, 1, 2)
        scale = (pixels.shape[-1] // self.heads) ** -0.5
        return {"qkv": qkv, "logits": logits, "scaled_logits": scale * logits, "attn": attn}

    def received(self, pixels: Tensor) -> Tensor:
        """The attention that each pixel receives, `[B, H, W]`: summed over queries, mean over heads."""
        _, height, width, _ = pixels.shape
        attn, s = self.weights(pixels)["attn"], self.inter_pool
        attn = F.avg_pool3d(attn.flatten(0, 1), (1, s, s), ceil_mode=True, divisor_override=1)  # sum of a cell
        size, reach = attn.shape[-2:], [centred(n, self.dilation) for n in self.kernel]
        padded = tuple(n + self.dilation * (k - 1) for n, k in zip(size, self.kernel, strict=True))
        keys = F.fold(attn.flatten(2), padded, self.kernel, self.dilation)
        keys = keys[..., reach[0] : reach[0] + size[0], reach[1] : reach[1] + size[1]]
        keys = keys.unflatten(0, (-1, self.heads))[:, :, 0].permute(0, 2, 3, 1)  # [B, H', W', h]
        keys = (keys / s**2).repeat_interleave(s, 1).repeat_interleave(s, 2)
        return self.roll(crop_pixels(keys, height, width), -self.step(height, width)).mean(-1)


class MSAConvBlock(MSAConvAttention):
    """The published block: attention, residual, a k x k convolution of the same kernel, ReLU.

    `[B, C, H, W]` -> `[B, output_channel, H', W']`. `dilation` is the attention's, `stride` and `padding` are
    the convolution's.

    Args:
        padding: 1 whatever the kernel, as published: a 7x7 block shrinks the map by 4. None keeps the size.
    """

    def __init__(
        self, input_channel: int, output_channel: int, kernel_size: int | Sequence[int], stride: int = 1,
        dilation: int = 1, dropout: float = 0.1, im2col_step: int = 7, padding: int | Sequence[int] | None = 1,
        bias: bool = False, heads: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(input_channel, kernel_size, dilation, dropout, im2col_step, heads)
        kernel = self.kernel
        pads = (kernel[0] // 2, kernel[1] // 2) if padding is None else pair(padding)
        self.mlp = nn.Conv2d(input_channel, output_channel, kernel, stride, pads, bias=bias)

    def preact(self, x: Tensor) -> Tensor:
        return self.mlp(super().forward(x) + x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.preact(x))


# ---- the network: our reading ------------------------------------------------------------------------------


class ImageMlp(Mlp):
    """A few images at a time, where the hidden numbers of all would be many."""

    def forward(self, x: Tensor) -> Tensor:
        return by_images(super().forward, x, x.shape[1] * x.shape[2] * self.fc1.weight.shape[0])


class Block(nn.Module):
    """x + proj(attention(norm(x))), then x + MLP(norm(x)), on `[B, H, W, C]`."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, **attention: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSAConvAttention(dim, wide=False, **attention)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ImageMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.proj(self.attn.attend(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def conv_norm(cin: int, cout: int) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout)]


class Stage(nn.Module):
    """Convolutions that halve the map (the stem: twice), then blocks; `[B, cin, H, W]` -> `[B, C, ., .]`."""

    def __init__(self, down: list[nn.Module], blocks: list[Block]) -> None:
        super().__init__()
        self.down = nn.Sequential(*down)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.down(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TiC(nn.Module):
    """Four stages of MSA-Conv blocks, `[B, in_chans, H, W]`, sides of 32 px or more -> logits `[B, num_classes]`.

    Our reading of the paper's abstract, not a published network. No weight depends on the image's size: one
    set serves any. Feature maps have strides 4, 8, 16, 32 (`feature_info`).

    Args:
        dims, depths, heads: of the four stages.
        kernel: the attention's window.
        dilations: a stage's list has one number a block; 1 everywhere by default.
        shift, inter_pool: see `MSAConvAttention`; pooling acts in every second block.

    Raises:
        UserError: sides or channels that the network cannot take.
    """

    dynamic_size = True

    def __init__(
        self, dims: Sequence[int] = (32, 64, 128, 256), depths: Sequence[int] = (1, 1, 2, 1),
        heads: Sequence[int] = (1, 2, 4, 8), kernel: int | Sequence[int] = 5, num_classes: int = 1000,
        in_chans: int = 3, mlp_ratio: float = 4.0, dilations: Sequence[Sequence[int]] | None = None,
        shift: int | None = None, inter_pool: int = 2, attn_drop: float = 0.0, drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        dilations = dilations or [[1] * depth for depth in depths]
        if not len(dims) == len(depths) == len(heads) == len(dilations) or any(
            len(row) != depth for row, depth in zip(dilations, depths, strict=False)
        ):
            raise UserError("TiC takes one of dims, depths, heads, dilations a stage and one dilation a block")
        total = sum(depths)
        stages: list[Stage] = []
        index = 0
        for number, dim in enumerate(dims):
            half = dim // 2
            stem = [*conv_norm(in_chans, half), nn.GELU(), *conv_norm(half, dim)]
            blocks = []
            for dilation in dilations[number]:
                blocks.append(
                    Block(
                        dim, mlp_ratio, drop_path_rate * index / max(total - 1, 1), kernel_size=kernel,
                        dilation=dilation, dropout=attn_drop, heads=heads[number], shift=shift,
                        inter_pool=inter_pool if index % 2 else 1, index=index,
                    )
                )  # fmt: skip
                index += 1
            stages.append(Stage(conv_norm(dims[number - 1], dim) if number else stem, blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**n, "module": f"stages.{n}"} for n, dim in enumerate(dims)
        ]
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.init_weights()
        self.reset_classifier(num_classes)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The maps after each stage, `[B, C_i, ceil(H/s), ceil(W/s)]` for s = 4, 8, 16, 32."""
        check_images(x, self.in_chans, 32, "TiC")
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, normed: `[B, num_features, ceil(H/32), ceil(W/32)]`."""
        check_images(x, self.in_chans, 32, "TiC")
        return self.norm(self.stages(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits `[B, num_classes]`, or its mean `[B, num_features]`."""
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.to(self.norm.weight)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms."""
        return {n for n, p in self.named_parameters() if p.ndim <= 1}

    @torch.no_grad()
    def attention_maps(self, x: Tensor) -> dict[str, Tensor]:
        """Per block, by its name, the attention that each pixel of its map receives: `[B, h, w]`."""
        return captured(self, x, Block, lambda block, x: block.attn.received(block.norm1(x)))

    def to_deploy(self) -> TiC:
        """A copy for inference and export, in eval mode: BatchNorm folded, channels_last, linear layers packed."""
        model = copy.deepcopy(self).eval().requires_grad_(False)
        for stage in model.stages:
            down: Any = stage.down
            for n, layer in enumerate(down):
                if isinstance(layer, nn.BatchNorm2d):
                    down[n - 1] = fuse_conv_bn_eval(down[n - 1], layer)
                    down[n] = nn.Identity()
        pack_linears(model)
        for module in model.modules():
            if isinstance(module, MSAConvAttention):
                module.qkv_conv = PackedLinear(module.qkv_conv)
        return model.to(memory_format=torch.channels_last)


VARIANTS: dict[str, dict[str, Any]] = {  # all of them ours
    "tic_xs": dict(dims=(24, 48, 96, 192), depths=(1, 1, 2, 1), heads=(1, 2, 4, 8), kernel=3),
    "tic_mini": dict(dims=(32, 64, 128, 256), depths=(1, 1, 2, 1), heads=(1, 2, 4, 8), kernel=5),
    "tic_small": dict(dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), heads=(2, 4, 8, 16), kernel=7),
}


def tic(name: str, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> TiC:
    """The variant of that name; `overrides` replace arguments of `TiC`.

    Raises:
        UserError: no such variant.
    """
    options = pick_variant(name, VARIANTS, "TiC") | {"num_classes": num_classes, "in_chans": in_chans}
    return TiC(**(options | overrides))
