"""TransFER as deployed against a plain port of the published formulation, the same weights, batch 16 at 112 px.

The port runs the trunk in eager mode and its usual order, forms every head's attention matrix, and takes the last
block of the encoder for all tokens.
"""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from polyhead.folding import fold_batch_norms
from vision.transfer import TransFER, create_transfer


@torch.no_grad()
def port(network: TransFER, x: Tensor) -> Tensor:
    features = network.extractor(x)
    maps = [branch(features) for branch in network.attention.las]
    largest = functools.reduce(torch.maximum, maps)
    tokens = network.convert.proj(features * largest).flatten(2).transpose(1, 2)
    x = network.vit.embed(tokens)
    for block in network.vit.blocks:
        attend: Any = block.attn
        q, k, v = attend._split(attend.qkv(block.norm1(x)))  # type: ignore[operator]
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + attend.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
    return network.head(network.vit.norm(x)[:, 0])


class Logits(nn.Module):
    def __init__(self, network: TransFER) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).logits


def row(name: str, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    import onnxruntime

    torch.manual_seed(0)
    network: Any = create_transfer(name, **({"units": (3, 4, 14)} if name == "transfer" else {})).eval()
    nn.init.normal_(network.head.fc.weight, std=0.02)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, so that folding is put to work
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    plain = torch.randn(batch, 3, network.image_size, network.image_size, generator=torch.Generator().manual_seed(1))
    last = plain.contiguous(memory_format=torch.channels_last)
    deployed: Any = fold_batch_norms(network, lambda n: n(plain[:1])).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(Logits(deployed).eval(), (plain,), path, dynamo=True, input_names=["x"], verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        passes = {
            "port": lambda: port(network, plain),
            "eager": torch.no_grad()(lambda: network(plain).logits),
            "deployed": torch.no_grad()(lambda: deployed(last).logits),
            "ONNX": lambda: torch.from_numpy(session.run(None, {"x": plain.numpy()})[0]),
        }
        expected = passes["port"]()
        gaps = {who: float((run() - expected).abs().max()) for who, run in passes.items()}
        timings = harness.measure(passes, rounds, warmup=1)
    return {
        "network": name,
        "batch": batch,
        **{f"{who} (ms)": timing.cpu * 1e3 for who, timing in timings.items()},
        **{f"port / {who}": timings["port"].cpu / timings[who].cpu for who in ("eager", "deployed", "ONNX")},
        "target of deployed": 1.15 if (name, batch) == ("transfer", 16) else None,
        "largest change of logits": max(gaps.values()),
        "spread": max(t.spread for t in timings.values()),
    }


def run(command: str, threads: int = 1, quick: bool = False, only: str = "") -> harness.Report:
    rounds = 3 if quick else 7
    names = [
        n for n in ("transfer", "transfer_small") if (not only or n in only.split(",")) and (not quick or "_" in n)
    ]
    rows = [row(name, batch, rounds, threads) for name in names for batch in ((2,) if quick else (16, 1))]
    notes = ["CPU time of the process; port: a plain port of the published formulation with the same weights"]
    return harness.Report("transfer", command, {"Whole network, 112 px": rows}, notes)
