"""What a parser or a constructor complains about, as one line for a person."""

from __future__ import annotations

import re

import yaml

from apps import recipes
from polyhead.errors import UserError, nearest, reason


def _deepest(error: BaseException | None) -> BaseException | None:
    while error is not None and (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__
    return error


def class_paths() -> list[str]:
    """Every class that a shipped recipe names."""
    found: set[str] = set()
    for name in recipes.names():
        content = yaml.safe_load(recipes.find(name).read_text(encoding="utf-8"))
        found |= {content[k]["class_path"] for k in ("model", "data") if k in content}
    return sorted(found)


def plain(message: str, error: BaseException | None = None) -> UserError:
    """A one-line error with near matches for what was misspelt."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        seen = seen.__cause__ or seen.__context__
    text = message.strip() or reason(error or Exception(message))
    hints: list[str] = []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = " ".join(lines)
    found = re.search(r"(?:class_path|import path|Import path)[^\"']*[\"']([\w.]+)[\"']", line)
    wrong = re.search(r"(?:Option|Key|Group|argument|arguments)[: ]+['\"]?(--)?([\w.]+)['\"]?", line)
    if "unrecognized arguments" in line.lower() or "not accepted" in line:
        if wrong and "num_classes" in wrong.group(2):
            hints.append("the number of classes comes from the data")
    if found:
        near = nearest(found.group(1), class_paths())
        if near:
            hints.append(f"did you mean {', '.join(near)}?")
    return UserError(line[:400], hints)
