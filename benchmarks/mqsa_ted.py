"""MQSA-TED against its published formulation, written here, and RecBole's SASRec where RecBole is installed.

The published formulation scores every position of every branch against all items and feeds a dense teacher;
RecBole turns a history of n items into n - 1 samples of full width, each with a softmax over all items at its end.
"""

from __future__ import annotations

import importlib.util
import math
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Report, measure, peak_memory
from recsys.histories import padded
from recsys.interactions import Interactions, TrainSamples
from recsys.mqsa_ted import MQSATED, recommendation_loss
from recsys.optim import TensorFlowAdam
from recsys.ranking import rank, ranking_metrics, without_seen
from recsys.tasks import NextItem

BATCH, WIDTH, TAU, LAMBDA = 256, 50, 0.1, 0.1


def log(quick: bool) -> Interactions:
    """Beauty where it lies beside the checkout; the embedded sample for a smoke test or without it."""
    beauty = Path(__file__).resolve().parents[2] / "shared/data/recsys/beauty.parquet"
    data = Interactions(None if quick or not beauty.exists() else str(beauty), max_len=WIDTH)
    data.facts()
    data.setup("fit")
    return data


def peers() -> list[str]:
    """RecBole as it comes, importing which turns on torch's detection of anomalies, and without that."""
    there = importlib.util.find_spec("recbole") is not None
    return ["RecBole's SASRec", "RecBole's SASRec, anomalies not looked for"] if there else []


def recbole(data: Interactions) -> tuple[Any, nn.Module]:
    """RecBole's own loader of training batches of the same log, and its SASRec of our sizes on it."""
    # RecBole 1.2.1 sets aliases of these names, which NumPy 2 has no more
    for name, kind in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        setattr(np, name, kind)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.model.sequential_recommender.sasrec import SASRec

        table = Path(folder, "log", "log.inter")
        table.parent.mkdir()
        starts, items = data.histories
        columns = [np.repeat(np.arange(len(starts) - 1), np.diff(starts)), items, np.arange(len(items))]
        names = {"user_id": "token", "item_id": "token", "timestamp": "float"}
        header = "\t".join(f"{name}:{kind}" for name, kind in names.items())
        np.savetxt(table, np.stack(columns, 1), "%d", "\t", header=header, comments="")
        options = {
            "data_path": folder, "checkpoint_dir": folder, "load_col": {"inter": list(names)}, "use_gpu": False,
            "n_layers": 1, "n_heads": 1, "hidden_size": 64, "inner_size": 64, "MAX_ITEM_LIST_LENGTH": WIDTH,
            "loss_type": "CE", "train_neg_sample_args": None, "train_batch_size": BATCH,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        }  # fmt: skip
        with mock.patch("sys.argv", sys.argv[:1]):  # which it would read options from
            config = Config("SASRec", "log", config_dict=options)
        loader, *_ = data_preparation(config, create_dataset(config))
        torch.autograd.set_detect_anomaly(False)
    return loader, SASRec(config, loader.dataset).train()


def dense_teacher(samples: TrainSamples, heads: np.ndarray) -> Tensor:
    share = torch.from_numpy(samples.counts[heads].toarray() / samples.top[heads][:, None]).float()
    return (share / TAU).softmax(1)


def published_losses(network: MQSATED, samples: TrainSamples, history: Tensor, target: Tensor) -> Tensor:
    """All positions `[B, 50]`, logits of both branches, a dense teacher: the graph of the published code."""
    table = F.pad(network.item, (0, 0, 0, 1))
    parts = network.encode(history)
    logits = sum(s * (parts[n] @ table.T) for n, s in (("short", network.alpha), ("long", 1 - network.alpha)))
    assert isinstance(logits, Tensor)
    there = (target < network.items).flatten()
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    rec = (losses * there).sum() / there.sum()
    heads = history[history < network.items]
    x = F.dropout(F.embedding(heads, network.item) * math.sqrt(network.dim), network.dropout, network.training)
    student = ((x @ network.item.T) / TAU).softmax(1)
    kd = -(dense_teacher(samples, heads.numpy()) * (student + 1e-24).log()).sum(1).mean()
    return rec + LAMBDA * kd


