"""`polyhead cross-validate`: fits and tests every fold of the data in turn, and measures all of them together."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from pytorch_lightning import Callback

from apps.cli import PolyheadCLI, quiet, read_recipe
from apps.messages import Options, option_name
from polyhead import bundle
from polyhead.classifier import Classifier
from polyhead.errors import UserError
from polyhead.files import atomic_write, read_yaml, write_text
from polyhead.intervals import intervals
from polyhead.metrics import classification_metrics

# Options of fit that this command decides: option -> what does
DECIDED = {
    "data.fold": "every fold has its turn",
    "seed_everything": "--seeds says them",
    "ckpt_path": "every fold is a new training",
    "resume": "what is finished is left alone without being told",
    "overwrite": "for a new start give a new --output",
    "trainer.fast_dev_run": "every fold is a whole training",
    "trainer.devices": "a fold is fitted on one device",
}
SETTINGS, TESTED = "cross-validation.yaml", "test.parquet"
# Test samples that could not be read: a column of the results, and what the table of a fold says of itself
LEFT_OUT = "left_out"
# What is measured over the rows of all folds together
RESULTS = ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece")


class _Rows(Callback):
    """Keeps what is predicted for the samples of a test part, with their classes and groups."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes, self.rows = classes, []  # type: ignore[var-annotated]

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for i, name in enumerate(batch["id"]):
            group = batch["group"][i] if "group" in batch else name
            probabilities = [float(v) for v in outputs["probabilities"][i]]
            self.rows.append({"id": name, "group": group, "truth": self.classes[int(batch["label"][i])],
                              "label": str(outputs["label"][i]), "probabilities": probabilities})  # fmt: skip


def _fit_and_test(words: Sequence[str], folder: Path, init_from: str | None) -> None:
    """One fold: a run folder as `fit` and `test` leave it, and the rows of its test part."""
    # A training that was stopped goes on; one that has not begun has nothing to go on from
    begun = (folder / "checkpoints/last.ckpt").is_file()
    start = ["--resume"] if begun else ["--overwrite", *(["--init_from", init_from] if init_from else [])]
    cli = PolyheadCLI("fit", [*words, "--output", str(folder), *start])
    trainer: Any = cli.trainer
    if trainer.interrupted:
        raise KeyboardInterrupt
    if not isinstance(cli.model, Classifier):
        raise UserError(f"cross-validate compares classes, and {type(cli.model).__name__} is no classifier")
    trainer.test(cli.model, datamodule=cli.datamodule)
    rows = _Rows(cli.model.classes)
    trainer.callbacks.append(rows)
    trainer.predict(cli.model, cli.datamodule.test_dataloader())
    if not rows.rows:
        raise UserError(f"{folder.name} has no test sample that can be read")
    left_out = len(cli.datamodule.samples("test")) - len(rows.rows)
    table = pa.Table.from_pylist(rows.rows).replace_schema_metadata({LEFT_OUT: str(left_out)})
    with atomic_write(folder / TESTED) as temporary:
        pq.write_table(table, temporary)


