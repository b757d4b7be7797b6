"""Pickles of event sequences, without running anything that is in them."""

from __future__ import annotations

import io
import pickle
from typing import Any

from polyhead.errors import UserError, reason

# Plain containers and numbers need no import at all; these are how NumPy writes arrays and numbers
ARRAYS = {(f"numpy.{home}.multiarray", name) for home in ("core", "_core") for name in ("_reconstruct", "scalar")} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _Plain(pickle.Unpickler):
    """Admits numbers, text, lists, tuples, dicts, sets and NumPy arrays; refuses to import anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ARRAYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name} to be imported, which may run code: refused")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file: refused")


def read_plain(content: bytes, name: str) -> Any:
    """The containers, numbers and arrays in a pickle, those of Python 2 included.

    Raises:
        UserError: it holds, or asks for, anything else, or is damaged.
    """
    try:
        return _Plain(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{name} is not a pickle of plain data: {reason(error)}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{name} is not a pickle, or is damaged: {reason(error)[:150]}") from error
