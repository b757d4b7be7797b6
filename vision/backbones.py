"""One function resolves a backbone's name: ours, timm's, or a pretrained encoder that installs as a package.

Nothing here imports torch until a network is built, so that facts can be listed at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from polyhead import encoders
from polyhead.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# family -> module and function(name, num_classes=, in_chans=, **options)
FAMILIES: dict[str, tuple[str, str]] = {
    "shvit": ("vision.shvit", "shvit"),
    "halonet": ("vision.halonet", "halonet"),
    "spectformer": ("vision.spectformer", "spectformer"),
    "tic": ("vision.tic", "tic"),
}

# Families with weights for every place of the map
SIZED = ("spectformer",)

# name -> family, parameters at 1000 classes and 3 channels, image side of the published training
BACKBONES: dict[str, tuple[str, int, int]] = {
    "shvit_s1": ("shvit", 6_330_808, 224),
    "shvit_s2": ("shvit", 11_483_072, 224),
    "shvit_s3": ("shvit", 14_245_273, 224),
    "shvit_s4": ("shvit", 16_588_484, 256),
    "halonet_h0": ("halonet", 5_502_248, 256),
    "halonet_h1": ("halonet", 8_100_056, 256),
    "halonet_h1_paper": ("halonet", 8_101_352, 256),
    "halonet_h2": ("halonet", 9_405_608, 256),
    "halonet_h3": ("halonet", 11_842_792, 320),
    "halonet_h4": ("halonet", 19_103_464, 384),
    "halonet_h5": ("halonet", 30_718_952, 448),
    "halonet_h6": ("halonet", 43_458_280, 512),
    "halonet_h7": ("halonet", 67_434_728, 600),
    "halonet26t": ("halonet", 12_480_288, 256),
    "sehalonet33ts": ("halonet", 13_691_712, 256),
    "halonet50ts": ("halonet", 22_733_280, 256),
    "eca_halonext26ts": ("halonet", 10_756_885, 256),
    "haloregnetz_b": ("halonet", 11_680_072, 224),
    "halonet_xs": ("halonet", 974_020, 128),
    "halonet_small": ("halonet", 1_295_780, 128),
    "spectformer_t": ("spectformer", 9_158_376, 224),
    "spectformer_xs": ("spectformer", 20_028_520, 224),
    "spectformer_s": ("spectformer", 32_449_768, 224),
    "spectformer_b": ("spectformer", 57_159_656, 224),
    "spectformer_h_s": ("spectformer", 21_777_928, 224),
    "spectformer_h_b": ("spectformer", 32_539_880, 224),
    "spectformer_h_l": ("spectformer", 54_162_792, 224),
    "spectformer_hxs": ("spectformer", 2_621_496, 128),
    "tic_xs": ("tic", 1_118_812, 128),
    "tic_mini": ("tic", 1_899_608, 224),
    "tic_small": ("tic", 13_623_432, 224),
}

# ours expect ImageNet's mean and deviation, but for a network of timm's whose weights were trained otherwise
NORMALISATION: dict[str, encoders.Normalisation] = {"haloregnetz_b": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def create_backbone(
    name: str, num_classes: int, in_chans: int = 3, pretrained: bool = False, image_size: int | None = None,
    **options: Any,
) -> nn.Module:  # fmt: skip
    """A network with timm's interface, [B, in_chans, H, W] -> [B, num_classes], or pooled features for 0.

    Args:
        name: one of `BACKBONES`, else a timm name, else `encoder:efficientnet_lite0` (which always comes with
            its weights). `timm:NAME` is timm's where both have the name.
        pretrained: start from published weights, for timm's networks.
        image_size: side of the images in pixels, for networks of ours whose weights depend on it.
        options: further arguments of the network.

    Raises:
        UserError: no such name, an option that does not fit, weights that are not to be had.
    """
    if name in BACKBONES:
        if pretrained:
            raise UserError(
                f"{name} has no weights of its own to start from",
                hints=[
                    f"timm's own: the backbone timm:{name}, where timm has the name",
                    "a published file: `polyhead convert` it and give the bundle as --init_from",
                ],
            )
        module, function = FAMILIES[BACKBONES[name][0]]
        if image_size is not None and BACKBONES[name][0] in SIZED:
            options = {"img_size": image_size} | options
        build = getattr(importlib.import_module(module), function)
        try:
            return build(name, num_classes=num_classes, in_chans=in_chans, **options)
        except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
            raise UserError(f"an option of {name} does not fit: {error}") from error
    plain = name.removeprefix("timm:")
    encoders.check_name(plain, BACKBONES)
    offline = plain in encoders.NORMALISATION
    return encoders.create_encoder(plain, num_classes, in_chans, pretrained or offline, **options)


def normalisation(name: str) -> encoders.Normalisation:
    """The mean and standard deviation, of RGB scaled to 0..1, that a backbone expects.

    Raises:
        UserError: no such name.
    """
    if name in BACKBONES:
        return NORMALISATION.get(name, encoders.IMAGENET)
    plain = name.removeprefix("timm:")
    encoders.check_name(plain, BACKBONES)
    return encoders.normalisation(plain)


def list_backbones() -> dict[str, dict[str, Any]]:
    """Our variants and the offline encoder: name -> family, parameters, image_size."""
    rows = {**BACKBONES, "encoder:efficientnet_lite0": ("timm", 4_652_008, 224)}
    return {n: dict(zip(("family", "parameters", "image_size"), row, strict=True)) for n, row in rows.items()}
