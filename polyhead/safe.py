"""Reading weights from files without running anything that is in them."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from polyhead.errors import UserError, reason


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a safetensors or torch file, on the CPU, without running anything that it holds.

    Beside tensors and plain containers exactly one class is admitted, `argparse.Namespace`, because training
    checkpoints keep their command line in one.

    Raises:
        UserError: no such file, not such a file, or a file that asks for anything else to be imported.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if refused is None:
            raise UserError(
                f"{path} is not a checkpoint that torch can read safely: {_first(error)}"
            ) from error
        raise UserError(
            f"{path} asks for {refused[1]} to be imported, which may run code: refused",
            hints=["ask its author for the bare state dict, or a safetensors file"],
        ) from error
    except (SafetensorError, EOFError, RuntimeError, zipfile.BadZipFile, ValueError, OSError) as error:
        raise UserError(f"{path} is not a checkpoint file, or is damaged: {_first(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _first(error: Exception) -> str:
    return re.split(r"(?<=\.) ", reason(error))[0][:200]
