"""The harness: what it counts, in which order it runs, and that the SHViT comparison runs from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import harness


def test_rounds_are_interleaved_after_the_warm_up() -> None:
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = harness.measure(contestants, rounds=4, warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" * 4
    assert {t.rounds for t in timings.values()} == {4}


def test_both_clocks_and_the_median() -> None:
    waits = iter([0.0, 0.02, 0.5, 0.02])

    def busy() -> None:
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass

    timings = harness.measure({"sleep": lambda: time.sleep(next(waits)), "busy": busy}, rounds=3, warmup=1)
    assert timings["sleep"].cpu < 0.01 and 0.02 <= timings["sleep"].wall < 0.3
    assert timings["busy"].cpu == pytest.approx(0.03, abs=0.02)


def test_a_time_limit_keeps_five_rounds() -> None:
    runs: list[int] = []
    timings = harness.measure({"a": lambda: runs.append(1)}, rounds=100, warmup=0, seconds=0.0)
    assert timings["a"].rounds == len(runs) == 5


def hungry(megabytes: int) -> Callable[[], object]:
    return lambda: b"x" * (megabytes << 20)


def test_peak_memory_is_that_of_the_passes() -> None:
    small, large = harness.peak_memory(hungry, 1), harness.peak_memory(hungry, 64)
    if small is None or large is None:
        pytest.skip("this kernel cannot reset a peak")
    assert small < 16 << 20
    assert 60 << 20 < large < 90 << 20


def test_report_files(tmp_path: Path) -> None:
    rows = [{"form": "a", "ms": 12.345, "off": 1e-7}, {"form": "b", "ms": 1234.5, "more": None}]
    text = harness.save(harness.Report("name", "the command", {"Table": rows}, ["a note"]), tmp_path)
    assert "| a | 12.3 | 1e-07 | - |" in text and "| b | 1234 | - | - |" in text
    assert (tmp_path / "name.md").read_text() == text
    content = json.loads((tmp_path / "name.json").read_text())
    assert content["tables"]["Table"][1]["ms"] == 1234.5
    assert content["machine"]["torch"] in text and "processor" in content["machine"]


@pytest.mark.slow
def test_shvit_quick(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "shvit", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "shvit.json").read_text())["tables"]["CPU"]
    assert {r["engine"] for r in rows} >= {"timm eager", "eager", "deployed", "ONNX Runtime", "TorchScript"}
    assert {r["batch"] for r in rows} == {1, 2}
    assert all(r["difference"] < 1e-4 and r["CPU ms"] > 0 for r in rows)
