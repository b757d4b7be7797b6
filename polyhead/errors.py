"""Errors that are part of the interface: a person's mistake is one line, a bad sample is one reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence


class UserError(Exception):
    """A mistake a person can mend. The command prints `message` and at most four hints, and exits with 2.

    Args:
        message: one line that names the thing, where it is and what to do.
        hints: further lines, such as near matches.
    """

    def __init__(self, message: str, hints: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hints = list(hints)[:4]


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it: an interrupt with the status 143."""


class BadSample(Exception):
    """One sample cannot be read; `str(error)` is the reason in one line."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, then what it came from, and so on to the first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def nearest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The options most like `name`, best first, for a hint."""
    options = list(options)
    lower = {o.lower(): o for o in options}
    found = difflib.get_close_matches(name.lower(), list(lower), n=n, cutoff=0.5)
    return [lower[f] for f in found]


def reason(error: BaseException) -> str:
    """An exception as one line: its text, or its type where it has none."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
