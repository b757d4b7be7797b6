"""What a fit leaves behind, and how settings, weights and runs go from one call to the next."""

from __future__ import annotations

import csv
import html.parser
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from safetensors.torch import load_file

from polyhead.predictions import read_errors, read_predictions
from tests.apps.conftest import ONE_BATCH, TOY
from tests.command import Done, polyhead

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")


def ok(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


def bundle_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "bundle/model.safetensors")


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)


def curves(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def settings(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


# The run folder


def test_the_run_folder_holds_what_the_contract_says(digits_run: Path) -> None:
    files = {p.relative_to(digits_run).as_posix() for p in digits_run.rglob("*") if p.is_file()}
    events = {f for f in files if f.startswith("tensorboard/events.out.tfevents")}
    assert events and files - events == {
        "config.yaml", "metrics.csv", "metrics.json", "report.html", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "bundle/model.safetensors", "bundle/config.yaml", "bundle/README.md",
    }  # fmt: skip
    rows = curves(digits_run)
    assert [r["epoch"] for r in rows] == ["0", "1"] and [r["step"] for r in rows] == ["6", "12"]
    assert all(float(r["train/loss"]) > 0 and float(r["val/accuracy"]) >= 0 and float(r["lr"]) > 0 for r in rows)
    metrics = json.loads((digits_run / "metrics.json").read_text())
    assert {"val/loss", "val/accuracy", "val/balanced_accuracy", "val/f1_macro", "val/auroc", "val/ece"} <= set(metrics)
    assert {f"val/sensitivity.{c}" for c in range(10)} <= set(metrics)
    assert all(k.startswith("val/") for k in metrics)


def test_the_bundle_holds_resolved_settings_and_no_root(pets_run: Path) -> None:
    content = settings(pets_run / "bundle/config.yaml")
    assert set(content) == {"model", "data"}
    assert content["model"]["init_args"]["facts"] == {"classes": ["cat", "dog"]}
    assert content["data"]["init_args"]["classes"] == ["cat", "dog"]
    assert content["data"]["init_args"]["image_size"] == 64
    assert content["data"]["init_args"]["root"] is None
    card = (pets_run / "bundle/README.md").read_text()
    assert "vision.ImageClassifier" in card and "polyhead fit --config vision/shvit_digits" in card
    assert re.search(r"\| accuracy \| \d\.\d{4} \|", card)


def test_the_bundle_holds_the_best_weights(pets_run: Path) -> None:
    rows = curves(pets_run)
    best = min(rows, key=lambda r: float(r["val/loss"]))
    assert checkpoint(pets_run, "best")["epoch"] == int(best["epoch"])
    assert equal(bundle_weights(pets_run), dict(checkpoint(pets_run, "best")["state_dict"]))
    measured = json.loads((pets_run / "metrics.json").read_text())["val/loss"]
    assert measured == pytest.approx(float(best["val/loss"]), rel=1e-4)


class References(html.parser.HTMLParser):
    """Everything in a page that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.titles: list[str] = []
        self._heading = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attributes if k in ("src", "href", "data", "srcset", "action")]
        assert tag not in ("script", "iframe", "link", "object", "embed")
        self._heading = tag in ("h1", "h2", "h3")

    def handle_data(self, data: str) -> None:
        if self._heading and data.strip():
            self.titles.append(data.strip())


def test_the_report_is_one_file_with_curves_and_confusion_matrix(digits_run: Path) -> None:
    text = (digits_run / "report.html").read_text()
    page = References()
    page.feed(text)
    assert len(page.found) >= 2 and all(r.startswith("data:image/png;base64,") for r in page.found)
    assert "@import" not in text and "url(" not in text and "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert any("Confusion matrix" in t for t in page.titles) and "Training" in page.titles
    assert "polyhead fit --config vision/shvit_digits" in text
    weights = {k: v for k, v in bundle_weights(digits_run).items() if "running_" not in k and "num_batches" not in k}
    assert f"{sum(v.numel() for v in weights.values()):,}" in text and torch.__version__ in text


# Settings


def test_config_yaml_serves_every_subcommand(pets_run: Path, tmp_path: Path) -> None:
    for subcommand in ("validate", "test", "predict", "explain", "export"):
        extra = ("--format", "torchscript") if subcommand == "export" else ()
        folder = tmp_path / subcommand
        common = ("--config", pets_run / "config.yaml", "--ckpt_path", pets_run / "bundle", "--output", folder)
        ok(polyhead(subcommand, *common, *extra))
        again = settings(folder / f"config_{subcommand}.yaml")
        first = settings(pets_run / "config.yaml")
        assert {k: again[k] for k in ("model", "data")} == {k: first[k] for k in ("model", "data")}
    ok(polyhead("fit", "--config", pets_run / "config.yaml", "--output", tmp_path / "fit", "--trainer.max_epochs=1"))
    metrics = json.loads((tmp_path / "validate/metrics.json").read_text())
    fitted = json.loads((pets_run / "metrics.json").read_text())
    assert metrics == pytest.approx(fitted, abs=1e-6)
    assert all(k.startswith("test/") for k in json.loads((tmp_path / "test/metrics.json").read_text()))
    assert (tmp_path / "export/model.pt").is_file()


def test_print_config_gives_a_recipe(tmp_path: Path) -> None:
    options = ("--config", "vision/shvit_digits", "--model.image_size=32", "--data.image_size=32")
    done = ok(polyhead("fit", *options, "--print_config", cwd=tmp_path))
    (tmp_path / "mine.yaml").write_text(done.out)
    ok(polyhead("fit", "--config", "mine.yaml", "--output", "run", *ONE_BATCH, cwd=tmp_path))
    written = settings(tmp_path / "run/config.yaml")
    assert written["model"]["init_args"]["image_size"] == written["data"]["init_args"]["image_size"] == 32
    assert written["monitor"] == "val/accuracy"
    short = yaml.safe_load(ok(polyhead("fit", *options, "--print_config=skip_default", cwd=tmp_path)).out)
    assert short["trainer"] == {"max_epochs": 12} and "best" not in short
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml", "run"]


def test_the_checkpoint_s_settings_are_defaults_and_flags_win(pets_run: Path, pets: Path, tmp_path: Path) -> None:
    def run(name: str, *options: object) -> dict[str, Any]:
        model = pets_run / ("checkpoints/best.ckpt" if name == "checkpoint" else "bundle")
        ok(polyhead("predict", "--ckpt_path", model, "--data.root", pets, "--output", tmp_path / name, *options))
        return settings(tmp_path / name / "config_predict.yaml")["data"]["init_args"]

    for name in ("bundle", "checkpoint"):
        got = run(name)
        assert got["image_size"] == 64 and got["batch_size"] == 4 and got["classes"] == ["cat", "dog"]
    assert run("flag", "--data.image_size=32")["image_size"] == 32
    (tmp_path / "file.yaml").write_text("data:\n  init_args:\n    batch_size: 5\n    image_size: 48\n")
    got = run("file", "--config", tmp_path / "file.yaml", "--data.image_size=32")
    assert got["batch_size"] == 5 and got["image_size"] == 32


def test_flags_beat_recipes_wherever_they_stand(tmp_path: Path) -> None:
    flags = ("--data.batch_size=7", "--trainer.max_epochs=1")
    for name, words in (("before", (*flags, "--config", TOY)), ("after", ("--config", TOY, *flags))):
        ok(polyhead("fit", *words, "--output", tmp_path / name))
        written = settings(tmp_path / name / "config.yaml")
        assert written["data"]["init_args"]["batch_size"] == 7 and written["trainer"]["max_epochs"] == 1


def test_without_an_output_runs_of_one_second_do_not_meet(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as pool:
        start = lambda _: polyhead("fit", "--config", TOY, "--trainer.max_epochs=1", cwd=tmp_path)  # noqa: E731
        for done in pool.map(start, range(3)):
            ok(done)
    runs = list((tmp_path / "runs/toy").iterdir())
    assert len(runs) == 3 and all((r / "report.html").is_file() for r in runs)


# Going on, starting from, averaging


def test_curves_go_on_and_lose_what_the_checkpoint_has_not_seen(toy_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    (first,) = curves(run)
    lost = {**first, "epoch": "1", "step": "16", "val/loss": "99"}
    with (run / "metrics.csv").open("a", newline="") as file:
        csv.DictWriter(file, list(first)).writerow(lost)
    ok(polyhead("fit", "--output", run, "--resume", "--trainer.max_epochs=3"))
    rows = curves(run)
    assert [r["epoch"] for r in rows] == ["0", "1", "2"] and [r["step"] for r in rows] == ["8", "16", "24"]
    assert rows[0] == first and float(rows[1]["val/loss"]) < 99


def test_a_thawed_body_goes_on_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Frozen in epoch 0, trained from epoch 1 on, killed in epoch 1."""
    common = ("fit", "--config", "vision/shvit_digits", "--model.freeze=[backbone]", "--model.unfreeze_at=1",
              "--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1",
              "--last.every_n_steps=1")  # fmt: skip
    kill = '{"class_path": "tests.toy.KillAt", "init_args": {"where": "step", "step": 5}}'
    killed = polyhead(*common, "--output", tmp_path / "broken", f"--trainer.callbacks+={kill}")
    assert killed.status == -signal.SIGKILL, killed.err
    middle = checkpoint(tmp_path / "broken")["state_dict"]
    ok(polyhead(*common, "--output", tmp_path / "broken", "--resume"))
    ok(polyhead(*common, "--output", tmp_path / "whole"))
    broken, whole = (dict(checkpoint(tmp_path / run)["state_dict"]) for run in ("broken", "whole"))
    assert equal(broken, whole)
    name = "network.blocks1.0.conv.m.c.weight"
    assert not torch.equal(middle[name], broken[name])


class Interrupt(Callback):
    """What Ctrl-C does (or another signal), at a step of a training or a batch of a prediction."""

    def __init__(self, step: int, number: int = int(signal.SIGINT)) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == self.step:
            os.kill(os.getpid(), self.number)


def test_a_terminated_training_ends_with_143_and_goes_on(tmp_path: Path) -> None:
    stop = {"class_path": "tests.apps.test_fit.Interrupt", "init_args": {"step": 12, "number": int(signal.SIGTERM)}}
    fit = polyhead("fit", "--config", TOY, f"--trainer.callbacks+={json.dumps(stop)}", "--output", "run", cwd=tmp_path)
    assert fit.status == 143
    assert fit.err.endswith("polyhead: terminated\n  go on with: polyhead fit --output run --resume\n")
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text.replace("step: 12", "step: -1"))
    ok(polyhead("fit", "--output", "run", "--resume", cwd=tmp_path))


def test_an_interrupted_call_says_how_to_go_on(tmp_path: Path) -> None:
    def stop(step: int) -> str:
        callback = {"class_path": "tests.apps.test_fit.Interrupt", "init_args": {"step": step}}
        return f"--trainer.callbacks+={json.dumps(callback)}"

    early = polyhead("fit", "--config", TOY, stop(1), "--output", "early", cwd=tmp_path)
    assert early.status == 130 and early.err.endswith("polyhead: interrupted\n")
    assert not (tmp_path / "early").exists()
    fit = polyhead("fit", "--config", TOY, stop(12), "--output", "run", cwd=tmp_path)
    assert fit.status == 130
    assert fit.err.endswith("polyhead: interrupted\n  go on with: polyhead fit --output run --resume\n")
    text = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text.replace("step: 12", "step: -1"))
    ok(polyhead("fit", "--output", "run", "--resume", cwd=tmp_path))
    words = ("--ckpt_path", "run/bundle", "--data.batch_size=3")
    predict = polyhead("predict", *words, stop(4), cwd=tmp_path)
    assert predict.status == 130
    (folder,) = (tmp_path / "runs/run").iterdir()
    said = predict.err.splitlines()[-1]
    assert said.startswith("  go on with: polyhead predict --ckpt_path run/bundle --data.batch_size=3")
    assert said.endswith(f"--output {folder.relative_to(tmp_path)} --resume")
    ok(polyhead("predict", *words, "--output", folder, "--resume", cwd=tmp_path))
    assert len(read_predictions(folder)) == 40


