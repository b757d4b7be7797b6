"""SAHP: the authors' modules in both alignments, and EasyTPP's model of the same name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.converters.sahp import to_polyhead, to_published
from tests.parity import Check
from tests.parity._close import close, unknown
from timeseries.event_likelihood import points, terms
from timeseries.sahp import SAHP, States

INPUTS = {"seq_times", "seq_types", "lengths", "mc_uniforms", "offsets", "onehot"}
PEER_INPUTS = {"time_seqs", "time_delta_seqs", "type_seqs", "non_pad_mask", "attention_mask", "offsets"}
EPSILON = torch.finfo(torch.float32).eps


def build(meta: dict[str, Any], weights: Path, peer: bool) -> SAHP:
    options = dict(meta["constructor"])
    state, found = to_polyhead(load_file(weights))
    if peer:
        sizes = (options.pop("num_event_types"), options.pop("hidden_size"), options.pop("num_heads"),
                 options.pop("num_layers"))  # fmt: skip
        found["norm"] = options.pop("use_ln")
        for name in ("loss_integral_num_sample_per_step", "use_mc_samples", "pad_token_id", "dropout_rate"):
            options.pop(name)
    else:
        sizes = (options.pop("process_dim"), options.pop("d_model"), options.pop("atten_heads"), options.pop("nLayers"))
        options.pop("dropout"), options.pop("max_sequence_length")
    assert not options, f"options not understood: {sorted(options)}"
    network = SAHP(*sizes, dropout=0.0, attention_dropout=0.0, score=found["score"], variant=found["variant"],
                   norm=found["norm"])  # fmt: skip
    network.load_state_dict(state)
    return network.eval()


def gradients(network: SAHP, variant: str) -> dict[str, Tensor]:
    named = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in network.named_parameters()}
    return to_published(named, variant, network.layers, network.norm is not None)


def norms(found: dict[str, Tensor]) -> dict[str, Tensor]:
    total = torch.stack([g.norm() for g in found.values()]).norm()
    return {f"grad_norm.{k}": g.norm() for k, g in found.items()} | {"grad_norm_total": total}


def alignment(network: SAHP, io: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Everything under `official.*` or `causal.*`."""
    types, mask = io["seq_types"], io["mask"]
    dt, uniforms = io["dt"], io["mc_uniforms"]
    inputs = (dt, types[:, 1:])
    if kind == "causal":
        inputs = (torch.cat([torch.zeros_like(dt[:, :1]), dt[:, :-1]], 1), types[:, :-1])
    embedding = network.embedding
    got = {
        "type_embedding": embedding.scale * embedding.types(inputs[1]),
        "position_embedding": embedding.position(inputs[0]),
    }
    weights: list[Tensor] = []
    x = embedding(*inputs)
    for layer in range(network.layers):
        x = network.blocks[0](x, mask, weights)
        got |= {f"attn.{layer}": weights[-1], f"layer_out.{layer}": x}
    states = network(*inputs, mask)
    got |= {"start_point": states.start, "converge_point": states.converge, "omega": states.decay}
    count = uniforms.shape[-1]
    target = torch.where(types[:, 1:] < network.kinds, types[:, 1:], -1)
    network.zero_grad()
    parts = terms(network, states, dt, target, count, "monte_carlo", uniforms[:, :, 0])
    parts.nll.backward()
    found = gradients(network, "sahp")
    got |= norms(found) | {f"grad.{k}": g for k, g in found.items()}
    got |= {"nll": parts.nll, "log_sum": parts.log_type.sum(1), "interval_integral": parts.compensator}
    got["interval_integral_quadrature"] = terms(network, states, dt, target, 64).compensator
    got["intensity_at_events"] = network.intensity(states, dt[..., None])[:, :, 0]
    got["intensity_at_samples"] = network.intensity(states, dt[..., None] * uniforms[:, :, 0]).transpose(2, 3)
    got["intensity_at_offsets"] = network.intensity(states, io["offsets"].expand(*dt.shape, -1))
    return got


def double(network: SAHP, io: dict[str, Tensor], kind: str) -> Tensor:
    """The likelihood with gaps taken in double precision."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in io.items()}
    wide["dt"] = wide["seq_times"][:, 1:] - wide["seq_times"][:, :-1]
    network = network.double()
    try:
        return alignment(network, wide, kind)["nll"]
    finally:
        network.float()


@torch.no_grad()
def last_event(network: SAHP, io: dict[str, Tensor], hmax: float, count: int) -> Tensor:
    """The published prediction of each sequence's last event from those before it, its quadrature included."""
    rows = []
    grid = torch.linspace(0, hmax, count + 1)
    step = hmax / count
    for b, n in enumerate(io["lengths"].tolist()):
        if n < 2:
            rows.append(torch.zeros(5))
            continue
        states = network(io["dt"][b : b + 1, : n - 1], io["seq_types"][b : b + 1, 1:n])
        last = States(*(v[:, -1] for v in states[:3]))
        rates = network.intensity(last, grid[None])[0]
        total = rates.sum(-1)
        density = total * (-(total.cumsum(0) * step)).exp()

        def area(values: Tensor) -> Tensor:
            return ((values[1:] + values[:-1]) / 2 * step).sum(0)

        estimated = area(grid * density)
        kind = area(rates / total[:, None] * density[:, None]).argmax()
        true = io["dt"][b, n - 1] + 1e-5
        relative = ((estimated - true) / true) ** 2
        rows.append(torch.stack([estimated, true, relative, io["seq_types"][b, n].float(), kind.float()]))
    return torch.stack(rows)


