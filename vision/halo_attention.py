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
from torch.autograd.function import once_differentiable

from polyhead.errors import UserError
from vision.inference import PackedLinear, by_images
from vision.windows import attention_gradient, count_tiles, crop_pixels, cut_windows, pad_pixels, traced


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


def pointwise(layer: nn.Module, pixels: Tensor) -> Tensor:
    """A 1x1 convolution on `[B, H, W, C]`."""
    if isinstance(layer, nn.Conv2d):
        return F.linear(pixels, layer.weight[:, :, 0, 0], layer.bias)
    return layer(pixels)


def outer_sum(by_row: Tensor, by_column: Tensor) -> Tensor:
    """Row and column terms `[M, H, bs, bs, w]` -> `[M, H, bs*bs, w*w]`."""
    return (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)


def attend(q: Tensor, windows: Tensor, by_row: Tensor, by_column: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + row term + column term) v for every block.

    `[M, H, bs, bs, dk]`, `[M, w*w, H, dk + dv]`, twice `[M, H, bs, bs, w]` -> `[M, bs*bs, H, dv]`. On the CPU
    a few blocks at a time, whose logits stay in the cache: they are never in memory all at once, and the
    gradient computes them anew.
    """
    if traced() or q.device.type != "cpu":
        k, v = windows.transpose(1, 2).split([q.shape[-1], windows.shape[-1] - q.shape[-1]], dim=-1)
        bias = outer_sum(by_row, by_column)
        out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=bias, scale=scale)
        return out.transpose(1, 2)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, windows, by_row, by_column)):
        return _Attend.apply(q, windows, by_row, by_column, scale)
    return attend_in_chunks(q, windows, by_row, by_column, scale)


def chunks(q: Tensor, windows: Tensor) -> list[slice]:
    """Runs of blocks with about 2**19 logits."""
    logits = q.shape[1] * q.shape[2] * q.shape[3] * windows.shape[1]
    count = max(1, 2**19 // logits)
    return [slice(start, start + count) for start in range(0, len(q), count)]


def attend_in_chunks(q: Tensor, windows: Tensor, by_row: Tensor, by_column: Tensor, scale: float) -> Tensor:
    dk = q.shape[-1]
    out = q.new_empty(len(q), q.shape[2] * q.shape[3], q.shape[1], windows.shape[-1] - dk)
    for part in chunks(q, windows):
        kv, bias = windows[part].transpose(1, 2), outer_sum(by_row[part], by_column[part])
        part_out = F.scaled_dot_product_attention(
            q[part].flatten(2, 3), kv[..., :dk], kv[..., dk:], attn_mask=bias, scale=scale
        )
        out[part] = part_out.transpose(1, 2)
    return out


class _Attend(torch.autograd.Function):
    """`attend_in_chunks` with its gradient, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, windows: Tensor, by_row: Tensor, by_column: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        out = attend_in_chunks(q, windows, by_row, by_column, scale)
        ctx.save_for_backward(q, windows, by_row, by_column, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, windows, by_row, by_column, out = ctx.saved_tensors
        dk, window = q.shape[-1], by_row.shape[-1]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        grads = [torch.empty_like(t) for t in (q, windows, by_row, by_column)]
        with torch.autocast("cpu", enabled=False):
            for part in chunks(q, windows):
                kv = windows[part].to(wide).transpose(1, 2).flatten(0, 1)  # [m*H, w*w, dk + dv]
                d_q, d_k, d_v, d_logits = attention_gradient(
                    q[part].to(wide).flatten(2, 3).flatten(0, 1),
                    kv[..., :dk].contiguous(),
                    kv[..., dk:].contiguous(),
                    outer_sum(by_row[part].to(wide), by_column[part].to(wide)).flatten(0, 1),
                    out[part].to(wide).transpose(1, 2).flatten(0, 1),
                    grad[part].to(wide).transpose(1, 2).flatten(0, 1),
                    ctx.scale,
                )
                grads[0][part] = d_q.view(q[part].shape)
                d_windows = grads[1][part]
                d_windows[..., :dk] = d_k.unflatten(0, (-1, q.shape[1])).transpose(1, 2)
                d_windows[..., dk:] = d_v.unflatten(0, (-1, q.shape[1])).transpose(1, 2)
                square = d_logits.view(*by_row[part].shape[:4], window, window)
                grads[2][part] = square.sum(-1)
                grads[3][part] = square.sum(-2)
        return grads[0], grads[1], grads[2], grads[3], None


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
        self, dim: int, dim_out: int | None = None, feat_size: Any = None, stride: int = 1, num_heads: int = 8,
        dim_head: int | None = None, block_size: int = 8, halo_size: int = 3, qk_ratio: float = 1.0,
        qkv_bias: bool = False, avg_down: bool = False, scale_pos_embed: bool = False,
        mask_padding: bool = False, geometric_rel_pos: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        dim_out = dim_out or dim
        if block_size < 1 or halo_size < 0:
            raise UserError(f"halo attention: block {block_size} and halo {halo_size}: at least 1 and 0 are needed")
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
        self.q: nn.Module = nn.Conv2d(dim, num_heads * self.dim_k, 1, stride=self.query_stride, bias=qkv_bias)
        self.kv: nn.Module = nn.Conv2d(dim, num_heads * (self.dim_k + self.dim_v), 1, bias=qkv_bias)
        step = self.query_stride if geometric_rel_pos else 1
        self.pos_embed = RelativePosition(self.queries, self.window, self.dim_k, step)
        self.init_weights()

    def init_weights(self) -> None:
        for conv in (self.q, self.kv):
            assert isinstance(conv, nn.Conv2d)
            nn.init.trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
        nn.init.trunc_normal_(self.pos_embed.height_rel, std=self.scale)
        nn.init.trunc_normal_(self.pos_embed.width_rel, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        def images(pixels: Tensor) -> Tensor:
            part = pixels.permute(0, 3, 1, 2)
            q, windows = self.project(part)
            out = self.fold(attend(q, windows, *self.position(q, part), self.scale), part)
            return out.permute(0, 2, 3, 1)

        rows, columns = self.blocks(x)
        held = rows * columns * self.window**2 * self.num_heads * (self.dim_k + self.dim_v)
        return by_images(images, x.permute(0, 2, 3, 1), 2 * held).permute(0, 3, 1, 2)

    def pack(self) -> None:
        """For a deployed copy: projections with packed weights."""
        self.q, self.kv = PackedLinear(self.q), PackedLinear(self.kv)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, C, H, W]` -> queries `[M, H, bs, bs, dk]` and windows `[M, w*w, H, dk + dv]` of keys, values.

        M = B * blocks, blocks row-major. Channels are innermost all along, so that cutting the windows
        moves whole pixels (all heads at once).
        """
        b, bs, w, heads = self.block, self.queries, self.window, self.num_heads
        rows, columns = self.blocks(x)
        pixels = x.permute(0, 2, 3, 1)
        strided = pixels[:, :: self.query_stride, :: self.query_stride]
        if self.query_stride > 1:  # dense at once: the linear layer copies it anyway, an exporter asks if it must
            strided = strided.clone(memory_format=torch.contiguous_format)
        q = pointwise(self.q, strided)
        q = pad_pixels(q, rows * bs, columns * bs)
        q = q.reshape(x.shape[0], rows, bs, columns, bs, heads, self.dim_k).permute(0, 1, 3, 5, 2, 4, 6)
        kv = pointwise(self.kv, pixels)
        kv = pad_pixels(kv, rows * b, columns * b, (self.halo, self.halo))
        windows = cut_windows(kv, (w, w), b).view(-1, w * w, heads, self.dim_k + self.dim_v)
        return q.reshape(-1, heads, bs, bs, self.dim_k), windows

    def position(self, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the logits: a row term and a column term `[M, H, bs, bs, w]`."""
        by_row, by_column = self.pos_embed(q)
        if self.scale_pos_embed:
            by_row, by_column = by_row * self.scale, by_column * self.scale
        if self.mask_padding:
            rows, columns = self.blocks(x)
            # a key is padding if its row or its column is: the mask splits like the position term
            above = self.outside(rows, x.shape[2], q).repeat_interleave(columns, 0).repeat(x.shape[0], 1)
            beside = self.outside(columns, x.shape[3], q).repeat(x.shape[0] * rows, 1)
            by_row = by_row + above[:, None, None, None]
            by_column = by_column + beside[:, None, None, None]
        return by_row, by_column

    def outside(self, blocks: int, size: int, like: Tensor) -> Tensor:
        """`[blocks, w]` along one axis: 0 on the map, -inf beyond its ends."""
        at = torch.arange(self.window, device=like.device) - self.halo
        at = at + self.block * torch.arange(blocks, device=like.device)[:, None]
        return torch.zeros_like(at, dtype=like.dtype).masked_fill((at < 0) | (at >= size), float("-inf"))

    def blocks(self, x: Tensor) -> tuple[int, int]:
        return count_tiles(x.shape[2], self.block), count_tiles(x.shape[3], self.block)

    def fold(self, out: Tensor, x: Tensor) -> Tensor:
        """`[M, bs*bs, H, dv]` -> `[B, H*dv, ceil(H/stride), ceil(W/stride)]`, in channels_last memory."""
        rows, columns = self.blocks(x)
        bs, qs = self.queries, self.query_stride
        out = out.reshape(x.shape[0], rows, columns, bs, bs, self.num_heads * self.dim_v)
        out = out.transpose(2, 3).reshape(x.shape[0], rows * bs, columns * bs, self.num_heads * self.dim_v)
        out = crop_pixels(out, (x.shape[2] + qs - 1) // qs, (x.shape[3] + qs - 1) // qs).permute(0, 3, 1, 2)
        # cropped before the pooling: the last row of an odd map averages real positions only
        return F.avg_pool2d(out, 2, 2, ceil_mode=True) if self.pool else out

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The steps of `forward`, written out: what the fused form never holds.

        Returns `q_blocks` `[B*H, blocks, bs*bs, dk]`; `rel_logits` (before any scaling), `logits` and
        `attn` `[B*H, blocks, bs*bs, w*w]`, blocks row-major, key index u*w + v; `out` as `forward`.
        """
        q, windows = self.project(x)
        k, v = windows.transpose(1, 2).split([self.dim_k, self.dim_v], dim=-1)
        relative = outer_sum(*self.pos_embed(q))
        logits = self.scale * q.flatten(2, 3) @ k.transpose(2, 3) + outer_sum(*self.position(q, x))
        attn = logits.softmax(-1)

        def by_head(t: Tensor) -> Tensor:
            return t.unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(0, 1)

        named = {"q_blocks": q.flatten(2, 3), "rel_logits": relative, "logits": logits, "attn": attn}
        return {n: by_head(t) for n, t in named.items()} | {"out": self.fold((attn @ v).transpose(1, 2), x)}

    def received(self, x: Tensor) -> Tensor:
        """Attention each pixel receives, `[B, H, W]`: summed over queries and windows, mean over heads."""
        rows, columns = self.blocks(x)
        attn = self.maps(x)["attn"].unflatten(0, (x.shape[0], -1)).mean(1).sum(2)  # [B, blocks, w*w]
        size = (rows * self.block + 2 * self.halo, columns * self.block + 2 * self.halo)
        pasted = F.fold(attn.transpose(1, 2), size, self.window, stride=self.block)[:, 0]
        return pasted[:, self.halo : self.halo + x.shape[2], self.halo : self.halo + x.shape[3]]
