"""TransFER and APViT against the released code: whole networks, their units, and what training drops."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from checkpoints.converters.transfer import apvit_names, from_paddle
from tests.parity import Check
from tests.parity._close import close, unknown
from vision.irse import Unit
from vision.transfer import APViT, Attention, Block, LANet, MapTokens, TransFER

NETWORK = {"embed_dim": "width", "classes": "num_classes"}
PASSED = ("widths", "units", "ratio", "branches", "depth", "heads", "mlp_ratio", "qkv_bias", "keep_num", "keep_rates")


def options(constructor: dict[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in constructor.items() if k in PASSED}
    found |= {ours: constructor[theirs] for theirs, ours in NETWORK.items() if theirs in constructor}
    units = constructor.get("units", (3, 4, 14))
    return {**found, "squeeze": constructor.get("mode") == "ir_se", "image_size": constructor["grid"] * 2 ** len(units)}


def loaded(module: nn.Module, state: dict[str, Tensor]) -> Any:
    tracked = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    module.load_state_dict({**tracked, **state})
    return module.eval()


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# Whole networks


def whole(case: str, facts: dict[str, Any], weights: dict[str, Tensor], io: dict[str, Tensor]) -> Iterator[Check]:
    network: TransFER = loaded(TransFER(**options(facts["constructor"])), from_paddle(weights))
    image = io["image"].clone().requires_grad_(True)
    features = network.extractor(image)
    maps = network.attention(features)
    tokens, largest = network.convert(features, maps)
    x = network.vit.embed(tokens)
    got: dict[str, Tensor] = {"trunk": features, "la_max": largest, "tokens": tokens}
    got |= {f"la_map_{i}": maps[:, i : i + 1] for i in range(maps.shape[1])}
    for i, block in enumerate(network.vit.blocks):
        x = block(x)
        got[f"block_{i}"] = x
    feature = network.vit.norm(x)[:, 0]
    logits = network.head(feature)
    got |= {"cls_feature": feature, "logits": logits}
    if "target" in io:
        loss = F.cross_entropy(logits, io["target"])
        parameters = dict(network.named_parameters())
        gradients = torch.autograd.grad(loss, [image, *parameters.values()])
        got |= {"loss": loss[None], "grad_image": gradients[0]}
        named = dict(zip(parameters, gradients[1:], strict=True))
        got["grad_norm_total"] = torch.stack([g.square().sum() for g in named.values()]).sum().sqrt()[None]
        for key in io:
            if key.startswith("grad."):
                name = next(iter(from_paddle({key[5:]: io[key]})))
                value = named.get(name)
                got[key] = value.T if value is not None and value.shape != io[key].shape else value  # type: ignore[assignment]
    yield from compared(case, facts["tolerance"], io, got)
    with torch.no_grad():
        # What inference runs: the last block for the class token alone
        short = network(io["image"])
    yield close(case, "logits by the shortcut", short.logits, io["logits"], facts["tolerance"]["logits"])


def compared(case: str, tolerance: dict[str, Any], io: dict[str, Tensor], got: dict[str, Tensor]) -> Iterator[Check]:
    for name, expected in io.items():
        if name in ("image", "target") or "/in." in name:
            continue
        if name not in got:
            yield unknown(case, name)
            continue
        yield close(case, name, got[name], expected, tolerance[group(name)])


def group(name: str) -> str:
    if name.startswith("la_"):
        return "la_maps"
    if name.startswith("grad"):
        return "gradients"
    if name == "loss":
        return "loss"
    features = name in ("trunk", "tokens", "cls_feature") or re.fullmatch(r"block_\d+", name)
    return "features" if features else "logits"


def apvit(case: str, facts: dict[str, Any], weights: dict[str, Tensor], io: dict[str, Tensor]) -> Iterator[Check]:
    own = {k: v for k, v in weights.items() if not k.startswith("max_hybrid_flatten/")}
    network: APViT = loaded(APViT(**options(facts["constructor"])), apvit_names(own))
    got: dict[str, Tensor] = {}
    with torch.no_grad():
        got["trunk"] = network.extractor(io["image"])
        x = network.embed(io["image"])
        for i, (block, keep) in enumerate(zip(network.blocks, network.keep_rates, strict=True)):
            x = block(x, keep=keep)
            got[f"block_{i}"] = x
        got["logits"] = network(io["image"])
        got["probabilities"] = got["logits"].softmax(-1)
        unit = part(weights, "max_hybrid_flatten/")
        if unit:
            width, channels = unit["proj.weight"].shape[:2]
            project: MapTokens = loaded(MapTokens(channels, width, after=True), unit)
            given = part(io, "max_hybrid_flatten/in.")
            maps = torch.cat([given[k] for k in sorted(given) if k.startswith("map_")], 1)
            got["max_hybrid_flatten/out.tokens"] = project(given["feature"], maps)[0]
    yield from compared(case, facts["tolerance"], io, got)


# Units


def units(case: str, facts: dict[str, Any], weights: dict[str, Tensor], io: dict[str, Tensor]) -> Iterator[Check]:
    for name, about in facts["units"].items():
        given, expected = part(io, f"{name}/in."), part(io, f"{name}/out.")
        state = from_paddle(part(weights, f"{name}/"))
        with torch.no_grad():
            got = unit(name, about, state, given, expected)
        for key, value in expected.items():
            if key in ("official_zeroed_token", "head_index") or key.startswith("drop_index"):
                continue
            where = f"{name}/{key}"
            yield close(case, where, got[key], value, facts["tolerance"]) if key in got else unknown(case, where)
    known = tuple(f"{n}/" for n in facts["units"])
    yield from (unknown(case, key) for key in io if not key.startswith(known))


def unit(
    name: str, about: dict[str, Any], state: dict[str, Tensor], given: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    if "cls" in about:
        squeeze = about["cls"].endswith("_SE")
        module: Any = loaded(Unit(about["in_channel"], about["depth"], about["stride"], squeeze), state)
        return {"y": module(given["x"])}
    if name == "lanet":
        return lanet(about, state, given["x"])
    if name == "mad":
        project: MapTokens = loaded(MapTokens(about["channels"], about["embed_dim"]), state)
        maps = torch.cat([given[f"map_{i}"] for i in range(about.get("maps", about.get("branches", 2)))], 1)
        got = {"tokens_eval": project(given["feature"], maps)[0]}
        for key in expected:
            if key.startswith("drop_index_"):
                drop = expected[key].long()
                got[f"tokens_train_{key.removeprefix('drop_index_')}"] = project(given["feature"], maps, drop)[0]
        return got
    sizes = {"width": about["dim"], "heads": about["heads"], "qkv_bias": about.get("qkv_bias", False)}
    if name == "attention":
        x = given["x"]
        by = {mode: loaded(Attention(**sizes, mode=mode), state) for mode in ("head", "token")}  # type: ignore[arg-type]
        return {
            "y_eval": by["head"](x),
            "y_train_official": by["token"](x, expected["official_zeroed_token"].long()),
            "y_head_dropped": by["head"](x, expected["head_index"].long()),
        }
    if name == "block":
        width = sizes.pop("width")
        module = loaded(Block(width, mlp_ratio=about.get("mlp_ratio", 3), **sizes), state)
        return {"y": module(given["x"])}
    return {}


def lanet(about: dict[str, Any], state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    module: LANet = loaded(LANet(about["channel_num"], about["ratio"]), state)
    got = {"map": module(x)}
    before = {k: v.clone() for k, v in module.state_dict().items()}
    got["map_train"] = module.train()(x)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    for norm in ("bn1", "bn2"):
        after: Any = getattr(module, norm)
        got[f"after_train.{norm}._mean"] = after.running_mean
        # Paddle averages the biased variance of a batch, PyTorch the unbiased one
        old = 0.9 * before[f"{norm}.running_var"]
        got[f"after_train.{norm}._variance"] = old + (after.running_var - old) * (count - 1) / count
    return got


def run(folder: Path) -> Iterator[Check]:
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        # A list of keys and shapes is no case
        if not isinstance(facts, dict) or not {"units", "constructor"} & set(facts):
            continue
        case = path.stem
        weights = load_file(folder / f"{case}.weights.safetensors")
        io = load_file(folder / f"{case}.io.safetensors")
        if "units" in facts and "constructor" not in facts:
            yield from units(case, facts, weights, io)
        elif facts.get("model") == "apvit":
            yield from apvit(case, facts, weights, io)
        else:
            yield from whole(case, facts, weights, io)
