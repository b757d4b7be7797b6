"""Weights of one image size start a network of another, with a new head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyhead import bundle
from polyhead.errors import UserError
from vision.tasks import ImageClassifier


def classifier(backbone: str, classes: str, side: int) -> ImageClassifier:
    torch.manual_seed(side)
    return ImageClassifier({"classes": list(classes)}, backbone, image_size=side)


def saved(system: ImageClassifier) -> bundle.Saved:
    return bundle.Saved(system.state_dict(), {"class_path": "vision.ImageClassifier"}, {}, Path("old"))


@pytest.mark.parametrize("backbone", ["spectformer_hxs", "spectformer_t"])
def test_weights_are_resized_for_good_and_the_head_is_new(backbone: str) -> None:
    old, new = classifier(backbone, "abc", 128), classifier(backbone, "abcde", 192)
    # Smooth weights, as trained ones are: those of noise do not survive an interpolation
    for name, value in old.state_dict().items():
        if name.endswith("complex_weight"):
            rows, columns = (torch.linspace(0, 3, n) for n in value.shape[:2])
            value.mul_(0.01).add_((rows[:, None] + 2 * columns).sin()[:, :, None, None])
        elif name.endswith("pos_embed"):
            side = int(value.shape[1] ** 0.5)
            ramp = torch.linspace(0, 3, side)
            value.mul_(0.01).add_((ramp[:, None] - ramp).cos().view(1, -1, 1))
    fresh = bundle.init_weights(new, saved(old))
    assert fresh and all(name.startswith(tuple(new.head_prefixes())) for name in fresh)
    before, after = old.state_dict(), new.state_dict()
    resized = [k for k in after if k not in fresh and before[k].shape != after[k].shape]
    kinds = {k.rsplit(".", 1)[-1] for k in resized}
    assert kinds == ({"complex_weight"} if backbone.endswith("hxs") else {"complex_weight", "pos_embed"})
    same = [k for k in after if k not in fresh and k not in resized]
    assert all(torch.equal(before[k], after[k]) for k in same)
    back = classifier(backbone, "abc", 128)
    bundle.init_weights(back, saved(new))
    for name in resized:
        gap = (back.state_dict()[name] - before[name]).norm() / before[name].norm()
        assert gap < 0.05, (name, gap)


def test_what_has_other_layers_is_refused_in_one_line() -> None:
    vanilla = classifier("spectformer_t", "abc", 64)
    for other in ("halonet_xs", "spectformer_hxs"):
        with pytest.raises(UserError, match="does not fit this model"):
            bundle.init_weights(vanilla, saved(classifier(other, "abc", 64)))
