"""Cross entropy against a softmax over all items, without keeping the scores of all positions.

One function serves the recommendation and the distillation loss: scores are made for a few rows at a time and the
gradients come out with them, so that nothing of size rows x items outlives its chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements in a chunk of scores: on a CPU they stay in its cache, a GPU is best fed by one chunk
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}
# Rows of a chunk: products with an odd number of them are slower by a fifth
MULTIPLE = 16
# exp of a larger number is no float32 any more
LARGEST = 87.0
# Scores are made to the base of 2, whose powers take a CPU a third of the time of those of e
BITS = math.log2(math.e)
# Added to a probability before its logarithm is taken; where that is smaller, a gradient changes by over 1e-4
FLOOR, FLOOR_MATTERS = 1e-24, -46.0


class Targets(NamedTuple):
    """A distribution over items a row: `share [R]` on every item (None is 0), and more where there is `weight`.

    `row`, `item` and `weight` are `[M]`; rows ascend and a pair of row and item occurs once.
    """

    row: Tensor
    item: Tensor
    weight: Tensor
    share: Tensor | None = None

    def part(self, rows: slice) -> Targets:
        """Those of a range of rows, counted from its first."""
        bounds = torch.searchsorted(self.row, torch.tensor([rows.start, rows.stop], device=self.row.device)).tolist()
        own = slice(*bounds)
        share = None if self.share is None else self.share[rows]
        return Targets(self.row[own] - rows.start, self.item[own], self.weight[own], share)

    def only(self, rows: Tensor) -> Targets:
        """Those of the rows where `rows [R]` is true."""
        keep, number = rows[self.row], rows.cumsum(0) - 1
        share = None if self.share is None else self.share[rows]
        return Targets(number[self.row[keep]], self.item[keep], self.weight[keep], share)

    def dense(self, rows: int, items: int) -> Tensor:
        """`[R, N]`."""
        whole = self.weight.new_zeros(rows, items)
        if self.share is not None:
            whole += self.share[:, None]
        whole[self.row, self.item] += self.weight
        return whole


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Targets, padding_class: bool, floor: bool, chunk: int
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            total, *grads = _forward(
                hidden.detach().float(), table.detach().float(), targets, padding_class, floor, chunk,
                any(ctx.needs_input_grad[:2]),
            )  # fmt: skip
        ctx.save_for_backward(*grads)
        ctx.dtypes = hidden.dtype, table.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        by_hidden, by_table = ((g * grad).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return by_hidden, by_table, None, None, None, None


def _forward(
    hidden: Tensor, table: Tensor, targets: Targets, padding_class: bool, floor: bool, chunk: int, grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients by `hidden` and `table`."""
    rows, items = len(hidden), len(table)
    cpu = hidden.device.type == "cpu"
    # Scores lie within +-reach; on a GPU the host would have to wait to know it, and another pass costs less
    reach = float(hidden.norm(dim=1).max() * table.norm(dim=1).max()) if cpu and rows else math.inf
    small = reach + math.log(items + 1) < LARGEST
    by_hidden, by_table = torch.zeros_like(hidden), torch.zeros_like(table)
    loss = hidden.new_zeros(rows)
    # A log probability may be so small that the floor counts
    near = floor and -2 * reach - math.log(items + 1) < FLOOR_MATTERS
    plain = torch.ones(rows, dtype=torch.bool, device=hidden.device)
    # One piece of memory for all chunks: fresh pages for each take longer than some of the arithmetic
    room, bits = hidden.new_empty(min(chunk, rows) * items), hidden * BITS
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        h, own = hidden[part], targets.part(part) if rows > chunk else targets
        # Rows lie side by side on a CPU: its products are faster so
        space = room[: len(h) * items]
        z = torch.mm(bits[part], table.T, out=space.view(items, -1).T if cpu else space.view(-1, items))
        scale = None
        if near and not cpu:
            # All rows, so as not to wait for which
            plain[part] = False
            loss[part], z = _floored(z.div_(BITS), own)
        else:
            lowest = z.amin(1, keepdim=True) if near else None
            wanted = own.weight * z[own.row, own.item]
            top = None if small else z.amax(1, keepdim=True).clamp_min(0 if padding_class else -math.inf)
            z = z.exp2_() if top is None else z.sub_(top).exp2_()
            mass = z.sum(1, keepdim=True)
            if padding_class:
                mass = mass + (1.0 if top is None else (-top).exp2())
            logs = mass.log() if top is None else mass.log() + top / BITS
            loss[part] = logs[:, 0].index_add(0, own.row, wanted, alpha=-1 / BITS)
            z[own.row, own.item] -= own.weight * mass[own.row, 0]
            scale = mass.reciprocal()
            if lowest is not None:
                plain[part] = (lowest / BITS - logs)[:, 0] >= FLOOR_MATTERS
                if not plain[part].all():
                    deep = ~plain[part]
                    loss[part][deep], gradient = _floored(h[deep] @ table.T, own.only(deep))
                    z[deep] = gradient * mass[deep]
        if grads:
            by_hidden[part] = z @ table if scale is None else (z @ table) * scale
            by_table.addmm_(z.T, h if scale is None else h * scale)
    if targets.share is not None:
        # What is the same for all items, at once: whatever goes over the whole table costs as much for one row
        share, everything = targets.share * plain, table.sum(0)
        loss -= share * (hidden @ everything)
        by_hidden -= share[:, None] * everything
        by_table -= share @ hidden
    return loss.sum(), by_hidden, by_table


def _floored(z: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """-sum p log(q + 1e-24) of each row, and its gradient by the scores: q sum(r) - r with r = p q / (q + 1e-24)."""
    row, item, weight, share = targets
    q = z.softmax(1)
    lifted = q + FLOOR
    reached = q / lifted
    logs = lifted.log_()
    loss = z.new_zeros(len(z)).index_add_(0, row, -weight * logs[row, item])
    above = weight * reached[row, item]
    if share is None:
        reached.zero_()
    else:
        loss -= share * logs.sum(1)
        reached *= share[:, None]
    reached[row, item] += above
    return loss, q.mul_(reached.sum(1, keepdim=True)).sub_(reached)


def cross_entropy(
    hidden: Tensor, table: Tensor, targets: Targets, padding_class: bool = False, floor: bool = False,
    chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """The mean over rows of -sum_j p_j log q_j, q = softmax(hidden table^T), p as `targets` say (summing to 1).

    Args:
        hidden: `[R, d]`.
        table: `[N, d]`.
        targets: p.
        padding_class: one more class with the score 0 in the softmax, which is never a target.
        floor: take log(q + 1e-24), as the published distillation loss does.
        chunk: rows at a time; by the size of `table` when None.

    Returns:
        A scalar, differentiable once by `hidden` and `table`.
    """
    most = CHUNK.get(hidden.device.type, CHUNK["cpu"]) // len(table)
    size = chunk or max(2 * MULTIPLE, most // MULTIPLE * MULTIPLE)
    total = _CrossEntropy.apply(hidden, table, targets, padding_class, floor, size)
    return total / max(1, len(hidden))
