"""HaloNet against timm: the attention layer in inference and training, and whole models, same weights.

Each layer gets its map in the order that it works in and that its network hands it: timm's plain, ours
channels_last; for inference our projections are packed as in a deployed network. Whole models of ours are
deployed (`to_deploy()`) and get plain images, timm's are measured in both memory orders.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from benchmarks import harness
from vision.halo_attention import HaloAttention
from vision.halonet import halonet

# layer -> its arguments, side of the map, batches for time and for memory
LAYERS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "halonet_h1 group 0": (dict(dim=64, block_size=8, halo_size=3), 64, 4, 4),
    "halonet_h1 group 1, stride 2": (dict(dim=128, block_size=8, halo_size=3, stride=2), 64, 4, 4),
    "halonet26t group 2": (dict(dim=256, block_size=8, halo_size=2), 16, 8, 16),
}
# ratio of time in inference, share of memory in inference, ratio of time in training
LAYER_TARGETS = {"halonet_h1 group 0": (1.7, 0.6, 1.3), "halonet26t group 2": (1.6, 0.65, None)}
MODELS = {"halonet_h1": 1.7, "halonet26t": 1.4}
Pass = Callable[[], Any]


@functools.cache
def layers(name: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    options = LAYERS[name][0]
    pair: dict[str, nn.Module] = {"timm": HaloAttn(**options).eval(), "ours": HaloAttention(**options).eval()}
    pair["ours"].load_state_dict(pair["timm"].state_dict())
    return pair


def layer_pass(name: str, who: str, training: bool, batch: int, threads: int) -> Pass:
    harness.set_threads(threads)
    layer, (options, side, *_) = layers(name)[who], LAYERS[name]
    x = torch.randn(batch, options["dim"], side, side, generator=torch.Generator().manual_seed(1))
    if who == "ours":
        x = x.contiguous(memory_format=torch.channels_last)
    if not training:
        layer = copy.deepcopy(layer)
        if isinstance(layer, HaloAttention):
            layer.pack()
        return lambda: inference(layer, x)
    x.requires_grad_()

    def step() -> Tensor:
        layer.zero_grad()
        x.grad = None
        out = layer(x)
        out.square().mean().backward()
        return out

    return step


@torch.no_grad()
def inference(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


@functools.cache
def models(name: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    reference = timm.create_model(name).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, so that folding is put to work
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    ours = halonet(name).eval()
    ours.load_state_dict(reference.state_dict())
    last = timm.create_model(name).eval().to(memory_format=torch.channels_last)
    last.load_state_dict(reference.state_dict())
    return {"timm": reference, "timm channels_last": last, "ours": ours.to_deploy()}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())


def layer_row(name: str, training: bool, rounds: int, threads: int) -> dict[str, Any]:
    _, side, batch, memory_batch = LAYERS[name]
    passes = {who: layer_pass(name, who, training, batch, threads) for who in ("timm", "ours")}
    gap = difference(passes["ours"](), passes["timm"]())
    timings = harness.measure(passes, rounds)
    peak = {w: harness.peak_memory(layer_pass, name, w, training, memory_batch, threads) for w in passes}
    faster, lighter, training_target = LAYER_TARGETS.get(name, (None, None, None))
    return {
        "layer": name,
        "pass": "training" if training else "inference",
        "batch": batch,
        "timm (ms)": timings["timm"].cpu * 1e3,
        "ours (ms)": timings["ours"].cpu * 1e3,
        "ratio": timings["timm"].cpu / timings["ours"].cpu,
        "target": training_target if training else faster,
        "memory batch": memory_batch,
        "timm (MiB)": peak["timm"] / 2**20,
        "ours (MiB)": peak["ours"] / 2**20,
        "share": peak["ours"] / peak["timm"],
        "at most": None if training else lighter,
        "relative difference": gap,
        "spread": max(t.spread for t in timings.values()),
    }


def model_row(name: str, batch: int, rounds: int) -> dict[str, Any]:
    plain = torch.randn(batch, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    last = plain.contiguous(memory_format=torch.channels_last)
    inputs = {"timm": plain, "timm channels_last": last, "ours": plain}
    passes = {who: functools.partial(inference, model, inputs[who]) for who, model in models(name).items()}
    gap = difference(passes["ours"](), passes["timm"]())
    timings = harness.measure(passes, rounds, warmup=1)
    peer = min(timings["timm"].cpu, timings["timm channels_last"].cpu)
    return {
        "network": name,
        "batch": batch,
        **{f"{who} (ms)": timing.cpu * 1e3 for who, timing in timings.items()},
        "ratio to timm": timings["timm"].cpu / timings["ours"].cpu,
        "ratio to its better order": peer / timings["ours"].cpu,
        "target": MODELS[name],
        "relative difference": gap,
        "spread": max(t.spread for t in timings.values()),
    }


def run(command: str, threads: int = 1, quick: bool = False, only: str = "") -> harness.Report:
    rounds = 3 if quick else 15
    chosen = [n for n in MODELS if not only or n in only.split(",")]
    rows = [
        layer_row(name, training, rounds, threads) for name in list(LAYERS)[: 1 if quick else None]
        for training in (False, True)
    ]  # fmt: skip
    tables = {"Attention layer": rows}
    batches = (1,) if quick else (1, 4)
    tables["Whole models, 256 px"] = [model_row(name, batch, rounds) for name in chosen for batch in batches]
    notes = ["ratio: timm / ours, CPU time of the process; share: ours / timm, peak memory above the start"]
    return harness.Report("halonet", command, tables, notes)