def group(output: str) -> str:
    """The tolerance that an output is held to."""
    if output.startswith(("layer_out", "start", "converge", "omega", "type_emb", "position_emb")):
        return "states"
    for name in ("grad_norm", "grad", "nll", "log_sum", "interval_integral", "intensity", "attn", "predict"):
        if output.startswith(name):
            return name
    raise KeyError(output)


def held(case: str, name: str, got: Tensor, expected: Tensor, tolerance: dict[str, float]) -> Check:
    if "scaled_atol" in tolerance:
        atol = tolerance["scaled_atol"] * float(expected.abs().max())
        return close(case, name, got, expected, {"atol": max(atol, 1e-30), "rtol": tolerance.get("rtol", 0.0)})
    return close(case, name, got, expected, tolerance)


def official_case(folder: Path, meta: dict[str, Any]) -> Iterator[Check]:
    case = meta["name"]
    io = load_file(folder / f"{case}.io.safetensors")
    network = build(meta, folder / f"{case}.weights.safetensors", peer=False)
    got: dict[str, Tensor] = {}
    for kind in ("official", "causal"):
        got |= {f"{kind}.{k}": v.detach() for k, v in alignment(network, io, kind).items()}
        got[f"{kind}.nll_float64"] = double(network, io, kind).detach()
    got["predict.last_event"] = last_event(network, io, meta["predict"]["hmax"], meta["predict"]["n_samples"])
    exact = {"dt": io["seq_times"][:, 1:] - io["seq_times"][:, :-1]}
    there = io["seq_types"][:, 1:] < network.kinds
    exact["mask"] = there[:, None] & torch.ones_like(io["mask"]).tril()
    for name, expected in io.items():
        if name in INPUTS:
            continue
        if name in exact:
            yield Check(case, name, float((exact[name] != expected).sum()), 0.0)
        elif name not in got:
            yield unknown(case, name)
        else:
            output = name if name.startswith("predict") else name.partition(".")[2]
            yield held(case, name, got[name], expected, meta["tolerance"][group(output)])


def peer_case(folder: Path, meta: dict[str, Any]) -> Iterator[Check]:
    case, options = meta["name"], meta["constructor"]
    io = load_file(folder / f"{case}.io.safetensors")
    network = build(meta, folder / f"{case}.weights.safetensors", peer=True)
    dt, types, allowed, there = io["time_delta_seqs"], io["type_seqs"], ~io["attention_mask"], io["non_pad_mask"]
    network.zero_grad()
    inner = allowed[:, :-1, :-1]
    states = network(dt[:, :-1], types[:, :-1], inner)
    scored, gap = there[:, 1:], dt[:, 1:]
    at_events = network.intensity(states, gap[..., None])[:, :, 0]
    rule = "even" if options["use_mc_samples"] else "trapezoid"
    u, share = points(gap, options["loss_integral_num_sample_per_step"], rule)  # type: ignore[arg-type]
    chosen = at_events.gather(2, types[:, 1:].clamp(max=network.kinds - 1)[..., None])[..., 0] + EPSILON
    event = torch.where(scored, chosen, 1.0).log()
    # The library adds its epsilon to the intensity of every type
    total = (network.intensity(states, u) + EPSILON).sum(-1)
    integral = torch.where(scored, (total * share).sum(-1), 0.0)
    loss = integral.sum() - event.sum()
    loss.backward()
    whole = network(dt, types, allowed)
    got = norms(gradients(network, "easytpp")) | {
        "hidden": network.hidden(dt[:, :-1], types[:, :-1], inner),
        "intensity_at_events": at_events,
        "event_ll": event,
        "non_event_ll": integral,
        "loss": loss,
        "num_events": scored.sum(),
        "intensity_at_offsets": network.intensity(whole, io["offsets"].expand(*dt.shape, -1)),
    }
    for name, expected in io.items():
        if name in PEER_INPUTS:
            continue
        if name not in got:
            yield unknown(case, name)
            continue
        kind = "grad_norm" if name.startswith("grad_norm") else name if name in meta["tolerance"] else "default"
        yield close(case, name, got[name].detach(), expected, meta["tolerance"][kind])


def run(folder: Path) -> Iterator[Check]:
    for path in sorted(folder.glob("*.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if "EasyTPP" in meta.get("source", "") or "hidden_size" in meta.get("constructor", {}):
            yield from peer_case(folder, meta)
        elif "constructor" in meta:
            yield from official_case(folder, meta)
        else:
            yield Check(path.stem, "a fixture of no known kind", math.inf, 0.0)
