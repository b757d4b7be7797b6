"""Multi-variate parallel attention (MVPA), exact, in memory linear in the number of tokens.

Tokens are (step, channel) pairs, n = t * C + c. With d the head width, the logit of query n and key n' is

    [ W(t, t') q_n . k_n'  +  time[n, t - t']  +  chan[n, |c - c'|] ] / sqrt(d),    t' <= t

where W is 1 inside the local window and for the last step's queries, else 0: beyond the window a key still
counts through its time and channel terms, whose logits are a sum. Its weights are therefore a product of two
small vectors, exp(time) and exp(chan), and only keys inside the window need a score of their own.

`attend` works through blocks of query steps and keeps, for the backward pass, q, k, v, the two score tables and
one log-sum-exp a query: O(N (T + C + d)). `attend_dense` is the formula as it stands, for exporters (sizes may
vary) and for looking at weights.

Shapes: B batch, H query heads, G key-value heads, r = H / G, T steps, C channels, N = T C, d head width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Rows (steps x grouped heads x channels) that one block of queries should have at least
ROWS = 96
MAX_STEPS = 16


class Scores(NamedTuple):
    """What attention is computed from, scaled by 1/sqrt(d) where it enters a logit.

    Attributes:
        q: `[B, G, T, r*C, d]`, content queries with their bias, scaled.
        k, v: `[B, G, N, d]`.
        time: `[B, G, T, r*C, T]`, column j is the score at a distance of T-1-j steps.
        chan: `[B, G, T, r*C, C]`, column j is the score of channel j.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    time: Tensor
    chan: Tensor


