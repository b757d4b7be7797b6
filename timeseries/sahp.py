"""SAHP: the self-attentive Hawkes process (Zhang et al., ICML 2020), from its smallest module to the whole.

Every sequence has a row 0 (BOS, the beginning of observation) and a row an event; the state of row i is what is
known once event i has happened, and rules until event i + 1. That is `alignment="causal"`, a likelihood. The
published training loop scores event i with the state that has seen it (`alignment="official"`, kept for parity).

Times are in whatever unit the gaps are given in; intensities are per that unit.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyhead.errors import UserError
from timeseries.excitation import Excitation

Score = Literal["softmax", "exp_softmax"]
Variant = Literal["sahp", "easytpp"]
# exp of more overflows float32 before the softmax can normalise it
LARGEST_SCORE = 80.0
# Queries at a time, and up to how many rows
TILE, LONG = 32, 512


def _traced() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class States(NamedTuple):
    """What rules the intensity after each row.

    Attributes:
        start, converge, decay: `[..., D]` (or `[..., K]` for EasyTPP's cell), at once, in the long run, and how fast.
        jump: `[..., K, R]`, height of the exponential kernels of `Excitation`, or None.
        rate: `[R]`, their decay, or None.
    """

    start: Tensor
    converge: Tensor
    decay: Tensor
    jump: Tensor | None = None
    rate: Tensor | None = None

    def rows(self, index: Tensor | slice | tuple[Tensor | slice, Tensor | slice]) -> States:
        """The states of some rows. `index` addresses `[B, N]`, or the first axis."""
        jump = None if self.jump is None else self.jump[index]
        return States(self.start[index], self.converge[index], self.decay[index], jump, self.rate)


class Embedding(nn.Module):
    """Types, and time-shifted positions: `scale * E[k_i] + P_i` (section 4.1 of the paper).

    `P_i = [sin(i w_j + W_j dt_i); cos(i w_j + W_j dt_i)]`, all sines before all cosines, `w_j = 10000^(-2j/D)`.

    Args:
        types: K; row K of the table is BOS and padding.
        d_model: D, even.
        scaled: multiply types by sqrt(D).
    """

    frequencies: Tensor

    def __init__(self, types: int, d_model: int, scaled: bool) -> None:
        super().__init__()
        self.scale = math.sqrt(d_model) if scaled else 1.0
        # The padding row gets no gradient but is no zero either: it is a constant that stands for BOS
        self.types = nn.Embedding(types + 1, d_model, padding_idx=types)
        self.shift = nn.Linear(1, d_model // 2, bias=False)
        exponent = torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model)
        self.register_buffer("frequencies", exponent.exp(), persistent=False)

    def position(self, dt: Tensor, first: Tensor | int = 0) -> Tensor:
        """`[B, N]` gaps before each row -> `[B, N, D]`; `first` is the position of row 0."""
        place = torch.arange(dt.shape[1], device=dt.device) + (first if isinstance(first, int) else first[:, None])
        phase = place.to(dt.dtype)[..., None] * self.frequencies.to(dt.dtype) + self.shift(dt[..., None])
        return torch.cat([phase.sin(), phase.cos()], -1)

    def forward(self, dt: Tensor, types: Tensor, first: Tensor | int = 0) -> Tensor:
        return self.scale * self.types(types) + self.position(dt, first)


class Norm(nn.Module):
    """`a (x - mean) / std + b` with the unbiased deviation.

    The published 1e-6 on the deviation itself stands inside the root here: one fused kernel, the same numbers.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.unbiased = math.sqrt((d_model - 1) / d_model)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight * self.unbiased, self.bias, 1e-12)


