"""ACMIL: attention-challenging multiple instance learning (Zhang et al., ECCV 2024, arXiv 2311.07125).

A bag of N instance features becomes a class prediction and an attention over its instances, by K branches
that are kept apart (diversity loss) and, in training, kept from relying on a few instances (STKIM). K = 1
without masking is attention-based MIL (ABMIL). State-dict keys are the published ones.

Shapes: B bags, N instances, F feature width, D inner width, H heads (1 for `ga`, 8 for `mha`), K branches,
C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyhead.errors import UserError

MASKED = -1e9
HEADS = 8


class Output(NamedTuple):
    """What the network gives.

    Attributes:
        slide_logits: `[B, C]`, the prediction.
        branch_logits: `[B, K, C]`.
        attention_logits: `[B, H, K, N]` before softmax, float32; -1e9 where masked or absent.
        bag_feature: `[B, D]`, what the slide classifier sees.
    """

    slide_logits: Tensor
    branch_logits: Tensor
    attention_logits: Tensor
    bag_feature: Tensor


class DimReduction(nn.Module):
    """relu(x W^T), `[..., F]` -> `[..., D]`, without bias (section 2.1 of the released code's model)."""

    def __init__(self, d_feat: int, d_inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_feat, d_inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(x), inplace=True)


class Classifier(nn.Module):
    """Dropout and a linear layer, `[..., D]` -> `[..., C]`."""

    def __init__(self, d_inner: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(d_inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(x))


class GatedAttention(nn.Module):
    """(tanh(h W_V) * sigmoid(h W_U)) W_w, instances `[..., N, D]` -> logits `[..., K, N]` (Ilse et al. 2018)."""

    def __init__(self, d_inner: int, gate: int, branches: int) -> None:
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(d_inner, gate), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(d_inner, gate), nn.Sigmoid())
        self.attention_weights = nn.Linear(gate, branches)

    def forward(self, h: Tensor) -> Tensor:
        return self.attention_weights(self.attention_V(h) * self.attention_U(h)).transpose(-1, -2)


class Projections(nn.Module):
    """The projections of one branch (with query and key) or of the bag (without), and the layer norm at their end."""

    def __init__(self, d_inner: int, dropout: float, query: bool) -> None:
        super().__init__()
        if query:
            self.q_proj = nn.Linear(d_inner, d_inner)
            self.k_proj = nn.Linear(d_inner, d_inner)
        self.v_proj = nn.Linear(d_inner, d_inner)
        self.out_proj = nn.Linear(d_inner, d_inner)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(d_inner, eps=1e-6)

    def key(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """What a query row `[D]` compares instances with: vectors `[H, D]` and constants `[H]`.

        Q_h . (W_k h)_h = h . (W_k^T Q_h): the query is one learned row, so keys need not be formed.
        """
        width = q.shape[-1] // HEADS
        rows = self.q_proj(q).view(HEADS, width) / math.sqrt(width)
        vectors = torch.einsum("hc,hcd->hd", rows, self.k_proj.weight.view(HEADS, width, -1))
        return vectors, (rows * self.k_proj.bias.view(HEADS, width)).sum(-1)

    def finish(self, pooled: Tensor) -> Tensor:
        """Instances pooled by each head, `[..., H, D]` -> `[..., D]`.

        Softmax rows sum to 1, so the values of a pooled row are the pooled values.
        """
        width = pooled.shape[-1] // HEADS
        weight = self.v_proj.weight.view(HEADS, width, -1)
        values = torch.einsum("...hd,hcd->...hc", pooled, weight).flatten(-2) + self.v_proj.bias
        return self.layer_norm(self.dropout(self.out_proj(values)))


def draw_mask(logits: Tensor, top: int, share: float) -> Tensor:
    """STKIM's choice: of the `top` largest logits of every row, `int(top * share)` at random, as a mask.

    `logits [H, K, N]` -> bool `[H, K, N]`, with the random numbers in the order of the published code.
    """
    heads, branches, count = logits.shape
    top = min(top, count)
    chosen = int(top * share)
    mask = torch.zeros_like(logits, dtype=torch.bool)
    if chosen == 0:
        return mask
    largest = logits.topk(top, dim=-1).indices
    if heads == 1:
        noise = torch.rand(branches, top, device=logits.device)[None]
    else:
        noise = torch.stack([torch.rand(heads, top, device=logits.device) for _ in range(branches)], 1)
    picked = largest.gather(-1, noise.argsort(-1)[..., :chosen])
    return mask.scatter(-1, picked, True)


class ACMIL(nn.Module):
    """The whole network, bags `[B, N, F]` or one bag `[N, F]` -> `Output`.

    Args:
        d_feat: F, width of the instance features.
        d_inner: D; for `mha` a multiple of 8.
        num_classes: C.
        n_token: K, branches.
        arch: `ga` (gated attention) or `mha` (a learned query with 8 heads a branch).
        n_masked_patch: STKIM looks at this many largest logits of a row; 0 is off.
        mask_drop: the share of them that a training step masks.
        gate: width of the gated attention.
        dropout: before the heads (`ga`) or before the layer norms (`mha`, 0.1 as published).

    Raises:
        UserError: a width that the heads do not divide, an empty bag, or features of another width.
    """

    def __init__(
        self, d_feat: int, d_inner: int = 128, num_classes: int = 2, n_token: int = 5,
        arch: Literal["ga", "mha"] = "ga", n_masked_patch: int = 10, mask_drop: float = 0.6, gate: int = 128,
        dropout: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if arch == "mha" and d_inner % HEADS:
            raise UserError(f"ACMIL mha needs a d_inner that is a multiple of {HEADS}, not {d_inner}")
        if n_token < 1 or num_classes < 1:
            raise UserError(f"ACMIL needs a branch and a class or more, not {n_token} and {num_classes}")
        if not 0 <= mask_drop <= 1:
            raise UserError(f"mask_drop is {mask_drop:g}: a share from 0 to 1 is needed")
        self.d_feat, self.d_inner, self.n_token, self.arch = d_feat, d_inner, n_token, arch
        self.n_masked_patch, self.mask_drop = n_masked_patch, mask_drop
        dropout = {"ga": 0.0, "mha": 0.1}[arch] if dropout is None else dropout
        heads_dropout = dropout if arch == "ga" else 0.0
        self.dimreduction = DimReduction(d_feat, d_inner)
        if arch == "ga":
            self.attention = GatedAttention(d_inner, gate, n_token)
        else:
            self.q = nn.Parameter(torch.empty(1, n_token, d_inner).normal_(std=1e-6))
            self.sub_attention = nn.ModuleList([Projections(d_inner, dropout, True) for _ in range(n_token)])
            self.bag_attention = Projections(d_inner, dropout, False)
        self.classifier = nn.ModuleList([Classifier(d_inner, num_classes, heads_dropout) for _ in range(n_token)])
        self.Slide_classifier = Classifier(d_inner, num_classes, heads_dropout)

    # Pieces that whole and streamed bags share

    def _keys(self) -> tuple[Tensor, Tensor] | None:
        """For `mha`, all branches' vectors `[H, K, D]` and constants `[H, K]`."""
        if self.arch == "ga":
            return None
        pairs = [sub.key(self.q[0, k]) for k, sub in enumerate(self._subs())]
        return torch.stack([v for v, _ in pairs], 1), torch.stack([c for _, c in pairs], 1)

    def _subs(self) -> Iterator[Projections]:
        return iter(self.sub_attention)  # type: ignore[arg-type]

    def _logits(self, h: Tensor, keys: tuple[Tensor, Tensor] | None) -> Tensor:
        """Instances `[B, N, D]` -> float32 logits `[B, H, K, N]`."""
        if keys is None:
            return self.attention(h).float().unsqueeze(1)
        vectors, constants = keys
        return (torch.einsum("hkd,bnd->bhkn", vectors, h) + constants[..., None]).float()

    def _heads(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled instances `[B, H, K, D]` -> slide logits, branch logits, bag feature."""
        if self.arch == "ga":
            branches = list(pooled[:, 0].unbind(1))
            # Everything is linear in the attention, so the mean of the branches is the bag's own pooling
            bag = pooled[:, 0].mean(1)
        else:
            branches = [sub.finish(pooled[:, :, k]) for k, sub in enumerate(self._subs())]
            bag = self.bag_attention.finish(pooled.mean(2))
        logits = torch.stack([head(z) for head, z in zip(self.classifier, branches, strict=True)], 1)
        return self.Slide_classifier(bag), logits, bag

    def _check(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return x[None] if x.ndim == 2 else x
        if x.shape[-1] != self.d_feat or x.ndim not in (2, 3):
            got = list(x.shape)
            raise UserError(f"ACMIL takes instances [N, {self.d_feat}], got {got}: another encoder's features?")
        if x.shape[-2] == 0:
            raise UserError("ACMIL got a bag without instances")
        return x[None] if x.ndim == 2 else x

    def forward(self, x: Tensor, present: Tensor | None = None, mask: Tensor | None = None) -> Output:
        """Predict.

        Args:
            x: `[B, N, F]` or `[N, F]`.
            present: bool `[B, N]`, False where a batch of unequal bags was padded.
            mask: bool `[B, H, K, N]`, the instances to mask; drawn (STKIM) in training when it is None.
        """
        x = self._check(x)
        h = self.dimreduction(x)
        logits = self._logits(h, self._keys())
        if present is not None:
            logits = logits.masked_fill(~present[:, None, None], MASKED)
        if mask is None and self.training and self.n_masked_patch > 0:
            mask = torch.stack([draw_mask(row.detach(), self.n_masked_patch, self.mask_drop) for row in logits])
        if mask is not None:
            logits = logits.masked_fill(mask.bool(), MASKED)
        weights = logits.softmax(-1)
        # A plain product: its gradient by `h` is no view, so that the other one is added to it in place
        pooled = torch.bmm(weights.to(h.dtype).flatten(1, 2), h).unflatten(1, weights.shape[1:3])
        slide, branch, bag = self._heads(pooled)
        return Output(slide, branch, logits, bag)

    @torch.inference_mode()
    def stream(self, x: Any, chunk: int = 4096) -> Output:
        """`forward` of one bag in memory that does not grow with it, but for the attention logits.

        Args:
            x: `[N, F]`, a tensor or a (memory-mapped) array of any float type, read `chunk` rows at a time.
        """
        keys = self._keys()
        like = self.Slide_classifier.fc.weight
        top: Tensor | None = None
        total = pooled = torch.zeros((), device=like.device)
        if x.shape[0] == 0:
            raise UserError("ACMIL got a bag without instances")
        heads = 1 if keys is None else HEADS
        attention = torch.empty(1, heads, self.n_token, x.shape[0], device=like.device)
        for start in range(0, x.shape[0], chunk):
            rows = torch.as_tensor(x[start : start + chunk]).to(like.device, like.dtype)
            h = self.dimreduction(self._check(rows))
            logits = self._logits(h, keys)
            attention[..., start : start + chunk] = logits
            new = logits.amax(-1, keepdim=True) if top is None else torch.maximum(top, logits.amax(-1, keepdim=True))
            scale = torch.zeros_like(new) if top is None else (top - new).exp()
            weights = (logits - new).exp()
            total = total * scale + weights.sum(-1, keepdim=True)
            pooled = pooled * scale + torch.einsum("bhkn,bnd->bhkd", weights.to(h.dtype), h)
            top = new
        slide, branch, bag = self._heads(pooled / total)
        return Output(slide, branch, attention, bag)


def bag_attention(output: Output) -> Tensor:
    """The attention of the whole bag, `[B, N]`: the mean of the softmax over heads and branches."""
    return output.attention_logits.softmax(-1).mean((1, 2))


def diversity(attention_logits: Tensor) -> Tensor:
    """Mean cosine between the attentions of two branches, over all pairs and heads; 0 for one branch.

    From the K x K products of the rows, so that no second copy of them is kept for the gradient.
    """
    branches = attention_logits.shape[-2]
    if branches == 1:
        return attention_logits.new_zeros(())
    rows = attention_logits.softmax(-1)
    products = rows @ rows.transpose(-1, -2)
    norms = products.diagonal(dim1=-2, dim2=-1).clamp_min(1e-16).sqrt()
    cosines = products / (norms[..., None] * norms[..., None, :])
    above = torch.ones(branches, branches, dtype=torch.bool, device=rows.device).triu(1)
    return cosines[..., above].mean()


def neg_entropy(attention_logits: Tensor) -> Tensor:
    """sum p log p of each attention row, averaged over rows: the term of AEM (arXiv 2406.15303)."""
    logs = attention_logits.log_softmax(-1)
    return (logs.exp() * logs).sum(-1).mean()


def losses(output: Output, label: Tensor, aem: float = 0.0, smoothing: float = 0.0) -> dict[str, Tensor]:
    """`loss` = `branch` + `bag` + `diversity` + aem * negative entropy, all weights 1 as published.

    Args:
        output: of the network, in training with its masks.
        label: `[B]`.
        aem: weight of the entropy term of AEM; 0 is ACMIL.
        smoothing: of the labels; 0 as published.
    """
    bags, branches, classes = output.branch_logits.shape
    bag = F.cross_entropy(output.slide_logits, label, label_smoothing=smoothing)
    branch = bag.new_zeros(())
    if branches > 1:
        each = output.branch_logits.reshape(-1, classes)
        branch = F.cross_entropy(each, label.repeat_interleave(branches), label_smoothing=smoothing)
    parts = {"branch": branch, "bag": bag, "diversity": diversity(output.attention_logits)}
    total = parts["branch"] + parts["bag"] + parts["diversity"]
    if aem:
        parts["entropy"] = neg_entropy(output.attention_logits)
        total = total + aem * parts["entropy"]
    return {"loss": total, **parts}
