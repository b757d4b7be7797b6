"""Small runs and pictures that the tests of the command share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import polyhead

TOY = Path(__file__).parents[1] / "toy.yaml"
# The shipped recipe at its shortest: one batch for training, one for validation
ONE_BATCH = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """A smooth picture of a seed's own."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_pets(root: Path, counts: tuple[tuple[str, int], ...] = (("train", 8), ("val", 4), ("test", 4))) -> Path:
    """`SPLIT/CLASS/FILE`: bright cats and dark dogs."""
    for part, (split, count) in enumerate(counts):
        for c, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                tone = np.asarray(picture(1000 * part + 100 * c + k)) // 2 + 120 * (1 - c)
                Image.fromarray(tone.astype(np.uint8)).save(folder / f"{k}.png")
    return root


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit of the toy."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    done = polyhead("fit", "--config", TOY, "--output", folder, "--trainer.max_epochs=1")
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of the shipped digits recipe, two epochs of six batches."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    short = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=6", "--trainer.limit_val_batches=1")
    done = polyhead("fit", "--config", "vision/shvit_digits", "--output", folder, *short)
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pets(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture(scope="session")
def pets_run(tmp_path_factory: pytest.TempPathFactory, pets: Path) -> Path:
    """A fit of the digits recipe's network on pets, long enough to tell them apart."""
    folder = tmp_path_factory.mktemp("pets") / "pets"
    options = ("--data.root", pets, "--data.batch_size=4", "--trainer.max_epochs=12", "--model.optimizer.lr=0.005",
               "--monitor=val/loss", "--mode=min")  # fmt: skip
    done = polyhead("fit", "--config", "vision/shvit_digits", "--output", folder, *options)
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="session")
def pets_export(tmp_path_factory: pytest.TempPathFactory, pets_run: Path) -> Path:
    """The pets model as ONNX and as TorchScript."""
    folder = tmp_path_factory.mktemp("export") / "export"
    for kind in ("onnx", "torchscript"):
        done = polyhead("export", "--ckpt_path", pets_run / "bundle", "--format", kind, "--output", folder)
        assert done.status == 0, done.err
    return folder
