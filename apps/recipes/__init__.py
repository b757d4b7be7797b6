"""Shipped recipes: NAME is DOMAIN/SYSTEM, a YAML file beside this one. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from polyhead.errors import UserError, nearest

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
    hint = f"did you mean {', '.join(near)}?" if near else f"shipped recipes: {', '.join(known)}"
    raise UserError(f"no recipe or file {name!r} for --config", [hint])


def title(name: str | Path) -> str:
    """What a run of this recipe is called: the shipped name, or the file's stem."""
    path = Path(name)
    return str(path.relative_to(FOLDER).with_suffix("")) if path.is_relative_to(FOLDER) else path.stem
