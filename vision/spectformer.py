"""SpectFormer: spectral gates in the early layers, attention in the later ones.

Patro, Namboodiri, Agneeswaran, "SpectFormer: Frequency and Attention is what you need in a Vision
Transformer" (arXiv 2304.06446, WACV 2025). Two unrelated architectures carry the name: the vanilla one
(a ViT of patches; T, XS, S, B) and the hierarchical one (a convolutional stem and four stages; H-S, H-B,
H-L, whose published code calls them s, b, l). State-dict keys are the published ones. Letters in shapes:
B batch, N tokens (row-major over H x W), C channels, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from polyhead.errors import UserError
from vision.common import Mlp, check_images, init_convolution, pick_variant
from vision.inference import by_images
from vision.spectformer_layers import Attention, Backbone, ClassAttention, Size, drop, pair
from vision.spectral_gate import SpectralGate
from vision.token_label import Box, mix, random_box

# ---- vanilla -----------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """A convolution over patches, `[B, in_chans, H, W]` -> `[B, N, C]`."""

    def __init__(self, patch: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class SpectralBlock(nn.Module):
    """x + MLP(norm(gate(norm(x)))): one residual around both."""

    def __init__(self, dim: int, hidden: int, grid: tuple[int, int], rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = SpectralGate(dim, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = drop(rate)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(x), grid))))


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, hidden: int, num_heads: int, rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, joint=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = drop(rate)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VanillaSpectFormer(Backbone):
    """Patches, `alpha` spectral blocks, attention blocks, mean over tokens, classifier (paper, section 3).

    `[B, in_chans, H, W]` -> logits `[B, K]`. Images of another size than `img_size` are taken too: sides are
    padded with zeros to a multiple of the patch, positions and filters are resized at every call
    (`set_input_size` does it for good).

    Args:
        img_size: side(s) in pixels; the learned positions and filters have its grid.
        num_heads: the published block fixes 6; for T and B, which cannot run with 6, 4 follows the code's
            comment and 8 is our choice (64 channels a head, as in T, XS and S).
        alpha: leading blocks that are spectral.

    Raises:
        UserError: channels or sizes that the network cannot take.
    """

    def __init__(
        self, img_size: Size = 224, patch_size: int = 16, in_chans: int = 3, num_classes: int = 1000,
        embed_dim: int = 384, depth: int = 12, num_heads: int = 6, mlp_ratio: float = 4.0, alpha: int = 4,
        drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_chans, self.num_classes, self.patch_size = in_chans, num_classes, patch_size
        self.num_features = embed_dim
        height, width = pair(img_size)
        if min(height, width) < patch_size:
            raise UserError(f"spectformer: img_size {img_size} is smaller than a patch of {patch_size} px")
        self.grid = (-(-height // patch_size), -(-width // patch_size))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = [drop_path_rate * n / max(depth - 1, 1) for n in range(depth)]
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(
            SpectralBlock(embed_dim, hidden, self.grid, rate)
            if n < alpha
            else AttentionBlock(embed_dim, hidden, num_heads, rate)
            for n, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head: nn.Module = nn.Identity()
        self.ends = sorted({min(alpha, depth), depth} - {0})  # maps are taken after the last block of a kind
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{n - 1}"} for n in self.ends
        ]
        self.init_weights()
        self.reset_classifier(num_classes)

    def grids(self, x: Tensor) -> list[tuple[int, int]]:
        check_images(x, self.in_chans, self.patch_size, "SpectFormer")
        patch = self.patch_size
        return [((x.shape[2] + patch - 1) // patch, (x.shape[3] + patch - 1) // patch)]

    def embed(self, x: Tensor) -> Tensor:
        """Patch embedding plus position, `[B, N, C]`."""
        (grid,) = self.grids(x)
        below, right = grid[0] * self.patch_size - x.shape[2], grid[1] * self.patch_size - x.shape[3]
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return self.patch_embed(x) + resize_positions(self.pos_embed, self.grid, grid)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The maps after the last spectral and the last attention block (normed), `[B, C, h, w]` each."""
        (grid,) = self.grids(x)
        x = self.embed(x)
        maps = []
        for count, block in enumerate(self.blocks, start=1):
            x = block(x, grid)
            if count in self.ends:
                last = self.norm(x) if count == len(self.blocks) else x
                maps.append(last.transpose(1, 2).unflatten(2, grid))
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The normed tokens `[B, N, C]`."""
        (grid,) = self.grids(x)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits `[B, K]`, or their mean `[B, C]`."""
        x = x.mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        self.head = self.new_classifier(num_classes)

    def set_input_size(self, img_size: Size, method: str = "bicubic") -> None:
        """Resize positions and filters for images of another size, for good."""
        height, width = pair(img_size)
        grid = (-(-height // self.patch_size), -(-width // self.patch_size))
        self.pos_embed = nn.Parameter(resize_positions(self.pos_embed.detach(), self.grid, grid))
        self.grid = grid
        for gate in self.gates().values():
            gate.set_grid(grid, method)

    def resize_state(self, state: Mapping[str, Tensor], method: str = "bicubic") -> dict[str, Tensor]:
        resized = super().resize_state(state, method)
        positions = resized.get("pos_embed")
        if positions is None or positions.shape[1] == math.prod(self.grid):
            return resized
        # Without a filter that tells, a square
        gate = state.get("blocks.0.filter.complex_weight")
        rows = gate.shape[0] if gate is not None else math.isqrt(positions.shape[1])
        if positions.shape[1] % rows == 0:
            resized["pos_embed"] = resize_positions(positions, (rows, positions.shape[1] // rows), self.grid)
        return resized

    def to_deploy(self) -> VanillaSpectFormer:
        """A copy for inference and export, in eval mode: linear layers packed, gates in their faster form."""
        model = copy.deepcopy(self).eval().requires_grad_(False)
        model.settle()
        return model


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positional embeddings `[1, N, C]` of another grid, by the published bicubic interpolation."""
    if old == new:
        return positions
    image = positions.transpose(1, 2).unflatten(2, old)
    return F.interpolate(image, new, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


# ---- hierarchical ------------------------------------------------------------------------------------------


class Downsample(nn.Module):
    """Convolution of stride 2 and LayerNorm, `[B, cin, H, W]` -> `[B, N, cout]`. `hidden` makes it the stem:
    three more convolutions before it, the first of them of stride 2 too."""

    def __init__(self, cin: int, cout: int, hidden: int = 0) -> None:
        super().__init__()
        if hidden:
            layers: list[nn.Module] = []
            for n, channels in enumerate((cin, hidden, hidden)):
                kernel, stride = (7, 2) if n == 0 else (3, 1)
                conv = nn.Conv2d(channels, hidden, kernel, stride, kernel // 2, bias=False)
                layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
            self.conv = nn.Sequential(*layers)
        self.hidden = hidden
        self.proj = nn.Conv2d(hidden or cin, cout, 3, 2, 1)
        self.norm = nn.LayerNorm(cout)

    def halved(self, x: Tensor) -> Tensor:
        """The stem's map of stride 2, `[B, hidden, H/2, W/2]`."""
        return self.conv(x) if self.hidden else x

    def tokens(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(self.halved(x))


class DepthwiseConv(nn.Module):
    """A 3x3 depthwise convolution on the token grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)  # a channels_last view: no copy
        return self.dwconv(image).permute(0, 2, 3, 1).flatten(1, 2)


class ConvMlp(nn.Module):
    """Linear, depthwise convolution, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        def images(x: Tensor) -> Tensor:
            return self.fc2(F.gelu(self.dwconv(self.fc1(x), grid)))

        return by_images(images, x, x.shape[1] * self.fc1.weight.shape[0])


class StageBlock(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)); the mixer is a gate, or attention if it has heads."""

    def __init__(self, dim: int, hidden: int, grid: tuple[int, int], num_heads: int, rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, joint=False) if num_heads else SpectralGate(dim, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, hidden)
        self.drop_path = drop(rate)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        normed = self.norm1(x)
        mixed = self.attn(normed, grid) if isinstance(self.attn, SpectralGate) else self.attn(normed)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class ClassBlock(nn.Module):
    """Class attention and MLP for the first entry; the tokens pass unchanged."""

    def __init__(self, dim: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        cls = x[:, :1] + self.attn(self.norm1(x))
        cls = cls + self.mlp(self.norm2(cls))
        return torch.cat([cls, x[:, 1:]], dim=1)


class HierarchicalSpectFormer(Backbone):
    """A stem, two spectral and two attention stages, class attention, classifier (paper, section 3).

    `[B, in_chans, H, W]`, sides of 32 px or more -> logits `[B, K]`. Filters have the grid of `img_size`; for
    other sizes they are resized at every call (`set_input_size` does it for good). With `token_label` a
    second classifier reads every token: training returns (logits, token logits `[B, N, K]`, box) for
    `TokenLabelLoss`, evaluation logits + 0.5 * the largest token logit of each class.

    Args:
        stem_hidden_dim: channels of the stem's stride-2 map.
        num_heads: of stages 3 and 4 (the first two are not used).
        mix_token: mix the token maps of a batch in training (with `token_label`).
        sr_ratios: accepted for the published signature; it has no effect.

    Raises:
        UserError: channels or sizes that the network cannot take.
    """

    def __init__(
        self, img_size: Size = 224, in_chans: int = 3, num_classes: int = 1000, stem_hidden_dim: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 448), num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4), depths: Sequence[int] = (3, 4, 6, 3), sr_ratios: Any = None,
        drop_path_rate: float = 0.0, token_label: bool = True, mix_token: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_chans, self.num_classes = in_chans, num_classes
        self.token_label, self.mix_token = token_label, mix_token
        self.num_features = embed_dims[3]
        self.norm4: nn.LayerNorm
        self.feature_info = [{"num_chs": stem_hidden_dim, "reduction": 2, "module": "patch_embed1.conv"}]
        grids = self.size_grids(*pair(img_size))
        rates = [drop_path_rate * n / max(sum(depths) - 1, 1) for n in range(sum(depths))]
        for stage, (dim, grid) in enumerate(zip(embed_dims, grids, strict=True)):
            cin, hidden = (embed_dims[stage - 1], 0) if stage else (in_chans, stem_hidden_dim)
            heads = num_heads[stage] if stage >= 2 else 0
            blocks = [
                StageBlock(dim, int(dim * mlp_ratios[stage]), grid, heads, rates.pop(0)) for _ in range(depths[stage])
            ]
            self.add_module(f"patch_embed{stage + 1}", Downsample(cin, dim, hidden))
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=1e-6))
            module = f"norm{stage + 1}" if stage < 3 else "block4"
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**stage, "module": module})
        hidden = int(self.num_features * mlp_ratios[3])
        self.post_network = nn.ModuleList([ClassBlock(self.num_features, num_heads[3], hidden)])
        self.head: nn.Module = nn.Identity()
        self.init_weights()
        self.reset_classifier(num_classes)

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module)

    @staticmethod
    def size_grids(height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the tokens of each stage."""
        return [((height + s - 1) // s, (width + s - 1) // s) for s in (4, 8, 16, 32)]

    def grids(self, x: Tensor) -> list[tuple[int, int]]:
        check_images(x, self.in_chans, 32, "SpectFormer")
        return self.size_grids(x.shape[2], x.shape[3])

    def stage(self, number: int) -> tuple[Any, Any, Any]:
        """Embedding, blocks and norm of stage 1 to 4."""
        parts = (getattr(self, f"{part}{number}") for part in ("patch_embed", "block", "norm"))
        return tuple(parts)

    def forward_tokens(self, x: Tensor, box: Box | None = None) -> list[Tensor]:
        """The stem's map of stride 2, then the tokens after the last block of each stage, not normed.

        `box` mixes the stem's output with the reversed batch.
        """
        grids = self.grids(x)
        found = [self.stage(1)[0].halved(x)]
        y = found[0]
        for number in range(1, 5):
            embed, blocks, norm = self.stage(number)
            grid = grids[number - 1]
            y = embed.tokens(y)
            if box is not None and number == 1:
                y = mix(y.unflatten(1, grid), box, scale=8).flatten(1, 2)
            for block in blocks:
                y = block(y, grid)
            found.append(y)
            if number < 4:
                y = norm(y).unflatten(1, grid).permute(0, 3, 1, 2)
        return found

    def class_tokens(self, tokens: Tensor) -> Tensor:
        """Stage 4's tokens -> `[B, 1 + N, C]`: the class entry, then the tokens as they are."""
        x = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        for block in self.post_network:
            x = block(x)
        return x

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The maps of strides 2, 4, 8, 16, 32; those of stages 1 to 3 normed."""
        half, *tokens = self.forward_tokens(x)
        maps = [half]
        for number, (y, grid) in enumerate(zip(tokens, self.grids(x), strict=True), start=1):
            normed = self.stage(number)[2](y) if number < 4 else y
            maps.append(normed.transpose(1, 2).unflatten(2, grid))
        return maps

    def forward_features(self, x: Tensor, box: Box | None = None) -> Tensor:
        """The normed class entry and tokens, `[B, 1 + N, C]`."""
        return self.norm4(self.class_tokens(self.forward_tokens(x, box)[-1]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Class entry and tokens -> logits `[B, K]` as in evaluation, or the class entry `[B, C]`."""
        if pre_logits:
            return x[:, 0]
        logits = self.head(x[:, 0])
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1) if self.token_label else logits

    def forward(self, x: Tensor, box: Box | None = None) -> Any:
        if not (self.training and self.token_label):
            return self.forward_head(self.forward_features(x))
        grid = self.grids(x)[-1]
        if box is None:
            box = random_box(grid) if self.mix_token else (0, 0, 0, 0)
        y = self.forward_features(x, box)
        tokens = mix(self.aux_head(y[:, 1:]).unflatten(1, grid), box).flatten(1, 2)
        return self.head(y[:, 0]), tokens, box

    def get_classifier(self) -> Any:
        return (self.head, self.aux_head) if self.token_label else self.head

    def reset_classifier(self, num_classes: int) -> None:
        """New classifiers; 0 classes leave the class entry's features."""
        self.num_classes = num_classes
        self.head = self.new_classifier(num_classes)
        self.token_label = self.token_label and num_classes > 0
        if self.token_label:
            self.aux_head = self.new_classifier(num_classes)

    def set_input_size(self, img_size: Size, method: str = "bicubic") -> None:
        """Resize the filters for images of another size, for good."""
        for number, grid in enumerate(self.size_grids(*pair(img_size))[:2], start=1):
            for block in self.stage(number)[1]:
                block.attn.set_grid(grid, method)

    def to_deploy(self) -> HierarchicalSpectFormer:
        """A copy for inference and export: the stem's BatchNorm folded, channels_last, q and kv joined,
        linear layers packed."""
        model = copy.deepcopy(self).eval().requires_grad_(False)
        stem: Any = model.stage(1)[0].conv
        for n in (0, 3, 6):
            stem[n] = fuse_conv_bn_eval(stem[n], stem[n + 1])
            stem[n + 1] = nn.Identity()
        for module in model.modules():
            if isinstance(module, Attention):
                module.join()
        model.settle()
        return model.to(memory_format=torch.channels_last)


VARIANTS: dict[str, dict[str, Any]] = {
    # paper, vanilla
    "spectformer_t": dict(embed_dim=256, depth=12, num_heads=4),
    "spectformer_xs": dict(embed_dim=384, depth=12, num_heads=6),
    "spectformer_s": dict(embed_dim=384, depth=19, num_heads=6, drop_path_rate=0.15),
    "spectformer_b": dict(embed_dim=512, depth=19, num_heads=8, drop_path_rate=0.25),
    # paper, hierarchical; token_label=True adds the published second classifier
    "spectformer_h_s": dict(drop_path_rate=0.1),
    "spectformer_h_b": dict(
        stem_hidden_dim=64, embed_dims=(64, 128, 320, 512), num_heads=(2, 4, 10, 16), depths=(3, 4, 12, 3),
        drop_path_rate=0.1,
    ),
    "spectformer_h_l": dict(
        stem_hidden_dim=64, embed_dims=(96, 192, 384, 512), num_heads=(3, 6, 12, 16), depths=(3, 6, 18, 3),
        drop_path_rate=0.3,
    ),
    # a preset of ours for training from scratch on small photographs (128 px)
    "spectformer_hxs": dict(
        img_size=128, stem_hidden_dim=16, embed_dims=(32, 64, 160, 224), num_heads=(1, 2, 5, 7),
        mlp_ratios=(4, 4, 4, 4), depths=(1, 1, 2, 1),
    ),
}  # fmt: skip


def spectformer(name: str, num_classes: int = 1000, in_chans: int = 3, **overrides: Any) -> Backbone:
    """The variant of that name; `overrides` replace arguments of the network, `img_size` for one.

    Raises:
        UserError: no such variant.
    """
    options = pick_variant(name, VARIANTS, "SpectFormer") | {"num_classes": num_classes, "in_chans": in_chans}
    if "embed_dim" in options:
        return VanillaSpectFormer(**(options | overrides))
    return HierarchicalSpectFormer(**({"token_label": False} | options | overrides))
