"""Every command of README.md runs as it stands, in order, in an empty folder with some photographs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.command import polyhead

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line.split()[1:] for line in lines if line.startswith("polyhead ")]


def test_the_journey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, picture in zip("ab", load_digits().images, strict=False):
        Image.fromarray((picture * 15.9).astype(np.uint8)).resize((80, 60)).save(photos / f"{name}.png")
    assert len(commands()) >= 6
    for words in commands():
        done = polyhead(*words, cwd=tmp_path)
        assert done.status == 0, f"{words}: {done.err}"
    assert (tmp_path / "runs/digits/report.html").stat().st_size > 20_000
    assert {p.suffix for p in (tmp_path / "runs/photos/explain").iterdir()} == {".png", ".npz"}

    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(code, scope)
    rows = scope["rows"]
    assert isinstance(rows, list)
    assert [row["label"] for row in rows] == ["0", "1"]


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_linked_pages_exist() -> None:
    for page in re.findall(r"\]\((docs/[\w.]+)\)", README):
        assert (Path(__file__).parents[1] / page).is_file(), page
