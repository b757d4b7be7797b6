"""Medicine: radiographs and whole-slide images. What recipes name is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"SlideClassifier": "medical.tasks", "BagData": "medical.bag_data"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
