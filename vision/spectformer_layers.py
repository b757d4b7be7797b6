"""The parts that both SpectFormer architectures are built from; see `vision.spectformer`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from polyhead.errors import UserError
from vision.common import captured
from vision.inference import pack_linears
from vision.spectral_gate import SpectralGate, resize_filter

Size = int | Sequence[int]


def pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def drop(rate: float) -> nn.Module:
    return DropPath(rate) if rate else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, `[B, N, C]` -> `[B, N, C]`.

    `joint` keeps one projection `qkv`, otherwise `q` and `kv` as in the hierarchical models; `to_deploy` of
    the network joins them.
    """

    def __init__(self, dim: int, num_heads: int, joint: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"spectformer: {dim} channels cannot be split into {num_heads} heads")
        self.num_heads, self.joint = num_heads, joint
        if joint:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, heads, N, C / heads]`."""
        qkv = self.qkv(x) if self.joint else torch.cat([self.q(x), self.kv(x)], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """Attention each token receives, `[B, N]`: the mean over heads and queries."""
        q, k, _ = self.heads(x)
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))

    def join(self) -> None:
        """One product in place of the two of `q` and `kv`."""
        if self.joint:
            return
        self.qkv = nn.Linear(self.q.in_features, 3 * self.q.in_features).to(self.q.weight)
        self.qkv.weight.data = torch.cat([self.q.weight, self.kv.weight]).detach()
        self.qkv.bias.data = torch.cat([self.q.bias, self.kv.bias]).detach()
        self.joint = True
        del self.q, self.kv


class ClassAttention(nn.Module):
    """The first entry of `[B, 1 + N, C]` attends to all entries -> `[B, 1, C]`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(x[:, :1]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """Attention of the class entry on the N tokens, `[B, N]`, mean over heads."""
        q, k, _ = self.heads(x)
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1)


class Backbone(nn.Module):
    """What both architectures share: initialisation, other image sizes, explanation."""

    num_classes: int
    in_chans: int
    num_features: int
    head: nn.Module

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def new_classifier(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        layer = nn.Linear(self.num_features, num_classes)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer.to(next(self.parameters()).device)

    def gates(self) -> dict[str, SpectralGate]:
        return {n: m for n, m in self.named_modules() if isinstance(m, SpectralGate)}

    def settle(self) -> None:
        """For a deployed copy: linear layers packed, the gates' weights kept as they are used."""
        pack_linears(self)
        for gate in self.gates().values():
            gate.freeze()

    def resize_state(self, state: Mapping[str, Tensor], method: str = "bicubic") -> dict[str, Tensor]:
        """A state dict of this network at another image size, with filters and positions resized.

        `bicubic` is the published conversion; `spectrum` for the gates see `resize_filter`.
        """
        resized = dict(state)
        for name, gate in self.gates().items():
            key = f"{name}.complex_weight"
            if key in resized:
                resized[key] = resize_filter(resized[key], gate.grid, method)
        return resized

    def no_weight_decay(self) -> set[str]:
        """Biases, norms and the positional embedding; spectral weights are decayed, as published."""
        return {n for n, p in self.named_parameters() if p.ndim <= 1 or n == "pos_embed"}

    def grids(self, x: Tensor) -> list[tuple[int, int]]:
        """Rows and columns of the tokens of an image batch, of each stage."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.no_grad()
    def attention_maps(self, x: Tensor) -> dict[str, Tensor]:
        """Per attention layer, by its name, the attention each token receives: `[B, h, w]`.

        The hierarchical class attention (`post_network.0.attn`) says what the class token looks at; the
        other layers are means over heads and queries.
        """
        found = captured(self, x, (Attention, ClassAttention), lambda layer, x: layer.weights(x))
        by_count = {math.prod(grid): grid for grid in self.grids(x)}
        return {name: w.unflatten(1, by_count[w.shape[1]]) for name, w in found.items()}
