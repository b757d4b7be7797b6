"""ACMIL: model cases, training trajectories, feature files and the tiling of a slide."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_auroc

from medical.acmil import ACMIL, draw_mask, losses
from medical.bags import find_bags
from tests.parity import Check

NO_COLUMNS: dict[str, str | None] = dict.fromkeys(("bag", "label", "group", "split"))


def close(case: str, name: str, got: Any, expected: Any, rtol: float, atol: float) -> Check:
    """Largest |got - expected| / (atol + rtol |expected|), against 1."""
    got, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (got, expected))
    if got.shape != expected.shape:
        return Check(case, f"{name} {list(got.shape)} for {list(expected.shape)}", math.inf, 1.0)
    gap = ((got - expected).abs() / (atol + rtol * expected.abs())).max() if got.numel() else torch.zeros(())
    return Check(case, name, float(gap) if not gap.isnan() else math.inf, 1.0)


def build(meta: dict[str, Any], weights: Path) -> ACMIL:
    options = dict(meta["constructor"])
    model = ACMIL(
        options.pop("D_feat"), options.pop("D_inner"), options.pop("n_class"), options.pop("n_token"),
        meta["arch"], options.pop("n_masked_patch"), options.pop("mask_drop"), options.pop("D", 128),
        options.pop("droprate", None) or 0.0,
    )  # fmt: skip
    assert not options, f"options not understood: {sorted(options)}"
    model.load_state_dict(load_file(weights))
    return model


def evaluation(model: ACMIL, x: Tensor, label: Tensor) -> dict[str, Tensor]:
    model.eval()
    with torch.no_grad():
        output = model(x)
        parts = losses(output, label)
        h = model.dimreduction(x)
    logits = output.attention_logits[0]
    attention = logits.softmax(-1)
    # The script's own sum: over heads, branches and instances, divided by the branches alone
    entropy = (attention * logits.log_softmax(-1)).sum() / logits.shape[1]
    return {
        "attention": attention,
        "attention_logits": logits,
        "bag_attention": attention.mean(1),
        "bag_feature": output.bag_feature,
        "branch_logits": output.branch_logits[0],
        "instance_features": h,
        "slide_logits": output.slide_logits,
        "neg_entropy": entropy.view(1),
        **{f"loss_{k}": v.view(1) for k, v in _named(parts).items()},
    }


def _named(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"total" if k == "loss" else k: v for k, v in parts.items()}


def training(model: ACMIL, x: Tensor, label: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a masked training step."""
    model.train()
    model.zero_grad()
    output = model(x, mask=mask[None])
    parts = losses(output, label)
    parts["loss"].backward()
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    named = {
        "attention_logits": output.attention_logits[0],
        "branch_logits": output.branch_logits[0],
        "slide_logits": output.slide_logits,
        "mask": mask,
        "grad_norm_total": torch.stack([g.norm() for g in grads.values()]).norm().view(1),
        **{f"loss_{k}": v.view(1) for k, v in _named(parts).items()},
    }
    return named, grads


def model_case(folder: Path, meta: dict[str, Any]) -> Iterator[Check]:
    case = meta["case"]
    io = load_file(folder / f"{case}.io.safetensors")
    tolerance = meta["tolerance"]
    model = build(meta, folder / f"{case}.weights.safetensors")
    x, label = io["features"].float(), io["label"]
    got = {f"eval.{k}": v for k, v in evaluation(model, x, label).items()}
    for name, setting in meta["train_cases"].items():
        mask = io[f"{name}.mask"]
        outputs, grads = training(model, x, label, mask)
        got |= {f"{name}.{k}": v for k, v in outputs.items()}
        got |= {f"{name}.grad.{k}": v for k, v in grads.items()}
        got |= {f"{name}.gradnorm.{k}": v.norm().view(1) for k, v in grads.items()}
        torch.manual_seed(setting["torch_manual_seed_before_forward"])
        with torch.no_grad():
            logits = model.eval()(x).attention_logits[0]
            drawn = torch.zeros_like(logits, dtype=torch.bool)
            if setting["n_masked_patch"]:
                drawn = draw_mask(logits, setting["n_masked_patch"], setting["mask_drop"])
        yield Check(case, f"{name}.mask as drawn", float((drawn != mask.bool()).sum()), 0.0)
    for name, expected in io.items():
        if name in ("features", "label"):
            continue
        if name not in got:
            yield Check(case, f"{name} is not understood", math.inf, 0.0)
        else:
            yield close(case, name, got[name].detach(), expected, **tolerance)


