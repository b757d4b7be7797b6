"""`polyhead doctor`: versions, device, recipes; with --data.root also the data: counts, classes, bad files."""

from __future__ import annotations

import importlib.metadata
import platform

from apps import recipes
from polyhead.errors import UserError

PACKAGES = (
    "polyhead", "torch", "torchvision", "pytorch-lightning", "jsonargparse", "timm", "onnx", "onnxruntime", "pyarrow",
)  # fmt: skip


def _line(mark: str, name: str, text: str) -> None:
    print(f"{mark:<5} {name:<20} {text}")


def _versions() -> None:
    _line("ok", "python", platform.python_version())
    for package in PACKAGES:
        try:
            _line("ok", package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            _line("FAIL", package, "not installed")


def _device() -> None:
    import torch

    if torch.cuda.is_available():
        _line("ok", "device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    else:
        _line("ok", "device", f"CPU, {torch.get_num_threads()} threads")


def _recipes() -> int:
    """How many shipped recipes do not parse."""
    from apps.cli import read_recipe

    failed = 0
    for name in recipes.names():
        try:
            read_recipe(["--config", name])
            _line("ok", "recipe", name)
        except UserError as error:
            failed += 1
            _line("FAIL", "recipe", f"{name}: {error.message}")
    return failed


def _data(config: str, arguments: list[str]) -> int:
    """Show what a recipe's data module finds; how many problems there are, unreadable samples among them."""
    from apps.cli import read_recipe
    from polyhead.bundle import build_data

    for argument in arguments:
        if argument.startswith("--") and not argument.startswith("--data"):
            raise UserError(f"doctor takes --config and --data options, not {argument}")
    recipe = read_recipe(["--config", config, *arguments])["data"]
    data = build_data(recipe)
    summary = data.summary()
    _line("ok", "data", f"{data.root or 'embedded sample'}, read by {recipe['class_path']}")
    for name, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        _line("ok", name, str(value))
    failures = data.check()
    if summary.get("classes") != "none":
        try:
            data.setup("fit")
        except UserError as error:
            failures.append(("fit", error.message))
    for identity, why in failures[:20]:
        _line("FAIL", identity, why)
    if len(failures) > 20:
        _line("FAIL", "...", f"and {len(failures) - 20} more")
    _line("ok" if not failures else "FAIL", "problems", str(len(failures)))
    return len(failures)


def main(arguments: list[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print("usage: polyhead doctor [--data.root PATH] [--config RECIPE] [--data...]\n\n"
              "Checks versions, device and recipes. With --data.root it reads the data as the recipe would\n"
              "(vision/shvit by default) and prints counts, classes and files that cannot be read.")  # fmt: skip
        return 0
    config: str | None = None
    rest: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        if argument == "--config":
            config = next(iterator, "")
        elif argument.startswith("--config="):
            config = argument.partition("=")[2]
        else:
            rest.append(argument)
    if rest or config is not None:
        return 1 if _data(config or "vision/shvit", rest) else 0
    _versions()
    _device()
    return 1 if _recipes() else 0
