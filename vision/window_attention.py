"""Attention of every pixel to its own k x k neighbourhood: the operator of MSA-Conv.

Zhang, Wang, Bian, Xiong, "TiC: Exploring Vision Transformer in Convolution" (arXiv 2310.04134). Letters in
shapes: B batch, C channels, H x W pixels, h heads, b side of a tile of queries, wy x wx the keys it sees.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision.windows import (
    Pair,
    add_windows,
    attention_gradient,
    count_tiles,
    crop_pixels,
    cut_windows,
    pad_pixels,
    traced,
)

BUDGET = 2**20  # numbers in the windows or the logits of the images that are worked on at once
TILES = (4, 7, 8)


class Geometry(NamedTuple):
    """Tile side of the queries, kernel (kh, kw), and how many queries a side share a centre (pooled keys)."""

    tile: int
    kernel: Pair
    pool: int
    heads: int
    scale: float

    @property
    def step(self) -> int:
        """Keys from a tile's window to the next one's."""
        return self.tile // self.pool

    @property
    def window(self) -> Pair:
        return self.step + self.kernel[0] - 1, self.step + self.kernel[1] - 1


def centred(kernel: int, dilation: int) -> int:
    """How far the window reaches before its pixel: (d * (k - 1)) // 2."""
    return dilation * (kernel - 1) // 2


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel: Pair, dilation: int = 1, heads: int = 1, pool: int = 1,
    dropout: float = 0.0, tile: int | None = None,
) -> Tensor:  # fmt: skip
    """softmax over the window of (q k * (C/h)**-0.5), times v: `[B, H, W, C]` three times -> `[B, H, W, C]`.

    Positions beyond the map have key 0 and value 0 and stay in the softmax. With `pool` = s, k and v are
    `[B, ceil(H/s), ceil(W/s), C]` and the query (y, x) sees the window centred at (y // s, x // s). A window
    that cannot be centred (dilation * (kernel - 1) odd) reaches one pixel further below and to the right.

    Queries are cut into b x b tiles, each with its patch of keys, and go through the fused attention with a
    band mask, a few images at a time; the gradient computes patches and weights anew. (With dropout, and on
    other devices than the CPU, all images go at once and autograd keeps the patches.) Dilation works on the
    d x d interleaved sub-maps.

    Args:
        dropout: on the attention weights.
        tile: b, by default chosen by the map's size.

    Source: paper; published layer, commit "C" (operator of section 2.2 of its formulas).
    """
    batch, height, width, channels = q.shape
    reach = tuple(centred(n, dilation) for n in kernel)
    if dilation > 1 and any(r % dilation for r in reach):
        return attend_simply(q, k, v, kernel, dilation, heads, pool, dropout)[0]
    d = dilation
    rows, columns = (height + pool * d - 1) // (pool * d), (width + pool * d - 1) // (pool * d)
    if d > 1:
        q = split_phases(pad_pixels(q, rows * pool * d, columns * pool * d), d, pool)
        k, v = (split_phases(pad_pixels(t, rows * d, columns * d), d, 1) for t in (k, v))
    size = (q.shape[1], q.shape[2])
    tile = tile or choose_tile(size, kernel, pool)
    geometry = Geometry(tile, kernel, pool, heads, (channels // heads) ** -0.5)
    n, m = count_tiles(size[0], tile), count_tiles(size[1], tile)
    border = tuple(r // d for r in reach)
    after = tuple(kern - 1 - b for kern, b in zip(kernel, border, strict=True))
    q = pad_pixels(q, n * tile, m * tile)
    below, right = (x * geometry.step - t for x, t in zip((n, m), k.shape[1:3], strict=True))
    pads = (0, 0, border[1], right + after[1], border[0], below + after[0])
    k, v = F.pad(k, pads), F.pad(v, pads)
    out = crop_pixels(attend_tiles(q, k, v, geometry, dropout), *size)
    return crop_pixels(merge_phases(out, batch, d, pool), height, width) if d > 1 else out


def split_phases(x: Tensor, d: int, pool: int) -> Tensor:
    """`[B, n*d*s, m*d*s, C]` -> `[B*d*d, n*s, m*s, C]`: the d*d interleaved sub-maps of s x s cells."""
    x = x.unflatten(2, (-1, d, pool)).unflatten(1, (-1, d, pool)).permute(0, 2, 5, 1, 3, 4, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(0, 2)


def merge_phases(x: Tensor, batch: int, d: int, pool: int) -> Tensor:
    """The inverse of `split_phases`."""
    x = x.unflatten(0, (batch, d, d)).unflatten(4, (-1, pool)).unflatten(3, (-1, pool))
    return x.permute(0, 3, 1, 4, 5, 2, 6, 7).flatten(4, 6).flatten(1, 3)


def choose_tile(size: Pair, kernel: Pair, pool: int) -> int:
    """The tile with the least work; one of fixed size where the map's is not known (a tracer)."""
    if torch.compiler.is_compiling() or not all(isinstance(n, int) for n in size):
        return 8 if max(kernel) > 3 else 4

    def work(tile: int) -> int:
        tiles = ((size[0] + tile - 1) // tile) * ((size[1] + tile - 1) // tile)
        step = tile // pool
        # 64 stands for moving a key, against one product with a query (measured)
        return tiles * (step + kernel[0] - 1) * (step + kernel[1] - 1) * (tile * tile + 64)

    return min((t for t in TILES if t % pool == 0), key=work)


def attend_tiles(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, dropout: float) -> Tensor:
    """Padded queries `[B, n*b, m*b, C]`, padded keys and values -> `[B, n*b, m*b, C]`."""
    if traced() or dropout or q.device.type != "cpu":
        mask = band_mask(geometry, q.device).to(q.dtype)
        return attend_images(q, k, v, mask, geometry, dropout)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Local.apply(q, k, v, geometry)
    return attend_in_chunks(q, k, v, geometry)


def attend_images(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, geometry: Geometry, dropout: float = 0.0) -> Tensor:
    n, m = q.shape[1] // geometry.tile, q.shape[2] // geometry.tile
    keys, values = (by_head(cut_windows(t, geometry.window, geometry.step), geometry.heads) for t in (k, v))
    out = F.scaled_dot_product_attention(
        by_head(tiles(q, geometry.tile), geometry.heads), keys, values, mask, dropout, scale=geometry.scale
    )
    return untile(out, q.shape[0], n, m, geometry.tile)


def tiles(x: Tensor, tile: int) -> Tensor:
    """`[B, n*b, m*b, C]` -> `[B, n, m, b, b, C]`."""
    return x.unflatten(2, (-1, tile)).unflatten(1, (-1, tile)).transpose(2, 3)


def by_head(x: Tensor, heads: int) -> Tensor:
    """`[B, n, m, y, x, C]` -> `[B*n*m, h, y*x, C/h]`."""
    return x.flatten(3, 4).flatten(0, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


def untile(x: Tensor, batch: int, n: int, m: int, tile: int) -> Tensor:
    """`[B*n*m, h, b*b, C/h]` -> `[B, n*b, m*b, C]`."""
    x = x.transpose(1, 2).reshape(batch, n, m, tile, tile, x.shape[1] * x.shape[3]).transpose(2, 3)
    return x.reshape(batch, n * tile, m * tile, x.shape[-1])


def band_mask(geometry: Geometry, device: torch.device | None = None) -> Tensor:
    """`[b*b, wy*wx]`: 0 where the key lies in the query's window, -inf elsewhere."""
    centre = torch.arange(geometry.tile, device=device) // geometry.pool
    inside = []
    for kernel, window in zip(geometry.kernel, geometry.window, strict=True):
        offset = torch.arange(window, device=device)[None] - centre[:, None]
        inside.append((offset >= 0) & (offset < kernel))
    both = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    return torch.zeros(both.shape, device=device).masked_fill(~both, float("-inf")).flatten(2).flatten(0, 1)


@functools.lru_cache(maxsize=64)
def kept_mask(geometry: Geometry, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return band_mask(geometry, torch.device("cpu")).to(dtype)


def chunks(q: Tensor, k: Tensor, geometry: Geometry) -> list[slice]:
    """Runs of images whose windows and logits keep within the budget."""
    count = (q.shape[1] // geometry.tile) * (q.shape[2] // geometry.tile) * geometry.window[0] * geometry.window[1]
    numbers = count * max(2 * k.shape[-1], geometry.heads * geometry.tile**2)
    images = max(1, BUDGET // numbers)
    return [slice(start, start + images) for start in range(0, len(q), images)]


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    mask = kept_mask(geometry, q.dtype)
    parts = chunks(q, k, geometry)
    if len(parts) == 1:
        return attend_images(q, k, v, mask, geometry)
    out = q.new_empty(q.shape)
    for part in parts:
        out[part] = attend_images(q[part], k[part], v[part], mask, geometry)
    return out


class _Local(torch.autograd.Function):
    """`attend_in_chunks` with its gradient, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
        out = attend_in_chunks(q, k, v, geometry)
        ctx.geometry = geometry
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        g: Geometry = ctx.geometry
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
        mask = kept_mask(g, wide)
        n, m = q.shape[1] // g.tile, q.shape[2] // g.tile

        def flat(x: Tensor) -> Tensor:
            return by_head(x, g.heads).flatten(0, 1).contiguous()

        def windows(x: Tensor, images: int) -> Tensor:
            """`[images*n*m*h, wy*wx, C/h]` -> `[images, n, m, wy, wx, C]`."""
            x = x.unflatten(0, (-1, g.heads)).transpose(1, 2).flatten(2)
            return x.view(images, n, m, *g.window, x.shape[-1])

        with torch.autocast("cpu", enabled=False):
            for part in chunks(q, k, g):
                images = len(q[part])
                rows, d_keys, d_values, _ = attention_gradient(
                    flat(tiles(q[part].to(wide), g.tile)),
                    flat(cut_windows(k[part].to(wide), g.window, g.step)),
                    flat(cut_windows(v[part].to(wide), g.window, g.step)),
                    mask,
                    flat(tiles(out[part].to(wide), g.tile)),
                    flat(tiles(grad[part].to(wide), g.tile)),
                    g.scale,
                )
                d_q[part] = untile(rows.unflatten(0, (-1, g.heads)), images, n, m, g.tile)
                d_k[part] = add_windows(windows(d_keys, images), (k.shape[1], k.shape[2]), g.step)
                d_v[part] = add_windows(windows(d_values, images), (k.shape[1], k.shape[2]), g.step)
        return d_q, d_k, d_v, None


def attend_simply(
    q: Tensor, k: Tensor, v: Tensor, kernel: Pair, dilation: int = 1, heads: int = 1, pool: int = 1,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`window_attention` written out, with the unscaled logits and the weights `[B, h, kh*kw, H, W]`.

    It holds every window of the map at once: for looking at the weights, and for windows that interleaving
    cannot split (an even kernel with dilation).
    """
    batch, height, width, channels = q.shape
    queries = q.permute(0, 3, 1, 2).unflatten(1, (heads, -1))  # [B, h, d, H, W]

    def gather(t: Tensor) -> Tensor:
        """`[B, H', W', C]` -> `[B, h, d, kh*kw, H, W]`."""
        reach = [centred(n, dilation) for n in kernel]
        after = [dilation * (n - 1) - r for n, r in zip(kernel, reach, strict=True)]
        padded = F.pad(t, (0, 0, reach[1], after[1], reach[0], after[0])).permute(0, 3, 1, 2)
        found = F.unfold(padded, kernel, dilation).view(batch, heads, -1, kernel[0] * kernel[1], *t.shape[1:3])
        if pool > 1:
            found = found.repeat_interleave(pool, 4).repeat_interleave(pool, 5)[..., :height, :width]
        return found

    logits = torch.einsum("bhdyx,bhdnyx->bhnyx", queries, gather(k))
    weights = F.dropout((logits * (channels // heads) ** -0.5).softmax(2), dropout)
    out = torch.einsum("bhnyx,bhdnyx->byxhd", weights, gather(v)).flatten(3)
    return out, logits, weights
