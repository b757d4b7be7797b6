"""Exports of a network, run beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]


@torch.no_grad()
def exported(model: nn.Module, x: Tensor, form: str, dynamic_size: bool, folder: Path) -> Run:
    """The network as a TorchScript, `torch.export` or ONNX file with a dynamic batch, read back."""
    if form == "torchscript":
        torch.jit.trace(model, x, check_trace=False).save(str(folder / "m.pt"))
        return torch.jit.load(str(folder / "m.pt"))
    axes = {axis: torch.export.Dim.AUTO for axis in ((0, 2, 3) if dynamic_size else (0,))}
    if form == "pt2":
        program = torch.export.export(model, (x,), dynamic_shapes=(axes,), strict=False)
        torch.export.save(program, folder / "m.pt2")
        return torch.export.load(folder / "m.pt2").module()
    import onnxruntime

    onnx_program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(axes,), verbose=False)
    assert onnx_program is not None
    onnx_program.save(folder / "m.onnx")
    session = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@torch.no_grad()
def largest_difference(model: nn.Module, run: Run, shapes: list[tuple[int, ...]]) -> float:
    """The largest difference of the outputs over random inputs of these shapes."""
    gaps = []
    for shape in shapes:
        x = torch.randn(shape)
        gaps.append(float((model(x) - run(x)).abs().max()))
    return max(gaps)
