"""The `polyhead` command: answers help at once and hands everything else to what it needs."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

import polyhead
from polyhead.errors import Terminated, UserError, causes, nearest, reason

# Threads that wait for each other without sleeping cost several times their work on a machine that does more
# than this; it must be said before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LIGHTNING = {
    "fit": "train on a data set; keeps the best weights as a bundle and a report",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "write a table with a row for every sample",
    "export": "write an ONNX, TorchScript or pt2 file, checked against the model",
    "explain": "draw what the model looks at",
}
OWN = {
    "models": ("apps.models:main", "list systems, variants and shipped models"),
    "doctor": ("apps.doctor:main", "check the installation and, with --data.root, a data set"),
    "convert": ("apps.convert:main", "turn a published checkpoint into a bundle"),
    "cross-validate": ("apps.cross_validate:main", "fit and test every fold of the data in turn, and pool the results"),
}
# A domain's own commands: name -> (dotted name, one line); imported when called
DOMAIN: dict[str, tuple[str, str]] = {
    "tile": ("medical.slides.tile", "cut slides into tiles on tissue and describe them by an encoder"),
    "pack": ("medical.packed.pack_command", "put feature files of bags into one memory-mapped folder"),
    "heatmap": ("medical.heatmap_command.heatmap", "draw a bag classifier's attention over a slide or photograph"),
    "vectors": ("recsys.vectors_command.vectors", "write a recommender's items and users as vectors for an index"),
    "simulate": ("timeseries.event_simulate.simulate", "draw new event sequences from a trained model"),
    "epileptor": ("timeseries.recording_commands.epileptor", "simulate recordings with seizures at known times"),
    "annotate": ("timeseries.recording_commands.annotate", "write predicted seizures as events, EDF+ and pictures"),
    "baseline": ("timeseries.recording_commands.baseline", "a classical model on the data of a trained one"),
}


def help_text() -> str:
    lines = ["usage: polyhead SUBCOMMAND [--config RECIPE] [options]", "", "subcommands:"]
    summaries = LIGHTNING | {k: v[1] for k, v in OWN.items()} | {k: v[1] for k, v in DOMAIN.items()}
    lines += [f"  {name:<14} {text}" for name, text in summaries.items()]
    lines += [
        "",
        "RECIPE is a shipped recipe (`polyhead models` lists them) or a file. Common options:",
        "  --data.root PATH   your data: a folder, a zip or a table; the embedded sample by default",
        "  --output DIR       the run folder; runs/<recipe>/<time> by default",
        "  --ckpt_path MODEL  a checkpoint, a bundle, a shipped model, or best/last of --output",
        "  --debug            show the traceback of an error",
        "  --version          print the version",
        "",
        "`polyhead SUBCOMMAND --help` lists all options; docs/ and README.md tell the story.",
    ]
    return "\n".join(lines)


def _load(target: str) -> Callable[[list[str]], int]:
    import importlib

    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _domain(command: str, arguments: list[str]) -> int:
    from apps.domain import run

    return run(command, DOMAIN[command][0], arguments)


def dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if arguments[0] == "--version":
        print(f"polyhead {polyhead.__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in LIGHTNING:
        from apps.cli import run

        return run(command, rest)
    if command in OWN:
        return _load(OWN[command][0])(rest)
    if command in DOMAIN:
        return _domain(command, rest)
    known = [*LIGHTNING, *OWN, *DOMAIN]
    near = nearest(command, known)
    hints = [f"did you mean {near[0]}?"] if near else [f"subcommands: {', '.join(known)}"]
    raise UserError(f"unknown subcommand {command!r}", hints)


OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def explain_os_error(error: BaseException) -> UserError | None:
    """A full disk or a folder without permission as a person's error; None for anything else.

    Looks through the causes and, for libraries that lose the number, at the text.
    """
    for seen in causes(error):
        code = getattr(seen, "errno", None)
        text = str(seen)
        where = getattr(seen, "filename2", None) or getattr(seen, "filename", None) or "the outputs"
        if code in OUT_OF_SPACE or "No space left on device" in text:
            return UserError(f"no space left on the disk to write {where}")
        if code in UNWRITABLE:
            return UserError(f"no permission to write {where}: {reason(seen)}")
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command. A person's mistake is one line, at most four hints, and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        return dispatch(arguments)
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        print(f"polyhead: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        for hint in interrupt.args:
            print(f"  {hint}", file=sys.stderr)
        return 143 if terminated else 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        found = error if isinstance(error, UserError) else explain_os_error(error)
        if found is None or debug:
            raise
        print(f"polyhead: {found.message}", file=sys.stderr)
        for hint in found.hints:
            print(f"  {hint}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
