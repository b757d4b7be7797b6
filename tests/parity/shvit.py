"""SHViT against the published code: stages, logits, losses and gradients of stored and of full-size networks.

The full-size cases store no weights: every tensor is a hash of its published key (see `procedural`).
"""

from __future__ import annotations

import copy
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.parity import Check
from tests.parity._close import apart, unknown
from vision.shvit import SHViT, shvit

SMALL_SCALES = ("pw2.bn.weight", "proj.1.bn.weight", ".m.bn.weight")


def run(folder: Path) -> Iterator[Check]:
    fixture = json.loads((folder / "fixtures.json").read_text())
    manifest = folder / "state_dict_manifest.json"
    if manifest.exists():
        yield from keys(json.loads(manifest.read_text()))
    if "selfcheck" in fixture.get("procedural_recipe", {}):
        yield from selfcheck(fixture["procedural_recipe"]["selfcheck"])
    for case in fixture["cases"]:
        yield from check_case(folder, case, fixture["tolerance"])


def check_case(folder: Path, case: Mapping[str, Any], tolerance: Mapping[str, Any]) -> Iterator[Check]:
    name, seed = case["case"], case["seed"]
    io = load_file(folder / f"{name}.io.safetensors")
    options = case["constructor"]
    model = shvit(case["variant"], **options) if case.get("variant") else SHViT(**options)
    if case["kind"] == "stored":
        model.load_state_dict(load_file(folder / f"{name}.weights.safetensors"))
        image = io.pop("input").float()
    elif case["kind"] == "procedural":
        procedural(model, seed)
        image = io.pop("input", procedural_image(case["input_shape"], seed)).float()
    else:
        yield from (unknown(name, key) for key in io)
        return
    count = sum(p.numel() for p in model.parameters())
    yield Check(name, "n_params", abs(count - case["n_params"]), 0.0)

    got = outputs(model, image, io.pop("target"))
    for key, expected in io.items():
        if key not in got:
            yield unknown(name, key)
        elif key.endswith("grad_norm"):
            relative = apart(got[key] / expected, torch.ones_like(expected), 0.0)
            yield Check(name, key, relative, number(tolerance["grad_norms"]))
        else:
            largest = expected.abs().max().clamp_min(1)
            difference = apart(got[key] / largest, expected / largest, 0.0)
            yield Check(name, key, difference, number(tolerance["values"]))


def outputs(model: SHViT, image: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Everything that a fixture may hold, by its key."""
    trained = copy.deepcopy(model)
    image = image.requires_grad_()
    model.eval()
    got = {"eval.stem": model.patch_embed(image)}
    maps = model.forward_intermediates(image)
    for i, x in enumerate(maps, 1):
        got |= {f"eval.stage{i}": x, f"eval.stage{i}.chan_mean": x.mean((2, 3))}
        got[f"eval.stage{i}.chan_std"] = x.std((2, 3), correction=0)
    got["eval.pooled"] = model.forward_head(maps[-1], pre_logits=True)
    got["eval.logits"] = model(image)
    got["eval.loss"] = F.cross_entropy(got["eval.logits"], target)
    got["eval.loss"].backward()
    got["eval.grad_norm"] = gradient_norm(model)
    assert image.grad is not None
    got["eval.input_grad_norm"] = image.grad.norm()
    got["fused.logits"] = model.to_deploy()(image)

    logits = trained.train()(image.detach())
    if trained.distillation:
        logits, got["train.logits_dist"] = logits
        other = F.cross_entropy(got["train.logits_dist"], (target + 1) % trained.num_classes)
        got["train.loss"] = F.cross_entropy(logits, target) + 0.5 * other
    else:
        got["train.loss"] = F.cross_entropy(logits, target)
    got["train.logits"] = logits
    got["train.loss"].backward()
    got["train.grad_norm"] = gradient_norm(trained)
    for statistic in ("running_mean", "running_var"):
        found = [v for k, v in trained.state_dict().items() if k.endswith(statistic)]
        got[f"train.{statistic}_after_l2"] = torch.cat(found).norm()
    return {k: v.detach() for k, v in got.items()}


def gradient_norm(model: SHViT) -> Tensor:
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt()


def number(tolerance: float | str) -> float:
    """The tolerance itself, or the first number in scientific notation of its description."""
    if isinstance(tolerance, str):
        found = re.search(r"\d+(\.\d+)?e-\d+", tolerance)
        if found is None:
            raise ValueError(f"no tolerance in {tolerance!r}")
        return float(found.group())
    return float(tolerance)


def uniform(key: str, seed: int, count: int) -> np.ndarray:
    """`count` numbers in (0, 1), float64: the fixture's hash of the key, the seed and the position."""
    x = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(key.encode()) ^ seed)
    mask, factor, shift = np.uint64(0xFFFFFFFF), np.uint64(0x45D9F3B), np.uint64(16)
    x &= mask
    for _ in range(2):
        x = ((x ^ (x >> shift)) * factor) & mask
    return ((x ^ (x >> shift)) + 0.5) / 2.0**32


def hashed(key: str, seed: int, shape: torch.Size | list[int], low: float, high: float) -> Tensor:
    values = low + (high - low) * uniform(key, seed, math.prod(shape))
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def procedural(model: SHViT, seed: int) -> None:
    """Fill the model by the fixture's recipe."""
    state = model.state_dict()
    for key, value in state.items():
        fan_in = math.prod(value.shape[1:])
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith(("running_mean", ".bias")):
            low, high = -0.2, 0.2
        elif key.endswith("running_var"):
            low, high = 0.4, 1.6
        elif value.ndim == 1:
            low, high = (0.1, 0.5) if key.endswith(SMALL_SCALES) else (0.6, 1.4)
        else:
            high = (0.5 if key in ("head.l.weight", "head_dist.l.weight") else 2.0) / math.sqrt(fan_in)
            low = -high
        state[key] = hashed(key, seed, value.shape, low, high)
    model.load_state_dict(state)


def procedural_image(shape: list[int], seed: int) -> Tensor:
    batch, channels, height, width = shape
    coarse = hashed("input.coarse", seed, [batch, channels, 8, 8], -2, 2)
    coarse = coarse.repeat_interleave(height // 8, 2).repeat_interleave(width // 8, 3)
    return coarse + hashed("input.fine", seed, shape, -1, 1)


def selfcheck(expected: Mapping[str, list[float]]) -> Iterator[Check]:
    """The recipe's own examples: "key K, seed S, first four u" -> u."""
    for text, values in expected.items():
        found = re.match(r"key (\S+), seed (\d+)", text)
        assert found is not None
        got = uniform(found[1], int(found[2]), len(values))
        yield Check("procedural_recipe", text, float(np.abs(got - values).max()), 1e-15)


def keys(manifest: Mapping[str, Any]) -> Iterator[Check]:
    """Keys and shapes of every variant against the published state dict: the number of odd entries."""
    for name, entry in manifest.items():
        variant = name.removesuffix("_distill")
        with torch.device("meta"):
            model = shvit(variant, distillation=name != variant)
        count = sum(p.numel() for p in model.parameters())
        yield Check("state_dict_manifest", f"{name} parameters", abs(count - entry["n_params"]), 0.0)
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        if "keys" in entry:
            odd = {k for k in shapes.keys() | entry["keys"].keys() if shapes.get(k) != entry["keys"].get(k)}
        else:
            with torch.device("meta"):
                odd = shapes.keys() - shvit(variant).state_dict().keys() ^ set(entry["extra_keys"])
        yield Check("state_dict_manifest", f"{name} keys", len(odd), 0.0)
