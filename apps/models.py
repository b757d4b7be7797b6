"""`polyhead models`: systems, variants, parameter counts and shipped checkpoints, without importing torch."""

from __future__ import annotations

import importlib
import json
from fnmatch import fnmatch
from importlib import resources
from typing import Any

from apps import recipes
from apps.messages import Options
from polyhead.errors import UserError

# Tables of variants: domain -> dotted name of a function that gives name -> facts
TABLES = {"vision": "vision.variants:list_variants", "medical": "medical.variants:list_variants",
          "timeseries": "timeseries.variants:list_variants"}  # fmt: skip


def variants() -> list[dict[str, Any]]:
    """A row a variant: domain, name, family, parameters, image_size."""
    rows = []
    for domain, target in TABLES.items():
        module, _, name = target.partition(":")
        table = getattr(importlib.import_module(module), name)()
        rows += [{"domain": domain, "name": variant, **facts} for variant, facts in table.items()]
    return rows


def shipped() -> list[dict[str, Any]]:
    """A row a shipped bundle: name, system, data, results."""
    text = (resources.files("checkpoints") / "catalogue.json").read_text(encoding="utf-8")
    return [{"name": name, **entry} for name, entry in json.loads(text).items()]


def main(arguments: list[str]) -> int:
    parser = Options("polyhead models", description="Systems, variants, parameter counts and shipped checkpoints.")
    parser.add_argument("pattern", nargs="?", default="*", help="only names like this, such as 'shvit*'")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    options = parser.parse_args(arguments)
    wanted = [v for v in variants() if fnmatch(v["name"], options.pattern)]
    bundles = [b for b in shipped() if fnmatch(b["name"], options.pattern)]
    if not wanted and not bundles:
        raise UserError(f"no model is called {options.pattern!r}", ["`polyhead models` lists all"])
    if options.json:
        print(json.dumps({"variants": wanted, "shipped": bundles, "recipes": recipes.names()}, indent=2))
        return 0
    print(f"{'variant':<28} {'family':<14} {'parameters':>12}  native size")
    for row in wanted:
        print(f"{row['name']:<28} {row['family']:<14} {row['parameters']:>12,}  {row.get('image_size', '')}")
    print("\nshipped checkpoints (--ckpt_path NAME)")
    for row in bundles:
        results = ", ".join(f"{k} {v:.3f}" for k, v in row["results"].items())
        print(f"  {row['name']:<26} {row['system']}, {row['data']}: {results}")
    print("\nrecipes (--config NAME)")
    for name in recipes.names():
        print(f"  {name}")
    print("\nand any timm name as --model.backbone of an image classifier")
    return 0