def test_init_from_takes_weights_and_nothing_else(digits_run: Path, tmp_path: Path) -> None:
    options = ("--config", "vision/shvit_digits", "--init_from", digits_run / "checkpoints/last.ckpt")
    ok(polyhead("fit", *options, "--trainer.max_epochs=0", "--output", tmp_path / "still"))
    assert equal(bundle_weights(tmp_path / "still"), dict(checkpoint(digits_run)["state_dict"]))
    done = ok(polyhead("fit", *options, "--output", tmp_path / "on", *SHORT))
    assert f"started from {digits_run / 'checkpoints/last.ckpt'}\n" in done.err
    assert checkpoint(tmp_path / "on")["global_step"] == 2
    assert [r["epoch"] for r in curves(tmp_path / "on")] == ["0"]


def test_init_from_gives_other_classes_a_new_head(digits_run: Path, pets: Path, tmp_path: Path) -> None:
    """The bundle's own settings serve, its classes and its head do not."""
    common = ("--init_from", digits_run / "bundle", "--data.root", pets, "--trainer.max_epochs=0")
    done = ok(polyhead("fit", *common, "--output", tmp_path / "run"))
    assert "new: network.head.l.weight, network.head.l.bias" in done.err
    old, new = bundle_weights(digits_run), bundle_weights(tmp_path / "run")
    changed = {k for k in new if new[k].shape != old[k].shape or not torch.equal(new[k], old[k])}
    assert changed == {"network.head.l.weight", "network.head.l.bias"}
    assert new["network.head.l.bias"].shape == (2,)
    written = settings(tmp_path / "run/bundle/config.yaml")
    assert written["model"]["init_args"]["backbone_options"]["embed_dim"] == [64, 96, 128]


