"""A domain's own command: a function, imported when it is called, with its arguments as options."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from apps.messages import Call, plain


def run(command: str, dotted: str, arguments: list[str]) -> int:
    """Call the function `dotted` with what the command line says. Raises UserError."""
    module, _, name = dotted.rpartition(".")
    function: Any = getattr(importlib.import_module(module), name)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            names = lambda: inspect.signature(function).parameters  # noqa: E731
            raise plain(message, ex, Call(command, arguments, options=names))

    options: dict[str, Any] = {"as_positional": False, "allow_abbrev": False, "prog": f"polyhead {command}"}
    auto_cli(function, args=arguments, parser_class=Parser, **options)
    return 0
