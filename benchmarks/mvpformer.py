"""MVPA against the published formulation, written here from its description, and braindecode's, on the same weights.

The reference repeats the time and channel scores over all pairs of tokens and forms, masks, scales and normalises
the whole N x N matrix; the whole classifier beside it computes every token in its last block too. braindecode's
takes part where it is installed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Report, Timing, measure, peak_memory
from checkpoints.converters.mvpformer import rename
from timeseries.mvpformer import MVPA, MVPFormer

# (channels, segments, heads); key-value heads as published where they divide
LAYERS = ((8, 64, 12), (32, 64, 12), (64, 128, 1))
GROWTH = ((4, 32), (8, 32), (16, 32), (32, 32), (64, 32), (16, 8), (16, 16), (16, 64), (16, 128))
DIM = 64


def reference(layer: MVPA, x: Tensor, positions: Tensor, channels: Tensor) -> Tensor:
    """The published attention of `[B, T, C, D]`, every matrix of all pairs formed."""
    batch, steps, count, width = x.shape
    heads, groups, dim, tokens = layer.heads, layer.groups, layer.dim, steps * count
    repeat = heads // groups
    q = layer.q_attn(x).view(batch, tokens, heads, dim).transpose(1, 2)
    k, v = (y.reshape(batch, tokens, groups, dim).transpose(1, 2).repeat_interleave(repeat, 1)
            for y in layer.c_attn(x).chunk(2, -1))  # fmt: skip
    keys = [net(rows).view(-1, groups, dim).transpose(0, 1).repeat_interleave(repeat, 0)
            for net, rows in ((layer.position_net, positions), (layer.channel_net, channels))]  # fmt: skip
    content, by_time, by_channel = layer.attn_bias.view(3, groups, 1, dim).repeat_interleave(repeat, 1)
    scores = (q + content) @ k.transpose(-1, -2)
    time = ((q + by_time) @ keys[0].transpose(-1, -2)).view(batch, heads, steps, count, steps).transpose(2, 3)
    # A zero column in front and another view: rows slide by one (Transformer-XL)
    padded = torch.cat([time.new_zeros(*time.shape[:-1], 1), time], -1)
    time = padded.view(batch, heads, count, steps + 1, steps)[..., 1:, :].transpose(2, 3)
    time = time.reshape(batch, heads, tokens, steps).repeat_interleave(count, -1)
    each = torch.arange(count)
    index = (count - 1 - (each[:, None] - each).abs()).repeat(steps, 1)
    chan = ((q + by_channel) @ keys[1].transpose(-1, -2)).gather(-1, index.expand(batch, heads, -1, -1))
    chan = chan.repeat(1, 1, 1, steps)
    step = torch.arange(tokens) // count
    inside = ((step[:, None] - step).abs() <= layer.window) | (step == steps - 1)[:, None]
    weights = torch.where(inside, scores, torch.zeros(())) + time + chan
    weights = weights / math.sqrt(dim)
    weights = torch.where(step[None, :] <= step[:, None], weights, torch.full((), torch.finfo(weights.dtype).min))
    out = (weights.softmax(-1) @ v).transpose(1, 2).reshape(batch, steps, count, width)
    return layer.c_proj(out)


def peer() -> Any:
    """braindecode's module, or None where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of montages, on import
        try:
            from braindecode.models import mvpformer
        except ImportError:
            return None
    return mvpformer


def build(count: int, steps: int, heads: int, contestant: str, backward: bool) -> Callable[[], object]:
    """A pass through one attention layer, projections included."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    width, groups = heads * DIM, heads // 3 if heads % 3 == 0 else heads
    layer: Any = MVPA(width, heads, groups)
    x = torch.randn(1, steps, count, width)
    positions, channels = torch.randn(steps, width), torch.randn(count, width)
    each = torch.arange(count)
    index = count - 1 - (each[:, None] - each).abs()
    if contestant == "braindecode":
        weights = layer.state_dict()
        layer = peer()._MVPAttention(width, heads, groups)
        layer.load_state_dict(weights)

    def forward() -> Tensor:
        if contestant == "braindecode":
            return layer(x, positions[None], channels[None])
        return (
            layer(x, positions, channels, index) if contestant == "ours" else reference(layer, x, positions, channels)
        )

    def whole() -> None:
        layer.zero_grad()
        forward().square().sum().backward()

    return whole if backward else torch.no_grad()(forward)


def classifier(count: int, contestant: str, small: bool = False) -> Callable[[], Tensor]:
    """A window of 25 segments through the classifier of size S, from the signal to the logits."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = (2, 128, 4, 2, 256) if small else (12, 768, 12, 4, 1728)
    options: dict[str, Any] = dict(zip(("layers", "width", "heads", "kv_heads", "inner"), sizes, strict=True))
    model = MVPFormer(anchor="end", dropout=0.0, **options).eval()
    x = 50 * torch.randn(1, 25, count, 2560)
    if contestant == "braindecode":
        theirs = ("n_layers", "d_model", "n_heads", "n_head_kv", "d_inner")
        other = peer().MVPFormer(n_outputs=2, n_chans=count, n_times=25 * 2560, sfreq=512, drop_prob=0.0,
                                 **dict(zip(theirs, sizes, strict=True))).eval()  # fmt: skip
        weights = model.state_dict()
        other.load_state_dict({name: weights[key] for key, name in rename({k: k for k in other.state_dict()}).items()})
        signal = x.transpose(1, 2).flatten(2)
        return torch.inference_mode()(lambda: other(signal))

    def published() -> Tensor:
        h = model.embed(x)
        positions, channels, _ = model.mvpformer.tables(h)
        for block in model.mvpformer.h:
            n = block.ln_1(h)  # type: ignore[operator]
            h = h + block.mlp(n) + reference(block.attn, n, positions, channels)  # type: ignore[operator, arg-type]
        return model.head(model.mvpformer.ln_f(h)[:, -1].mean(1))

    return torch.inference_mode()((lambda: model(x).logits) if contestant == "ours" else published)


