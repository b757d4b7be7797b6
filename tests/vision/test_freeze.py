"""What is frozen stays as it is, its batch statistics included."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.command import polyhead

SMALL = ("fit", "--config", "vision/shvit_digits", "--trainer.max_epochs", 2, "--trainer.limit_train_batches", 2,
         "--trainer.limit_val_batches", 1, "--data.batch_size", 8)  # fmt: skip


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_a_linear_probe_changes_the_classifier_alone(tmp_path: Path) -> None:
    start = polyhead(*SMALL, "--output", tmp_path / "start")
    assert start.status == 0, start.err
    probe = polyhead(
        *SMALL, "--model.freeze", "[backbone]", "--init_from", tmp_path / "start/bundle", "--output", tmp_path / "probe"
    )
    assert probe.status == 0, probe.err
    bundle = state_of_bundle(tmp_path / "start/bundle")
    changed = {k for k, v in state(tmp_path / "probe").items() if not torch.equal(v, bundle[k])}
    assert changed == {"network.head.l.weight", "network.head.l.bias"}


def state_of_bundle(folder: Path) -> dict[str, torch.Tensor]:
    from polyhead import bundle

    return bundle.read(folder).state


def test_what_was_frozen_is_trained_from_its_epoch_on(tmp_path: Path) -> None:
    weights = {}
    for epochs in (1, 2):
        folder = tmp_path / str(epochs)
        done = polyhead(
            *SMALL, "--model.freeze", "[patch_embed]", "--model.unfreeze_at", 1, "--output", folder,
            "--trainer.max_epochs", epochs,
        )  # fmt: skip
        assert done.status == 0, done.err
        weights[epochs] = state(folder)
    stem = [k for k in weights[1] if k.startswith("network.patch_embed") and "weight" in k]
    other = polyhead(*SMALL, "--trainer.max_epochs", 1, "--model.freeze", "[patch_embed]", "--output", tmp_path / "f")
    assert other.status == 0, other.err
    assert all(torch.equal(weights[1][k], state(tmp_path / "f")[k]) for k in stem)
    assert any(not torch.equal(weights[2][k], weights[1][k]) for k in stem)


def test_an_unknown_prefix_is_said(tmp_path: Path) -> None:
    done = polyhead(*SMALL, "--model.freeze", "[stemm]", "--output", tmp_path / "x")
    assert done.status == 2
    assert "the network has no parameters named stemm" in done.err
