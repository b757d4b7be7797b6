"""Shipped recipes: NAME is DOMAIN/SYSTEM, a YAML file beside this one. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from polyhead.errors import UserError, nearest
from polyhead.files import read_yaml

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of all shipped recipes."""
    return sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.glob("*/*.yaml"))


def find(name: str) -> Path:
    """The file behind a path or a recipe's name. Raises UserError with near matches."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = FOLDER / f"{name}.yaml"
    if shipped.is_file() and name in names():
        return shipped
    known = names()
    short = {n.rsplit("/", 1)[1]: n for n in known}
    near = nearest(name, known) or [short[n] for n in nearest(name.rsplit("/", 1)[-1], short)]
    hint = f"did you mean {', '.join(near)}?" if near else f"`polyhead models` lists the {len(known)} shipped ones"
    raise UserError(f"no recipe or file {name!r} for --config", [hint])


def read(path: Path) -> dict[str, Any]:
    """The content of a recipe. Raises UserError with the line where it is no YAML mapping."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        what = {"NoneType": "nothing", "str": "text"}.get(type(content).__name__, f"a {type(content).__name__}")
        raise UserError(f"{path} is no recipe: it holds {what}, not keys such as model and data")
    return content


def line_of(path: Path, key: str) -> int | None:
    """The line of a dotted key such as `model.lr`, `init_args` left out; None where the file lacks it."""
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line = None
    for name in key.split("."):
        pairs: list[Any] = []
        while isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == name]
            inner = [v for k, v in node.value if k.value == "init_args"]
            if pairs or not inner:
                break
            node = inner[0]
        if not pairs:
            return None
        line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
    return line


def title(name: str | Path) -> str:
    """What a run of this recipe is called: the shipped name, or the file's stem."""
    path = Path(name)
    return shown(path) if path.is_relative_to(FOLDER) else path.stem


def shown(path: Path) -> str:
    """What a person calls this recipe: the shipped name, or the file."""
    return str(path.relative_to(FOLDER).with_suffix("")) if path.is_relative_to(FOLDER) else str(path)
