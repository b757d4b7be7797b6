"""`python -m tests.check_wheel DIR`: the wheel in DIR holds what it must and answers in a fresh environment."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

MUST = ("apps/trainer.yaml", "apps/recipes/vision/shvit.yaml", "polyhead/report.html", "polyhead/py.typed",
        "checkpoints/catalogue.json")  # fmt: skip
MUST_NOT = ("tests/", "benchmarks/", "docs/")


def main(folder: str) -> int:
    (wheel,) = Path(folder).glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    missing = [m for m in MUST if m not in names]
    recipes = {str(p.relative_to(".")) for p in Path("apps/recipes").glob("*/*.yaml")}
    bundles = {str(p) for p in Path("checkpoints/bundles").glob("*/*") if shipped(p)}
    missing += sorted((recipes | bundles) - set(names))
    odd = [n for n in names if n.startswith(MUST_NOT)]
    if missing or odd:
        print(f"the wheel lacks {missing} and should not hold {odd}")
        return 1
    with tempfile.TemporaryDirectory() as work:
        # The dependencies are this environment's; ours come from the wheel alone
        venv.create(work, with_pip=True)
        python = Path(work) / "bin/python"
        site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
        subprocess.check_call([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel.resolve())])
        paths = [p for p in sys.path if p.endswith("site-packages")]
        Path(site.strip(), "dependencies.pth").write_text("\n".join(paths) + "\n")
        for call in (["--help"], ["models"], ["doctor"]):
            done = subprocess.run(
                [Path(work) / "bin/polyhead", *call], cwd=work, capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"polyhead {call[0]} from the wheel failed:\n{done.stdout}{done.stderr}")
                return 1
    print(f"{wheel.name}: {len(names)} files; --help, models and doctor answer")
    return 0


def shipped(path: Path) -> bool:
    """Whether a bundle's file belongs in the wheel: its licence may keep it to the repository."""
    return not (path.parent / "NOT_IN_WHEEL").exists()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
