"""Reading weights from files without running anything that is in them."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.errors import UserError, reason

if TYPE_CHECKING:
    from torch import Tensor


class Settings:
    """What stands in for the class of training settings that some published checkpoints keep beside their weights.

    It takes any attributes and does nothing.
    """


# Names in published checkpoints -> the inert class that is built in place of theirs
INERT = {"utils.utils.Struct": Settings}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a safetensors or torch file, on the CPU, without running anything that it holds.

    Beside tensors and plain containers `argparse.Namespace` is admitted, because training checkpoints keep
    their command line in one, and for the names in `INERT` an empty class is built.

    Raises:
        UserError: no such file, not such a file, or a file that asks for anything else to be imported.
    """
    content = _read(Path(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def read_tensor(path: str | Path) -> Tensor:
    """The one tensor in a torch file, read as safely. Raises UserError."""
    content = _read(Path(path))
    if not hasattr(content, "numpy"):
        raise UserError(f"{path} holds a {type(content).__name__}, not a tensor")
    return content


def _read(path: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        admitted: list[Any] = [argparse.Namespace, *((stub, name) for name, stub in INERT.items())]
        with torch.serialization.safe_globals(admitted), warnings.catch_warnings():
            # Foreign pickles make torch doubt aloud whether it will manage
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if refused is None:
            raise UserError(f"{path} is not a checkpoint that torch can read safely") from error
        raise UserError(
            f"{path} asks for {refused[1]} to be imported, which may run code: refused",
            hints=["ask its author for the bare state dict, or a safetensors file"],
        ) from error
    except Exception as error:  # on damaged files the reader raises almost anything
        why = _first(error)
        # A bare name or number is no reason
        text = f"{path} is not a checkpoint file, or is damaged"
        raise UserError(f"{text}: {why}" if " " in why else text) from error


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Inside, every `torch.load` refuses what is not plain data, also where a library asks for the contrary.

    `torch.export.load` does: after a failed safe attempt it runs the general unpickler.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _first(error: Exception) -> str:
    return re.split(r"(?<=\.) ", reason(error))[0][:200]
