"""Exported models: one file that holds the graph, its preprocessing and names, and a test of itself."""

from __future__ import annotations

import base64
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import polyhead
from polyhead.columns import make_columns
from polyhead.errors import UserError, reason
from polyhead.files import atomic_write
from polyhead.safe import plain_data_only
from polyhead.system import Signature, System

Format = Literal["onnx", "torchscript", "pt2"]
SUFFIX: dict[str, str] = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2"}
KEY = "polyhead.json"
Arrays = dict[str, np.ndarray]


class Graph(nn.Module):
    """A system's `outputs` as tensors in, tuple of tensors out, in the order of its signature.

    It holds the system's modules and buffers but not the system: tracing reads every property of what it
    holds, and those of a Lightning module ask for a trainer.
    """

    def __init__(self, system: System, signature: Signature) -> None:
        super().__init__()
        for name, child in system.named_children():
            self.add_module(name, child)
        for name, buffer in system.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.names, self.results = list(signature.inputs), list(signature.outputs)
        self.outputs = [system.outputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.outputs[0](**dict(zip(self.names, inputs, strict=True)))
        return tuple(outputs[name] for name in self.results)


def _pack(arrays: Arrays) -> str:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _unpack(text: str) -> Arrays:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def difference(got: Arrays, expected: Arrays) -> float:
    """The largest difference over all outputs; infinite for NaN or another shape.

    Absolute, or relative to the largest value of outputs (such as times) that go beyond 1.
    """
    largest = 0.0
    for name, value in expected.items():
        if name not in got or got[name].shape != value.shape:
            return float("inf")
        gap = np.abs(got[name].astype(np.float64) - value.astype(np.float64))
        size = max(1.0, float(np.abs(value).max(initial=0.0)))
        largest = max(largest, float(gap.max(initial=0.0)) / size)
        if np.isnan(gap).any():
            return float("inf")
    return largest


def _numpy(tensors: dict[str, Tensor]) -> Arrays:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


def _batches(signature: Signature) -> list[dict[str, Tensor]]:
    """The inputs an export is compared on: batches of 1, 2 and 5, then the signature's other sizes."""
    first = signature.inputs
    sizes = []
    for batch in (1, 2, 5):
        repeat = {k: v[torch.arange(batch) % len(v)] for k, v in first.items()}
        sizes.append(repeat)
    return sizes + signature.checks


def _axes(signature: Signature) -> tuple[dict[int, Any], ...]:
    auto = torch.export.Dim.AUTO
    return tuple({0: auto, **dict.fromkeys(signature.dynamic.get(n, {}), auto)} for n in signature.inputs)


# Exporters give bytes, which Python then writes: on a full disk torch's own writers end the process


def _onnx(graph: Graph, signature: Signature, text: str) -> bytes:
    # The graph varies in named axes alone: `verify` compares sizes that were not traced
    program = torch.onnx.export(
        graph, tuple(signature.inputs.values()), dynamo=True, dynamic_shapes=(_axes(signature),),
        input_names=list(signature.inputs), output_names=signature.outputs, verbose=False,
    )  # fmt: skip
    assert program is not None
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, text
    return model.SerializeToString()


def _torchscript(graph: Graph, signature: Signature, text: str) -> bytes:
    # Who loads the file wants numbers, not gradients
    trained = [p for p in graph.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        traced = torch.jit.trace(graph, tuple(signature.inputs.values()), check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(traced, buffer, _extra_files={KEY: text})
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return buffer.getvalue()


def _pt2(graph: Graph, signature: Signature, text: str) -> bytes:
    program = torch.export.export(
        graph, tuple(signature.inputs.values()), dynamic_shapes=(_axes(signature),), strict=False
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={KEY: text})
    return buffer.getvalue()


EXPORTERS: dict[str, Callable[[Graph, Signature, str], bytes]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "pt2": _pt2,
}


class Exported:
    """An exported file, ready to run on numpy arrays; no model code is needed.

    Attributes:
        meta: what travels in it.
        self_test: the largest difference in its own test.

    Args:
        path: an `.onnx`, `.pt` (TorchScript) or `.pt2` file that `export` wrote.
        test: run the file's own test.

    Raises:
        UserError: not such a file, or its own test does not come out as it did when it was written.
    """

    def __init__(self, path: str | Path, test: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no exported model at {path}")
        opener = {".onnx": self._open_onnx, ".pt": self._open_torchscript, ".pt2": self._open_pt2}
        if self.path.suffix not in opener:
            raise UserError(f"{path} is not an exported model: .onnx, .pt and .pt2 are")
        try:
            with quiet(), plain_data_only():
                text, self._run = opener[self.path.suffix]()
        except Exception as error:
            raise UserError(f"cannot read {path}: {reason(error)[:200]}") from error
        if not text:
            raise UserError(f"{path} was not written by `polyhead export`: it carries no {KEY}")
        self.self_test = float("nan")
        try:
            self.meta: dict[str, Any] = json.loads(text)
            if not test:
                return
            got = self.run(_unpack(self.meta["golden"]["inputs"]))
            self.self_test = difference(got, _unpack(self.meta["golden"]["outputs"]))
        except Exception as error:
            raise UserError(f"{path} fails its own test: {reason(error)[:200]}") from error
        if self.self_test > self.meta["tolerance"]:
            raise UserError(f"{path} fails its own test: outputs differ by {self.self_test:.2g} from those it carries")

    def _open_onnx(self) -> tuple[str, Callable[[list[np.ndarray]], list[np.ndarray]]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        providers = [p for p in wanted if p in onnxruntime.get_available_providers()]
        session = onnxruntime.InferenceSession(str(self.path), options, providers=providers)
        names = [i.name for i in session.get_inputs()]
        return session.get_modelmeta().custom_metadata_map.get(KEY, ""), lambda arrays: session.run(
            None, dict(zip(names, arrays, strict=True))
        )

    def _open_torchscript(self) -> tuple[str, Callable[[list[np.ndarray]], list[np.ndarray]]]:
        files: dict[str, Any] = {KEY: ""}
        module = torch.jit.load(str(self.path), map_location="cpu", _extra_files=files).eval()
        text = files[KEY]
        return text.decode() if isinstance(text, bytes) else text, lambda arrays: self._run_torch(module, arrays)

    def _open_pt2(self) -> tuple[str, Callable[[list[np.ndarray]], list[np.ndarray]]]:
        files = {KEY: ""}
        module = torch.export.load(str(self.path), extra_files=files).module()
        return files[KEY], lambda arrays: self._run_torch(module, arrays)

    @staticmethod
    def _run_torch(module: Callable[..., Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            return [v.numpy() for v in module(*(torch.from_numpy(a) for a in arrays))]

    def run(self, inputs: Arrays) -> Arrays:
        """Named input arrays to named output arrays."""
        arrays = [np.ascontiguousarray(inputs[name]) for name in self.meta["inputs"]]
        return dict(zip(self.meta["outputs"], self._run(arrays), strict=True))


class ExportedModel(System):
    """An exported file as the model of `polyhead predict`.

    Args:
        path: the exported file.
        facts: ignored; the file carries its own.
    """

    def __init__(self, path: str, facts: dict[str, Any] | None = None) -> None:
        super().__init__(facts)
        self.exported = Exported(path)

    def input_names(self) -> list[str]:
        return list(self.exported.meta["inputs"])

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        try:
            got = self.exported.run(_numpy(inputs))
        except Exception as error:
            taken = {k: self.exported.meta["shapes"][k] for k in inputs}
            sizes = {k: list(v.shape) for k, v in inputs.items()}
            raise UserError(f"{self.exported.path} takes {taken} and got {sizes}: {reason(error)[:120]}") from error
        return {name: torch.from_numpy(value) for name, value in got.items()}

    def columns(self, batch: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
        return make_columns(self.exported.meta["columns"], _numpy(outputs))


class quiet:
    """Exporters log hundreds of lines and warn of their own deprecation: silence both for a block."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._levels = {n: logging.getLogger(n).level for n in ("onnx_ir", "onnxscript", "torch.onnx", "torch.export")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *exception: Any) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        self._warnings.__exit__(*exception)


def _verify(exported: Exported, system: System, signature: Signature, format: str) -> float:
    """The largest difference from the eager model, on sizes that were not traced. Raises UserError."""
    largest = 0.0
    for inputs in _batches(signature):
        with torch.inference_mode():
            expected = _numpy(system.outputs(**inputs))
        try:
            gap = difference(exported.run(_numpy(inputs)), expected)
        except Exception as error:
            sizes = {k: list(v.shape) for k, v in inputs.items()}
            raise UserError(f"the {format} export fails on inputs of {sizes}: {reason(error)[:200]}") from error
        largest = max(largest, gap)
    if largest > signature.tolerance:
        raise UserError(
            f"the {format} export differs from the model by {largest:.3g}, more than {signature.tolerance:g}; "
            "no file was written"
        )
    return largest


def _meta(system: System, signature: Signature) -> str:
    """What travels in the file: names, shapes, preprocessing, and an input with its output."""
    with torch.inference_mode():
        golden = _numpy(system.outputs(**signature.inputs))
    shapes = {
        k: ["batch", *[signature.dynamic.get(k, {}).get(i, v.shape[i]) for i in range(1, v.ndim)]]
        for k, v in signature.inputs.items()
    }
    meta = {
        "polyhead": polyhead.__version__,
        "system": system.recipe.get("class_path", type(system).__name__),
        "inputs": list(signature.inputs),
        "outputs": signature.outputs,
        "shapes": shapes,
        "dtypes": {k: str(v.dtype).removeprefix("torch.") for k, v in signature.inputs.items()},
        "facts": system.facts,
        "columns": signature.columns,
        # Where the training data lay is nobody's business, and would be read again by a predict without a root
        "data": {**system.data_recipe, "init_args": {**system.data_recipe.get("init_args", {}), "root": None}},
        "tolerance": signature.tolerance,
        "golden": {"inputs": _pack(_numpy(signature.inputs)), "outputs": _pack(golden)},
    }
    return json.dumps(meta)


def export(system: System, path: Path, format: Format) -> tuple[float, bool]:
    """Write `system` to `path`, after comparing it with the eager model on sizes that were not traced.

    Where the format cannot vary the sizes that the model can, the file takes the model's own size.

    Returns:
        The largest difference from the eager model, and whether sizes beside the batch vary.

    Raises:
        UserError: the model does not export, or differs by more than its tolerance; no file is left.
    """
    system = system.eval().cpu()
    signature = system.signature()
    deployed = system.deployed().eval()
    try:
        return _export(system, deployed, signature, path, format), bool(signature.dynamic)
    except UserError:
        if not signature.native:
            raise
    return _export(system, deployed, signature.fixed(), path, format), False


def _export(system: System, deployed: System, signature: Signature, path: Path, format: Format) -> float:
    try:
        with quiet(), torch.no_grad():
            content = EXPORTERS[format](Graph(deployed, signature), signature, _meta(system, signature))
    except Exception as error:
        raise UserError(f"{type(system).__name__} does not export to {format}: {reason(error)[:300]}") from error
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
        return _verify(Exported(temporary, test=False), system, signature, format)
