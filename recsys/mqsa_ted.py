"""MQSA-TED: multi-query self-attention with transition-aware distillation.

Zhu et al., "Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for
Sequential Recommendation", WSDM 2024 (arXiv 2311.01056).

Two branches attend to a history: one asks with the item itself, one with the mean of the last L items. Their mix is
compared with all items. A second loss makes the softmax of item against item follow how often one followed the
other in training. With `alpha` 1 and no distillation what is left is a SASRec-like model.

`B` sequences, `T` positions (the newest last), `d` channels, `H` heads, `N` items; the id N is padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.softmax import Targets, cross_entropy

# Zero in all but name: only a row of zeros meets it, and its norm is then exactly the bias
EPS = 1e-24
MASKED = -(2.0**32) + 1

Trace = dict[str, Tensor]


def window_mean(s: Tensor, present: Tensor, length: int) -> Tensor:
    """The mean of the items among the last `length` positions, padding left out, `[B, T, d]`.

    Args:
        s: `[B, T, d]`, zero at padding.
        present: `[B, T, 1]`, 1 where there is an item.
        length: L; 1 gives `s` itself.
    """
    if length == 1:
        return s
    positions = s.shape[1]
    both = F.pad(torch.cat([s, present], 2), (0, 0, length - 1, 0))
    total = both[:, :positions]
    for shift in range(1, length):
        total = total + both[:, shift : shift + positions]
    return total[..., :-1] / (total[..., -1:] + EPS)


class Block(nn.Module):
    """Attention whose query is a normed window mean, then a feed-forward layer.

    As published: keys and values come from the input as it is, query and residual from the normed query source;
    there is no output projection; the second residual is normed too.

    Args:
        dim: d.
        heads: H.
        length: L, how many items the query covers.
        dropout: on attention weights, after the ReLU and after the second layer.
    """

    def __init__(self, dim: int, heads: int = 1, length: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.length, self.dropout = heads, length, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def attention(self, n: Tensor, s: Tensor, hidden: Tensor) -> Tensor:
        """Attention weights `[B, H, T, T]` of normed queries `n` over `s`; `hidden` is true where it may not look."""
        q, k = self._split(self.query(n)), self._split(self.key(s))
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        return logits.masked_fill(hidden, MASKED).softmax(-1)

    def forward(self, s: Tensor, present: Tensor, hidden: Tensor, trace: Trace | None = None) -> Tensor:
        """`[B, T, d]` -> `[B, T, d]`, zero at padding.

        Args:
            s: the input, zero at padding.
            present: `[B, T, 1]`.
            hidden: `[B, 1, T, T]`, the keys that a query may not see.
            trace: gets the parts in between.
        """
        source = window_mean(s, present, self.length)
        n = self.norm1(source)
        weights = self.attention(n, s, hidden)
        seen = F.dropout(weights, self.dropout, self.training) @ self._split(self.value(s))
        o = seen.transpose(1, 2).flatten(2) + n
        g = self.norm2(o)
        f = F.dropout(self.fc1(g).relu(), self.dropout, self.training)
        f = F.dropout(self.fc2(f), self.dropout, self.training)
        if trace is not None:
            trace |= {"query_source": source, "query_normed": n, "attn_probs": weights, "attn_plus_residual": o,
                      "ffn_input": g}  # fmt: skip
        return (g + f) * present


class Branch(nn.Module):
    """Blocks that ask with the same window, and a last norm."""

    def __init__(self, dim: int, blocks: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, length, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor, present: Tensor, hidden: Tensor, trace: Trace | None = None) -> Tensor:
        for number, block in enumerate(self.blocks):
            inner: Trace | None = None if trace is None else {}
            x = block(x, present, hidden, inner)
            if trace is not None and inner is not None:
                trace |= {f"block{number}/{name}": value for name, value in inner.items()}
        if trace is not None:
            trace["stack_output"] = x
        return self.norm(x)


class MQSATED(nn.Module):
    """The encoder of histories and the table of items.

    Args:
        items: N.
        max_len: T, how many of the newest items it sees.
        dim: d.
        blocks: of each branch.
        heads: H, of each block.
        length: L, the window of the second branch.
        alpha: share of the first branch; 1 leaves the second out, 0 the first.
        dropout: the one rate of all sites.
    """

    def __init__(
        self, items: int, max_len: int = 50, dim: int = 64, blocks: int = 1, heads: int = 1, length: int = 3,
        alpha: float = 0.5, dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.items, self.max_len, self.dim, self.alpha, self.dropout = items, max_len, dim, alpha, dropout
        self.item = nn.Parameter(torch.empty(items, dim))
        self.position = nn.Parameter(torch.empty(max_len, dim))
        windows = {"short": 1, "long": min(length, max_len)}
        used = [n for n, share in {"short": alpha, "long": 1 - alpha}.items() if share]
        self.branches = nn.ModuleDict({n: Branch(dim, blocks, heads, windows[n], dropout) for n in used})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings from N(0, 0.01^2), kernels Glorot uniform, biases 0, norms the identity."""
        for table in (self.item, self.position):
            nn.init.normal_(table, std=0.01)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def embed(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Items and positions of a history `[B, T]`, `[B, T, d]`, and where there is an item, `[B, T, 1]`."""
        present = (history < self.items).unsqueeze(2)
        x = F.embedding(history.clamp(max=self.items - 1), self.item) * math.sqrt(self.dim)
        x = x + self.position[self.max_len - history.shape[1] :]
        mask = present.to(x.dtype)
        return F.dropout(x, self.dropout, self.training) * mask, mask

    def encode(self, history: Tensor, trace: Trace | None = None) -> dict[str, Tensor]:
        """The branches' representations of every prefix of a history.

        Args:
            history: `[B, T]`, T at most `max_len`, padding (N) at the left.
            trace: gets the parts in between, under the names of the published code's.

        Returns:
            branch -> `[B, T, d]`. Rows of padding mean nothing.
        """
        x, present = self.embed(history)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        hidden = later | (present < 0.5).transpose(1, 2).unsqueeze(1)
        result = {}
        for name, branch in self.branches.items():
            inner: Trace | None = None if trace is None else {}
            result[name] = branch(x, present, hidden, inner)
            if trace is not None and inner is not None:
                trace |= {f"{name}/{key}": value for key, value in inner.items()}
        if trace is not None:
            trace["embed/seq_emb"] = x
        return result

    def forward(self, history: Tensor) -> Tensor:
        """The mix of the branches, `[B, T, d]`: its inner product with an item is that item's score."""
        parts = self.encode(history)
        if len(parts) == 1:
            return next(iter(parts.values()))
        return self.alpha * parts["short"] + (1 - self.alpha) * parts["long"]


def recommendation_loss(hidden: Tensor, table: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Softmax cross entropy over all items and the padding class, whose score is 0; the mean over positions.

    Args:
        hidden: representations of the positions that have a next item, `[R, d]`.
        table: `[N, d]`.
        targets: the next items, `[R]`.
        chunk: see `recsys.softmax.cross_entropy`.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    exact = Targets(rows, targets, torch.ones_like(hidden[:, 0], dtype=torch.float32))
    return cross_entropy(hidden, table, exact, padding_class=True, chunk=chunk)


def teacher(row: Tensor, item: Tensor, share: Tensor, rows: int, items: int, tau: float) -> Targets:
    """What distillation wants: softmax over all items of a row's transition counts, its largest being 1 / tau.

    Args:
        row, item: an item that followed the row's head in training, `[M]`.
        share: its count as a share of the row's largest, `[M]`.
        rows, items: R and N.
        tau: temperature.
    """
    extra = torch.expm1(share / tau)
    norm = torch.full((rows,), float(items), device=share.device).index_add_(0, row, extra)
    return Targets(row, item, extra / norm[row], norm.reciprocal())


def distillation_loss(
    network: MQSATED, heads: Tensor, row: Tensor, item: Tensor, share: Tensor, tau: float = 0.1,
    chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy of the softmax of item against item with the transition counts; the mean over heads.

    Args:
        network: gives the items and the rate of dropout on the heads.
        heads: the input items, repetitions included, `[R]`.
        row, item, share: see `teacher`.
        tau: temperature of both sides.
        chunk: see `recsys.softmax.cross_entropy`.
    """
    wanted = teacher(row, item, share, len(heads), network.items, tau)
    x = F.embedding(heads, network.item) * math.sqrt(network.dim)
    x = F.dropout(x, network.dropout, network.training)
    return cross_entropy(x / tau, network.item, wanted, floor=True, chunk=chunk)
