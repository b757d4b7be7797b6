"""A run killed at any moment and resumed ends with the weights of an unbroken one, bit for bit."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest
import torch

from tests.command import polyhead

TOY = Path(__file__).parents[1] / "toy.yaml"
STEPS = 8  # an epoch: 64 samples in batches of 8


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = dict(checkpoint["state_dict"])
    # with a moving average the raw weights travel beside it
    state |= {f"raw.{k}": v for k, v in checkpoint.get("current_model_state", {}).items()}
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


OPTIONS = ("--model.ema_decay", "0.95")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = polyhead("fit", "--config", TOY, "--output", folder, *OPTIONS)
    assert done.status == 0, done.err
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("where", "step"),
    [("step", 5), ("step", STEPS + 7), ("step", STEPS), ("validation", 2 * STEPS), ("epoch_end", 2 * STEPS)],
)
def test_killed_and_resumed(unbroken: Path, tmp_path: Path, where: str, step: int, workers: int) -> None:
    folder = tmp_path / "run"
    kill = f'{{"class_path": "tests.toy.KillAt", "init_args": {{"where": "{where}", "step": {step}}}}}'
    common = ("--config", TOY, "--output", folder, "--data.num_workers", workers, *OPTIONS)
    killed = polyhead("fit", *common, f"--trainer.callbacks+={kill}")
    assert killed.status == -signal.SIGKILL, killed.err
    resumed = polyhead("fit", *common, "--resume")
    assert resumed.status == 0, resumed.err
    assert same(weights(folder), weights(unbroken))

    def rows(run: Path) -> list[dict[str, str]]:
        return list(csv.DictReader((run / "metrics.csv").open()))

    assert [r["epoch"] for r in rows(folder)] == ["0", "1", "2"]
    assert [r["val/loss"] for r in rows(folder)] == [r["val/loss"] for r in rows(unbroken)]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(unbroken: Path, tmp_path: Path) -> None:
    for seed, equal in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        done = polyhead("fit", "--config", TOY, "--output", folder, *OPTIONS, "--seed_everything", seed)
        assert done.status == 0, done.err
        assert same(weights(folder), weights(unbroken)) is equal


def test_resume_takes_the_run_s_own_settings(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill = '{"class_path": "tests.toy.KillAt", "init_args": {"where": "step", "step": 12}}'
    polyhead("fit", "--config", TOY, "--output", folder, "--trainer.max_epochs", 2, f"--trainer.callbacks+={kill}")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("step: 12", "step: -1"))
    resumed = polyhead("fit", "--output", folder, "--resume")
    assert resumed.status == 0, resumed.err
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("option", [("--resume",), ("--ckpt_path", "last")])
def test_nothing_to_resume_is_an_error(tmp_path: Path, option: tuple[str, ...]) -> None:
    done = polyhead("fit", "--config", TOY, "--output", tmp_path / "none", *option)
    assert done.status == 2
    assert done.err.startswith("polyhead: nothing to continue from")
    assert not (tmp_path / "none").exists()
