"""Published ACMIL checkpoints: read although a project's class lies in them, and turned into a bundle."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints.converters.acmil import to_polyhead
from medical.acmil import ACMIL
from polyhead import load
from polyhead.errors import UserError
from polyhead.safe import read_checkpoint
from tests.command import polyhead


def published(arch: Any) -> ACMIL:
    torch.manual_seed(0)
    return ACMIL(12, 16, 3, 4, arch, 10, 0.6, 24 if arch == "ga" else 128)


def save_as_published(network: ACMIL, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training script's dictionary, with its settings as an instance of its own class."""
    module = types.ModuleType("utils.utils")
    struct = type("Struct", (), {"__module__": "utils.utils"})
    module.Struct = struct  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "utils", types.ModuleType("utils"))
        patched.setitem(sys.modules, "utils.utils", module)
        config = struct()
        config.__dict__.update(lr=1e-4, n_token=5, arch="ga")
        torch.save({"model": network.state_dict(), "optimizer": {}, "epoch": 7, "config": config}, path)


@pytest.mark.parametrize("arch", ["ga", "mha"])
def test_a_published_checkpoint_becomes_a_bundle_with_the_same_outputs(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = published(arch).eval()
    save_as_published(network, tmp_path / "checkpoint-best.pth", monkeypatch)
    assert read_checkpoint(tmp_path / "checkpoint-best.pth")["config"].lr == 1e-4
    done = polyhead("convert", tmp_path / "checkpoint-best.pth", "--output", tmp_path / "bundle")
    assert done.status == 0, done.err
    bag = np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32)
    row = load(tmp_path / "bundle").predict([bag])[0]
    with torch.no_grad():
        wanted = network(torch.from_numpy(bag)).slide_logits.softmax(-1)[0].numpy()
    assert np.allclose(row["probabilities"], wanted, atol=1e-6)


def test_what_is_no_acmil_is_refused() -> None:
    state = published("ga").state_dict()
    with pytest.raises(UserError, match="it has the key 'extra.weight'"):
        to_polyhead({**state, "extra.weight": torch.zeros(1)})
    del state["Slide_classifier.fc.weight"]
    with pytest.raises(UserError, match="not a whole ACMIL checkpoint"):
        to_polyhead(state)
