"""Weights of one image size start a network of another, with a new head."""

from __future__ import annotations

from pathlib import Path

import torch

from polyhead import bundle
from vision.tasks import ImageClassifier


def classifier(classes: str, side: int) -> ImageClassifier:
    return ImageClassifier({"classes": list(classes)}, "spectformer_hxs", backbone_options={"img_size": side})


def test_spectral_weights_are_resized_and_the_head_is_new() -> None:
    torch.manual_seed(0)
    old, new = classifier("abc", 128), classifier("abcde", 96)
    saved = bundle.Saved(old.state_dict(), {"class_path": "vision.ImageClassifier"}, {}, Path("old"))
    fresh = bundle.init_weights(new, saved)
    assert fresh and all(name.startswith(tuple(new.head_prefixes())) for name in fresh)
    before, after = old.state_dict(), new.state_dict()
    resized = [k for k in after if k not in fresh and before[k].shape != after[k].shape]
    assert resized
    same = [k for k in after if k not in fresh and k not in resized]
    assert all(torch.equal(before[k], after[k]) for k in same)
    back = classifier("abc", 128)
    bundle.init_weights(back, bundle.Saved(after, saved.model, {}, Path("new")))
    for name in resized:
        gap = (back.state_dict()[name] - before[name]).norm() / before[name].norm()
        assert gap < 1.0, name