class Attention(nn.Module):
    """Causal attention of `heads` heads.

    Args:
        score: `softmax`, or the published softmax of `exp(q.k) / sqrt(d)` (`exp_softmax`).
        output: a linear layer after the heads.
        dropout: of the attention weights.
    """

    def __init__(self, d_model: int, heads: int, score: Score, output: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.score, self.dropout = heads, score, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model) if output else nn.Identity()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, weights: list[Tensor] | None = None, cache: Cache | None = None
    ) -> Tensor:
        """`[B, N, D]` -> `[B, N, D]`.

        Args:
            mask: `[B, N, N]`, True where a query may look at a key; None is causal.
            weights: collects the attention `[B, H, N, N]`.
            cache: keys and values of earlier rows; `x` is then the next row of each sequence.
        """
        batch, rows, width = x.shape
        qkv = self.qkv(x).view(batch, rows, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k, v, mask = cache.extended(k, v)
        drop = self.dropout if self.training else 0.0
        # On a CPU tiles of small heads are quicker than the fused kernel, as long as they fit
        tiled = mask is None and not _traced() and (self.score == "exp_softmax" or (x.is_cpu and rows <= LONG))
        if weights is None and tiled:
            # Tiles of queries touch no key that lies after them
            tiles = [self._mix(q[:, :, a : a + TILE], k, v, None, drop, a)[0] for a in range(0, rows, TILE)]
            mixed = torch.cat(tiles, 2)
        elif weights is None and self.score == "softmax":
            allowed = None if mask is None else mask[:, None]
            mixed = F.scaled_dot_product_attention(q, k, v, allowed, drop, is_causal=mask is None)
        else:
            mixed, attention = self._mix(q, k, v, mask, drop)
            if weights is not None:
                weights.append(attention)
        return self.out(mixed.transpose(1, 2).reshape(batch, rows, width))

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, drop: float, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Values mixed for queries that begin at row `first`, and the weights."""
        rows = q.shape[2]
        if mask is None:
            k, v = k[:, :, : first + rows], v[:, :, : first + rows]
            place = torch.arange(k.shape[2], device=q.device)
            allowed = place <= place[first:, None]
        else:
            allowed = mask[:, None]
        score = q @ k.transpose(-1, -2)
        if self.score == "exp_softmax":
            score = score.clamp(max=LARGEST_SCORE).exp()
        score = (score / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf)
        attention = score.softmax(-1)
        return F.dropout(attention, drop) @ v, attention


class Cache:
    """Keys and values of one layer, for sequences of unequal length to which a row at a time is added.

    Args:
        rows: `[B]`, the place of the next row of each sequence, moved on by the caller.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """With rows `[B, H, N, d]` added, whole sequences at first and then a row of each; and the mask."""
        if self.k is None or self.v is None:
            self.k, self.v = k, v
            return k, v, None
        if int(self.rows.max()) >= self.k.shape[2]:
            room = max(16, self.k.shape[2] // 2)
            self.k, self.v = F.pad(self.k, (0, 0, 0, room)), F.pad(self.v, (0, 0, 0, room))
        at = torch.arange(len(self.rows), device=k.device)
        self.k[at, :, self.rows], self.v[at, :, self.rows] = k[:, :, 0], v[:, :, 0]
        there = torch.arange(self.k.shape[2], device=k.device) <= self.rows[:, None]
        return self.k, self.v, there[:, None]

    def keep(self, index: Tensor, rows: Tensor) -> None:
        """Only the sequences `index`, whose next rows have the places `rows`."""
        assert self.k is not None and self.v is not None
        self.k, self.v, self.rows = self.k[index], self.v[index], rows


class Block(nn.Module):
    """The published layer: `x + drop(Attn(N1 x))`, then `drop(x + drop(FFN(N2 x)))`."""

    def __init__(self, d_model: int, heads: int, score: Score, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(d_model), Norm(d_model)
        self.attention = Attention(d_model, heads, score, True, attention_dropout)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, weights: list[Tensor] | None = None, cache: Cache | None = None
    ) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), mask, weights, cache))
        inner = self.down(self.drop(F.gelu(self.up(self.norm2(x)), approximate="tanh")))
        return self.drop(x + self.drop(inner))