def rate(recipe: dict[str, Any], epoch: float) -> float:
    """The published half cosine on the fractional epoch, with its linear warm-up."""
    warm, last = recipe["warmup_epoch"], recipe["train_epoch"]
    if epoch < warm:
        return recipe["lr"] * epoch / warm
    share = 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (last - warm)))
    return recipe["min_lr"] + (recipe["lr"] - recipe["min_lr"]) * share


def trajectory_case(folder: Path, meta: dict[str, Any]) -> Iterator[Check]:
    case, recipe, tolerance = meta["case"], meta["recipe"], meta["tolerance"]
    io = load_file(folder / f"{case}.io.safetensors")
    model = build(meta, folder / f"{case}.weights.safetensors")
    sets = {part: [io[f"{part}.bag{i}"].float() for i in range(len(io[f"{part}.labels"]))] for part in ("train", "val")}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=recipe["weight_decay"]
    )
    steps: list[list[float]] = []
    rates: list[float] = []
    evaluated: list[list[float]] = []
    logits = torch.zeros(())
    for epoch in range(recipe["train_epoch"]):
        model.train()
        for index, bag in enumerate(sets["train"]):
            rates.append(rate(recipe, epoch + index / len(sets["train"])))
            for group in optimizer.param_groups:
                group["lr"] = rates[-1]
            parts = losses(model(bag), io["train.labels"][index : index + 1])
            optimizer.zero_grad()
            parts["loss"].backward()
            optimizer.step()
            steps.append([parts[k].item() for k in ("branch", "diversity", "bag")])
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(bag).slide_logits for bag in sets["val"]])
        truth = io["val.labels"]
        accuracy = float((logits.argmax(1) == truth).double().mean())
        auroc = float(multiclass_auroc(logits.softmax(1), truth, logits.shape[1]))
        evaluated.append([auroc, 100 * accuracy, accuracy, float(F.cross_entropy(logits, truth))])
    got: dict[str, tuple[Any, dict[str, float]]] = {
        "losses_branch_diversity_bag": (steps, tolerance["losses"]),
        "lr_per_step": (rates, tolerance["lr"]),
        "val_auroc_acc1_f1_loss_per_epoch": (evaluated, tolerance["val_metrics"]),
        "val_slide_logits_final": (logits, tolerance["final_logits"]),
        **{f"final.{n}": (p.detach(), tolerance["final_weights"]) for n, p in model.named_parameters()},
    }
    for name, expected in io.items():
        if name.startswith(("train.", "val.")) or name.removeprefix("final.") in meta["free_parameters"]:
            continue
        if name not in got:
            yield Check(case, f"{name} is not understood", math.inf, 0.0)
        else:
            value, limits = got[name]
            yield close(case, name, value, expected, limits.get("rtol", 0.0), limits.get("atol", 0.0) or 1e-300)


def files_case(folder: Path) -> Iterator[Check]:
    """The same bags in every layout of feature files."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    roots = sorted(p for p in folder.iterdir() if p.suffix == ".h5")
    roots += sorted({p.parent for p in folder.rglob("*") if p.suffix in (".h5", ".pt") and p.parent != folder})
    for root in roots:
        bags = {bag.id: bag for bag in find_bags(root, NO_COLUMNS)}
        case = f"{folder.name}/{root.relative_to(folder)}"
        yield Check(case, "slides", float(len(bags.keys() ^ index["slides"].keys())), 0.0)
        for name, expected in index["slides"].items():
            got = bags[name].read()
            rows, width = got.features.shape
            yield Check(case, f"{name} shape", abs(rows - expected["n"]) + abs(width - index["feature_dim"]), 0.0)
            # Stored as float16, a value is off by up to 2^-11 of itself
            loose = got.features.dtype == np.float16
            total = got.features.astype(np.float64)
            limit = float(np.abs(total).sum()) * 2.0**-11 if loose else 1e-9
            yield Check(case, f"{name} sum", abs(float(total.sum()) - expected["sum_float32"]), limit)
            if got.coords is not None:
                gap = np.abs(got.coords.sum(0) - np.array(expected["coords_sum"])).max()
                yield Check(case, f"{name} coordinates", float(gap), 0.0)
            if bags[name].label is not None:
                yield Check(case, f"{name} label", float(int(bags[name].label or -1) != expected["label"]), 0.0)


def run(folder: Path) -> Iterator[Check]:
    for path in sorted(folder.glob("*.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if "recipe" in meta:
            yield from trajectory_case(folder, meta)
        elif "constructor" in meta:
            yield from model_case(folder, meta)
        elif "segmentation" in meta:
            from tests.parity._wsi import tiling_case

            yield from tiling_case(folder, meta)
        else:
            yield Check(path.stem, "a fixture of no known kind", math.inf, 0.0)
    for index in sorted(folder.glob("*/index.json")):
        yield from files_case(index.parent)
