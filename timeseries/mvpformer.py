"""MVPFormer: a transformer over (segment, channel) tokens of intracranial EEG (Carzaniga et al., ICLR 2026).

A window of T segments and C channels in microvolts, each segment L samples, becomes T x C tokens by a wavelet
encoder; a trunk of MVPA blocks (see `timeseries.mvpa`) mixes them causally in time and freely over channels; a
head predicts the next segment's embedding (pre-training) or classifies the last segment. State-dict keys are the
published ones, less its dead weights (`ln_2`, `seizure_embeddings`).

Shapes: B windows, T segments, C channels, L samples a segment, D width, H heads, G key-value heads, r = H / G,
d = D / H, K classes.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyhead.errors import UserError
from timeseries.mvpa import Scores, attend, attend_dense, attend_last, dense_weights

# Daubechies-4 decomposition low pass, 8 taps; the high pass is its alternating reverse
DB4 = (
    -0.010597401785069032, 0.0328830116668852, 0.030841381835560764, -0.18703481171909309,
    -0.027983769416859854, 0.6308807679298589, 0.7148465705529157, 0.2303778133088965,
)  # fmt: skip
EPS = 1e-5
# Added to a band's energy before its logarithm, in squared units of the input
FLOOR = 1e-2
Anchor = Literal["end", "zero"]
Head = Literal["mean", "channel", "named", "generative"]
Encoder = Literal["wavelet", "energy"]


def levels(length: int) -> int:
    """Depth of the full decomposition of a row of that length: floor(log2(L / 7))."""
    return int(math.log2(length / (len(DB4) - 1))) if length >= 2 * (len(DB4) - 1) else 0


def band_sizes(length: int) -> list[int]:
    """Coefficients of each band in the order a_J, d_J, ..., d_1."""
    sizes = []
    for _ in range(levels(length)):
        length = (length + len(DB4) - 1) // 2
        sizes.append(length)
    return [length, *reversed(sizes)]


def decompose(x: Tensor, filters: Tensor, depth: int) -> list[Tensor]:
    """Periodic wavelet decomposition of rows `[N, L]`: bands a_J, d_J, ..., d_1 (PyWavelets' "periodic").

    Args:
        filters: `[2, 1, 8]`, low and high pass reversed, as a correlation takes them.
        depth: J.
    """
    side = len(DB4) - 2
    details: list[Tensor] = []
    row = x.unsqueeze(1)
    for _ in range(depth):
        # Slices instead of a padding mode, which exporters lack
        right = row[..., : side + row.shape[-1] % 2]
        both = F.conv1d(torch.cat([row[..., -side:], row, right], -1), filters, stride=2)
        row = both[:, :1]
        details.append(both[:, 1])
    return [row[:, 0], *reversed(details)]


class WaveletFilters(nn.Module):
    """The two filters, kept out of the state dict."""

    filters: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.depth = levels(length)
        low = torch.tensor(DB4, dtype=torch.float64)
        high = torch.tensor([(-1) ** (k + 1) * DB4[7 - k] for k in range(8)], dtype=torch.float64)
        both = torch.stack([low, high]).flip(-1)[:, None]
        self.register_buffer("filters", both.float(), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        """`[..., L]` -> bands `[n, size]` of the flattened rows; no gradient flows into the signal."""
        return decompose(x.reshape(-1, x.shape[-1]).float(), self.filters, self.depth)


class WaveEncoder(nn.Module):
    """The published encoder: all coefficients, RMS norm, linear; `[..., L]` -> `[..., D]`."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.wavelet = WaveletFilters(length)
        size = sum(band_sizes(length))
        self.ln = nn.RMSNorm(size, eps=EPS)
        self.proj = nn.Linear(size, width, bias=False)

    def coefficients(self, x: Tensor) -> Tensor:
        """`[..., L]` -> `[..., sum of band sizes]`."""
        return torch.cat(self.wavelet(x), -1).view(*x.shape[:-1], -1)

    def forward(self, x: Tensor, mean: Tensor | None = None, deviation: Tensor | None = None) -> Tensor:
        return self.proj(self.ln(self.coefficients(x)))


class EnergyEncoder(nn.Module):
    """Log energies of the bands instead of their coefficients: amplitude and spectrum without phase.

    The published norm discards absolute power, which tells states apart that differ in nothing else. A mean and a
    deviation `[B, C, bands]` of the recording, where given, standardise what it is measured against.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.wavelet = WaveletFilters(length)
        self.bands = len(band_sizes(length))
        self.proj = nn.Linear(self.bands, width)

    def energies(self, x: Tensor) -> Tensor:
        """`[..., L]` -> log(mean square of each band + 0.01) `[..., bands]`."""
        bands = [band.square().mean(-1) for band in self.wavelet(x)]
        return (torch.stack(bands, -1) + FLOOR).log().view(*x.shape[:-1], -1)

    def features(self, x: Tensor, mean: Tensor | None = None, deviation: Tensor | None = None) -> Tensor:
        """Log energies, standardised where a mean and a deviation are given."""
        features = self.energies(x)
        if mean is not None and deviation is not None:
            features = (features - mean[:, None]) / deviation[:, None]
        return features

    def forward(self, x: Tensor, mean: Tensor | None = None, deviation: Tensor | None = None) -> Tensor:
        return self.proj(self.features(x, mean, deviation))


class AdaptedLinear(nn.Linear):
    """A linear layer without bias and, once `adapt` was called, a low-rank adapter on its last rows (LoRA).

    y = x W^T, and to the adapted outputs (alpha / rank) x A^T B^T is added. The adapter stays apart from the
    weight; `merged` is the sum.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    def adapt(self, rows: int, rank: int, alpha: float) -> None:
        """Add an adapter for the last `rows` outputs: A Kaiming-uniform, B zero."""
        self.rows, self.scale = rows, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def merged(self) -> Tensor:
        """The weight with the adapter in it."""
        if self.lora_A is None or self.lora_B is None:
            return self.weight
        change = self.scale * (self.lora_B @ self.lora_A)
        return torch.cat([self.weight[: -self.rows], self.weight[-self.rows :] + change])

    def merge(self) -> None:
        """Put the adapter into the weight for good."""
        self.weight = nn.Parameter(self.merged().detach())
        self.lora_A = self.lora_B = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.lora_A is None or self.lora_B is None:
            return y
        change = F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale
        return torch.cat([y[..., : -self.rows], y[..., -self.rows :] + change], -1)


class MVPA(nn.Module):
    """Multi-variate parallel attention, `[B, T, C, D]` -> the same (section 3 of the paper).

    Args:
        width, heads, kv_heads: D, H, G.
        window: segments back, beside its own, that content reaches; the last segment sees all.
        dropout: of attention weights and of the output.
        structured: drop whole key segments and key channels instead of single weights, with the same share.
        content: False leaves the content term out (published flag `global_att`).
        scale: the factor on all logits, 1/sqrt(d) as published.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, window: int = 10, dropout: float = 0.0,
        structured: bool = False, content: bool = True, scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.groups, self.dim = heads, kv_heads, width // heads
        self.window, self.dropout, self.structured, self.content = window, dropout, structured, content
        self.scale = self.dim**-0.5 if scale is None else scale
        inner = kv_heads * self.dim
        self.q_attn = AdaptedLinear(width, width)
        self.c_attn = AdaptedLinear(width, 2 * inner)
        self.position_net = nn.Linear(width, inner, bias=False)
        self.channel_net = nn.Linear(width, inner, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.attn_bias = nn.Parameter(torch.empty(3 * inner).normal_(std=0.02))

    def scores(self, x: Tensor, positions: Tensor, channels: Tensor, index: Tensor, last: bool = False) -> Scores:
        """What attention is computed from.

        Args:
            x: `[B, T, C, D]`, normalised.
            positions: `[T, D]`, row j for a distance of T-1-j segments.
            channels: `[R, D]`, rows of the channel codebook.
            index: `[C, C]`, the row of each pair of channels.
            last: queries of the last segment only.
        """
        batch, steps, count, _ = x.shape
        repeat = self.heads // self.groups
        inner = (batch, steps, count, self.groups, self.dim)
        source = x[:, -1:] if last else x
        q = self.q_attn(source).unflatten(-1, (self.groups, repeat, self.dim)).permute(0, 3, 1, 4, 2, 5)
        k, v = self.c_attn(x).chunk(2, -1)
        k, v = (y.view(inner).permute(0, 3, 1, 2, 4).flatten(2, 3) for y in (k, v))
        content, by_time, by_channel = self.attn_bias.view(3, self.groups, self.dim)
        q = ((q + content[:, None, None, None]) * self.scale).flatten(3, 4)
        tables = []
        for net, rows, bias in ((self.position_net, positions, by_time), (self.channel_net, channels, by_channel)):
            keys = net(rows).view(-1, self.groups, self.dim).transpose(0, 1)
            # The query already has the content bias in it
            offset = torch.einsum("gd,gnd->gn", (bias - content) * self.scale, keys)
            tables.append(torch.einsum("bgtrd,gnd->bgtrn", q, keys) + offset[:, None, None])
        time, raw = tables
        chan = raw.gather(4, index.repeat(repeat, 1).expand(*raw.shape[:4], -1))
        return Scores(q, k, v, time, chan)

    def _drop(self, scores: Scores, steps: int, count: int) -> Scores:
        """Structured dropout: weights of dropped segments and channels are zero, which is to drop their values."""
        keep = math.sqrt(1 - self.dropout)
        drawn = [torch.rand(n, device=scores.v.device) < keep for n in (steps, count)]
        kept = (drawn[0][:, None] & drawn[1]).flatten() / (1 - self.dropout)
        return scores._replace(v=scores.v * kept[:, None].to(scores.v.dtype))

    def forward(self, x: Tensor, positions: Tensor, channels: Tensor, index: Tensor, last: bool = False) -> Tensor:
        """See `scores`; with `last` the output is `[B, 1, C, D]`."""
        batch, steps, count, width = x.shape
        scores = self.scores(x, positions, channels, index, last)
        dropout = self.dropout if self.training else 0.0
        if dropout and self.structured:
            scores, dropout = self._drop(scores, steps, count), 0.0
        if last:
            out = attend_last(scores, self.content, dropout)
        elif torch.jit.is_tracing() or torch.compiler.is_compiling():
            out = attend_dense(scores, self.window, self.content)
        else:
            out = attend(scores, self.window, self.content, dropout)
        out = out.unflatten(3, (-1, count)).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, count, width)
        return F.dropout(self.c_proj(out), self.dropout, self.training)

    def weights(self, x: Tensor, positions: Tensor, channels: Tensor, index: Tensor) -> Tensor:
        """Attention weights `[B, H, T*C, T*C]`, all in memory."""
        batch, steps, count, _ = x.shape
        dense = dense_weights(self.scores(x, positions, channels, index), self.window, self.content)
        dense = dense.unflatten(3, (-1, count)).permute(0, 1, 3, 2, 4, 5, 6)
        return dense.reshape(batch, self.heads, steps * count, steps * count)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), `[..., D]` -> the same."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """h + MLP(n) + MVPA(n), n = RMSNorm(h): one norm feeds both branches."""

    def __init__(self, width: int, inner: int, attention: dict[str, Any]) -> None:
        super().__init__()
        self.ln_1 = nn.RMSNorm(width, eps=EPS)
        self.attn = MVPA(width, **attention)
        self.mlp = SwiGLU(width, inner)

    def forward(self, h: Tensor, *tables: Tensor, last: bool = False) -> Tensor:
        n = self.ln_1(h)
        mixed = self.attn(n, *tables, last=last)
        if last:
            h, n = h[:, -1:], n[:, -1:]
        return h + self.mlp(n) + mixed


class Trunk(nn.Module):
    """Blocks over tokens `[B, T, C, D]` with two codebooks for distances in time and over channels.

    Args:
        anchor: which row of a codebook a distance takes. `end`, as published: rows are counted from the far end,
            so that their meaning depends on T and C; `zero`: the row of that number, the last for all beyond.

    Raises:
        UserError: with `end`, more segments or channels than the codebooks have rows.
    """

    def __init__(
        self, width: int, layers: int, inner: int, n_positions: int, n_channels: int, anchor: Anchor,
        dropout: float, attention: dict[str, Any], by_layer: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.anchor = anchor
        self.positional_embedding = nn.Embedding(n_positions, width)
        self.channel_embedding = nn.Embedding(n_channels, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList()
        for number in range(layers):
            block = Block(width, inner, attention)
            if by_layer:
                block.attn.scale /= number + 1
            self.h.append(block)
        self.ln_f = nn.RMSNorm(width, eps=EPS)

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codebook rows for time `[T, D]` and channels `[R, D]`, and the row of each pair of channels `[C, C]`."""
        steps, count = (torch.arange(x.shape[i], device=x.device) for i in (1, 2))
        positions, channels = self.positional_embedding.weight, self.channel_embedding.weight
        apart = (count[:, None] - count[None, :]).abs()
        if self.anchor == "end":
            if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
                self._check(len(steps), len(count))
            return positions[steps], channels[count], count[-1] - apart
        rows = (steps[-1] - steps).clamp(max=len(positions) - 1)
        return positions[rows], channels, apart.clamp(max=len(channels) - 1)

    def _check(self, steps: int, channels: int) -> None:
        for name, got, table in (
            ("segments", steps, self.positional_embedding), ("channels", channels, self.channel_embedding),
        ):  # fmt: skip
            if got > table.num_embeddings:
                raise UserError(
                    f"{got} {name} in a window: this model has rows for {table.num_embeddings}; choose fewer, or "
                    "train a model with anchor zero"
                )

    def forward(self, x: Tensor, last: bool = False) -> Tensor:
        """`[B, T, C, D]` -> the same, or with `last` the last segment's `[B, 1, C, D]`."""
        tables = self.tables(x)
        h = self.drop(x)
        for number, block in enumerate(self.h):
            h = block(h, *tables, last=last and number == len(self.h) - 1)
        return self.ln_f(h)


class Output(NamedTuple):
    """What a classifier gives.

    Attributes:
        logits: `[B, K]`.
        channels: `[B, C, K]`, each channel's own logits (head `channel`) or its share of the window's.
    """

    logits: Tensor
    channels: Tensor


class LinearHead(nn.Module):
    """One linear layer without bias."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class NamedHead(nn.Module):
    """A weight for every channel of a fixed, named set, zero at first: `[B, C, D]` -> shares `[B, C, K]`.

    The first class is what the others are measured against: its logit is 0.
    """

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes - 1, channels, width))
        self.bias = nn.Parameter(torch.zeros(classes - 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(torch.einsum("bcd,kcd->bck", x, self.weight) + self.bias / x.shape[1], (1, 0))


class MVPFormer(nn.Module):
    """The whole network: windows `[B, T, C, L]` in microvolts -> see `forward` and `predict_next`.

    Args:
        length: L, samples a segment.
        width, layers, heads, kv_heads, inner: D, blocks, H, G, width inside the MLP.
        classes: K.
        head: `mean` (published: the mean over channels of the last segment), `channel` (each channel of the last
            segment is classified; the window gets the logits of the `rank`-th most suspicious one), `named` (a
            weight for every channel of a fixed set, on the mean over segments), `generative` (pre-training).
        channels: how many channels the head `named` knows.
        rank: for the head `channel`.
        encoder: `wavelet` (published) or `energy` (log energies of the bands).
        n_positions, n_channels: rows of the codebooks.
        anchor: see `Trunk`; `end` is the published one.
        window: see `MVPA`.
        dropout: of embeddings, attention and residuals.
        structured: see `MVPA`.
        init: deviation of the trunk's initial weights.
        content, scaled, by_layer: the published flags `global_att`, `scale_attn_weights`,
            `scale_attn_by_inverse_layer_idx`.

    Raises:
        UserError: sizes that do not divide, or segments too short for the transform.
    """

    def __init__(
        self, length: int = 2560, width: int = 768, layers: int = 12, heads: int = 12, kv_heads: int = 4,
        inner: int = 1728, classes: int = 2, head: Head = "mean", channels: int = 0, rank: int = 2,
        encoder: Encoder = "wavelet", n_positions: int = 110, n_channels: int = 128, anchor: Anchor = "end",
        window: int = 10, dropout: float = 0.1, structured: bool = False, init: float = 0.02,
        content: bool = True, scaled: bool = True, by_layer: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads or heads % kv_heads:
            raise UserError(f"width {width}, heads {heads}, kv_heads {kv_heads}: each must divide the one before")
        if levels(length) < 1:
            raise UserError(f"segments of {length} samples are too short: at least {2 * (len(DB4) - 1)} are needed")
        if min(layers, classes, rank, n_positions, n_channels) < 1 or (head == "named" and channels < 1):
            raise UserError("layers, classes, rank, codebooks and named channels: at least 1 of each is needed")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is {dropout:g}: 0 or more, and less than 1, is needed")
        self.length, self.classes, self.kind, self.rank = length, classes, head, rank
        self.encoder = WaveEncoder(length, width) if encoder == "wavelet" else EnergyEncoder(length, width)
        attention = {
            "heads": heads, "kv_heads": kv_heads, "window": window, "dropout": dropout, "structured": structured,
            "content": content, "scale": None if scaled else 1.0,
        }  # fmt: skip
        self.mvpformer = Trunk(width, layers, inner, n_positions, n_channels, anchor, dropout, attention, by_layer)
        for part in self.mvpformer.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=init)
        self.head: nn.Module = (
            NamedHead(channels, width, classes) if head == "named"
            else LinearHead(width, width if head == "generative" else classes)
        )  # fmt: skip

    def adapt(self, rank: int = 8, alpha: float = 16.0) -> None:
        """Low-rank adapters on all queries and values, as published; only they and the head are then trained."""
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for block in self.mvpformer.h:
            attention: Any = block.attn
            attention.q_attn.adapt(attention.q_attn.out_features, rank, alpha)
            attention.c_attn.adapt(attention.groups * attention.dim, rank, alpha)

    def merge(self) -> None:
        """Put adapters into the weights."""
        for part in self.modules():
            if isinstance(part, AdaptedLinear):
                part.merge()

    def check(self, x: Tensor) -> None:
        """Raise a UserError unless `x` is what the network takes."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        if x.ndim != 4 or x.shape[-1] != self.length:
            raise UserError(f"windows of shape {list(x.shape)}: [B, T, C, {self.length}] are needed")

    def embed(self, x: Tensor, mean: Tensor | None = None, deviation: Tensor | None = None) -> Tensor:
        """Segments `[B, T, C, L]` -> embeddings `[B, T, C, D]`; see `EnergyEncoder` for mean and deviation."""
        self.check(x)
        return self.encoder(x, mean, deviation)

    def classify(self, embeddings: Tensor) -> Output:
        """Embeddings `[B, T, C, D]` -> class logits."""
        if self.kind == "named":
            channels = self.head(self.mvpformer(embeddings).mean(1))
            return Output(channels.sum(1), channels)
        # Other segments are keys and values alone: the last block computes no queries for them
        channels = self.head(self.mvpformer(embeddings, last=True)[:, 0])
        if self.kind == "mean":
            return Output(channels.mean(1), channels / channels.shape[1])
        suspicion = channels[..., -1] - channels[..., 0]
        order = suspicion.argsort(dim=1, descending=True)
        # The rank-th, or the last where there are fewer channels; as tensors, so that a tracer leaves C open
        place = torch.arange(channels.shape[1], device=channels.device)[-1:].clamp(max=self.rank - 1)
        chosen = order.index_select(1, place)[..., None].expand(-1, -1, channels.shape[-1])
        return Output(channels.gather(1, chosen)[:, 0], channels)

    def forward(self, x: Tensor, mean: Tensor | None = None, deviation: Tensor | None = None) -> Output:
        return self.classify(self.embed(x, mean, deviation))

    def attended(self, x: Tensor, mean: Tensor | None = None, deviation: Tensor | None = None) -> Tensor:
        """Where the last segment attends in the last block, `[B, T, C]`, the mean over heads and its channels."""
        h = self.embed(x, mean, deviation)
        tables = self.mvpformer.tables(h)
        blocks: Any = list(self.mvpformer.h)
        for block in blocks[:-1]:
            h = block(h, *tables)
        last = blocks[-1]
        scores = last.attn.scores(last.ln_1(h), *tables, last=True)
        bias = scores.time[:, :, 0, :, :, None] + scores.chan[:, :, 0, :, None, :]
        logits = bias.flatten(-2)
        if last.attn.content:
            logits = logits + scores.q[:, :, 0] @ scores.k.transpose(-1, -2)
        return logits.softmax(-1).mean((1, 2)).view(h.shape[0], *h.shape[1:3])

    def predict_next(self, embeddings: Tensor) -> Tensor:
        """Embeddings `[B, T, C, D]` -> the predicted embedding of each next segment `[B, T, C, D]`."""
        return self.head(self.mvpformer(embeddings))


# Published sizes, and small ones that train on a CPU in minutes
VARIANTS: dict[str, dict[str, Any]] = {
    "mvpformer_s": {},
    "mvpformer_m": {"width": 2048, "layers": 24, "heads": 16, "kv_heads": 8, "inner": 5632},
    "mvpformer_mini": {"width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "inner": 256},
    "mvpformer_xs": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 64},
    "mvpformer_micro": {"width": 16, "layers": 1, "heads": 4, "kv_heads": 2, "inner": 32},
}


def create_mvpformer(name: str, **options: Any) -> MVPFormer:
    """A network of a named size. Raises UserError where there is none of that name."""
    if name not in VARIANTS:
        raise UserError(f"no MVPFormer is called {name!r}: there are {', '.join(VARIANTS)}")
    return MVPFormer(**{**VARIANTS[name], **options})
