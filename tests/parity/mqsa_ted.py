"""MQSA-TED: the network, losses, gradients, optimiser steps, evaluation and the preparation of real logs."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn import functional as F

from checkpoints.converters.mqsa_ted import names, to_polyhead
from recsys.histories import Histories, padded, transitions
from recsys.mqsa_ted import MQSATED, Trace, distillation_loss, recommendation_loss, teacher
from recsys.optim import TensorFlowAdam
from recsys.ranking import rank, ranking_metrics, without_seen
from tests.parity import Check
from tests.parity._close import apart


def tolerance(name: str, rules: Mapping[str, str]) -> tuple[float, float, float]:
    """atol, rtol and atol as a share of the largest value, for an output, as the fixture words them."""
    for pattern, rule in rules.items():
        kind = re.escape(pattern.split(" (")[0]).replace(r"\*", "[^ ]*").split(r",\ ")
        if any(re.fullmatch(k, name) for k in kind):
            if rule == "exact":
                return 0.0, 0.0, 0.0
            numbers = {k: float(v) for k, v in re.findall(r"(atol|rtol) ([\d.e-]+\d)", rule)}
            scaled = re.search(r"\+ ([\d.e-]+)\*max\|tensor\||\+ ([\d.e-]+) \* max\|tensor\|", rule)
            share = float(scaled[1] or scaled[2]) if scaled else 0.0
            if numbers:
                return numbers.get("atol", 0.0), numbers.get("rtol", 0.0), share
    return 0.0, 0.0, 0.0


def compared(case: str, name: str, got: Any, expected: Tensor, rules: Mapping[str, str]) -> Check:
    got = torch.as_tensor(got).detach().reshape(expected.shape) if got is not None else None
    atol, rtol, share = tolerance(name, rules)
    if got is None:
        return Check(case, f"{name} is not understood", math.inf, 0.0)
    limit = atol + share * float(expected.abs().max())
    if rtol and not limit:
        gap = ((got.double() - expected.double()).abs() / expected.double().abs()).max()
        return Check(case, name, float(gap), rtol)
    return Check(case, name, apart(got, expected, rtol / limit if limit else 0.0), limit)


class Data:
    """A log as arrays, split and truncated as published."""

    def __init__(self, user: np.ndarray, item: np.ndarray, order: np.ndarray, items: int, max_len: int) -> None:
        at = np.lexsort((order, user))
        counts = np.unique(user[at], return_counts=True)[1]
        self.all = Histories(np.concatenate([[0], np.cumsum(counts)]), item[at].astype(np.int32))
        self.items, self.max_len = items, max_len
        n = self.all.lengths
        self.long = int((n - 2 > max_len).sum())
        self.train = self.all.pieces(np.maximum(n - 2 - max_len, 0), n - 2)
        self.seen = {"valid": self.train, "test": self.all.pieces(np.maximum(n - 2 - max_len, 0), n - 1)}
        self.target = {
            "valid": self.all.items[self.all.starts[1:] - 2],
            "test": self.all.items[self.all.starts[1:] - 1],
        }

    def pad(self, histories: Histories) -> np.ndarray:
        return padded(histories, self.max_len, self.items)

    def train_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        n = self.train.lengths
        return self.pad(self.train.pieces(0 * n, n - 1)), self.pad(self.train.pieces(0 * n + 1, n))

    def dense_seen(self, part: str) -> np.ndarray:
        dense = np.zeros((len(self.all.lengths), self.items), np.float32)
        seen = self.seen[part]
        np.add.at(dense, (np.repeat(np.arange(len(dense)), seen.lengths), seen.items), 1)
        return dense


def edges(counts: csr_matrix, heads: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Row, item and share of the row's largest count, for every head."""
    rows = counts[heads].tocoo()
    top = np.maximum(counts.max(1).toarray().ravel()[heads], 1)
    return (torch.from_numpy(rows.row.astype(np.int64)), torch.from_numpy(rows.col.astype(np.int64)),
            torch.from_numpy((rows.data / top[rows.row]).astype(np.float32)))  # fmt: skip


