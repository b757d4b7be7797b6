"""MVPFormer: attention layer, trunk, encoder, generative and classification models, and the SWEC window index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints.converters.mvpformer import rename
from tests.parity import Check
from tests.parity._close import apart, unknown
from timeseries.generative import contrastive, contrastive_logits
from timeseries.mvpformer import MVPA, MVPFormer, Trunk, WaveEncoder
from timeseries.swec import SwecFile, Windows, published_window

# An output without a tolerance of its own takes another's, or an absolute one
ALIASES = {"embeds": "trunk_out", "pooled": "trunk_out", "trunk_out": "pred", "grad_norm_total": "grad_norm"}
TIGHT = {"atol": 1e-6}
# The published flags and defaults (sheet 2.3 and 2.7)
FLAGS = {"global_att": True, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
IGNORED = {"reorder_and_upcast_attn", "use_cache", "attn_pdrop", "resid_pdrop", "embd_pdrop", "lora_merge", "n_layer"}
Options = Mapping[str, Any]


def tolerance(name: str, table: Options) -> Options | None:
    if "atol" in table or "rtol" in table:
        return table
    if name.startswith("merged.") or name == "accuracy":
        return TIGHT
    keys = [name, name.split(".")[0], name.removeprefix("train.").split(".")[0]]
    for key in keys:
        while key is not None:
            if key in table:
                return table[key]
            key = ALIASES.get(key)  # type: ignore[assignment]
    return None


def near(case: str, name: str, got: Tensor | None, expected: Tensor, table: Options) -> Check:
    """|a - b| <= atol + rtol |b|; -inf must match."""
    bound = tolerance(name, table)
    if got is None or bound is None or got.shape != expected.shape:
        return unknown(case, name)
    got, expected = got.detach().double(), expected.double()
    if not torch.equal(got == -math.inf, expected == -math.inf):
        return Check(case, name, math.inf, 1.0)
    got, expected = (x.masked_fill(x == -math.inf, 0) for x in (got, expected))
    atol, rtol = bound.get("atol", 0.0), bound.get("rtol", 0.0)
    if not atol:
        gap = ((got - expected).abs() / expected.abs().clamp_min(1e-300)).max().item()
        return Check(case, name, math.inf if math.isnan(gap) else gap, rtol)
    return Check(case, name, apart(got, expected, rtol / atol), atol)


def compare(case: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], table: Options) -> Iterator[Check]:
    for name, value in expected.items():
        yield near(case, name, got.get(name), value, table)


def norms(module: nn.Module) -> dict[str, Tensor]:
    """Gradients, their norms, and the norm of all, by name."""
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in module.named_parameters()}
    named = {f"grad.{n}": g for n, g in grads.items()} | {f"grad_norm.{n}": g.norm() for n, g in grads.items()}
    return named | {"grad_norm_total": torch.stack([g.norm() for g in grads.values()]).norm()}


def flags(options: Options) -> dict[str, bool]:
    return {k: options.get(k, default) for k, default in FLAGS.items()}


def model_options(options: Options) -> dict[str, Any]:
    known = {
        "n_positions": "n_positions", "n_channels": "n_channels", "n_embd": "width", "n_layer": "layers",
        "n_head": "heads", "n_head_kv": "kv_heads", "n_inner": "inner",
    }  # fmt: skip
    odd = set(options) - set(known) - set(FLAGS) - IGNORED - {"lora", "lora_alpha", "lora_rank", "lora_dropout"}
    if odd:
        raise ValueError(f"options not understood: {sorted(odd)}")
    set_ = flags(options)
    named = {ours: options[theirs] for theirs, ours in known.items() if theirs in options}
    return named | {
        "content": set_["global_att"], "scaled": set_["scale_attn_weights"],
        "by_layer": set_["scale_attn_by_inverse_layer_idx"], "dropout": 0.0,
    }  # fmt: skip


def attention(folder: Path, meta: Options) -> Iterator[Check]:
    case, options = meta["name"], meta["constructor"]
    io = load_file(folder / f"{case}.io.safetensors")
    width, heads = options["n_embd"], options["n_head"]
    set_ = flags(options)
    scale = (width // heads) ** -0.5 if set_["scale_attn_weights"] else 1.0
    if set_["scale_attn_by_inverse_layer_idx"]:
        scale /= meta["layer_idx"] + 1
    layer = MVPA(width, heads, options.get("n_head_kv", heads), content=set_["global_att"], scale=scale)
    weights = load_file(folder / f"{case}.weights.safetensors")
    layer.load_state_dict({k: v for k, v in weights.items() if k not in ("time_bias", "masked_bias")})
    hidden, positions, channels = (
        io.pop(k).requires_grad_() for k in ("hidden", "position_embedding", "channel_embedding")
    )
    count = hidden.shape[2]
    each = torch.arange(count)
    index = count - 1 - (each[:, None] - each).abs()
    inputs = (hidden, positions[0], channels[0], index)
    out = layer(*inputs)
    (out * io.pop("grad_out")).sum().backward()
    got = {"out": out, "attn": layer.weights(*inputs), **norms(layer)}
    got |= {"grad.hidden": hidden.grad, "grad.position": positions.grad, "grad.channel": channels.grad}  # type: ignore[dict-item]
    yield from compare(case, got, io, meta["tolerance"])


def trunk(folder: Path, meta: Options) -> Iterator[Check]:
    case, options = meta["name"], model_options(meta["constructor"])
    io = load_file(folder / f"{case}.io.safetensors")
    network = MVPFormer(640, head="generative", **options)
    module: Trunk = network.mvpformer
    weights = {f"mvpformer.{k}": v for k, v in load_file(folder / f"{case}.weights.safetensors").items()}
    module.load_state_dict({k.removeprefix("mvpformer."): v for k, v in rename(weights).items()})
    got: dict[str, Tensor] = {}
    for number, block in enumerate(module.h):
        block.register_forward_pre_hook(lambda _, inputs, n=number: got.update({f"hidden_in.{n}": inputs[0]}))
    with torch.no_grad():
        got["last_hidden_state"] = module(io.pop("inputs_embeds"))
    yield from compare(case, got, io, meta["tolerance"])


def encoder(folder: Path, meta: Options) -> Iterator[Check]:
    case, options = meta["name"], dict(meta["constructor"])
    if options.pop("wavelet", "db4") != "db4":
        raise ValueError("only db4 is known")
    io = load_file(folder / f"{case}.io.safetensors")
    module = WaveEncoder(options["size_input"], options["size_output"])
    module.load_state_dict(load_file(folder / f"{case}.weights.safetensors"))
    x = io.pop("x")
    with torch.no_grad():
        rows = module.coefficients(x)
        got = {"dwt": rows, "normed": module.ln(rows), "out": module(x)}
    yield from compare(case, got, io, meta["tolerance"])


def build(folder: Path, meta: Options, **head: Any) -> MVPFormer:
    network = MVPFormer(meta["size_input"], **head, **model_options(meta["constructor"]))
    options = meta["constructor"]
    if options.get("lora"):
        network.adapt(options.get("lora_rank", 8), options.get("lora_alpha", 16))
    network.load_state_dict(rename(load_file(folder / f"{meta['name']}.weights.safetensors")))
    return network


def generative(folder: Path, meta: Options) -> Iterator[Check]:
    case = meta["name"]
    io = load_file(folder / f"{case}.io.safetensors")
    network = build(folder, meta, head="generative")
    embeds = network.embed(io.pop("x"))
    out = network.mvpformer(embeds)
    pred = network.head(out)
    logits = contrastive_logits(pred, embeds, io.pop("negative_index"), meta["temp"])
    loss, accuracy = contrastive(logits)
    loss.backward()
    got = {"embeds": embeds, "trunk_out": out, "pred": pred, "logits": logits, "loss": loss, "accuracy": accuracy}
    yield from compare(case, got | norms(network), io, meta["tolerance"])
    if "minus_inf_logits" in meta:
        count = int((logits == -math.inf).sum())
        yield Check(case, "number of -inf logits", abs(count - meta["minus_inf_logits"]), 0.0)


def classification(folder: Path, meta: Options) -> Iterator[Check]:
    case = meta["name"]
    io = load_file(folder / f"{case}.io.safetensors")
    network = build(folder, meta, classes=meta["size_out"], head="mean")
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    if "trainable_parameters" in meta:
        wrong = trained ^ set(meta["trainable_parameters"])
        yield Check(case, "trainable parameters", float(len(wrong)), 0.0)
    x, y = io.pop("x"), io.pop("y")
    weight = torch.tensor(meta["class_weight"]) if meta.get("class_weight") else None
    embeds = network.embed(x)
    logits = network.classify(embeds).logits
    loss = F.cross_entropy(logits, y, weight)
    loss.backward()
    with torch.no_grad():
        out = network.mvpformer(embeds)
    got = {"train.logits": logits, "train.loss": loss, "embeds": embeds, "trunk_out": out,
           "pooled": out[:, -1].mean(1), **norms(network)}  # fmt: skip
    network.merge()
    with torch.no_grad():
        merged = network.classify(embeds).logits
    got |= {"logits": merged, "loss": F.cross_entropy(merged, y, weight)}
    for number, block in enumerate(network.mvpformer.h):
        for name in ("q_attn", "c_attn"):
            got[f"merged.h.{number}.{name}.weight"] = getattr(block.attn, name).weight
    yield from compare(case, got, io, meta["tolerance"])


def dataset(folder: Path, meta: Options) -> Iterator[Check]:
    io = load_file(folder / "dataset.io.safetensors")
    segment, bounds = meta["segment_size_ms"] / 1000, meta["tolerance"]
    understood = set()
    for case, settings in meta["cases"].items():
        options = settings["options"]
        if set(options) - {"stride", "slowdown", "balanced"}:
            raise ValueError(f"options not understood: {options}")
        begins, labels, ranges, kept = [], [], [], 0
        items: list[tuple[SwecFile, float]] = []
        for patient in settings["patients"]:
            (path,) = folder.rglob(f"{patient['id']}_total.h5")
            file = SwecFile(path)
            windows = Windows(
                file.duration, file.seizures, meta["segment_n"], segment, options["stride"] / 1000,
                bool(options.get("slowdown")),
            )  # fmt: skip
            own = windows.ranges(patient["seizures"])
            shift = len(items)
            ranges.append([[a + shift, b + shift] for a, b in own])
            kept += sum(b - a for a, b in own)
            begins.append(torch.from_numpy(windows.begins()))
            labels.append(torch.from_numpy(windows.labels()))
            items += [(file, float(b)) for b in begins[-1]]
        yield Check(case, "total_items", abs(len(items) - settings["total_items"]), 0.0)
        yield Check(case, "len", abs(kept - settings["len"]), 0.0)
        yield Check(case, "samples_boundaries", float(ranges != settings["samples_boundaries"]), 0.0)
        got = {"begin_second": torch.cat(begins), "label": torch.cat(labels)}
        for key, expected in io.items():
            name = key.removeprefix(f"{case}.")
            if name == key:
                continue
            understood.add(key)
            if name.startswith("sample."):
                file, begin = items[int(name.split(".")[1])]
                found = published_window(file, begin, meta["segment_n"], segment, meta["sampling_rate"])
                yield near(case, name, found, expected, {"sample": bounds["sample"]})
            elif name in got:
                limit = bounds["begin_second"] if name == "begin_second" else 0.0
                yield Check(case, name, apart(got[name], expected, 0.0), limit)
            else:
                yield unknown(case, name)
    yield from (unknown("dataset", key) for key in io.keys() - understood)


MODULES = {
    "attention layer": attention,
    "decoder trunk": trunk,
    "wavelet encoder": encoder,
    "generative": generative,
    "classification": classification,
}


def run(folder: Path) -> Iterator[Check]:
    for path in sorted(folder.glob("*.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        if "cases" in meta:
            yield from dataset(folder, meta)
            continue
        found = next((check for kind, check in MODULES.items() if meta.get("module", "").startswith(kind)), None)
        if found is None:
            yield unknown(path.stem, f"module {meta.get('module')!r}")
        else:
            yield from found(folder, meta)
