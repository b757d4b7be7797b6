"""ACMIL against the published formulation, written here from the paper's equations, on the same weights.

The reference forms keys and values of every branch, pools the bag with a second softmax and product, and
takes the diversity over all pairs of branches one by one.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Report, measure, peak_memory
from medical.acmil import ACMIL, HEADS, Output, draw_mask, losses
from medical.bags import Bag, find_bags, read_h5
from medical.packed import pack

K = 5


def reference(model: ACMIL, x: Tensor, mask: bool) -> Output:
    """The published forward pass of one bag `[N, F]`."""
    h = model.dimreduction(x)
    if model.arch == "ga":
        gate: Any = model.attention
        logits = gate.attention_weights(gate.attention_V(h) * gate.attention_U(h)).T[None]
    else:
        width = h.shape[1] // HEADS
        rows = []
        for k, sub in enumerate(model._subs()):
            query = sub.q_proj(model.q[0, k]).view(HEADS, 1, width)
            keys = sub.k_proj(h).view(-1, HEADS, width).transpose(0, 1)
            rows.append((query @ keys.transpose(1, 2) / width**0.5)[:, 0])
        logits = torch.stack(rows, 1)
    if mask:
        logits = logits.masked_fill(draw_mask(logits.detach(), 10, 0.6), -1e9)
    if model.arch == "ga":
        pooled = logits[0].softmax(-1) @ h
        branches = list(pooled)
        bag = (logits[0].softmax(-1).mean(0, keepdim=True) @ h)[0]
    else:
        branches = []
        for k, sub in enumerate(model._subs()):
            values = sub.v_proj(h).view(-1, HEADS, width).transpose(0, 1)
            out = (logits[:, k, None].softmax(-1) @ values).reshape(-1)
            branches.append(sub.layer_norm(sub.dropout(sub.out_proj(out))))
        values = model.bag_attention.v_proj(h).view(-1, HEADS, width).transpose(0, 1)
        out = (logits.softmax(-1).mean(1, keepdim=True) @ values).reshape(-1)
        bag = model.bag_attention.layer_norm(model.bag_attention.dropout(model.bag_attention.out_proj(out)))
    heads = torch.stack([head(z) for head, z in zip(model.classifier, branches, strict=True)])
    return Output(model.Slide_classifier(bag)[None], heads[None], logits[None], bag[None])


def reference_losses(output: Output, label: Tensor) -> Tensor:
    logits = output.attention_logits[0]
    pairs = [
        F.cosine_similarity(logits[:, i].softmax(-1), logits[:, j].softmax(-1), dim=-1).mean()
        for i in range(K) for j in range(i + 1, K)
    ]  # fmt: skip
    branch = F.cross_entropy(output.branch_logits[0], label.expand(K))
    return branch + F.cross_entropy(output.slide_logits, label) + torch.stack(pairs).mean()


def build(arch: str, width: int, count: int, ours: bool, what: str) -> Callable[[], object]:
    """A pass over a bag of `count` instances of `width` features: a training step, or a prediction."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = ACMIL(width, width // 2, 2, K, arch, dropout=0.0)  # type: ignore[arg-type]
    x = torch.randn(count, width)
    label = torch.tensor([1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train() -> None:
        model.train()
        loss = losses(model(x), label)["loss"] if ours else reference_losses(reference(model, x, True), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def predict() -> Tensor:
        model.eval()
        return (model.stream(x) if ours else reference(model, x, False)).slide_logits

    return train if what == "train" else predict


def same_outputs(arch: str, width: int, count: int) -> float:
    torch.manual_seed(0)
    model = ACMIL(width, width // 2, 2, K, arch).eval()  # type: ignore[arg-type]
    x = torch.randn(count, width)
    with torch.no_grad():
        pairs = zip(model(x), reference(model, x, False), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)


def compare(arch: str, width: int, count: int, what: str, rounds: int) -> dict[str, Any]:
    passes = {name: build(arch, width, count, name == "ours", what) for name in ("published", "ours")}
    timing = measure(passes, rounds, warmup=1)
    del passes
    memory = {name: peak_memory(build, arch, width, count, name == "ours", what, passes=1) for name in timing}
    row: dict[str, Any] = {"variant": arch, "features": width, "instances": count, "pass": what}
    for name, timed in timing.items():
        peak = memory[name]
        row |= {f"{name} CPU ms": 1e3 * timed.cpu, f"{name} MB": peak and peak / 1e6}
    row["times faster"] = timing["published"].cpu / timing["ours"].cpu
    if memory["ours"] and memory["published"]:
        row["times less memory"] = memory["published"] / memory["ours"]
    row["largest difference"] = same_outputs(arch, width, min(count, 2000))
    return row


def large_build(count: int) -> Callable[[], object]:
    """A prediction of a bag of `count` instances that lie there in float16."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = ACMIL(512, 256, 2, K).eval(), torch.zeros(count, 512, dtype=torch.float16)
    return partial(model.stream, x)


def growing(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for count in (1000, 5000) if quick else (10_000, 100_000, 1_000_000):
        peak, attention = peak_memory(large_build, count, passes=1) or 0, 4 * K * count
        rows.append({"instances": count, "MB of a prediction": peak / 1e6, "MB of its attention rows": attention / 1e6,
                     "MB beside them": (peak - attention) / 1e6})  # fmt: skip
    return rows


def loading(quick: bool) -> list[dict[str, Any]]:
    """A bag into a float32 buffer that is there already, from three layouts of the same values."""
    count, width = (900, 64) if quick else (9000, 1024)
    values = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    buffer = np.zeros((count, width), np.float32)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for rows in (1, 32):
            with h5py.File(folder / f"rows{rows}.h5", "w") as file:
                file.create_dataset("features", data=values, chunks=(rows, width))
        pack([Bag("one", partial(read_h5, folder / "rows32.h5"), "0")], folder / "packed")

        def h5(name: str) -> None:
            with h5py.File(folder / name, "r") as file:
                file["features"].read_direct(buffer)

        (bag,) = find_bags(folder / "packed", {})

        def packed() -> None:
            with warnings.catch_warnings():  # of a map that cannot be written to
                warnings.simplefilter("ignore")
                torch.from_numpy(buffer).copy_(torch.from_numpy(bag.read().features))

        contestants = {"h5, one-row chunks": partial(h5, "rows1.h5"), "h5, 32-row chunks": partial(h5, "rows32.h5"),
                       "packed float16": packed}  # fmt: skip
        timing = measure(contestants, rounds=5 if quick else 15, warmup=2)
    ours = timing["packed float16"].cpu
    return [{"layout": n, "CPU ms": 1e3 * t.cpu, "packed is faster by": t.cpu / ours} for n, t in timing.items()]


def run(command: str, threads: int, quick: bool, only: str) -> Report:
    cases = [
        ("mha", 512, 10_000, "train"), ("mha", 512, 50_000, "train"), ("mha", 512, 200_000, "train"),
        ("mha", 1024, 10_000, "train"), ("mha", 512, 50_000, "predict"),
        ("ga", 512, 10_000, "train"), ("ga", 1024, 200_000, "predict"),
    ]  # fmt: skip
    if quick:
        cases = [("mha", 64, 500, "train"), ("ga", 64, 500, "predict")]
    rows = [
        compare(arch, width, count, what, rounds=5 if count < 20_000 else 3 if count < 100_000 else 2)
        for arch, width, count, what in cases if not only or arch in only.split(",")
    ]  # fmt: skip
    notes = [f"{K} branches, masking on in training; memory is what a pass takes beside the bag and the weights."]
    tables = {
        "the network": rows,
        "ga, 512 features, predicting ever larger bags": growing(quick),
        "loading a bag of 9,000 x 1,024": loading(quick),
    }
    return Report("acmil", command, tables, notes)
