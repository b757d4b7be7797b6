"""A domain's own command: a function, imported when it is called, with its arguments as options."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from apps.messages import Call, plain
from polyhead.errors import UserError


def run(command: str, dotted: str, arguments: list[str]) -> int:
    """Call the function `dotted` with what the command line says. Raises UserError."""
    module, _, name = dotted.rpartition(".")
    function: Any = getattr(importlib.import_module(module), name)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            names = lambda: inspect.signature(function).parameters  # noqa: E731
            raise plain(message, ex, Call(command, arguments, options=names))

    options: dict[str, Any] = {"as_positional": False, "allow_abbrev": False, "prog": f"polyhead {command}"}
    try:
        auto_cli(function, args=arguments, parser_class=Parser, **options)
    except UserError as error:
        # What reads the data says how fit calls an option
        own = "|".join(inspect.signature(function).parameters)
        texts = [re.sub(rf"--data\.({own})\b", r"--\1", text) for text in (error.message, *error.hints)]
        raise UserError(texts[0], texts[1:]) from error
    return 0
