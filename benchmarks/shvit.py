"""SHViT in every form we run it in, against timm's with the same weights, MobileViTv2-1.0 and EfficientViT-M4.

Forms: timm's plain eager network; ours eager; `to_deploy()`, which is folded and channels-last; the network
compiled with frozen weights; the deployed form as TorchScript; the network in ONNX Runtime. A peer's
counterpart of the deployed form is the plain network in channels-last order. Outputs are compared with timm's
eager ones before anything is timed.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks import harness
from checkpoints.converters.shvit import to_polyhead
from vision.shvit import VARIANTS, shvit

# measured in turn, so that what is compared meets the same machine; name -> side of the image
GROUPS: list[dict[str, int]] = [
    {"shvit_s1": 224},
    {"shvit_s2": 224, "efficientvit_m4": 224},
    {"shvit_s3": 224},
    {"shvit_s4": 256, "mobilevitv2_100": 256},
]
BASE, DEPLOYED, COMPILED, ONNX = "timm eager", "deployed", "compiled", "ONNX Runtime"
ENGINES = (BASE, "eager", DEPLOYED, COMPILED, "TorchScript", ONNX)
GPU_ENGINES = (BASE, "eager", DEPLOYED, COMPILED)
TARGETS = [(DEPLOYED, 16, 1.45), (COMPILED, 16, 1.9), (ONNX, 16, 2.4), (ONNX, 1, 3.1)]  # S1, one thread

Pass = Callable[[], Any]


def random_statistics(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and scales other than those of the start, so that folding is put to work."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


@functools.cache
def plain(name: str) -> nn.Module:
    """timm's network, with the same weights in every process."""
    torch.manual_seed(0)
    return random_statistics(timm.create_model(name))


@functools.cache
def ours(name: str) -> nn.Module:
    """Our network with the weights of `plain`; a peer's is timm's."""
    if name not in VARIANTS:
        return plain(name)
    state, config = to_polyhead(plain(name).state_dict())
    model = shvit(**config)
    model.load_state_dict(state)
    return model.eval()


@functools.cache
def deployed(name: str) -> nn.Module:
    if name in VARIANTS:
        return ours(name).to_deploy()  # type: ignore[operator]
    return copy.deepcopy(plain(name)).to(memory_format=torch.channels_last)


