"""`polyhead convert`: a published checkpoint, from a file or a hub, as a bundle of ours."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from apps.models import variants
from checkpoints.converters import CONVERTERS
from checkpoints.converters.images import recipe as image_recipe
from polyhead.errors import UserError, nearest, reason
from polyhead.safe import read_checkpoint


def _from_timm(name: str) -> dict[str, Any]:
    """The weights of a timm model, downloaded by timm or taken from its cache."""
    import logging

    import timm

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if not timm.is_model(name):
        near = nearest(name, timm.list_models())
        raise UserError(f"timm has no model {name!r}", [f"did you mean {', '.join(near)}?"] if near else [])
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever the hub's client raises
        raise UserError(f"the weights of timm:{name} cannot be fetched: {reason(error)[:200]}") from error


def _class_names(path: str | None, count: int, pictures: bool) -> list[str]:
    """Names from a file with one a line; ImageNet's for 1000 classes of pictures; else the numbers."""
    if path is not None:
        try:
            names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the class names in {path}: {reason(error)}") from error
        if len(names) != count or len(set(names)) != count:
            raise UserError(f"{path} holds {len(set(names))} different names, the checkpoint has {count} classes")
        return names
    if count == 1000 and pictures:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        # Descriptions are not unique (two kinds of crane); the synset makes them so
        return [f"{info.index_to_label_name(i)} {info.index_to_description(i)}" for i in range(count)]
    return [str(i) for i in range(count)]


def _convert(state: dict[str, Any], system: str | None) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The first converter that knows the keys: its module, our state dict, what it found."""
    if system is not None and system not in CONVERTERS:
        raise UserError(f"no converter for {system!r}", [f"there are: {', '.join(CONVERTERS)}"])
    failures = []
    for family in [system] if system else CONVERTERS:
        module = importlib.import_module(CONVERTERS[family])
        try:
            return module, *module.to_polyhead(state)
        except UserError as error:
            failures.append(f"{family}: {error.message}")
    if system:
        raise UserError(failures[0])
    raise UserError("no system knows this checkpoint", [f[:200] for f in failures])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("polyhead convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="a published checkpoint: a torch or safetensors file")
    parser.add_argument("--from", dest="source", metavar="timm:NAME", help="fetch it from timm's hub instead")
    parser.add_argument("--output", required=True, help="the folder of the new bundle")
    parser.add_argument("--system", help=f"which system it is of ({', '.join(CONVERTERS)}); found out by default")
    parser.add_argument("--classes", help="a file with one class name a line")
    parser.add_argument("--image_size", type=int, help="side of the evaluation images; the published one by default")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) == (options.source is None):
        raise UserError("convert takes a checkpoint file, or --from timm:NAME")
    output = Path(options.output)
    if output.exists():
        raise UserError(f"{output} is there already: choose another --output")
    if options.source is not None and not options.source.startswith("timm:"):
        raise UserError(f"--from takes timm:NAME, not {options.source!r}")
    state = _from_timm(options.source.removeprefix("timm:")) if options.source else read_checkpoint(options.checkpoint)
    module, weights, config = _convert(state, options.system)

    from polyhead import bundle

    sizes = {row["name"]: row.get("image_size", 224) for row in variants()}
    size = options.image_size or sizes.get(config.get("name"), 224)
    make = getattr(module, "recipe", image_recipe)
    made = make(config, _class_names(options.classes, config["num_classes"], make is image_recipe), size)
    system = bundle.build_model(made["model"])
    # What a system keeps beside its network no published checkpoint has, and not all count their batches; of a
    # trunk or an encoder alone the rest is new, for a training to start from
    partial = bool(config.get("partial"))
    beside = {
        k: v for k, v in system.state_dict().items()
        if partial or not k.startswith("network.") or k.endswith("num_batches_tracked")
    }  # fmt: skip
    own = {f"network.{k}": v.float() if v.is_floating_point() else v for k, v in weights.items()}
    saved = bundle.Saved({**beside, **own},
                         made["model"], made["data"], Path(str(options.checkpoint or options.source)))  # fmt: skip
    bundle.load_weights(system, saved)
    source = Path(options.checkpoint).name if options.checkpoint else options.source
    text = f"# {output.name}\n\nConverted from the published checkpoint `{source}`; its licence and results hold.\n"
    if partial:
        text += "\nOnly a part of the network is in it, the rest is untrained: a start for `fit --init_from`.\n"
    bundle.save_bundle(output, system.state_dict(), made["model"], made["data"], text)
    count = sum(p.numel() for p in system.network.parameters())
    print(f"{output}: {config.get('name', options.system)}, {count:,} parameters, {config['num_classes']} classes")
    step = f"fit --init_from {output}" if partial else f"predict --ckpt_path {output}"
    print(f"next: polyhead {step} --data.root DIR")
    return 0
