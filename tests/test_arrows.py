"""The rooms: who may import whom, how long a file may be, what help and lists may load, what is depended on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOMAINS = {"vision", "medical", "timeseries", "recsys"}
ROOMS = {"apps", "checkpoints", "polyhead", *DOMAINS}
# Room -> the rooms it may import beside itself
ARROWS = {
    "apps": {"checkpoints", "polyhead"},
    "checkpoints": {"polyhead"},
    "polyhead": set(),
    **dict.fromkeys(DOMAINS, {"polyhead"}),
}
RUNS_CODE = {"eval", "exec", "pickle.load", "pickle.loads", "joblib.load", "yaml.load", "yaml.unsafe_load"}
# Networks read without Lightning; these files of a domain may import it
LIGHTNING = {"tasks.py"}
LONGEST = 600


def files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, those inside functions and of dotted strings given to importlib too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def test_the_rooms_are_there() -> None:
    assert all((ROOT / room / "__init__.py").is_file() for room in ROOMS)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_follow_the_arrows(room: str) -> None:
    allowed = ARROWS[room] | {room}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(room)
        for name, line in imports(path)
        if (first := name.split(".")[0]) in ROOMS | {"tests", "benchmarks"} and first not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_only_tasks_know_lightning() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(*DOMAINS)
        if path.name not in LIGHTNING
        for name, line in imports(path)
        if name.split(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_public_names_of_the_frameworks() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(*ROOMS, "tests", "benchmarks")
        for name, line in imports(path)
        if name.split(".")[0] in ("jsonargparse", "pytorch_lightning", "lightning_fabric", "torchmetrics")
        and any(part.startswith("_") for part in name.split("."))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_too_long() -> None:
    long = {str(p.relative_to(ROOT)): n for p in files(*ROOMS, "tests", "benchmarks")
            if (n := len(p.read_text(encoding="utf-8").splitlines())) > LONGEST}  # fmt: skip
    assert not long


def test_nothing_runs_the_general_unpickler() -> None:
    wrong = []
    for path in files(*ROOMS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("torch.load",) and given.get("weights_only") != "True":
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called} without weights_only=True")
            if called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called} with allow_pickle")
            if called in RUNS_CODE:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}")
    assert not wrong, "\n".join(wrong)


def loaded(statement: str) -> set[str]:
    """The top-level modules in memory after a statement."""
    code = f"import sys\n{statement}\nprint('\\n' + ' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {
    "torch", "pytorch_lightning", "jsonargparse", "timm", "torchvision", "numpy", "pandas", "sklearn", "matplotlib",
}  # fmt: skip
LIGHT = [["--help"], ["--version"], ["models"], ["models", "--json"], ["doctor", "--help"]]


@pytest.mark.parametrize("arguments", LIGHT)
def test_help_and_lists_load_nothing_heavy(arguments: list[str]) -> None:
    found = loaded(f"from apps.main import main; assert main({arguments!r}) == 0")
    assert not found & HEAVY


def test_the_package_loads_torch_only_when_asked() -> None:
    assert not loaded("import polyhead; polyhead.load; polyhead.__version__") & HEAVY
    assert not loaded("import vision, medical, timeseries, recsys, checkpoints, apps") & HEAVY


def requirements() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(.*)", r) for r in project["dependencies"]]
    return {m[1]: m[2] for m in found if m}


def test_versions_that_must_not_be_older() -> None:
    wanted = requirements()
    # 2.6.2 and 2.6.3 were malicious uploads; 2.6.6 refuses foreign instantiators in checkpoints
    assert wanted["pytorch-lightning"] == ">=2.6.6"
    assert wanted["jsonargparse"] == ">=4.46,<5"
    assert wanted["torch"] == ">=2.11"
    assert "lightning" not in wanted
    # tests/oldest.py makes a constraints file of lower bounds: each needs one
    assert all(">=" in bound for bound in wanted.values())
