"""The command in a process of its own, forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["apps.cli", "polyhead.export", "polyhead.progress", "torch.utils.tensorboard", "tests.toy", "vision.tasks",
     "vision.images", "recsys.tasks", "recsys.interactions"]
)  # fmt: skip


@dataclass
class Done:
    """A finished command: exit status (negative: the signal that ended it) and what it printed."""

    status: int
    out: str
    err: str


def _child(arguments: list[str], folder: str, out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    sys.argv = ["polyhead", *arguments]
    # A shell's background jobs ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    from apps.main import main

    sys.exit(main(arguments))


def polyhead(*arguments: object, cwd: Path | None = None, timeout: float = 300) -> Done:
    """Run `polyhead ARGUMENTS` for real; raises when it takes longer than `timeout` seconds."""
    with tempfile.TemporaryDirectory() as work:
        out, err = f"{work}/out", f"{work}/err"
        words = [str(a) for a in arguments]
        process = _context.Process(target=_child, args=(words, str(cwd or Path.cwd()), out, err))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"polyhead {words} took more than {timeout} s")
        read = [Path(p).read_text() if Path(p).exists() else "" for p in (out, err)]
    return Done(process.exitcode or 0, *read)
