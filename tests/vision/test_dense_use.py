"""Dense use: the maps of every stride into torchvision's feature pyramid, trained end to end."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork

from vision.backbones import create_backbone


@pytest.mark.parametrize("name", ["halonet_xs", "spectformer_hxs", "tic_xs"])
def test_features_feed_a_pyramid(name: str) -> None:
    backbone = create_backbone(name, num_classes=0)
    info = backbone.feature_info
    pyramid = FeaturePyramidNetwork([level["num_chs"] for level in info], 16)  # type: ignore[union-attr]
    x = torch.randn(2, 3, 96, 160)
    maps = backbone.forward_intermediates(x)  # type: ignore[operator]
    levels = pyramid(OrderedDict((str(level["reduction"]), m) for level, m in zip(info, maps, strict=True)))  # type: ignore[arg-type]
    assert list(levels)[-4:] == ["4", "8", "16", "32"]
    for stride, level in levels.items():
        assert level.shape == (2, 16, 96 // int(stride), 160 // int(stride))
    sum(level.square().mean() for level in levels.values()).backward()  # type: ignore[union-attr]
    reached = {n for n, p in backbone.named_parameters() if p.grad is not None}
    # all but what only the classification reads
    rest = {n for n, _ in backbone.named_parameters()} - reached
    assert all(n.startswith(("norm.", "norm4.", "post_network.", "head")) for n in rest)
