"""The ids that a model has numbered, as one piece of text that a configuration can carry."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from polyhead.errors import UserError


class Catalogue:
    """Ids and their numbers.

    Args:
        ids: numbers or strings; the first has the number 0.
    """

    def __init__(self, ids: Sequence[Any]) -> None:
        self.ids = list(ids)
        # By their text: the same item may be a number in one log and text in another
        self.numbers = {str(v): n for n, v in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def numbers_of(self, ids: Iterable[Any]) -> np.ndarray:
        """The number of each id, -1 where it is unknown, int32."""
        return np.array([self.numbers.get(str(v), -1) for v in ids], dtype=np.int32)

    def extended(self, ids: Iterable[Any]) -> Catalogue:
        """With the ids that are new, behind those that are there."""
        return Catalogue([*self.ids, *(v for v in ids if str(v) not in self.numbers)])

    def pack(self) -> str:
        """As text: base64 of compressed JSON."""
        return base64.b64encode(zlib.compress(json.dumps(self.ids, separators=(",", ":")).encode(), 9)).decode()

    @classmethod
    def unpack(cls, text: str) -> Catalogue:
        """Raises UserError where the text is not what `pack` gave."""
        try:
            return cls(json.loads(zlib.decompress(base64.b64decode(text))))
        except (ValueError, zlib.error, TypeError) as error:
            raise UserError("the catalogue of items in this model is damaged") from error
