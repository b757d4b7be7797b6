"""HaloNet against timm's layer and models: the attention's steps, every stage, gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.parity import Check
from tests.parity._close import close, unknown
from vision.halonet import HaloAttention, HaloNet

MAPS = ("q_blocks", "rel_logits", "logits", "attn")
FEATURES = ("stem", "features")


def run(folder: Path) -> Iterator[Check]:
    (description,) = folder.glob("fixture*.json")
    fixture = json.loads(description.read_text())
    tolerance = fixture["tolerance"]
    for group, cases in fixture.items():
        if not (isinstance(cases, list) and all(isinstance(c, dict) for c in cases)):
            continue
        for case in cases:
            io = load_file(folder / case["io"])
            if group == "attention":
                yield from attention(case, io, load_file(folder / case["weights"]), tolerance)
            elif group == "models":
                yield from model(case, io, load_file(folder / case["weights"]), tolerance)
            else:
                yield from (unknown(case.get("name", group), key) for key in io)


def attention(
    case: Mapping[str, Any], io: dict[str, Tensor], weights: dict[str, Tensor], tolerance: Mapping[str, Any]
) -> Iterator[Check]:
    layer = HaloAttention(**case["kwargs"]).eval()
    layer.load_state_dict(weights)
    x = io.pop("x").requires_grad_()
    cotangent = io.pop("cotangent", None)
    got = {"out": layer(x)}
    if cotangent is not None:
        (got["out"] * cotangent).sum().backward()
        got |= gradients(layer, x)
    with torch.no_grad():
        got |= {k: v for k, v in layer.maps(x).items() if k in MAPS}
    for key, expected in io.items():
        held = tolerance["attention_grad" if key.startswith("grad.") else "attention"]
        yield close(case["name"], key, got.get(key), expected, held)


def model(
    case: Mapping[str, Any], io: dict[str, Tensor], weights: dict[str, Tensor], tolerance: Mapping[str, Any]
) -> Iterator[Check]:
    net = HaloNet(**case["config"], num_classes=case["num_classes"]).eval()
    net.load_state_dict(weights)
    if "params" in case:
        count = sum(p.numel() for p in net.parameters())
        yield Check(case["name"], "parameter count", abs(count - case["params"]), 0.0)
    x = io.pop("x").requires_grad_()
    target = io.pop("target", None)
    got: dict[str, Tensor] = {"stem": net.stem(x)}
    y = got["stem"]
    for number, stage in enumerate(net.stages):
        y = got[f"stage{number}"] = stage(y)
    got["features"] = net.forward_features(x)
    got["pooled"] = net.forward_head(got["features"], pre_logits=True)
    got["logits"] = net(x)
    if target is not None:
        loss = F.cross_entropy(got["logits"], target)
        loss.backward()
        got |= {"loss": loss.reshape(1)} | gradients(net, x)
        squares = [p.grad.square().sum() for p in net.parameters() if p.grad is not None]
        got["grad_norm"] = torch.stack(squares).sum().sqrt().reshape(1)
    for key, expected in io.items():
        if key.startswith("grad."):
            held = tolerance["model_grad"]
        elif key == "grad_norm":
            held = tolerance["grad_norm"]
        else:
            feature = key in FEATURES or key.startswith("stage")
            held = tolerance["model_features" if feature else "model_logits"]
        yield close(case["name"], key, got.get(key), expected, held)


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    named = [(n, p.grad) for n, p in module.named_parameters()] + [("x", x.grad)]
    return {f"grad.{n}": g for n, g in named if g is not None}
