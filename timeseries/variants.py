"""The networks of this domain by name, for lists: loads nothing heavy."""

from __future__ import annotations

from typing import Any

# Arguments of `timeseries.sahp.SAHP` with two types, and what they come to
EVENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sahp": (4_186, {"d_model": 16, "heads": 8, "layers": 4, "score": "exp_softmax"}),
    "sahp_kernels": (16_131, {"d_model": 32, "heads": 4, "layers": 4, "rates": 3}),
    "sahp_easytpp": (6_642, {"d_model": 32, "heads": 2, "layers": 2, "variant": "easytpp"}),
}
# Sizes in `timeseries.mvpformer.VARIANTS` with the published encoder, 5 s at 512 Hz, and two classes
RECORDINGS: dict[str, int] = {
    "mvpformer_s": 73_579_314,
    "mvpformer_m": 1_239_089_714,
    "mvpformer_mini": 1_024_178,
    "mvpformer_xs": 114_482,
    "mvpformer_micro": 50_826,
}


def list_variants() -> dict[str, dict[str, Any]]:
    """Name -> family and parameters (of event models: with two types)."""
    events = {name: {"family": "sahp", "parameters": count} for name, (count, _) in EVENTS.items()}
    return events | {name: {"family": "mvpformer", "parameters": count} for name, count in RECORDINGS.items()}


def create_network(name: str) -> Any:
    """The network behind a name of `list_variants`."""
    if name in RECORDINGS:
        from timeseries.mvpformer import create_mvpformer

        return create_mvpformer(name)
    from timeseries.sahp import SAHP

    return SAHP(2, **EVENTS[name][1])
