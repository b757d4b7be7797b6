"""The networks of this domain by name, for lists: loads nothing heavy."""

from __future__ import annotations

from typing import Any

# Arguments of `timeseries.sahp.SAHP` with two types, and what they come to
EVENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sahp": (4_186, {"d_model": 16, "heads": 8, "layers": 4, "score": "exp_softmax"}),
    "sahp_kernels": (16_131, {"d_model": 32, "heads": 4, "layers": 4, "rates": 3}),
    "sahp_easytpp": (6_642, {"d_model": 32, "heads": 2, "layers": 2, "variant": "easytpp"}),
}


def list_variants() -> dict[str, dict[str, Any]]:
    """Name -> family and parameters (of event models: with two types)."""
    return {name: {"family": "sahp", "parameters": count} for name, (count, _) in EVENTS.items()}


def create_network(name: str) -> Any:
    """The network behind a name of `list_variants`."""
    from timeseries.sahp import SAHP

    return SAHP(2, **EVENTS[name][1])
