"""What the adapters of both SpectFormer architectures share: the fixture's form, its procedural tensors,
the tolerances it states in words, and the walk over expected outputs."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.parity import Check
from tests.parity._close import apart, unknown
from vision.spectformer import spectformer

SUFFIXES: dict[str, Callable[[Tensor], Tensor]] = {
    ".tok_mean": lambda x: x.mean(1),
    ".tok_std": lambda x: x.std(1, correction=0),
    ".sub": lambda x: x[:, ::37, ::3],
}
INPUTS = ("input", "target", "resize.input", "train.token_label_target")


def hashed(key: str, shape: tuple[int, ...], seed: int, low: float, high: float) -> Tensor:
    """The fixture's procedural tensor of that key (`procedural_recipe` in its description)."""
    count = math.prod(shape)
    x = (np.arange(count, dtype=np.uint64) + (zlib.crc32(key.encode()) ^ seed)) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B)) & np.uint64(0xFFFFFFFF)
    x = x ^ (x >> np.uint64(16))
    values = low + (high - low) * ((x.astype(np.float64) + 0.5) / 2**32)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def procedural_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    weights = {}
    for key, like in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            weights[key] = like
            continue
        low, high = -0.1, 0.1
        if key.endswith("complex_weight"):
            low, high = -0.3, 0.3
        elif key.endswith("running_mean"):
            low, high = -0.2, 0.2
        elif key.endswith("running_var"):
            low, high = 0.4, 1.6
        elif key != "pos_embed" and not key.endswith(".bias"):
            if like.ndim == 1:
                low, high = 0.6, 1.4
            else:
                small = key.endswith(("mlp.fc2.weight", "attn.proj.weight"))
                high = (0.6 if small else 1.7) / math.sqrt(math.prod(like.shape[1:]))
                low = -high
        weights[key] = hashed(key, tuple(like.shape), seed, low, high)
    return weights


def procedural_input(shape: list[int], seed: int) -> Tensor:
    batch, channels, height, width = shape
    coarse = hashed("input.coarse", (batch, channels, 8, 8), seed, -2, 2)
    coarse = coarse.repeat_interleave(height // 8, 2).repeat_interleave(width // 8, 3)
    return coarse + hashed("input.fine", (batch, channels, height, width), seed, -1, 1)


class Tolerance:
    """The bounds that the description states in words; the number is read from there."""

    def __init__(self, words: Mapping[str, str]) -> None:
        self.value, self.norm, self.resize = (
            float(re.findall(r"\d+(?:\.\d+)?e-\d+", words[kind])[0]) for kind in ("values", "grad_norms", "resize")
        )

    def check(self, case: str, key: str, got: Tensor | None, expected: Tensor) -> Check:
        if got is None:
            return unknown(case, key)
        largest = float(expected.abs().max())
        if not expected.is_floating_point():
            return Check(case, key, apart(got, expected, 0.0), 0.0)
        if key.endswith("_norm"):
            return Check(case, key, apart(got, expected, 0.0) / max(largest, 1e-30), self.norm)
        if key.startswith("resize.") and key.endswith(("complex_weight", "pos_embed")):
            return Check(case, key, apart(got, expected, 0.0), self.resize)
        return Check(case, key, apart(got, expected, 0.0) / max(1.0, largest), self.value)


Results = dict[str, Tensor]


def run(
    folder: Path,
    build: Callable[[Mapping[str, Any]], nn.Module],
    evaluate: Callable[[Mapping[str, Any], nn.Module, Mapping[str, Tensor]], Results],
) -> Iterator[Check]:
    """All checks of a fixture; `evaluate` gives every output it knows of a case by the fixture's names."""
    description = json.loads((folder / "fixtures.json").read_text())
    tolerance = Tolerance(description["tolerance"])
    for case in description["cases"]:
        name = case["case"]
        io = load_file(folder / case.get("io", f"{name}.io.safetensors"))
        model = build(case).eval()
        if case["kind"] == "stored":
            model.load_state_dict(load_file(folder / case.get("weights", f"{name}.weights.safetensors")))
        elif case["kind"] == "procedural":
            model.load_state_dict(procedural_weights(model, case["seed"]))
            io.setdefault("input", procedural_input(case["input_shape"], case["seed"]))
        else:
            yield unknown(name, f"kind {case['kind']!r}")
            continue
        if "n_params" in case:
            count = sum(p.numel() for p in model.parameters())
            yield Check(name, "parameter count", abs(count - case["n_params"]), 0.0)
        got = evaluate(case, model, io)
        for key, expected in io.items():
            if key in INPUTS:
                continue
            suffix = next((s for s in SUFFIXES if key.endswith(s)), "")
            value = got.get(key.removesuffix(suffix))
            if value is not None and suffix:
                value = SUFFIXES[suffix](value)
            yield tolerance.check(name, key, value, expected)
    if (folder / "state_dict_manifest.json").exists():
        yield from layouts(folder)


def layouts(folder: Path) -> Iterator[Check]:
    """Keys and shapes of the published variants."""
    for variant, listed in json.loads((folder / "state_dict_manifest.json").read_text()).items():
        name = variant.replace("-", "_")
        with torch.device("meta"):
            model = spectformer(name, **({"token_label": True} if name.startswith("spectformer_h_") else {}))
        ours = {k: list(v.shape) for k, v in model.state_dict().items()}
        differ = [k for k in ours.keys() | listed["keys"].keys() if ours.get(k) != listed["keys"].get(k)]
        yield Check(variant, "state-dict keys and shapes that differ", len(differ), 0.0)


def gradients(model: nn.Module, x: Tensor, loss: Tensor, prefix: str) -> Results:
    """Gradient norms, and the gradient of every parameter by its state-dict key."""
    model.zero_grad()
    x.grad = None
    loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = {f"{prefix}grad_norm": torch.stack([g.square().sum() for g in named.values()]).sum().sqrt()}
    if x.grad is not None:
        found[f"{prefix}input_grad_norm"] = x.grad.norm()
    for key, grad in named.items():
        # the fixtures leave out the module a gate stands in
        short = re.sub(r"\.(filter|attn)\.(?=complex)", ".", key).replace("blocks.", "block")
        for name in {key, short}:
            found |= {f"{prefix}grad.{name}": grad, f"{prefix}grad.{name}_norm": grad.norm()}
    return found


def images(io: Mapping[str, Tensor], key: str = "input") -> Tensor:
    """The input as a float32 leaf that takes a gradient (it is stored in half precision)."""
    return io[key].float().requires_grad_()


def loss_of(logits: Tensor, io: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits, io["target"])
