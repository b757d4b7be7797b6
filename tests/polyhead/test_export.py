"""Exported files: the same numbers, a test of themselves, whole or absent, and nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from polyhead.errors import UserError
from polyhead.export import KEY, SUFFIX, Exported, Format, difference, export
from tests.toy import Toy

FACTS = {"classes": ["a", "b", "c"]}


class Doubling(Toy):
    """A system whose deployed form is wrong."""

    def deployed(self) -> Any:
        other = Toy(self.facts)
        other.load_state_dict(self.state_dict())
        other.network[4].weight.data *= 2
        return other.eval()


class Stubborn(Toy):
    """A system that no exporter can trace."""

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            raise RuntimeError("this cannot be traced")
        return super().outputs(**inputs)


def toy(kind: type[Toy] = Toy) -> Toy:
    torch.manual_seed(3)
    system = kind(FACTS)
    system.network[1].running_mean.uniform_(-1, 1)  # type: ignore[operator, union-attr]
    system.network[1].running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    system.recipe = {"class_path": "tests.toy.Toy", "init_args": {"facts": FACTS}}
    system.data_recipe = {"class_path": "tests.toy.ToyData", "init_args": {"root": "/where/it/lay", "batch_size": 8}}
    return system


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for format in SUFFIX:
        made[format] = folder / f"model{SUFFIX[format]}"
        export(toy(), made[format], format)  # type: ignore[arg-type]
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "model.pt", "model.pt2"]
    return made


def test_a_torchscript_file_asks_for_no_gradients_and_leaves_the_model_trainable(tmp_path: Path) -> None:
    system = toy()
    export(system, tmp_path / "model.pt", "torchscript")
    module = torch.jit.load(str(tmp_path / "model.pt"))
    outputs = module(*system.signature().inputs.values())
    assert not any(value.requires_grad for value in outputs)
    assert all(parameter.requires_grad for parameter in system.parameters())


@pytest.mark.parametrize("format", SUFFIX)
def test_a_file_is_the_model(files: dict[str, Path], format: Format) -> None:
    system = toy().eval()
    exported = Exported(files[format])
    for batch in (1, 3, 17):
        x = torch.randn(batch, 8)
        expected = {k: v.detach().numpy() for k, v in system.outputs(x=x).items()}
        assert difference(exported.run({"x": x.numpy()}), expected) < 1e-6
    assert exported.self_test < 1e-6


@pytest.mark.parametrize("format", SUFFIX)
def test_a_file_carries_what_a_user_needs(files: dict[str, Path], format: Format) -> None:
    meta = Exported(files[format]).meta
    assert meta["facts"] == FACTS and meta["inputs"] == ["x"] and meta["outputs"] == ["logits", "probabilities"]
    assert meta["shapes"] == {"x": ["batch", 8]} and meta["dtypes"] == {"x": "float32"}
    assert meta["columns"] == {"kind": "classification", "classes": ["a", "b", "c"]}
    assert meta["data"] == {"class_path": "tests.toy.ToyData", "init_args": {"root": None, "batch_size": 8}}
    assert meta["system"] == "tests.toy.Toy"
    assert b"/where/it/lay" not in files[format].read_bytes()


def test_onnx_is_one_file_that_others_can_check(files: dict[str, Path]) -> None:
    model = onnx.load(files["onnx"], load_external_data=False)
    onnx.checker.check_model(model)
    assert not any(t.external_data for t in model.graph.initializer)
    assert json.loads({p.key: p.value for p in model.metadata_props}[KEY])["facts"] == FACTS


# Tampering


def _onnx_weights(path: Path) -> None:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(value * 1.05, tensor.name))
    onnx.save(model, path)


def _torchscript_weights(path: Path) -> None:
    extra = {KEY: ""}
    module = torch.jit.load(str(path), _extra_files=extra)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.05)
    torch.jit.save(module, str(path), _extra_files=extra)


def _pt2_weights(path: Path) -> None:
    extra = {KEY: ""}
    program = torch.export.load(str(path), extra_files=extra)
    with torch.no_grad():
        for p in program.state_dict.values():
            if p.is_floating_point():
                p.mul_(1.05)
    torch.export.save(program, str(path), extra_files=extra)


TAMPER: dict[str, Callable[[Path], None]] = {
    "onnx": _onnx_weights, "torchscript": _torchscript_weights, "pt2": _pt2_weights,
}  # fmt: skip


@pytest.mark.parametrize("format", SUFFIX)
def test_a_file_that_was_changed_fails_its_own_test(files: dict[str, Path], format: str, tmp_path: Path) -> None:
    path = tmp_path / files[format].name
    path.write_bytes(files[format].read_bytes())
    TAMPER[format](path)
    with pytest.raises(UserError, match="fails its own test: outputs differ by 0.0"):
        Exported(path)


@pytest.mark.parametrize("format", SUFFIX)
def test_a_file_that_is_cut_short_is_refused(files: dict[str, Path], format: str, tmp_path: Path) -> None:
    path = tmp_path / files[format].name
    content = files[format].read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 50):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=rf"{path}"):
            Exported(path)


def test_notes_that_are_no_notes_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["onnx"])
    for text in ("not json", "{}", json.dumps({"golden": {"inputs": "!!", "outputs": ""}, "inputs": ["x"]})):
        model.metadata_props[-1].value = text
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(UserError, match="fails its own test"):
            Exported(tmp_path / "model.onnx")


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)  # type: ignore[attr-defined]


def test_nothing_in_a_file_is_executed(files: dict[str, Path], tmp_path: Path) -> None:
    """`torch.export.load` goes on to the general unpickler where the safe one refuses: it must not."""
    planted = Planted()
    planted.path = str(tmp_path / "executed")  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save({"x": planted}, buffer)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    replaced = 0
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(files["pt2"]) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if "sample_inputs" in info.filename or content[:2] in (b"PK", b"\x80\x02"):
                content, replaced = buffer.getvalue(), replaced + 1
            target.writestr(info.filename, content)
    assert replaced
    before = dict(os.environ)
    with pytest.raises(UserError):
        Exported(path)
    assert not (tmp_path / "executed").exists()
    assert dict(os.environ) == before
    # and the file would do so if it could
    try:
        torch.export.load(str(path))
    except Exception:
        pass
    assert (tmp_path / "executed").exists()


# Exports that do not come about


@pytest.mark.parametrize("format", SUFFIX)
def test_a_difference_leaves_no_file(format: Format, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"the {format} export differs from the model by .*; no file was written"):
        export(toy(Doubling), tmp_path / f"model{SUFFIX[format]}", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", SUFFIX)
def test_a_model_that_cannot_be_exported_is_a_line(format: Format, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"Stubborn does not export to {format}: ") as raised:
        export(toy(Stubborn), tmp_path / f"model{SUFFIX[format]}", format)
    assert "\n" not in raised.value.message and not list(tmp_path.iterdir())


def test_an_older_file_survives_a_failed_export(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(files["torchscript"].read_bytes())
    with pytest.raises(UserError):
        export(toy(Doubling), path, "torchscript")
    assert path.read_bytes() == files["torchscript"].read_bytes()


def test_differences_are_not_hidden_by_shapes_or_nan() -> None:
    one = np.ones((2, 3), np.float32)
    assert difference({"y": one + 0.5}, {"y": one}) == 0.5
    assert difference({"y": one[:1]}, {"y": one}) == float("inf")
    assert difference({}, {"y": one}) == float("inf")
    assert difference({"y": one * np.nan}, {"y": one}) == float("inf")
