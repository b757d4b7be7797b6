"""Blocked local attention with a halo: the layer of HaloNet.

Vaswani et al., CVPR 2021 (arXiv 2103.12731), section 2; parameters, channel order and padding are those of
timm's `HaloAttn`. Letters in shapes: B batch, M = B * blocks, H heads, b block, h halo, w = b + 2h window,
bs side of a block of queries (b, or b/2 when the queries are strided), dk and dv width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import UserError


def round_channels(value: float, floor: float = 0.9) -> int:
    """The multiple of 8 nearest to `value`, at least 8 and at least `floor * value`."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < floor * value else rounded


class RelativePosition(nn.Module):
    """Row and column embeddings of a key's place in the window, `[2w - 1, dk]` each, shared by the heads.

    A query (y, x) of a block and a key (u, v) of its window get <q, height_rel[w-1+u-y*step]> +
    <q, width_rel[w-1+v-x*step]>. `step` 1 is the published index, also for strided queries, where it is
    then no function of the true displacement; the query stride makes it one (for models trained by us).
    """

    rows: Tensor

    def __init__(self, queries: int, window: int, dim_head: int, step: int = 1) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head))
        rows = window - 1 + torch.arange(window)[None] - step * torch.arange(queries)[:, None]
        self.register_buffer("rows", rows, persistent=False)  # [bs, w]

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """`[M, H, bs, bs, dk]` queries -> the row term `[M, H, bs, bs, w]` and the column term, alike."""
        by_row = torch.einsum("mhyxd,yud->mhyxu", q, self.height_rel[self.rows].to(q.dtype))
        by_column = torch.einsum("mhyxd,xvd->mhyxv", q, self.width_rel[self.rows].to(q.dtype))
        return by_row.contiguous(), by_column.contiguous()


