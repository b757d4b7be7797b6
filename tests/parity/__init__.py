"""Parity with the published code: one adapter module a system, checked against recorded fixtures.

An adapter is `tests/parity/<system>.py` with `run(folder) -> Iterator[Check]`. The folder's name is the
system; what to build, which tolerance to hold and which outputs to expect stand in the fixture itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """One expected output: `difference` is in the unit of `tolerance`."""

    case: str
    output: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.difference) and self.difference <= self.tolerance


def has_adapter(name: str) -> bool:
    return name.isidentifier() and importlib.util.find_spec(f"{__name__}.{name}") is not None


def find_fixtures(root: Path) -> list[Path]:
    """The fixture folders at or one level below `root`: those that hold a JSON description."""
    if any(root.glob("*.json")):
        return [root]
    return sorted(p for p in root.iterdir() if p.is_dir() and any(p.glob("*.json")))


def run(folder: Path) -> Iterator[Check]:
    """All checks of one fixture folder. A failure to understand it is a failed check, not an exception."""
    if not has_adapter(folder.name):
        yield Check("-", f"no adapter for the system {folder.name!r}", math.inf, 0.0)
        return
    adapter = importlib.import_module(f"{__name__}.{folder.name}")
    count = 0
    try:
        for check in adapter.run(folder):
            count += 1
            yield check
    except Exception as error:  # noqa: BLE001 - any surprise in a fixture must be reported with its name
        yield Check("-", f"not understood: {type(error).__name__}: {error}", math.inf, 0.0)
        return
    if count == 0:
        yield Check("-", "the fixture holds no expected output", math.inf, 0.0)