def total_loss(
    model: MQSATED, options: dict[str, Any], counts: csr_matrix, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    valid, there = targets < model.items, inputs < model.items
    heads = inputs[there]
    rec = recommendation_loss(model(inputs)[valid], model.item, targets[valid])
    kd = distillation_loss(model, heads, *edges(counts, heads.numpy()), tau=options["tau"])
    l2 = sum((p**2).sum() for p in model.parameters()) / 2
    return {"rec": rec, "kd": kd, "total": rec + options["lambda_kd"] * kd + options["l2_reg"] * l2}


def build(options: dict[str, Any], weights: Path) -> MQSATED:
    state, sizes = to_polyhead(load_file(weights))
    model = MQSATED(sizes["items"], sizes["max_len"], sizes["dim"], sizes["blocks"], options["num_head"], options["L"],
                    options["alpha"], options["dropout_rate"])  # fmt: skip
    model.load_state_dict(state)
    assert (model.items, model.max_len, model.dim) == tuple(options[k] for k in ("num_item", "max_len", "num_factor"))
    return model


def theirs(tensors: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Our parameters (or gradients) under the graph's names and in its layout."""
    return {n: tensors[our].T if n.endswith("kernel") else tensors[our] for our, n in names(blocks).items()}


def network_outputs(
    model: MQSATED, options: dict[str, Any], data: Data, counts: csr_matrix, io: dict[str, Tensor]
) -> dict[str, Any]:
    inputs, targets = io["batch/input_seq"], io["batch/pred_seq"]
    trace: Trace = {}
    with torch.no_grad():
        parts = model.encode(inputs, trace)
        hidden = model(inputs)
        logits = F.pad(hidden @ model.item.T, (0, 1))
        heads = inputs[inputs < model.items]
        row, item, share = edges(counts, heads.numpy())
        x = F.embedding(heads, model.item) * math.sqrt(model.dim) / options["tau"]
        got: dict[str, Any] = {f"expect/{k}": v for k, v in trace.items()}
        got |= {f"expect/{k}/representation": v for k, v in parts.items()}
        got |= {
            "expect/rec/logits_full": logits,
            "expect/rec/ce_per_position": F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"),
            "expect/kd/teacher": teacher(row, item, share, len(heads), model.items, options["tau"]).dense(
                len(heads), model.items
            ),
            "expect/kd/student": (x @ model.item.T).softmax(1),
        }
    losses = total_loss(model, options, counts, inputs, targets)
    model.zero_grad()
    losses["total"].backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    got |= {f"expect/loss/{k}": v for k, v in losses.items()}
    got |= {f"grad/{k}": v for k, v in theirs(grads, options["num_block"]).items()}
    got["expect/loss/grad_norm"] = torch.stack([g.norm() for g in grads.values()]).norm()
    return got


def data_outputs(data: Data, counts: csr_matrix, io: dict[str, Tensor]) -> dict[str, Any]:
    inputs, targets = data.train_arrays()
    heads = io["batch/item_head"].numpy()
    users = len(io["batch/input_seq"])
    found = [(inputs == row).all(1).nonzero()[0] for row in io["batch/input_seq"].numpy()]
    batch = inputs[[f[0] for f in found]] if all(len(f) for f in found) else inputs[:users]
    return {
        "transition/indptr": counts.indptr, "transition/indices": counts.indices, "transition/count": counts.data,
        "batch/train_input_all": inputs, "batch/train_target_all": targets,
        "batch/valid_input": data.pad(data.seen["valid"]), "batch/test_input": data.pad(data.seen["test"]),
        "mask/valid": data.dense_seen("valid"), "mask/test": data.dense_seen("test"),
        "batch/item_head": batch[batch < data.items], "batch/item_tail": counts[heads].toarray(),
    }  # fmt: skip


def evaluation_outputs(model: MQSATED, options: dict[str, Any], data: Data) -> dict[str, Any]:
    got: dict[str, Any] = {}
    for part in ("valid", "test"):
        history = torch.from_numpy(data.pad(data.seen[part]))
        seen = torch.from_numpy(padded(data.seen[part], data.max_len + 1, data.items))
        with torch.no_grad():
            scores = without_seen(model.eval()(history)[:, -1] @ model.item.T, seen)
        metrics = ranking_metrics(options["cutoffs"])
        metrics.update(*rank(scores, torch.from_numpy(data.target[part].astype(np.int64))), model.items)
        got[f"{part}_scores_masked"] = scores
        got[f"{part}_top{options['topk']}"] = scores.topk(options["topk"]).indices
        got |= {f"{part}_{k}": metric.total / metric.count for k, metric in metrics.items()}
    return {f"expect/eval/{k}": v for k, v in got.items()}


def optimiser_outputs(
    model: MQSATED, options: dict[str, Any], counts: csr_matrix, io: dict[str, Tensor]
) -> dict[str, Any]:
    adam = options["adam"]
    optimizer = TensorFlowAdam(
        model.parameters(), lr=options["lr"], betas=(adam["beta1"], adam["beta2"]), eps=adam["epsilon"]
    )
    first = io["batch/input_seq"], io["batch/pred_seq"]
    second = io["opt/batch2_input_seq"], io["opt/batch2_pred_seq"]
    got, seen = {}, []
    model.train()
    for step, batch in enumerate((first, second, first), 1):
        losses = total_loss(model, options, counts, *batch)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        seen.append(losses["total"].detach())
        now = {n: p.detach().clone() for n, p in model.named_parameters()}
        got |= {f"opt/after{step}/{k}": v for k, v in theirs(now, options["num_block"]).items()}
    return {"opt/losses": torch.stack(seen), **got}


GIVEN = ("data/", "batch/input_seq", "batch/pred_seq", "opt/batch2")


def model_case(folder: Path, case: str, rules: Mapping[str, str]) -> Iterator[Check]:
    options = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))
    io = load_file(folder / f"{case}.io.safetensors")
    columns = [io[f"data/{k}"].numpy() for k in ("user_id", "item_id", "order")]
    data = Data(*columns, options["num_item"], options["max_len"])
    counts = transitions(data.train, data.items, options["time_span"])
    model = build(options, folder / f"{case}.weights.safetensors")
    got = data_outputs(data, counts, io) | network_outputs(model, options, data, counts, io)
    got |= evaluation_outputs(model, options, data)
    got |= optimiser_outputs(model, options, counts, io)
    there = io["batch/input_seq"] < data.items
    for name, expected in io.items():
        if name.startswith(GIVEN):
            continue
        value = got.get(name)
        if value is not None and "/block" in name and name.startswith("expect/"):
            value = value.transpose(1, 2)[there] if name.endswith("attn_probs") else value[there]
            expected = expected.transpose(1, 2)[there] if name.endswith("attn_probs") else expected[there]
        if value is not None and name.endswith("_scores_masked"):
            open_ = expected > -1e9
            if not bool((value[~open_] < -1e9).all()):
                value = None
            else:
                value, expected = value[open_], expected[open_]
        yield compared(case, name, value, expected, rules)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<i4").tobytes()).hexdigest()


