"""Files that appear whole or not at all; the report; the errors that are lines."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from polyhead.callbacks import generator_state, merge_json, set_generator_state
from polyhead.errors import UserError, causes, nearest, reason
from polyhead.files import atomic_write, read_yaml, write_text
from polyhead.report import confusion_picture, curves, write_report
from tests.toy import Toy


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent == path.parent and temporary.suffix == ".txt"
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_file_has_the_person_s_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_what_the_system_says_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/x: .*/file is a file"):
        write_text(tmp_path / "file/x", "")
    with pytest.raises(UserError, match="cannot write .*: No space left on device"), atomic_write(tmp_path / "x"):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("a library's own words") from error
    with pytest.raises(RuntimeError, match="unrelated"), atomic_write(tmp_path / "x"):
        raise RuntimeError("unrelated")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_yaml_says_where_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, why in (("a: 1\nb: [", "x.yaml, line 2 is not YAML"), ("a: !!python/object:os.system {}", "not YAML")):
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            read_yaml(path)
    with pytest.raises(UserError, match="cannot read .*none.yaml: No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_numbers_of_one_stage_replace_only_their_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    merge_json(path, "val", {"loss": 1.0, "old": 2.0})
    merge_json(path, "test", {"loss": 3.0})
    merge_json(path, "val", {"loss": 0.5})
    assert json.loads(path.read_text()) == {"test/loss": 3.0, "val/loss": 0.5}


def test_generators_go_on_where_they_stopped() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.normal()), random.random(), float(np.random.rand())]

    np.random.normal()  # leaves half a pair behind
    state = generator_state()
    first = draw()
    draw()
    set_generator_state(torch.load(_saved(state), weights_only=True))
    assert draw() == first


def _saved(state: dict[str, object]) -> str:
    import tempfile

    path = tempfile.mkstemp()[1]
    torch.save(state, path)
    return path


def test_errors_are_short_lines() -> None:
    error = UserError("one\n  line", [str(i) for i in range(9)])
    assert error.message == "one line" and len(error.hints) == 4
    assert reason(ValueError("a\n b")) == "a b" and reason(KeyError()) == "KeyError"
    assert nearest("Shvit_S1", ["shvit_s1", "halonet", "SHVIT_s2"])[0] == "shvit_s1" and nearest("zzz", ["shvit"]) == []
    try:
        try:
            raise OSError("deep")
        except OSError as inner:
            raise ValueError("shallow") from inner
    except ValueError as outer:
        outer.__cause__.__cause__ = outer  # type: ignore[union-attr]
        assert [str(e) for e in causes(outer)] == ["shallow", "deep"]


def test_the_report_escapes_what_people_name(tmp_path: Path) -> None:
    system = Toy({"classes": ["a", "b", "c"]})
    system.results["val"] = {}
    (tmp_path / "metrics.json").write_text(json.dumps({"val/recall.<script>alert(1)</script>": 0.5, "test/loss": 1.25}))
    path = write_report(tmp_path, system, "val", "polyhead fit '<b>'", "model: <i>")
    text = path.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "<b>" not in text and "<i>" not in text
    assert "1.25" in text


def test_curves_have_a_panel_a_metric() -> None:
    from matplotlib import pyplot

    assert curves([]) is None
    names = ("epoch", "step", "train/loss", "val/loss", "val/accuracy", "lr")
    rows = [dict(zip(names, cells.split(","), strict=True)) for cells in ("0,8,2,1,,0.1", "1,16,1,0.5,0.9,0.1")]
    figure = curves(rows)
    assert figure is not None
    panels = {a.get_title(): {line.get_label(): list(line.get_ydata()) for line in a.lines} for a in figure.axes}
    assert panels == {"loss": {"train": [2, 1], "val": [1, 0.5]}, "accuracy": {"val": [0.9]}}
    pyplot.close(figure)


@pytest.mark.parametrize("classes", [2, 30])
def test_a_confusion_matrix_is_shaded_by_recall(classes: int) -> None:
    from matplotlib import pyplot

    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    matrix[0, 1], matrix[1, 1] = 3, 4
    figure = confusion_picture(matrix, [f"class {i}" for i in range(classes)])
    (axis,) = figure.axes
    shown = axis.images[0].get_array()
    assert shown[0, 1] == 1 and shown[1, 1] == 1 and shown[0, 0] == 0
    assert [t.get_text() for t in axis.get_yticklabels()][:2] == ["class 0", "class 1"]
    assert len(axis.texts) == (4 if classes == 2 else 0)
    pyplot.close(figure)