def image(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def build(name: str, engine: str, batch: int, size: int, threads: int) -> Pass:
    """One pass of a network in an engine on the CPU, from the image to the logits."""
    harness.set_threads(threads)
    x = image(batch, size)
    network: Any
    if engine == ONNX:
        return onnx(name, x, threads)
    if engine == BASE:
        network = plain(name)
    elif engine == "eager":
        network = ours(name)
    elif engine == DEPLOYED:
        network = deployed(name)
        x = x if name in VARIANTS else x.contiguous(memory_format=torch.channels_last)
    elif engine == COMPILED:
        torch._dynamo.reset()
        # frozen weights are what lets the compiler fuse into oneDNN's convolutions; as an option of
        # torch.compile the setting is taken without a word and does nothing
        with torch._inductor.config.patch(freezing=True):
            network = torch.compile(copy.deepcopy(ours(name)), dynamic=False)
            network(x)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(deployed(name), x)
            network = torch.jit.freeze(traced)

    @torch.no_grad()
    def run() -> Tensor:
        return network(x)

    return run


@functools.cache
def exported(name: str, size: int) -> str:
    """An ONNX file of the network with a dynamic batch."""
    program = torch.onnx.export(
        ours(name),
        (image(2, size),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        verbose=False,
    )
    assert program is not None
    handle, path = tempfile.mkstemp(".onnx")
    os.close(handle)
    program.save(path)
    return path


def onnx(name: str, x: Tensor, threads: int) -> Pass:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # waiting threads that spin would count as CPU time
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(exported(name, x.shape[-1]), options, ["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    pixels = x.numpy()
    return lambda: session.run(None, {entry.name: pixels})[0]


@torch.no_grad()
def build_gpu(name: str, engine: str, batch: int, size: int) -> Pass:
    """One pass on the GPU in float16, channels-last; compiled with CUDA graphs."""
    x = image(batch, size).to("cuda", torch.float16, memory_format=torch.channels_last)
    source: Any = {BASE: plain, DEPLOYED: deployed}.get(engine, ours)(name)
    network: Any = copy.deepcopy(source).to("cuda", torch.float16, memory_format=torch.channels_last)
    if engine == COMPILED:
        torch._dynamo.reset()
        network = torch.compile(network, dynamic=False, mode="reduce-overhead")

    @torch.no_grad()
    def run() -> Tensor:
        return network(x)

    for _ in range(3):
        run()
    return run


def difference(got: Any, expected: Any) -> float:
    got, expected = (torch.as_tensor(v).float().cpu() for v in (got, expected))
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def compare(
    group: dict[str, int],
    batch: int,
    engines: tuple[str, ...],
    make: Callable[..., Pass],
    tolerance: float,
    **limits: Any,
) -> list[dict[str, Any]]:
    """Rows of one group at one batch, measured in turn."""
    passes, apart = {}, {}
    for name, size in group.items():
        for engine in engines:
            if engine == "eager" and name not in VARIANTS:
                continue
            run = passes[name, engine] = make(name, engine, batch, size)
            apart[name, engine] = difference(run(), passes[name, BASE]())
            if not apart[name, engine] <= tolerance:
                raise RuntimeError(f"{name} as {engine} differs from timm's by {apart[name, engine]:.2g}")
    print(f"batch {batch}: {', '.join(group)}", file=sys.stderr, flush=True)
    timings = harness.measure({f"{n}/{e}": run for (n, e), run in passes.items()}, **limits)
    rows = []
    clock = "wall" if make is build_gpu else "cpu"
    for name, engine in passes:
        t, base = timings[f"{name}/{engine}"], timings[f"{name}/{BASE}"]
        row = {"network": name, "size": group[name], "batch": batch, "engine": engine}
        row |= {"images a second": batch / getattr(t, clock)}
        row |= {"CPU ms": t.cpu * 1e3, "wall ms": t.wall * 1e3, "+-": f"{t.spread:.0%}", "rounds": t.rounds}
        row |= {
            "times timm eager": getattr(base, clock) / getattr(t, clock),
            "difference": apart[name, engine],
        }
        rows.append(row)
    return rows


def duel(rows: list[dict[str, Any]], one: str, other: str) -> list[dict[str, Any]]:
    """Two networks side by side in every engine that both have."""
    at = {(r["network"], r["batch"], r["engine"]): r["images a second"] for r in rows}
    table = []
    for name, batch, engine in at:
        if name == one and (other, batch, engine) in at:
            a, b = at[one, batch, engine], at[other, batch, engine]
            table.append({"engine": engine, "batch": batch, one: a, other: b, "times faster": a / b})
    return table


def run(command: str, threads: int = 1, quick: bool = False, only: str = "") -> harness.Report:
    """All tables: CPU, S1 against its targets, S4 against MobileViTv2, memory, GPU where there is one."""
    chosen = {name for name in only.split(",") if name}
    groups = [{n: s for n, s in group.items() if not chosen or n in chosen} for group in GROUPS]
    batches: tuple[int, ...] = (1, 16)
    engines: tuple[str, ...] = ENGINES
    limits: dict[str, Any] = {"rounds": 41, "seconds": 30.0}
    if quick:
        groups, batches = [{"shvit_s1": 64}], (1, 2)
        engines = tuple(e for e in ENGINES if e != COMPILED)
        limits = {"rounds": 3, "warmup": 1}
    groups = [group for group in groups if group]

    def on_cpu(name: str, engine: str, batch: int, size: int) -> Pass:
        return build(name, engine, batch, size, threads)

    rows = [
        row for group in groups for batch in batches for row in compare(group, batch, engines, on_cpu, 1e-4, **limits)
    ]
    rate = harness.matrix_rate()
    report = harness.Report(
        "shvit",
        command,
        {"CPU": rows},
        [
            f"{threads} thread(s) in every runtime; images a second of CPU time; random weights, float32",
            f"a 1024 x 1024 float32 product runs at {rate:.0f} GFLOP/s here; S1's 241 M multiply-adds an image "
            f"need at least {482 / rate:.1f} ms at that rate",
        ],
    )
    if not quick and threads == 1:
        found = {(r["engine"], r["batch"]): r["times timm eager"] for r in rows if r["network"] == "shvit_s1"}
        report.tables["S1, one thread, against the targets"] = [
            {"engine": e, "batch": b, "times timm eager": found[e, b], "target": t}
            for e, b, t in TARGETS
            if (e, b) in found
        ]
    if pairs := duel(rows, "shvit_s4", "mobilevitv2_100"):
        report.tables["S4 against MobileViTv2-1.0, images a second"] = pairs
    memory = [
        {"network": n, "batch": batches[-1], "engine": e, "MB a pass beyond the weights": m / 1e6}
        for group in groups[:1] + groups[1:][-1:]
        for n, size in group.items()
        for e in ((BASE, DEPLOYED) if quick else engines)
        if e != "eager" or n in VARIANTS
        if (m := harness.peak_memory(build, n, e, batches[-1], size, threads)) is not None
    ]
    report.tables["Peak memory on the CPU"] = memory
    if torch.cuda.is_available():
        report.tables["GPU, float16"] = [
            row
            for group in groups
            for batch in (*batches, 256)
            for row in compare(group, batch, GPU_ENGINES, build_gpu, 0.05, synchronise=torch.cuda.synchronize, **limits)
        ]
    return report
