"""The MSA-Conv operator against the published algorithm, written out here: im2col, multiply, sum.

Published on the CPU: the windows of k are unfolded and multiplied with q, those of v with the weights; the
backward pass unfolds the windows again and, for k and v, the whole map of weights. Both are given q, k, v
[B, C, H, W] and return [B, C, H, W].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from vision.tic import tic
from vision.window_attention import window_attention

# batch, channels, side, kernel, dilation
CASES = {
    "C64 56x56 k3": (8, 64, 56, 3, 1),
    "C64 56x56 k7": (8, 64, 56, 7, 1),
    "C128 28x28 k7": (8, 128, 28, 7, 1),
    "C64 56x56 k5 d2": (8, 64, 56, 5, 2),
}
TARGETS = {"C64 56x56 k3": (3.0, 1 / 2), "C64 56x56 k7": (10.0, 1 / 6)}  # ratio of time, share of memory
Pass = Callable[[], Any]


class Scores(torch.autograd.Function):
    """S[n] = sum over channels of q * (k shifted to window position n)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, kernel: int, dilation: int) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.window = kernel, dilation
        return (windows(k, kernel, dilation) * q[:, :, None]).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        q, k = ctx.saved_tensors
        d_q = (windows(k, *ctx.window) * grad[:, None]).sum(2)
        return d_q, scattered(q, grad, *ctx.window), None, None


class Weighted(torch.autograd.Function):
    """O = sum over window positions of A[n] * (v shifted to n)."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, kernel: int, dilation: int) -> Tensor:
        ctx.save_for_backward(weights, v)
        ctx.window = kernel, dilation
        return (windows(v, kernel, dilation) * weights[:, None]).sum(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        weights, v = ctx.saved_tensors
        d_weights = (windows(v, *ctx.window) * grad[:, :, None]).sum(1)
        return d_weights, scattered(grad, weights, *ctx.window), None, None


def windows(x: Tensor, kernel: int, dilation: int) -> Tensor:
    """[B, C, H, W] -> [B, C, k*k, H, W]."""
    found = F.unfold(x, kernel, dilation, dilation * (kernel - 1) // 2)
    return found.view(x.shape[0], x.shape[1], kernel * kernel, *x.shape[2:])


def scattered(x: Tensor, weights: Tensor, kernel: int, dilation: int) -> Tensor:
    """sum over n of (x * weights[n]) shifted back: by unfolding x and the whole map of weights."""
    count = kernel * kernel
    unfolded = windows(weights, kernel, dilation)  # [B, k*k, k*k, H, W]: position n seen from the pixel at n'
    at = torch.arange(count)
    opposite = unfolded[:, at, count - 1 - at]  # the weight that the pixel over there gives to this one
    return (windows(x, kernel, dilation).flip(2) * opposite[:, None]).sum(2)


def published(q: Tensor, k: Tensor, v: Tensor, kernel: int, dilation: int) -> Tensor:
    scores = Scores.apply(q, k, kernel, dilation)
    return Weighted.apply((scores * q.shape[1] ** -0.5).softmax(1), v, kernel, dilation)


def unfolded(q: Tensor, k: Tensor, v: Tensor, kernel: int, dilation: int) -> Tensor:
    """The plain formulation, differentiated by autograd."""
    scores = (windows(k, kernel, dilation) * q[:, :, None]).sum(1)
    return (windows(v, kernel, dilation) * (scores * q.shape[1] ** -0.5).softmax(1)[:, None]).sum(2)


def ours(q: Tensor, k: Tensor, v: Tensor, kernel: int, dilation: int) -> Tensor:
    q, k, v = (t.permute(0, 2, 3, 1) for t in (q, k, v))
    return window_attention(q, k, v, (kernel, kernel), dilation).permute(0, 3, 1, 2)


FORMS = {"published": published, "unfold": unfolded, "ours": ours}


def operator_pass(case: str, form: str, training: bool, threads: int) -> Pass:
    harness.set_threads(threads)
    batch, channels, side, kernel, dilation = CASES[case]
    make = torch.Generator().manual_seed(1)
    inputs = [torch.randn(batch, channels, side, side, generator=make) for _ in range(3)]
    function = functools.partial(FORMS[form], kernel=kernel, dilation=dilation)
    if not training:
        return torch.no_grad()(lambda: function(*inputs))
    for tensor in inputs:
        tensor.requires_grad_()

    return lambda: torch.autograd.grad(function(*inputs).square().sum(), inputs)


def operator_row(case: str, training: bool, rounds: int, threads: int) -> dict[str, Any]:
    passes = {form: operator_pass(case, form, training, threads) for form in FORMS}
    expected, got = (torch.stack([*passes[form]()]) for form in ("published", "ours"))
    gap = float((got - expected).abs().max() / expected.abs().max())
    timings = harness.measure(passes, rounds, warmup=1)
    peak = {form: harness.peak_memory(operator_pass, case, form, training, threads) for form in FORMS}
    faster, lighter = TARGETS.get(case, (None, None))
    return {
        "case": case,
        "pass": "training" if training else "inference",
        **{f"{form} (ms)": timing.cpu * 1e3 for form, timing in timings.items()},
        "ratio": timings["published"].cpu / timings["ours"].cpu,
        "target": faster,
        "ratio to unfold": timings["unfold"].cpu / timings["ours"].cpu,
        **{f"{form} (MiB)": peak[form] / 2**20 for form in FORMS},
        "share": peak["ours"] / peak["published"],
        "at most": lighter,
        "relative difference": gap,
        "spread": max(t.spread for t in timings.values()),
    }


def network_row(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """The deployed network against itself as it trains."""
    torch.manual_seed(0)
    model = tic(name).eval()
    deployed = model.to_deploy()
    x = torch.randn(batch, 3, 224, 224)
    passes = {"eager": lambda: model(x), "deployed": lambda: deployed(x)}
    with torch.no_grad():
        gap = float((passes["eager"]() - passes["deployed"]()).abs().max())
        timings = harness.measure(passes, rounds, warmup=1)
    times = {f"{form} (ms)": timing.cpu * 1e3 for form, timing in timings.items()}
    return {"network": name, "batch": batch, **times, "difference": gap}


def run(command: str, threads: int = 1, quick: bool = False, only: str = "") -> harness.Report:
    rounds = 3 if quick else 9
    cases = list(CASES)[: 1 if quick else None]
    tables = {
        "Operator": [operator_row(case, training, rounds, threads) for case in cases for training in (False, True)]
    }
    names = [n for n in ("tic_xs", "tic_mini", "tic_small") if not only or n in only.split(",")]
    batches = (1,) if quick else (1, 8)
    tables["Networks, 224 px"] = [network_row(n, b, rounds) for n in names[: 1 if quick else None] for b in batches]
    notes = ["ratio: published / ours, CPU time of the process; share: ours / published, peak memory above the start"]
    return harness.Report("tic", command, tables, notes)