def test_the_moving_average_is_evaluated_and_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ok(polyhead("fit", "--config", TOY, "--output", run, "--model.ema_decay=0.9", "--trainer.max_epochs=2"))
    last = checkpoint(run)
    mean, raw = last["state_dict"], last["current_model_state"]
    assert not torch.equal(mean["network.0.weight"], raw["network.0.weight"])
    best = {k: v for k, v in checkpoint(run, "best")["state_dict"].items()}
    assert equal(bundle_weights(run), best)
    ok(polyhead("validate", "--ckpt_path", run / "bundle", "--output", tmp_path / "again"))
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert again == pytest.approx(json.loads((run / "metrics.json").read_text()), abs=1e-6)
    best_row = min(curves(run), key=lambda r: float(r["val/loss"]))
    assert again["val/loss"] == pytest.approx(float(best_row["val/loss"]), rel=1e-4)


def test_mixing_is_the_seed_s_alone(tmp_path: Path) -> None:
    mixing = ("--model.mixup_alpha=0.2", "--model.cutmix_alpha=1.0", "--data.policy=trivial")
    runs = {}
    for name, options in {"one": mixing, "two": (*mixing, "--data.num_workers=2"), "plain": ()}.items():
        ok(polyhead("fit", "--config", "vision/shvit_digits", *SHORT, *options, "--output", tmp_path / name))
        runs[name] = dict(checkpoint(tmp_path / name)["state_dict"])
    assert equal(runs["one"], runs["two"])
    assert not equal(runs["one"], runs["plain"])


