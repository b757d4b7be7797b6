"""SpectFormer: our deployed networks against the published formulation, written out here, same weights.

The reference keeps the published forward: FFT gates, attention as two products and a softmax with q and kv
projected apart, batch norm in the stem, default memory order. Targets stand beside the measured ratios.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from vision.spectformer import HierarchicalSpectFormer, VanillaSpectFormer, spectformer
from vision.spectformer_layers import Attention, ClassAttention
from vision.spectral_gate import SpectralGate

MODELS = ("spectformer_s", "spectformer_h_s")
GRIDS = ((14, 384), (28, 128), (56, 64))  # side of the grid, channels
EAGER_TARGETS = {("spectformer_s", 1): 1.03, ("spectformer_s", 16): 1.1, ("spectformer_h_s", 1): 1.05}


def published_gate(self: SpectralGate, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    height, width = grid or self.grid
    batch, count, channels = x.shape
    spectrum = torch.fft.rfft2(x.view(batch, height, width, channels).float(), dim=(1, 2), norm="ortho")
    spectrum = spectrum * torch.view_as_complex(self.complex_weight)
    return torch.fft.irfft2(spectrum, s=(height, width), dim=(1, 2), norm="ortho").reshape(batch, count, channels)


def published_attention(self: Attention, x: Tensor) -> Tensor:
    batch, count, channels = x.shape
    heads, width = self.num_heads, channels // self.num_heads
    if self.joint:
        q, k, v = self.qkv(x).reshape(batch, count, 3, heads, width).permute(2, 0, 3, 1, 4)
    else:
        q = self.q(x).reshape(batch, count, heads, width).permute(0, 2, 1, 3)
        k, v = self.kv(x).reshape(batch, count, 2, heads, width).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-2, -1)) * width**-0.5).softmax(dim=-1)
    return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, channels))


def published_class_attention(self: ClassAttention, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    return self.proj((weights @ v).transpose(1, 2).flatten(2))


def published(model: nn.Module) -> nn.Module:
    """The network with the published forward of its gates and attentions."""
    forms = {
        SpectralGate: published_gate,
        Attention: published_attention,
        ClassAttention: published_class_attention,
    }
    for module in model.modules():
        if type(module) in forms:
            module.forward = MethodType(forms[type(module)], module)  # type: ignore[method-assign]
    return model.eval()


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """Reference and ours, same weights."""
    torch.manual_seed(0)
    ours = spectformer(name).eval()
    assert isinstance(ours, VanillaSpectFormer | HierarchicalSpectFormer)
    for module in ours.modules():  # batch norms as after training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    reference = spectformer(name)
    reference.load_state_dict(ours.state_dict())
    return published(reference), ours.to_deploy()


def compare(
    label: dict[str, Any], contestants: dict[str, Callable[[], Tensor]], rounds: int, target: float | None
) -> dict[str, Any]:
    """A row: CPU milliseconds of both, their ratio, the target, the largest difference of the outputs."""
    with torch.inference_mode():
        (first, a), (second, b) = ((name, run()) for name, run in contestants.items())
        timings = harness.measure(contestants, rounds)
    return label | {
        f"{first} (ms)": timings[first].cpu * 1e3,
        f"{second} (ms)": timings[second].cpu * 1e3,
        "ratio": timings[first].cpu / timings[second].cpu,
        "target": target,
        "difference": float((a - b).abs().max()),
        "spread": max(t.spread for t in timings.values()),
    }


def gates(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for side, channels in GRIDS:
        for batch in (1, 16):
            gate = SpectralGate(channels, (side, side)).eval()
            gate.freeze()
            reference = published(SpectralGate(channels, (side, side)))
            reference.load_state_dict(gate.state_dict())
            x = torch.randn(batch, side * side, channels)
            for backend in ("matmul", "auto"):
                gate.backend = backend
                label = {"grid": f"{side}x{side}", "channels": channels, "batch": batch, "form": backend}
                rows.append(
                    compare(label, {"published": lambda: reference(x), "ours": lambda: gate(x)}, rounds, None)  # noqa: B023
                )
    return rows


def exported(model: nn.Module, folder: Path) -> Path:
    """An ONNX file of the network with a dynamic batch."""
    path = folder / "model.onnx"
    program = torch.onnx.export(
        model,
        (torch.randn(2, 3, 224, 224),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.AUTO},),
        verbose=False,
    )
    assert program is not None
    program.save(path)
    return path


def onnx(path: Path, x: Tensor, threads: int) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # waiting threads that spin would count as CPU time
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    pixels = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {entry.name: pixels})[0])


def image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def run(command: str, threads: int = 1, quick: bool = False, only: str = "") -> harness.Report:
    rounds = 3 if quick else 15
    tables: dict[str, list[dict[str, Any]]] = {"Gate alone": gates(rounds)}
    for name in (n for n in MODELS if not only or n in only.split(",")):
        reference, ours = build(name)
        rows = tables[name] = []
        for batch in (1,) if quick else (1, 4, 16):
            x = image(batch)
            target = EAGER_TARGETS.get((name, batch), 1.0)
            contestants = {"published": lambda: reference(x), "ours": lambda: ours(x)}  # noqa: B023
            rows.append(compare({"form": "eager", "batch": batch}, contestants, rounds, target))
        if quick:
            continue
        compiled = {n: torch.compile(m, dynamic=False, options={"freezing": True}) for n, m in
                    (("published", reference), ("ours", ours))}  # fmt: skip
        x = image(1)
        contestants = {n: lambda m=m: m(x) for n, m in compiled.items()}  # type: ignore[misc]  # noqa: B023
        rows.append(compare({"form": "both compiled", "batch": 1}, contestants, rounds, 1.0))
        contestants = {"published": lambda: reference(x), "ours": lambda: compiled["ours"](x)}  # noqa: B023
        rows.append(compare({"form": "ours compiled", "batch": 1}, contestants, rounds, None))
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as folder:
            path = exported(ours, Path(folder))
            for batch in (1, 16):
                x = image(batch)
                contestants = {"published": lambda: reference(x), "ours": onnx(path, x, threads)}  # noqa: B023
                target = 1.0 if batch == 1 else None
                rows.append(compare({"form": "ours in ONNX Runtime", "batch": batch}, contestants, rounds, target))
    notes = [
        "published: eager, FFT gates, attention by two products and a softmax, batch norm unfolded",
        "ours: `to_deploy()`; ratio: published / ours, CPU time of the process",
    ]
    return harness.Report("spectformer", command, tables, notes)