def build(data: Interactions, contestant: str, dropout: float = 0.5) -> Callable[[], Any]:
    """A training step on the next of eight batches; it gives the loss."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    samples: Any = data.samples("train")
    batches: Iterator[list[int]] = cycle([b for b in data.batches(samples, "train", 0) if len(b) == BATCH][:8]
                                         or data.batches(samples, "train", 0)[:8])  # fmt: skip
    items = samples.items
    if contestant in peers():
        loader, model = recbole(data)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        drawn = chain.from_iterable(repeat(loader))

        def theirs() -> float:
            with torch.autograd.set_detect_anomaly(contestant == peers()[0]):
                return _step(optimizer, model.calculate_loss(next(drawn)))  # type: ignore[operator]

        return theirs
    system = NextItem(data.facts(), dropout=dropout, lambda_kd=LAMBDA, tau=TAU).train()
    optimizer = TensorFlowAdam(system.parameters(), 1e-3, weight_decay=1e-4, fused=contestant == "ours")

    def ours() -> float:
        return _step(optimizer, system.losses(samples.load_batch(next(batches), 0))["loss"])

    def published() -> float:
        chosen = samples.rows[np.asarray(next(batches))]
        whole = torch.from_numpy(padded(samples.train, WIDTH + 1, items, chosen))
        # The first item of a history follows nothing and is no target
        target = whole[:, 1:].masked_fill(whole[:, :-1] == items, items)
        return _step(optimizer, published_losses(system.network, samples, whole[:, :-1], target))

    return ours if contestant == "ours" else published


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def evaluation(data: Interactions, contestant: str, users: int) -> Callable[[], Any]:
    """Ranks of the targets of `users` validation users; it gives NDCG@20."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    questions: Any = data.samples("val")
    system = NextItem(data.facts()).eval()
    network, items = system.network, len(data.catalogue)
    # Every so-many-th user of those sorted by length: the same lengths as all
    order = data.order(questions, "val", 0)
    rows = order[:: max(1, len(order) // users)][:users]
    chunks = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]

    @torch.inference_mode()
    def ours() -> float:
        metrics = ranking_metrics([5, 10, 20])
        for chunk in chunks:
            batch = questions.load_batch(chunk, 0)
            scores = without_seen(system.users(batch["history"]) @ network.item.T, batch["history"])
            metrics.update(*rank(scores, batch["target"]), items)
        return float(metrics["ndcg_20"].compute())

    @torch.inference_mode()
    def published() -> float:
        table = F.pad(network.item, (0, 0, 0, 1))
        total = 0.0
        for chunk in chunks:
            history = torch.from_numpy(padded(questions.histories, WIDTH, items, chunk))
            seen = torch.zeros(len(chunk), items + 1).scatter_add_(1, history, torch.ones(history.shape))
            parts = network.encode(history)
            logits = network.alpha * (parts["short"] @ table.T) + (1 - network.alpha) * (parts["long"] @ table.T)
            scores = logits[:, -1, :-1] - seen[:, :-1] * 2.0**32
            found = scores.topk(20).indices == torch.from_numpy(questions.target[chunk])[:, None].long()
            place = found.float().argmax(1)
            total += float((found.any(1) / (place + 2.0).log2()).sum())
        return total / len(rows)

    return ours if contestant == "ours" else published


def memory_build(quick: bool, contestant: str) -> Callable[[], object]:
    return build(log(quick), contestant)


def large_build(items: int, rows: int) -> Callable[[], object]:
    """The recommendation loss and its gradient on a catalogue of `items`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = (0.1 * torch.randn(items, 64)).requires_grad_()
    hidden = torch.randn(rows, 64).requires_grad_()
    target = torch.randint(0, items, (rows,))

    def run() -> None:
        table.grad = hidden.grad = None
        recommendation_loss(hidden, table, target).backward()

    return run


def write_log(path: Path, events: int) -> None:
    """Events of a tenth as many users with 100,000 items, at random times, as Parquet."""
    rng = np.random.default_rng(0)
    schema = pa.schema({"user_id": pa.int64(), "item_id": pa.int64(), "timestamp": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, events, 1_000_000):
            size = min(1_000_000, events - start)
            limits = (events // 10, 100_000, 100_000_000)
            writer.write_table(pa.table([rng.integers(0, limit, size) for limit in limits], schema=schema))


def first_batch(path: str) -> Callable[[], object]:
    """From a Parquet log to the first training batch."""

    def run() -> None:
        data = Interactions(path)
        data.facts()
        data.setup("fit")
        samples = data.samples("train")
        samples.load_batch(data.batches(samples, "train", 0)[0], 0)  # type: ignore[attr-defined]

    return run


def large_logs(sizes: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for events in sizes:
            path = Path(folder) / f"{events}.parquet"
            write_log(path, events)
            memory = peak_memory(first_batch, str(path), passes=1)
            timing = measure({"read": first_batch(str(path))}, rounds=1, warmup=0)["read"]
            rows.append({"events": events, "MB of the file": path.stat().st_size / 1e6,
                         "CPU s to the first batch": timing.cpu, "MB": memory and memory / 1e6})  # fmt: skip
    return rows


def gemm_floor(positions: int, items: int) -> float:
    """CPU seconds of the six matrix products of an epoch, at the rate of (items x 64)(64 x 128)."""
    a, b, out = torch.randn(items, 64), torch.randn(128, 64), torch.empty(items, 128)
    seconds = measure({"product": lambda: torch.mm(a, b.T, out=out)}, rounds=50)["product"].cpu
    return 6 * positions / 128 * seconds


def training(data: Interactions, quick: bool) -> tuple[list[dict[str, Any]], list[str]]:
    samples: Any = data.samples("train")
    positions = int(samples.lengths.sum())
    steps = dict.fromkeys(("ours", "published"), len(data.batches(samples, "train", 0)))
    # A sample is an item that another one precedes, in a history without its last two
    steps |= dict.fromkeys(peers(), -(-int((data.whole_train.lengths - 1).clip(0).sum()) // BATCH))
    fast = measure({n: build(data, n) for n in ("ours", *peers())}, rounds=3 if quick else 16, warmup=2)
    slow = measure({n: build(data, n) for n in ("published", "ours")}, rounds=1 if quick else 3, warmup=1)
    first = {n: build(data, n, dropout=0.0)() for n in ("published", "ours")}
    epoch = fast["ours"].cpu * steps["ours"]
    rows = []
    for name, timed in {**fast, "published": slow["published"]}.items():
        ours = slow["ours"].cpu * steps["ours"] if name == "published" else epoch
        memory = peak_memory(memory_build, quick, name, passes=1)
        rows.append({"model": name, "steps an epoch": steps[name], "CPU s a step": timed.cpu,
                     "CPU s an epoch": timed.cpu * steps[name], "times ours": timed.cpu * steps[name] / ours,
                     "MB beyond the start": memory and memory / 1e6, "spread": timed.spread})  # fmt: skip
    floor = gemm_floor(positions, samples.items)
    gap = abs(first["ours"] - first["published"])
    return rows, [
        f"the loss of one batch without dropout differs from the published form's by {gap:.1e}",
        f"the six matrix products of an epoch alone: {floor:.3g} CPU s, ours takes {epoch / floor:.2f} times that",
    ]


def run(command: str, threads: int, quick: bool, only: str) -> Report:
    data = log(quick)
    rows, notes = training(data, quick)
    users = len(data.samples("val"))
    part = min(users, BATCH if quick else 4 * BATCH)
    passes = {n: evaluation(data, n, part) for n in ("published", "ours")}
    gap = abs(passes["ours"]() - passes["published"]())
    timing = measure(passes, rounds=1 if quick else 3, warmup=1)
    ranked = [{"model": n, "users": part, "CPU s": t.cpu, "CPU s a split": t.cpu * users / part,
               "times ours": t.cpu / timing["ours"].cpu} for n, t in timing.items()]  # fmt: skip
    large = []
    for items in (10_000,) if quick else (10_000, 100_000, 1_000_000):
        peak = peak_memory(partial(large_build), items, 1450, passes=1)
        table = items * 64 * 4 / 1e6
        large.append({"items": items, "MB of the table": table, "MB of all scores": items * 1450 * 4 / 1e6,
                      "MB of a pass": peak and peak / 1e6})  # fmt: skip
    if not peers():
        notes.append("RecBole is not installed here: `make bench-peers`, then the same with its python")
    notes += [f"NDCG@20 of both evaluations differs by {gap:.1e}",
              f"the whole process peaked at {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB, "
              "the published form's steps included"]  # fmt: skip
    logs = large_logs((20_000,) if quick else (1_000_000, 10_000_000))
    tables = {"a training step": rows, "evaluation": ranked, "the loss on large catalogues": large,
              "large logs": logs}  # fmt: skip
    return Report("mqsa_ted", command, tables, notes)