def test_a_teacher_s_bundle_is_learned_from(pets_run: Path, pets: Path, tmp_path: Path) -> None:
    options = ("--config", "vision/shvit_digits", "--data.root", pets, "--model.teacher", pets_run / "bundle")
    for kind in ("soft", "hard"):
        run = tmp_path / kind
        ok(polyhead("fit", *options, "--model.distillation", kind, "--output", run, *SHORT))
        (row,) = curves(run)
        assert float(row["train/distillation"]) > 0
        # The teacher is not part of the student
        assert bundle_weights(run).keys() == bundle_weights(pets_run).keys()
    assert not equal(bundle_weights(tmp_path / "soft"), bundle_weights(tmp_path / "hard"))


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path: Path) -> None:
    """One run folder, one report, every sample predicted once, with a moving average too."""
    import subprocess
    import sys

    def run(*words: object) -> str:
        command = [sys.executable, "-m", "apps", *map(str, words), "--trainer.strategy=ddp", "--trainer.devices=2",
                   "--trainer.accelerator=cpu"]  # fmt: skip
        home = str(Path(__file__).parents[2])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": home}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stderr

    run("fit", "--config", TOY, "--trainer.max_epochs=2", "--model.ema_decay=0.9")
    (folder,) = (tmp_path / "runs/toy").iterdir()
    assert [r["step"] for r in curves(folder)] == ["4", "8"] and (folder / "report.html").is_file()
    said = run("predict", "--ckpt_path", folder / "bundle", "--data.bad=7", "--output", "p")
    assert "34 samples predicted in p/predictions\n6 samples could not be read" in said
    ids = read_predictions(tmp_path / "p")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 34 and len(read_errors(tmp_path / "p")) == 6
    assert [p.name for p in (tmp_path / "p").glob("errors*")] == ["errors.parquet"]