def _settings(words: list[str], folds: int | None) -> tuple[dict[str, Any], list[int], list[str]]:
    """What all fits have in common, the numbers of the folds, and the options of each fit."""
    words = [*words, "--trainer.devices", "1"]
    recipe = read_recipe(words)
    data = recipe["data"]
    if "fold" not in data["init_args"] or "folds" not in data["init_args"]:
        raise UserError(f"cross-validate needs data that have folds, and {data['class_path']} has none")
    if folds is not None:
        words += ["--data.folds", str(folds)]
        data["init_args"]["folds"] = folds
    numbers = bundle.build_data(data).fold_numbers()
    if not numbers:
        raise UserError("how many folds? give --folds 5, or name a table's own by --data.fold_column")
    if folds is not None and len(numbers) != folds:
        column = data["init_args"].get("fold_column")
        raise UserError(f"--folds is {folds}, and column {column!r} names {len(numbers)}: leave --folds out")
    return {k: v for k, v in recipe.items() if k != "seed_everything"}, numbers, words


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder whose folds were fitted with other settings."""
    path = output / SETTINGS
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: a folder is needed")
    if any(output.glob("seed-*/fold-*")):
        before = read_yaml(path) if path.is_file() else None
        if before != settings:
            hint = f"its settings are in {path}" if path.is_file() else "it lacks its settings"
            raise UserError(f"{output} holds folds of other settings: choose another --output", [hint])
    write_text(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _pooled(rows: list[dict[str, Any]], classes: list[str]) -> dict[str, float]:
    """Results over the rows of all folds together, with 95 % intervals by group."""
    label = np.array([classes.index(r["truth"]) for r in rows])
    probabilities = np.array([r["probabilities"] for r in rows])
    metrics = classification_metrics(len(classes))
    metrics.update(torch.from_numpy(probabilities), torch.from_numpy(label))
    computed = metrics.compute()
    results = {name: float(computed[name]) for name in RESULTS}
    around = intervals(label, probabilities, [r["group"] for r in rows])
    for name in RESULTS:
        if name in around:
            results[f"{name}.low"], results[f"{name}.high"] = around[name]
    return results


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(k for r in rows for k in r))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    write_text(path, text.getvalue())


def _collect(output: Path, seeds: list[int], folds: list[int]) -> None:
    """The tables of all folds: folds.csv, pooled.csv, predictions.parquet; the pooled one is printed."""
    by_fold: list[dict[str, Any]] = []
    by_seed: list[dict[str, Any]] = []
    everything: list[dict[str, Any]] = []
    for seed in seeds:
        of_seed: list[dict[str, Any]] = []
        for fold in folds:
            folder = output / f"seed-{seed}/fold-{fold}"
            table = pq.read_table(folder / TESTED)
            rows, left_out = table.to_pylist(), int((table.schema.metadata or {}).get(LEFT_OUT.encode(), 0))
            found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            shown = {k.removeprefix("test/"): v for k, v in found.items()
                     if k.startswith("test/") and not k.endswith((".low", ".high"))}  # fmt: skip
            by_fold.append({"seed": seed, "fold": fold, "n": len(rows), LEFT_OUT: left_out, **shown})
            of_seed += [{"seed": seed, "fold": fold, **r} for r in rows]
        facts = read_yaml(output / f"seed-{seed}/fold-{folds[0]}/bundle/config.yaml")["model"]["init_args"]["facts"]
        missing = sum(row[LEFT_OUT] for row in by_fold if row["seed"] == seed)
        by_seed.append({"seed": seed, "n": len(of_seed), LEFT_OUT: missing, **_pooled(of_seed, facts["classes"])})
        everything += of_seed
    names = [n for n in by_seed[0] if n not in ("seed", "n", LEFT_OUT)]
    values = {n: np.array([r[n] for r in by_seed]) for n in names}
    summary: list[dict[str, Any]] = [{"seed": "mean", "n": "", **{n: float(v.mean()) for n, v in values.items()}}]
    if len(seeds) > 1:
        summary.append({"seed": "sd", "n": "", **{n: float(v.std(ddof=1)) for n, v in values.items()}})
    _write_csv(output / "folds.csv", by_fold)
    _write_csv(output / "pooled.csv", by_seed + summary)
    with atomic_write(output / "predictions.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(everything), temporary)
    print(f"{'seed':<6}{'n':>6}" + "".join(f"{n:>20}" for n in RESULTS))
    for row in by_seed + summary:
        print(f"{row['seed']:<6}{row['n']:>6}" + "".join(f"{row[n]:>20.4f}" for n in RESULTS))
    if by_seed[0][LEFT_OUT]:
        print(f"{by_seed[0][LEFT_OUT]} samples could not be read and are not among them", file=sys.stderr)
    print(f"pooled over {len(folds)} folds; by seed and fold: {output / 'folds.csv'}", file=sys.stderr)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: whole numbers with commas between are needed, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {text}: different numbers, 0 or more, are needed")
    return seeds


def main(arguments: list[str]) -> int:
    parser = Options(
        "polyhead cross-validate",
        description="Fit and test every fold of the data in turn, for every seed. All other options are those of fit, "
        "--config and --data.root first. Started again, it leaves finished folds alone and goes on.",
        usage="polyhead cross-validate --config RECIPE --output DIR [--folds N] [--seeds 0,1,...] [options of fit]",
    )
    parser.add_argument("--output", required=True, help="the folder; a run folder in it for every seed and fold")
    parser.add_argument(
        "--folds", type=int, help="draw so many, by class and patient; else --data.fold_column names them"
    )
    parser.add_argument("--init_from", help="start every fold from these weights, as fit does")
    parser.add_argument("--seeds", type=_seeds, default=[0], help="with commas between (default 0)")
    options, words = parser.parse_known_args(arguments)
    for name in filter(None, map(option_name, words)):
        if name in DECIDED:
            raise UserError(f"cross-validate has no option --{name}: {DECIDED[name]}")
    output = Path(options.output)
    settings, folds, words = _settings(words, options.folds)
    if options.init_from:
        settings["init_from"] = options.init_from
    _claim(output, settings)
    runs = [(seed, fold) for seed in options.seeds for fold in folds]
    left = [run for run in runs if not (output / f"seed-{run[0]}/fold-{run[1]}" / TESTED).is_file()]
    if len(left) < len(runs):
        print(f"{len(runs) - len(left)} of {len(runs)} folds were done before", file=sys.stderr)
    quiet()
    started = time.monotonic()
    for number, (seed, fold) in enumerate(left, 1):
        folder = output / f"seed-{seed}/fold-{fold}"
        each = [*words, "--data.fold", str(fold), "--seed_everything", str(seed)]
        try:
            # What a single fit would say, for each of them
            with (output / "log.txt").open("a", encoding="utf-8") as log, redirect_stderr(log):
                _fit_and_test(each, folder, options.init_from)
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)("the same command goes on where it stopped") from None
        found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        rest = (time.monotonic() - started) / number * (len(left) - number)
        print(f"seed {seed} fold {fold}: accuracy {found['test/accuracy']:.3f}, {len(left) - number} to go, "
              f"about {rest / 60:.0f} min", file=sys.stderr, flush=True)  # fmt: skip
    _collect(output, options.seeds, folds)
    return 0
