"""MEDUSA as deployed against the plain backbone: the body and heads may cost what their multiplications cost."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from medical.medusa import MEDUSA, preset
from medical.variants import PRESETS
from polyhead.folding import fold_batch_norms


@functools.cache
def networks(name: str) -> tuple[nn.Module, MEDUSA, MEDUSA]:
    """The plain timm backbone, MEDUSA eager and MEDUSA deployed, with the same backbone weights."""
    torch.manual_seed(0)
    options = {k: v for k, v in preset(name).items() if k != "global_size"}
    eager = MEDUSA(2, **options).eval()
    for module in eager.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, so that folding is put to work
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    plain = timm.create_model(options["backbone"], num_classes=2).eval()
    plain.load_state_dict(eager.backbone.state_dict(), strict=False)
    deployed: Any = fold_batch_norms(eager, lambda n: n(*views(name, 1)))
    return plain, eager, deployed.to(memory_format=torch.channels_last)


def views(name: str, batch: int) -> tuple[Tensor, Tensor]:
    facts = preset(name)
    source = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, facts["image_size"], facts["image_size"], generator=source)
    return x, torch.randn(batch, 1, facts["global_size"], facts["global_size"], generator=source)


def macs(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        run()
    return counted.get_total_flops() / 2e9


def onnx_session(network: nn.Module, example: tuple[Tensor, ...], path: Path, threads: int) -> Callable[..., Any]:
    import onnxruntime

    names = [f"input_{i}" for i in range(len(example))]
    torch.onnx.export(network, example, path, dynamo=True, input_names=names, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {n: t.numpy() for n, t in zip(names, example, strict=True)}
    return lambda: session.run(None, inputs)


class Logits(nn.Module):
    def __init__(self, network: MEDUSA) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return self.network(x, g).logits


def row(name: str, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    plain, eager, deployed = networks(name)
    x, g = views(name, batch)
    last = x.contiguous(memory_format=torch.channels_last)
    share = macs(lambda: eager(*views(name, 1))) / macs(lambda: plain(views(name, 1)[0]))
    calls: list[int] = []
    handle = deployed.body.register_forward_hook(lambda *a: calls.append(1))  # type: ignore[union-attr]
    with torch.no_grad():
        gap = float((deployed(last, g).logits - eager(x, g).logits).abs().max())
    handle.remove()
    with tempfile.TemporaryDirectory() as folder:
        passes = {
            "backbone": torch.no_grad()(lambda: plain(x)),
            "backbone channels_last": torch.no_grad()(lambda: plain_last(name)(last)),
            "MEDUSA eager": torch.no_grad()(lambda: eager(x, g)),
            "MEDUSA deployed": torch.no_grad()(lambda: deployed(last, g)),
            "backbone ONNX": onnx_session(plain, (x,), Path(folder) / "plain.onnx", threads),
            "MEDUSA ONNX": onnx_session(Logits(deployed).eval(), (x, g), Path(folder) / "ours.onnx", threads),
        }
        timings = harness.measure(passes, rounds, warmup=1)
    time = {who: timing.cpu * 1e3 for who, timing in timings.items()}
    return {
        "preset": name,
        "batch": batch,
        **{f"{who} (ms)": value for who, value in time.items()},
        "deployed / backbone": time["MEDUSA deployed"] / time["backbone"],
        "at most (MACs)": share,
        "deployed / backbone channels_last": time["MEDUSA deployed"] / time["backbone channels_last"],
        "eager / backbone": time["MEDUSA eager"] / time["backbone"],
        "ONNX / ONNX": time["MEDUSA ONNX"] / time["backbone ONNX"],
        "body runs": len(calls),
        "difference": gap,
        "spread": max(t.spread for t in timings.values()),
    }


@functools.cache
def plain_last(name: str) -> nn.Module:
    twin: nn.Module = timm.create_model(preset(name)["backbone"], num_classes=2).eval()
    twin.load_state_dict(networks(name)[0].state_dict())
    return twin.to(memory_format=torch.channels_last)


def run(command: str, threads: int = 1, quick: bool = False, only: str = "") -> harness.Report:
    rounds = 3 if quick else 7
    names = [n for n in PRESETS if (not only or n in only.split(",")) and (not quick or n == "medusa_r18")]
    rows = [row(name, batch, rounds, threads) for name in names for batch in ((1,) if quick else (1, 8))]
    notes = [
        "CPU time of the process; backbone: the plain timm network, eager, with the same weights",
        "at most: the multiplications of the whole over those of the backbone",
    ]
    return harness.Report("medusa", command, {"Inference": rows}, notes)