# Evaluation and pictures


def test_the_test_s_numbers_stand_beside_the_validation_s(pets_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pets_run, run)
    before = json.loads((run / "metrics.json").read_text())
    done = ok(polyhead("test", "--output", run, "--ckpt_path", "best"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert {k: v for k, v in metrics.items() if k.startswith("val/")} == before
    tested = {k for k in metrics if k.startswith("test/")}
    # A test has intervals besides
    assert {k.replace("val/", "test/") for k in before} == {k for k in tested if not k.endswith((".low", ".high"))}
    assert f"test/accuracy                 {metrics['test/accuracy']:.4f}" in done.err
    assert "Confusion matrix (test)" in (run / "report.html").read_text()
    assert equal(bundle_weights(run), bundle_weights(pets_run))
    assert settings(run / "config.yaml") == settings(pets_run / "config.yaml")
    refused = polyhead("test", "--output", run, "--ckpt_path", "best")
    assert refused.status == 2 and "already holds results of test" in refused.err


def test_explanations_change_with_the_weights(pets_run: Path, pets: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "other"
    shutil.copytree(pets_run / "bundle", other)
    weights = bundle_weights(pets_run)
    noise = torch.Generator().manual_seed(0)
    matrices = {k: v for k, v in weights.items() if v.ndim > 1}
    changed = weights | {k: v + 0.3 * v.std() * torch.randn(v.shape, generator=noise) for k, v in matrices.items()}
    save_file(changed, other / "model.safetensors")
    maps: dict[str, dict[str, np.ndarray]] = {}
    for name, model in (("one", pets_run / "bundle"), ("same", pets_run / "bundle"), ("other", other)):
        folder = tmp_path / f"run_{name}"
        ok(polyhead("explain", "--ckpt_path", model, "--data.root", pets / "test", "--limit", 3, "--output", folder))
        assert len(list((folder / "explain").glob("*.png"))) == 3
        for file in sorted((folder / "explain").glob("*.npz")):
            with np.load(file) as arrays:
                assert arrays["image"].shape == (3, 64, 64) and arrays["map"].ndim == 2
                assert arrays["probabilities"].sum() == pytest.approx(1, abs=1e-5)
                maps.setdefault(name, {})[file.stem] = arrays["map"] / arrays["map"].mean()
    assert len(maps["one"]) == 3
    for stem, one in maps["one"].items():
        assert np.array_equal(one, maps["same"][stem])
        assert np.abs(one - maps["other"][stem]).max() > 1e-3


def test_a_diverged_training_is_said_and_leaves_no_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = (
        "--model.optimizer.init_args.lr",
        "1e30",
        "--trainer.gradient_clip_val",
        "0",
        "--model.ema_decay",
        "null",
    )
    short = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--model.scheduler", "null")
    done = polyhead("fit", "--config", "vision/shvit", "--output", folder, *options, *short)
    assert done.status == 2 and "the training diverged" in done.err and "Traceback" not in done.err, done.err
    assert not (folder / "bundle").exists() and not (folder / "metrics.json").exists()


def test_overwriting_a_training_forgets_what_the_old_one_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ok(polyhead("fit", "--config", TOY, "--output", folder, *SHORT))
    ok(polyhead("test", "--output", folder, "--ckpt_path", "best"))
    assert "test/loss" in json.loads((folder / "metrics.json").read_text())
    page = (folder / "report.html").read_text()
    assert "max_epochs: 1" in page, "the report of a test shows the settings of the training"
    ok(polyhead("fit", "--config", TOY, "--output", folder, *SHORT, "--overwrite"))
    assert all(k.startswith("val/") for k in json.loads((folder / "metrics.json").read_text()))
    assert not (folder / "config_test.yaml").exists()