class PlainBlock(nn.Module):
    """EasyTPP's layer: attention and nothing beside it."""

    def __init__(self, d_model: int, heads: int, score: Score, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention = Attention(d_model, heads, score, False, attention_dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, weights: list[Tensor] | None = None, cache: Cache | None = None
    ) -> Tensor:
        return self.attention(x, mask, weights, cache)


class TanhCell(nn.Module):
    """The published code's intensity: D cells between a start and a converge point, read by a linear layer.

    `lambda_k(u) = softplus(W_k tanh(c + (s - c) exp(-w u)) + b_k)`, u the time since the row's event.
    """

    def __init__(self, d_model: int, types: int) -> None:
        super().__init__()
        self.states = nn.Linear(d_model, 3 * d_model)
        self.head = nn.Linear(d_model, types)

    def forward(self, x: Tensor) -> States:
        start, converge, decay = self.states(x).chunk(3, -1)
        start, converge = F.gelu(start, approximate="tanh"), F.gelu(converge, approximate="tanh")
        return States(start, converge, F.softplus(decay, beta=10))

    def intensity(self, states: States, u: Tensor) -> Tensor:
        start, converge, decay = (v[..., None, :] for v in states[:3])
        return F.softplus(self.head((converge + (start - converge) * (-decay * u[..., None]).exp()).tanh()))

    def bound(self, states: States, u: Tensor) -> Tensor:
        """No smaller than the intensity at any time from `u` `[...]` on: `[..., K]`.

        Each cell runs monotonically from its value at u to its converge point, so its largest contribution to a
        type is at one of the two ends; softplus is increasing.
        """
        now = (states.converge + (states.start - states.converge) * (-states.decay * u[..., None]).exp()).tanh()
        end = states.converge.tanh()
        largest = torch.maximum(now[..., None, :] * self.head.weight, end[..., None, :] * self.head.weight)
        return F.softplus(largest.sum(-1) + self.head.bias)


class TypeCell(nn.Module):
    """The paper's intensity as in EasyTPP, one cell a type.

    `lambda_k(u) = softplus_b(mu_k + (eta_k - mu_k) exp(-gamma_k u))`, softplus of a learned sharpness b_k.
    """

    def __init__(self, d_model: int, types: int) -> None:
        super().__init__()
        self.states = nn.Linear(d_model, 3 * types, bias=False)
        self.log_beta = nn.Parameter(torch.zeros(types))

    def forward(self, x: Tensor) -> States:
        start, converge, decay = self.states(x).chunk(3, -1)
        return States(F.gelu(start), F.gelu(converge), F.softplus(decay))

    def intensity(self, states: States, u: Tensor) -> Tensor:
        start, converge, decay = (v[..., None, :] for v in states[:3])
        return self._rate(converge + (start - converge) * (-decay * u[..., None]).exp())

    def bound(self, states: States, u: Tensor) -> Tensor:
        """As `TanhCell.bound`."""
        now = states.converge + (states.start - states.converge) * (-states.decay * u[..., None]).exp()
        return self._rate(torch.maximum(now, states.converge))

    def _rate(self, value: Tensor) -> Tensor:
        beta = self.log_beta.exp()
        return F.softplus(beta * value) / beta


class SAHP(nn.Module):
    """The whole: rows to states, states to intensities.

    Args:
        types: K, the number of event types.
        d_model: D, even and divisible by `heads`.
        heads: H.
        layers: how often the one layer is applied (`sahp`), or how many there are (`easytpp`).
        dropout: after attention and inside and after the feed-forward network.
        attention_dropout: of the attention weights (the published code has 0.1 whatever `dropout` is).
        score: see `Attention`; the published one is `exp_softmax`.
        variant: `sahp` is the published code, `easytpp` the library's model of the same name.
        rates: kernels of `Excitation`; 0 is the published model.
        norm: a norm after each layer (`easytpp` only).

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self, types: int, d_model: int = 16, heads: int = 8, layers: int = 4, dropout: float = 0.1,
        attention_dropout: float = 0.1, score: Score = "softmax", variant: Variant = "sahp", rates: int = 0,
        norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if types < 1 or layers < 1:
            raise UserError(f"SAHP needs at least one type and one layer, not {types} and {layers}")
        if d_model % 2 or d_model % heads:
            raise UserError(f"model.d_model is {d_model}: it must be even and divisible by the {heads} heads")
        published = variant == "sahp"
        block, cell = (Block, TanhCell) if published else (PlainBlock, TypeCell)
        self.kinds, self.d_model, self.layers = types, d_model, layers
        self.embedding = Embedding(types, d_model, scaled=published)
        # The published code applies the same weights in every layer
        count = 1 if published else layers
        self.blocks = nn.ModuleList(block(d_model, heads, score, dropout, attention_dropout) for _ in range(count))
        self.norm = nn.LayerNorm(d_model) if norm and not published else None
        self.cell: TanhCell | TypeCell = cell(d_model, types)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        if not published:
            with torch.no_grad():
                self.embedding.types.weight[types] = 0
        self.excitation = Excitation(d_model, types, rates) if rates else None

    def no_weight_decay(self) -> set[str]:
        """Weights whose zero means nothing."""
        return {"excitation.raw", "excitation.shared"}

    def hidden(
        self, dt: Tensor, types: Tensor, mask: Tensor | None = None, first: Tensor | int = 0,
        weights: list[Tensor] | None = None, caches: list[Cache] | None = None,
    ) -> Tensor:  # fmt: skip
        """The encoder: `[B, N]` gaps before the rows and types -> `[B, N, D]`. See `Attention` and `Embedding`."""
        x = self.embedding(dt, types, first)
        for layer in range(self.layers):
            block = self.blocks[layer % len(self.blocks)]
            x = block(x, mask, weights, caches[layer] if caches else None)
            x = x if self.norm is None else self.norm(x)
        return x

    def forward(
        self, dt: Tensor, types: Tensor, mask: Tensor | None = None, first: Tensor | int = 0,
        weights: list[Tensor] | None = None,
    ) -> States:  # fmt: skip
        """The states after every row.

        Args:
            dt: `[B, N]`, the gap before each row; 0 for BOS.
            types: `[B, N]` int64, 0 to K - 1; K for BOS and padding, which lies after all events.
            mask, first, weights: see `hidden`.
        """
        x = self.hidden(dt, types, mask, first, weights)
        states = self.cell(x)
        if self.excitation is not None:
            jump, rate = self.excitation(x, self.excitation.traces(dt, types))
            states = states._replace(jump=jump, rate=rate)
        return states

    def intensity(self, states: States, u: Tensor) -> Tensor:
        """Intensities `[..., M, K]` at times `u` `[..., M]` after the rows of `states`."""
        rate = self.cell.intensity(states, u)
        if states.jump is None or states.rate is None:
            return rate
        kernel = (-u[..., None] * states.rate).exp()
        return rate + torch.einsum("...mr,...kr->...mk", kernel, states.jump)

    def bound(self, states: States, u: Tensor) -> Tensor:
        """`[..., K]`: no smaller than the intensity at any time from `u` `[...]` after the rows on."""
        rate = self.cell.bound(states, u)
        if states.jump is None or states.rate is None:
            return rate
        return rate + torch.einsum("...r,...kr->...k", (-u[..., None] * states.rate).exp(), states.jump)