def pipeline_case(folder: Path, path: Path) -> Iterator[Check]:
    import pyarrow.parquet as pq

    meta = json.loads(path.read_text(encoding="utf-8"))
    table = pq.read_table((path.parent / meta["data"]).resolve())
    columns = [np.array(table[k]) for k in ("user_id", "item_id", "order")]
    data = Data(*columns, meta["num_item"], meta["max_len"])
    inputs, targets = data.train_arrays()
    counts = {int(k.removeprefix("transition_span")): transitions(data.train, data.items, int(k[-1]))
              for k in meta if k.startswith("transition_span")}  # fmt: skip
    expected: dict[str, Any] = {f"arrays.{k}": v for k, v in meta["arrays"].items() if k != "note"}
    got: dict[str, Any] = {
        "arrays.train_input": digest(inputs),
        "arrays.train_target": digest(targets),
        **{f"arrays.{part}_input": digest(data.pad(data.seen[part])) for part in ("valid", "test")},
        **{f"arrays.{part}_target": digest(data.target[part]) for part in ("valid", "test")},
    }
    ever = set(data.train.items.tolist())
    facts: dict[str, Any] = {
        "train_positions": int((targets < data.items).sum()),
        "users_longer_than_max_len": data.long,
    }
    for key in meta["counts"]:
        if size := re.fullmatch(r"train_steps_batch(\d+)", key):
            facts[key] = -(-len(inputs) // int(size[1]))
    for part in ("valid", "test"):
        seen, target = data.seen[part], data.target[part]
        pairs = set(zip(np.repeat(np.arange(len(target)), seen.lengths).tolist(), seen.items.tolist(), strict=True))
        facts |= {
            f"seen_pairs_{part}": len(pairs),
            f"{part}_targets_already_seen": sum((u, t) in pairs for u, t in enumerate(target.tolist())),
            f"{part}_targets_never_in_train": sum(t not in ever for t in target.tolist()),
        }
    expected |= {f"counts.{k}": v for k, v in meta["counts"].items()}
    got |= {f"counts.{k}": v for k, v in facts.items()}
    for span, matrix in counts.items():
        prefix = f"transition_span{span}"
        expected |= {f"{prefix}.{k}": v for k, v in meta[prefix].items()}
        sums = np.asarray(matrix.sum(1)).ravel()
        histogram = zip(*np.unique(matrix.data, return_counts=True), strict=True)
        facts = {
            "nnz": matrix.nnz, "total": int(matrix.sum()), "max_count": int(matrix.max()),
            "nonempty_rows": int((np.diff(matrix.indptr) > 0).sum()), "nonempty_cols": len(np.unique(matrix.indices)),
            "diagonal_total": int(matrix.diagonal().sum()), "max_row_sum": int(sums.max()),
            "max_row_nnz": int(np.diff(matrix.indptr).max()),
            "count_histogram": {str(k): int(v) for k, v in histogram},
            "sha256_indptr": digest(matrix.indptr), "sha256_indices": digest(matrix.indices),
            "sha256_counts": digest(matrix.data),
        }  # fmt: skip
        got |= {f"{prefix}.{k}": v for k, v in facts.items()}
    for name, value in expected.items():
        yield Check(path.stem, name, 0.0 if got.get(name) == value else math.inf, 0.0)
    arrays = path.with_suffix(".safetensors")
    if arrays.exists():
        yield from pipeline_arrays(path.stem, load_file(arrays), data, counts[1], inputs, targets)


def pipeline_arrays(
    case: str, io: dict[str, Tensor], data: Data, counts: csr_matrix, inputs: np.ndarray, targets: np.ndarray
) -> Iterator[Check]:
    coo = counts.tocoo()
    order = np.lexsort((coo.col, coo.row, -coo.data))[: len(io.get("top_row", []))]
    got: dict[str, Any] = {
        "row_sum": np.asarray(counts.sum(1)).ravel(), "col_sum": np.asarray(counts.sum(0)).ravel(),
        "row_max": counts.max(1).toarray().ravel(), "row_nnz": np.diff(counts.indptr),
        "top_row": coo.row[order], "top_col": coo.col[order], "top_count": coo.data[order],
        "train_input_head": inputs, "train_target_head": targets,
        "valid_input_head": data.pad(data.seen["valid"]), "test_input_head": data.pad(data.seen["test"]),
    }  # fmt: skip
    if "sample_row" in io:
        row, col = (np.array(io[k]) for k in ("sample_row", "sample_col"))
        got |= {"sample_row": row, "sample_col": col, "sample_count": np.asarray(counts[row, col]).ravel()}
    for name, expected in io.items():
        value = got.get(name)
        if value is None:
            yield Check(case, f"{name} is not understood", math.inf, 0.0)
            continue
        value = torch.as_tensor(np.asarray(value))
        value = value[: len(expected)] if name.endswith("_head") else value
        yield Check(case, name, apart(value, expected, 0.0), 0.0)


def run(folder: Path) -> Iterator[Check]:
    meta = json.loads((folder / "fixture.json").read_text(encoding="utf-8"))
    for case in meta["cases"]:
        yield from model_case(folder, case, meta["tolerances"])
    for name in meta["pipelines"]:
        yield from pipeline_case(folder, folder / f"pipeline_{name}.json")
