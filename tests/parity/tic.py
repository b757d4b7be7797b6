"""The published MSA-Conv layer, its block, and the bare operator."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.parity import Check
from tests.parity._close import close, unknown
from vision.tic import MSAConvAttention, MSAConvBlock, pair
from vision.window_attention import attend_simply, window_attention


def run(folder: Path) -> Iterator[Check]:
    (description,) = folder.glob("fixture*.json")
    fixture = json.loads(description.read_text())
    for case in fixture.get("cases", []):
        yield from layer(case, folder, fixture["tolerance"])
    if fixture.get("ops"):
        yield from operators(fixture["ops"], load_file(folder / "ops.io.safetensors"), fixture["tolerance"])


def layer(case: Mapping[str, Any], folder: Path, tolerance: Mapping[str, Any]) -> Iterator[Check]:
    kinds = {"reference block": MSAConvBlock, "attention-only": MSAConvAttention}
    build = next((b for kind, b in kinds.items() if case["kind"].startswith(kind)), None)
    io = load_file(folder / case["io"])
    if build is None:
        yield from (unknown(case["name"], key) for key in io)
        return
    module = build(**case["kwargs"]).eval()
    module.load_state_dict(load_file(folder / case["weights"]))
    for number in sorted({key.split(".")[0] for key in io}):
        held = {k.removeprefix(f"{number}."): v for k, v in io.items() if k.startswith(f"{number}.")}
        if "x" not in held:
            yield from (unknown(case["name"], f"{number}.{key}") for key in held)
            continue
        got = outputs(module, held.pop("x"), held.pop("cotangent", None))
        for key, expected in held.items():
            bound = tolerance["grad" if key.startswith("grad.") else "forward"]
            yield close(case["name"], f"{number}.{key}", got.get(key), expected, bound)


def outputs(module: MSAConvAttention, x: Tensor, cotangent: Tensor | None) -> dict[str, Tensor]:
    x.requires_grad_()
    module.zero_grad()
    out = module(x)
    got = {"out": out, "attended": MSAConvAttention.forward(module, x)}
    if isinstance(module, MSAConvBlock):
        got["preact"] = module.preact(x)
    # one head: its axis goes
    weights = module.weights(x.permute(0, 2, 3, 1))
    got |= {k: v.squeeze(1) if k != "qkv" else v for k, v in weights.items()}
    if cotangent is not None:
        (out * cotangent).sum().backward()
        named = [(n, p.grad) for n, p in module.named_parameters()] + [("x", x.grad)]
        got |= {f"grad.{n}": g for n, g in named if g is not None}
    return got


def operators(cases: list[dict[str, Any]], io: dict[str, Tensor], tolerance: Mapping[str, Any]) -> Iterator[Check]:
    for case in cases:
        name = case["name"]
        held = {key: io.pop(f"{name}.{key}") for key in [k.split(".", 1)[1] for k in io if k.startswith(f"{name}.")]}
        q, k, v = (held.pop(key).permute(0, 2, 3, 1) for key in "qkv")
        kernel, dilation = pair(case["kernel_size"]), case["dilation"]
        out, logits, weights = attend_simply(q, k, v, kernel, dilation)
        got = {"logits": logits.squeeze(1), "attn": weights.squeeze(1)}
        got["out"] = window_attention(q, k, v, kernel, dilation).permute(0, 3, 1, 2)
        for key, expected in held.items():
            yield close(name, key, got.get(key), expected, tolerance["forward"])
        simple = out.permute(0, 3, 1, 2)
        if "out" in held:
            yield close(name, "out of the simple form", simple, held["out"], tolerance["forward"])
    yield from (unknown("ops", key) for key in io)