def contestants() -> list[str]:
    return ["published", *(["braindecode"] if peer() else []), "ours"]


def gap(outputs: Iterable[Tensor]) -> float:
    """The largest difference from the first."""
    first, *others = outputs
    return max(float((first - other).abs().max()) for other in others)


def ratios(timing: dict[str, Timing]) -> dict[str, float]:
    """How much faster ours is than each of the others."""
    return {f"times {n}": t.cpu / timing["ours"].cpu for n, t in timing.items() if n != "ours"}


def compare(count: int, steps: int, heads: int, backward: bool, rounds: int) -> dict[str, Any]:
    passes = {name: build(count, steps, heads, name, backward) for name in contestants()}
    difference = None if backward else gap(p() for p in passes.values())  # type: ignore[misc]
    timing = measure(passes, rounds, warmup=1)
    del passes
    memory = {n: peak_memory(build, count, steps, heads, n, backward, passes=1) for n in timing}
    what = "forward + backward" if backward else "forward"
    row: dict[str, Any] = {"C x T": f"{count} x {steps}", "heads": heads, "pass": what}
    for name, timed in timing.items():
        row |= {f"{name} CPU ms": 1e3 * timed.cpu, f"{name} MB": memory[name] and memory[name] / 1e6}  # type: ignore[operator]
    row |= ratios(timing)
    if memory["ours"] and memory["published"]:
        row["times less memory"] = memory["published"] / memory["ours"]
    row["largest difference"] = difference
    return row


def whole(count: int, rounds: int, small: bool) -> dict[str, Any]:
    passes = {name: classifier(count, name, small) for name in contestants()}
    difference = gap(p() for p in passes.values())
    timing = measure(passes, rounds, warmup=0)
    row: dict[str, Any] = {"C x T": f"{count} x 25"}
    row |= {f"{name} CPU s": t.cpu for name, t in timing.items()}
    return row | ratios(timing) | {"largest difference": difference}


def growth(sizes: tuple[tuple[int, int], ...], rounds: int) -> list[dict[str, Any]]:
    """Our forward pass alone, beside how pairs in the band and scores of far keys grow."""
    rows = []
    for count, steps in sizes:
        timing = measure({"ours": build(count, steps, 4, "ours", False)}, rounds, warmup=1)["ours"]
        tokens = count * steps
        band = sum(min(t + 1, 11) for t in range(steps - 1)) + steps
        pairs = tokens * count * (steps + 1) / 2
        rows.append({
            "C": count, "T": steps, "N": tokens, "CPU ms": 1e3 * timing.cpu,
            "ns a causal pair and head": 1e9 * timing.cpu / pairs / 4, "share with content": band * count**2 / pairs,
        })  # fmt: skip
    return rows


def picture(rows: list[dict[str, Any]], path: Any) -> None:
    """Cost over channels and over segments, on logarithmic axes, with slopes 1 and 2 beside."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, vary, fixed, value in ((axes[0], "C", "T", 32), (axes[1], "T", "C", 16)):
        points = sorted((r[vary], r["CPU ms"]) for r in rows if r[fixed] == value)
        xs, ys = zip(*points, strict=True)
        axis.loglog(xs, ys, "o-", label="measured")
        for slope, style in ((1, ":"), (2, "--")):
            axis.loglog(xs, [ys[-1] * (x / xs[-1]) ** slope for x in xs], style, color="grey", label=f"slope {slope}")
        axis.set_xticks(xs, [str(x) for x in xs])
        axis.minorticks_off()
        axis.set_xlabel(f"{vary} ({fixed} = {value})")
        axis.set_ylabel("CPU ms")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def run(command: str, threads: int, quick: bool, only: str) -> Report:
    layers = ((4, 14, 2),) if quick else LAYERS
    rows = [
        compare(c, t, h, backward, rounds=3 if quick or c * t > 1000 else 9)
        for c, t, h in layers for backward in (False, True)
    ]  # fmt: skip
    wholes = [whole(c, 1 if quick else 3, quick) for c in ((4,) if quick else (16, 64))]
    grown = growth(((2, 12), (4, 12)) if quick else GROWTH, rounds=3 if quick else 5)
    if not quick:
        from pathlib import Path

        Path("runs/benchmarks").mkdir(parents=True, exist_ok=True)
        picture(grown, Path("runs/benchmarks/mvpformer_growth.png"))
    notes = [
        "One attention layer with its projections, batch 1, heads of width 64, float32; memory is what a pass takes "
        "beside weights and input. The whole classifier is of size S, from microvolts to logits.",
    ]
    if not peer():
        notes.append("braindecode is not installed here: `make bench-peers`, then the same with its python")
    tables = {"one attention layer": rows, "the whole classifier, one window": wholes, "how ours grows": grown}
    return Report("mvpformer", command, tables, notes)
