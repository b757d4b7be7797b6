"""The hierarchical SpectFormer: every stage, class attention, token labelling, one step of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.parity import Check
from tests.parity import _spectformer as shared
from vision.spectformer import HierarchicalSpectFormer, spectformer
from vision.spectral_gate import SpectralGate
from vision.token_label import TokenLabelLoss, mix_box


def run(folder: Path) -> Iterator[Check]:
    yield from shared.run(folder, build, evaluate)


def build(case: Mapping[str, Any]) -> nn.Module:
    options = {"drop_path_rate": 0.0, "token_label": True} | case["constructor"]
    if case.get("variant") is None:
        return HierarchicalSpectFormer(**options)
    return spectformer(case["variant"].replace("spectformer_", "spectformer_h_"), **options)


def evaluate(case: Mapping[str, Any], model: nn.Module, io: Mapping[str, Tensor]) -> shared.Results:
    assert isinstance(model, HierarchicalSpectFormer)
    x = shared.images(io)
    got: shared.Results = {}
    hooks = [
        gate.register_forward_hook(lambda m, i, out, name=name: got.__setitem__(f"eval.{name}.gate", out))
        for name, gate in ((n.removesuffix(".attn"), m) for n, m in model.named_modules())
        if isinstance(gate, SpectralGate)
    ]
    _, *stages = model.forward_tokens(x)
    for hook in hooks:
        hook.remove()
    got |= {f"eval.stage{n}": y for n, y in enumerate(stages, start=1)}
    got["eval.stem"] = model.stage(1)[0](x)
    got["eval.cls_block"] = model.class_tokens(stages[-1])
    tokens = got["eval.tokens"] = model.norm4(got["eval.cls_block"])
    got["eval.logits_cls"] = model.head(tokens[:, 0])
    got["eval.logits"] = model(x)
    if model.token_label:
        got["eval.logits_aux"] = model.aux_head(tokens[:, 1:])
        model.token_label = False
        got["eval.logits_no_token_label"] = model(x)
        model.token_label = True
    if "eval.loss" in io:
        got["eval.loss"] = shared.loss_of(got["eval.logits"], io)
        got |= shared.gradients(model, x, got["eval.loss"], "eval.")
    if any(key.startswith("train.") for key in io):
        got |= train(case, model, io)
    return got


def train(case: Mapping[str, Any], model: HierarchicalSpectFormer, io: Mapping[str, Tensor]) -> shared.Results:
    box = tuple(io["train.mix_bbox"].tolist()) if "train.mix_bbox" in io else tuple(case["mix_bbox"])
    got: shared.Results = {}
    if "mix_numpy_seed" in case:
        # the published draw: lam, then the centre's row and column
        draw = np.random.RandomState(case["mix_numpy_seed"])
        grid = model.grids(io["input"])[-1]
        drawn = mix_box(draw.beta(1.0, 1.0), draw.randint(grid[0]), draw.randint(grid[1]), grid)
        got["train.mix_bbox"] = torch.tensor(drawn)
    model.train()
    output = model(shared.images(io), box)
    got["train.logits_cls"], got["train.logits_aux"] = output[0], output[1]
    target = io["train.token_label_target"]
    got["train.loss_gt_variant"] = TokenLabelLoss(blend_truth=True)(output, target)
    got["train.loss"] = TokenLabelLoss()(output, target)
    got |= shared.gradients(model, torch.empty(0), got["train.loss"], "train.")
    norms = [m for m in model.stage(1)[0].modules() if isinstance(m, nn.BatchNorm2d)]
    for kind in ("running_mean", "running_var"):
        got[f"train.{kind}_after_l2"] = torch.cat([getattr(m, kind) for m in norms]).norm()
    return got