class HaloAttention(nn.Module):
    """Blocked local attention: each block of queries attends to its own block and a halo around it.

    `[B, dim, H, W]` -> `[B, dim_out, ceil(H/stride), ceil(W/stride)]`, any H and W: q, k and v are padded
    with zeros to a multiple of the block and the output is cropped. Padding keys, at the map's border too,
    have key and value zero and stay in the softmax, as published; `mask_padding` leaves them out.

    Args:
        stride: 2 attends with every second query (even block) or averages the output 2 x 2 (odd block, or
            `avg_down`).
        dim_head: width of a head's queries and keys; by default `dim_out * qk_ratio`, rounded to 8, over
            the heads. A head's values have `dim_out / num_heads` channels.
        scale_pos_embed: the position term is scaled by dk**-0.5 as the content term is.
        geometric_rel_pos: strided queries index the embeddings by true displacement (not the published way).
        feat_size: accepted for timm's signature; it has no effect.

    Source: paper, section 2; numerically timm's `HaloAttn`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: Any = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        mask_padding: bool = False,
        geometric_rel_pos: bool = False,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        if dim_out % num_heads:
            raise UserError(f"halo attention: {dim_out} channels cannot be split into {num_heads} heads")
        if stride not in (1, 2):
            raise UserError(f"halo attention: stride must be 1 or 2, got {stride}")
        self.block, self.halo, self.stride = block_size, halo_size, stride
        self.window = block_size + 2 * halo_size
        self.num_heads = num_heads
        self.dim_k = dim_head or round_channels(dim_out * qk_ratio) // num_heads
        self.dim_v = dim_out // num_heads
        self.scale = self.dim_k**-0.5
        self.scale_pos_embed, self.mask_padding = scale_pos_embed, mask_padding
        self.pool = stride == 2 and (avg_down or block_size % 2 == 1)
        self.query_stride = stride if not self.pool else 1
        self.queries = block_size // self.query_stride  # side of a block of queries
        self.q = nn.Conv2d(dim, num_heads * self.dim_k, 1, stride=self.query_stride, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, num_heads * (self.dim_k + self.dim_v), 1, bias=qkv_bias)
        step = self.query_stride if geometric_rel_pos else 1
        self.pos_embed = RelativePosition(self.queries, self.window, self.dim_k, step)
        self.init_weights()

    def init_weights(self) -> None:
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
        nn.init.trunc_normal_(self.pos_embed.height_rel, std=self.scale)
        nn.init.trunc_normal_(self.pos_embed.width_rel, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        by_row, by_column = self.pos_embed(q)
        if self.scale_pos_embed:
            by_row, by_column = by_row * self.scale, by_column * self.scale
        bias = by_row[..., :, None] + by_column[..., None, :]
        if self.mask_padding:
            bias = bias + self.padding_mask(x, bias.dtype)[:, None, None, None]
        out = F.scaled_dot_product_attention(
            q.flatten(2, 3), k, v, attn_mask=bias.flatten(4).flatten(2, 3), scale=self.scale
        )
        return self.fold(out, x)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, C, H, W]` -> queries `[M, H, bs, bs, dk]`, keys `[M, H, w*w, dk]`, values `[M, H, w*w, dv]`.

        M = B * blocks, blocks row-major. Channels are innermost all along, so that cutting the windows
        moves whole pixels (all heads at once); keys and values are then strided views of the windows.
        """
        b, bs, w, heads = self.block, self.queries, self.window, self.num_heads
        rows, columns = self.blocks(x)
        pixels = x.permute(0, 2, 3, 1)
        strided = pixels[:, :: self.query_stride, :: self.query_stride]
        q = F.linear(strided, self.q.weight[:, :, 0, 0], self.q.bias)
        q = pad_to(q, rows * bs, columns * bs)
        q = q.reshape(x.shape[0], rows, bs, columns, bs, heads, self.dim_k).permute(0, 1, 3, 5, 2, 4, 6)
        kv = F.linear(pixels, self.kv.weight[:, :, 0, 0], self.kv.bias)
        kv = pad_to(kv, rows * b, columns * b, self.halo)
        windows = kv.unfold(1, w, b).unfold(2, w, b).permute(0, 1, 2, 4, 5, 3)
        windows = windows.reshape(-1, w * w, heads, self.dim_k + self.dim_v).transpose(1, 2)
        k, v = windows.split([self.dim_k, self.dim_v], dim=-1)
        return q.reshape(-1, heads, bs, bs, self.dim_k), k, v

    def blocks(self, x: Tensor) -> tuple[int, int]:
        # (n + b - 1) // b and not -(-n // b): integer division truncates in ONNX
        return (x.shape[2] + self.block - 1) // self.block, (x.shape[3] + self.block - 1) // self.block

    def fold(self, out: Tensor, x: Tensor) -> Tensor:
        """`[M, H, bs*bs, dv]` -> `[B, H*dv, ceil(H/stride), ceil(W/stride)]`, in channels_last memory."""
        rows, columns = self.blocks(x)
        bs, qs = self.queries, self.query_stride
        out = out.transpose(1, 2).reshape(x.shape[0], rows, columns, bs, bs, self.num_heads * self.dim_v)
        out = out.transpose(2, 3).reshape(x.shape[0], rows * bs, columns * bs, self.num_heads * self.dim_v)
        height, width = (x.shape[2] + qs - 1) // qs, (x.shape[3] + qs - 1) // qs
        if not none(rows * bs - height, columns * bs - width):
            # gathered, not sliced: an exporter would fix the sizes to know whether a slice is still dense
            out = out.index_select(1, torch.arange(height, device=x.device))
            out = out.index_select(2, torch.arange(width, device=x.device))
        out = out.permute(0, 3, 1, 2)
        # cropped before the pooling: the last row of an odd map averages real positions only
        return F.avg_pool2d(out, 2, 2, ceil_mode=True) if self.pool else out

    def padding_mask(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[M, w, w]`: 0 on the map, -inf on keys that are padding."""
        rows, columns = self.blocks(x)
        real = x.new_ones(1, x.shape[2], x.shape[3], 1)
        real = pad_to(real, rows * self.block, columns * self.block, self.halo)[..., 0]
        real = real.unfold(1, self.window, self.block).unfold(2, self.window, self.block)
        real = real.reshape(1, -1, self.window, self.window).expand(x.shape[0], -1, -1, -1).flatten(0, 1)
        return torch.zeros_like(real, dtype=dtype).masked_fill(real == 0, float("-inf"))

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The steps of `forward`, written out: what the fused form never holds.

        Returns `q_blocks` `[B*H, blocks, bs*bs, dk]`; `rel_logits` (before any scaling), `logits` and
        `attn` `[B*H, blocks, bs*bs, w*w]`, blocks row-major, key index u*w + v; `out` as `forward`.
        """
        q, k, v = self.project(x)
        by_row, by_column = self.pos_embed(q)
        relative = (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
        q = q.flatten(2, 3)
        logits = self.scale * q @ k.transpose(2, 3) + relative * (self.scale if self.scale_pos_embed else 1)
        if self.mask_padding:
            logits = logits + self.padding_mask(x, logits.dtype).flatten(1)[:, None, None]
        attn = logits.softmax(-1)

        def by_head(t: Tensor) -> Tensor:
            return t.unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(0, 1)

        named = {"q_blocks": q, "rel_logits": relative, "logits": logits, "attn": attn}
        return {n: by_head(t) for n, t in named.items()} | {"out": self.fold(attn @ v, x)}

    def received(self, x: Tensor) -> Tensor:
        """Attention each pixel receives, `[B, H, W]`: summed over queries and windows, mean over heads."""
        rows, columns = self.blocks(x)
        attn = self.maps(x)["attn"].unflatten(0, (x.shape[0], -1)).mean(1).sum(2)  # [B, blocks, w*w]
        size = (rows * self.block + 2 * self.halo, columns * self.block + 2 * self.halo)
        pasted = F.fold(attn.transpose(1, 2), size, self.window, stride=self.block)[:, 0]
        return pasted[:, self.halo : self.halo + x.shape[2], self.halo : self.halo + x.shape[3]]


def pad_to(pixels: Tensor, height: int, width: int, halo: int = 0) -> Tensor:
    """`[B, H, W, C]` -> zeros below and to the right up to height x width, then `halo` on every side."""
    below, right = height - pixels.shape[1], width - pixels.shape[2]
    if halo == 0 and none(below, right):
        return pixels
    return F.pad(pixels, (0, 0, halo, halo + right, halo, halo + below))


def none(below: int, right: int) -> bool:
    """Whether there is certainly nothing to pad or crop. A tracer's sizes are no ints: it keeps the step."""
    return isinstance(below, int) and isinstance(right, int) and below == right == 0
