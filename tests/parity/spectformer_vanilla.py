"""The vanilla SpectFormer: every block, the gate, gradients, the conversion to another image size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity import Check
from tests.parity import _spectformer as shared
from vision.spectformer import VARIANTS, SpectralBlock, VanillaSpectFormer


def run(folder: Path) -> Iterator[Check]:
    yield from shared.run(folder, build, evaluate)


def build(case: Mapping[str, Any], **overrides: Any) -> VanillaSpectFormer:
    variant = (case.get("variant") or "").replace("-", "_").replace("_ti", "_t")
    options = VARIANTS.get(variant, {}) | case["constructor"]
    if "heads" in case:
        options["num_heads"] = case["heads"]
    return VanillaSpectFormer(**(options | overrides))


def evaluate(case: Mapping[str, Any], model: nn.Module, io: Mapping[str, Tensor]) -> shared.Results:
    assert isinstance(model, VanillaSpectFormer)
    x = shared.images(io)
    y = model.embed(x)
    got = {"eval.embed": y}
    for number, block in enumerate(model.blocks):
        if isinstance(block, SpectralBlock):
            got[f"eval.block{number}.norm1"] = block.norm1(y)
            got[f"eval.block{number}.gate"] = block.filter(block.norm1(y))
        y = got[f"eval.block{number}"] = block(y, model.grid)
    got["eval.pooled"] = model.forward_head(model.norm(y), pre_logits=True)
    got["eval.logits"] = model(x)
    if "eval.loss" in io:
        got["eval.loss"] = shared.loss_of(got["eval.logits"], io)
        got |= shared.gradients(model, x, got["eval.loss"], "eval.")
    if "resize_to_img_size" in case:
        got |= resized(case, model, io)
    return got


@torch.no_grad()
def resized(case: Mapping[str, Any], model: VanillaSpectFormer, io: Mapping[str, Tensor]) -> shared.Results:
    larger = build(case, img_size=case["resize_to_img_size"]).eval()
    state = larger.resize_state(model.state_dict())
    larger.load_state_dict(state)
    got = {f"resize.{k}": v for k, v in state.items()}
    if "resize.input" in io:
        got["resize.logits"] = larger(io["resize.input"].float())
    return got