def block_steps(steps: int, rows: int, window: int) -> list[tuple[int, int]]:
    """Ranges of query steps that are worked through together; the last step stands alone where it must.

    Args:
        steps: T.
        rows: r * C, queries a step.
        window: segments back that content reaches; with T <= window + 1 the last step is like the others.
    """
    size = max(1, min(MAX_STEPS, -(-ROWS // rows)))
    alone = steps > window + 1
    end = steps - 1 if alone else steps
    ranges = [(start, min(start + size, end)) for start in range(0, end, size)]
    return [*ranges, (steps - 1, steps)] if alone else ranges


class _Block:
    """One block of query steps: its scores split into far keys (a product) and near ones."""

    def __init__(self, scores: Scores, first: int, last: int, window: int, content: bool) -> None:
        groups = scores.q.shape[0] * scores.q.shape[1]
        self.steps, self.rows, self.dim = last - first, scores.q.shape[3], scores.q.shape[4]
        self.total, self.channels = scores.time.shape[4], scores.chan.shape[4]
        self.groups, self.first, self.last = groups, first, last
        self.content = content
        everything = last == self.total
        # Keys before `near` are beyond every query's window
        self.near = 0 if everything and self.total > window + 1 else max(0, first - window)
        if not content:
            self.near = 0 if self.steps > 1 or first == 0 else first
        self.window = window
        # Of the near steps, so many are beyond the window of the block's later queries
        self.ragged = 0 if self.near == 0 and everything else max(0, last - 1 - window - self.near)
        self.scores = scores

    def rows_of(self, x: Tensor) -> Tensor:
        """`[B, G, T, rows, *]` -> `[B*G, steps, rows, *]` of this block, a view."""
        return x[:, :, self.first : self.last].flatten(0, 1)

    def keys_of(self, x: Tensor, start: int, stop: int) -> Tensor:
        """`[B, G, N, d]` -> `[B*G, keys, d]` of the steps from start to stop, a view."""
        return x.flatten(0, 1)[:, start * self.channels : stop * self.channels]

    def time_of(self) -> Tensor:
        """`[B*G, steps, rows, last]`: the time score of each key step, -inf where it is in the future."""
        table = self.rows_of(self.scores.time)
        if self.steps == 1:
            return table[..., self.total - self.last :]
        shifted = table.new_full((*table.shape[:3], self.last), -math.inf)
        for i in range(self.steps):
            reach = self.first + i + 1
            shifted[:, i, :, :reach] = table[:, i, :, self.total - reach :]
        return shifted

    def near_logits(self, time: Tensor, chan: Tensor) -> Tensor:
        """`[B*G, steps, rows, near keys, C]`."""
        logits = time[..., self.near :, None] + chan[..., None, :]
        if not self.content:
            return logits
        flat = logits.view(self.groups, self.steps * self.rows, -1)
        q = self.rows_of(self.scores.q).flatten(1, 2)
        k = self.keys_of(self.scores.k, self.near, self.last)
        if not self.ragged:
            flat.baddbmm_(q, k.transpose(1, 2))
        else:
            content = torch.bmm(q, k.transpose(1, 2)).view(logits.shape)
            self.mask(content)
            logits += content
        return logits

    def mask(self, near: Tensor) -> None:
        """Zero, in place, what lies beyond each query's own window."""
        for i in range(self.steps):
            beyond = self.first + i - self.window - self.near
            if beyond > 0 and not (self.last == self.total and self.near == 0):
                near[:, i, :, :beyond] = 0

    def far_factors(self, time: Tensor, chan: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """exp(time + max chan - shift) `[.., near]` and exp(chan - max chan) `[.., C]`; their product is exp(logit)."""
        top = chan.amax(-1, keepdim=True)
        return (time[..., : self.near] + (top - shift)).exp_(), (chan - top).exp_()

    def forward(self, keep: _Dropout | None) -> tuple[Tensor, Tensor]:
        """Output `[B*G, steps*rows, d]` and log-sum-exp `[B*G, steps, rows, 1]`."""
        time, chan = self.time_of(), self.rows_of(self.scores.chan)
        near = self.near_logits(time, chan)
        shift = near.amax((-2, -1), keepdim=True).squeeze(-1)
        if self.near:
            shift = torch.maximum(shift, time[..., : self.near].amax(-1, keepdim=True) + chan.amax(-1, keepdim=True))
        near.sub_(shift[..., None]).exp_()
        total = near.sum((-2, -1), keepdim=True).squeeze(-1)
        flat = near.view(self.groups, self.steps * self.rows, -1)
        if keep is not None:
            flat *= keep.mask(flat, self.first, "near")
        out = torch.bmm(flat, self.keys_of(self.scores.v, self.near, self.last))
        if self.near:
            a, b = self.far_factors(time, chan, shift)
            total += a.sum(-1, keepdim=True) * b.sum(-1, keepdim=True)
            far = (a[..., None] * b[..., None, :]).view(self.groups, self.steps * self.rows, -1)
            if keep is not None:
                far *= keep.mask(far, self.first, "far")
            out.baddbmm_(far, self.keys_of(self.scores.v, 0, self.near))
        out /= total.view(self.groups, -1, 1)
        return out, shift + total.log()

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor, sums: Scores, keep: _Dropout | None) -> None:
        """Add this block's share to the gradients `sums`, given those of its output `[B*G, steps*rows, d]`."""
        time, chan = self.time_of(), self.rows_of(self.scores.chan)
        delta = (grad * out).sum(-1, keepdim=True)
        shape = (self.groups, self.steps, self.rows, -1, self.channels)
        d_time = time.new_zeros(time.shape)
        near = self.near_logits(time, chan).sub_(lse[..., None]).exp_().view(self.groups, self.steps * self.rows, -1)
        d_near = self._logit_gradient(near, grad, delta, self.near, self.last, sums, keep, "near")
        square = d_near.view(shape)
        d_time[..., self.near :] = square.sum(-1)
        d_chan = square.sum(-2)
        if self.content:
            if self.ragged:
                self.mask(square)
            q = self.rows_of(self.scores.q).flatten(1, 2)
            self.rows_of(sums.q).flatten(1, 2).copy_(
                torch.bmm(d_near, self.keys_of(self.scores.k, self.near, self.last))
            )
            self.keys_of(sums.k, self.near, self.last).baddbmm_(d_near.transpose(1, 2), q)
        if self.near:
            a, b = self.far_factors(time, chan, lse)
            far = (a[..., None] * b[..., None, :]).view(self.groups, self.steps * self.rows, -1)
            square = self._logit_gradient(far, grad, delta, 0, self.near, sums, keep, "far").view(shape)
            d_time[..., : self.near] = square.sum(-1)
            d_chan += square.sum(-2)
        self.rows_of(sums.chan).copy_(d_chan)
        target = self.rows_of(sums.time)
        for i in range(self.steps):
            reach = self.first + i + 1
            target[:, i, :, self.total - reach :] = d_time[:, i, :, :reach]

    def _logit_gradient(
        self, p: Tensor, grad: Tensor, delta: Tensor, start: int, stop: int, sums: Scores,
        keep: _Dropout | None, part: str,
    ) -> Tensor:  # fmt: skip
        """From weights p to the gradient of their logits, in place of dP; adds the gradient of the values."""
        d_p = torch.bmm(grad, self.keys_of(self.scores.v, start, stop).transpose(1, 2))
        used = p
        if keep is not None:
            mask = keep.mask(p, self.first, part)
            used = p * mask
            d_p *= mask
        self.keys_of(sums.v, start, stop).baddbmm_(used.transpose(1, 2), grad)
        return d_p.sub_(delta).mul_(p)


class _Dropout:
    """Elementwise dropout of attention weights whose masks are drawn again in the backward pass."""

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        self.p, self.seed, self.device = p, seed, device

    def mask(self, like: Tensor, first: int, part: str) -> Tensor:
        source = torch.Generator(self.device).manual_seed(self.seed + 2 * first + (part == "far"))
        drawn = torch.rand(like.shape, generator=source, device=like.device, dtype=like.dtype)
        return (drawn >= self.p).to(like.dtype) / (1 - self.p)


class _Attend(torch.autograd.Function):
    """Attention block by block; the backward pass computes the weights again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, time: Tensor, chan: Tensor,
        window: int, content: bool, dropout: float, seed: int,
    ) -> Tensor:  # fmt: skip
        scores = Scores(q, k, v, time, chan)
        batch, groups, steps, rows, dim = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(batch * groups, steps, rows, 1)
        keep = _Dropout(dropout, seed, q.device) if dropout else None
        for first, last in block_steps(steps, rows, window):
            block = _Block(scores, first, last, window, content)
            part, lse[:, first:last] = block.forward(keep)
            out.flatten(0, 1)[:, first:last] = part.view(batch * groups, last - first, rows, dim)
        ctx.save_for_backward(q, k, v, time, chan, out, lse)
        ctx.settings = (window, content, keep)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, time, chan, out, lse = ctx.saved_tensors
        window, content, keep = ctx.settings
        scores = Scores(q, k, v, time, chan)
        sums = Scores(*(torch.zeros_like(s, memory_format=torch.contiguous_format) for s in scores))
        grad = grad.contiguous()
        for first, last in block_steps(q.shape[2], q.shape[3], window):
            block = _Block(scores, first, last, window, content)
            share, given = (block.rows_of(x).flatten(1, 2) for x in (grad, out))
            block.backward(share, given, lse[:, first:last], sums, keep)
        return *sums, None, None, None, None


def attend(scores: Scores, window: int, content: bool = True, dropout: float = 0.0) -> Tensor:
    """Attention outputs `[B, G, T, r*C, d]`, exact, in blocks of query steps.

    Args:
        scores: see `Scores`.
        window: segments back, beside its own, that a query sees the content of.
        content: without it only the time and channel terms count.
        dropout: of single weights.
    """
    # One draw from the global generator a call: training stays reproducible and resumable
    seed = int(torch.randint(2**62, (1,))) if dropout else 0
    kind = scores.v.dtype
    # Sums over thousands of keys are no work for half precision
    wide = torch.float64 if kind == torch.float64 else torch.float32
    parts = [s.to(wide).contiguous() for s in scores]
    with torch.autocast(scores.v.device.type, enabled=False):
        return _Attend.apply(*parts, window, content, dropout, seed).to(kind)


def dense_weights(scores: Scores, window: int, content: bool = True) -> Tensor:
    """Attention weights `[B, G, T, r*C, T, C]` by the formula, for any T and C that a tracer may leave open."""
    steps = torch.arange(scores.time.shape[4], device=scores.q.device)
    distance = steps[:, None] - steps[None, :]
    last = steps.shape[0] - 1
    index = (last - distance).clamp(min=0, max=last)
    time = scores.time.gather(4, index[:, None].expand_as(scores.time))
    logits = time[..., None] + scores.chan[..., None, :]
    if content:
        inside = (distance.abs() <= window) | (steps == last)[:, None]
        product = torch.einsum("bgtrd,bgnd->bgtrn", scores.q, scores.k).reshape(logits.shape)
        logits = logits + product * inside[:, None, :, None].to(product.dtype)
    logits = logits.masked_fill((distance < 0)[:, None, :, None], torch.finfo(logits.dtype).min)
    return logits.flatten(-2).softmax(-1).reshape(logits.shape)


def attend_dense(scores: Scores, window: int, content: bool = True) -> Tensor:
    """As `attend`, with every weight in memory at once."""
    weights = dense_weights(scores, window, content).flatten(-2)
    return torch.einsum("bgtrn,bgnd->bgtrd", weights, scores.v)


def attend_last(scores: Scores, content: bool = True, dropout: float = 0.0) -> Tensor:
    """Outputs `[B, G, 1, r*C, d]` of the last step's queries, which see everything; scores hold only theirs."""
    bias = (scores.time[..., None] + scores.chan[..., None, :]).flatten(-2)[:, :, 0]
    q = scores.q[:, :, 0] if content else torch.zeros_like(scores.q[:, :, 0])
    return F.scaled_dot_product_attention(q, scores.k, scores.v, bias, dropout, scale=1.0).unsqueeze(2)
