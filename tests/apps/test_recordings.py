"""Recordings from end to end by the command: simulated, pre-trained, fine-tuned, predicted, annotated, converted."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import edfio
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.command import Done, polyhead
from timeseries.mvpformer import VARIANTS, MVPFormer

SHORT = ("--data.batch_size=8", "--data.steps=2", "--trainer.max_epochs=1")


def ok(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


def rows(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    return sorted(pq.read_table(folder / "predictions").to_pylist(), key=lambda r: (r["recording"], r["start"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four simulated patients with a seizure each."""
    path = tmp_path_factory.mktemp("recordings")
    ok(polyhead("epileptor", "--output", path / "data", "--recordings=4", "--channels=5", "--hours=0.015",
                "--seizures=60", "--seed=2"))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    ok(polyhead("fit", "--config", "timeseries/mvpformer_pretrain", "--data.root", folder / "data", *SHORT,
                "--data.segments=4", "--data.stride=2", "--output", folder / "pre"))  # fmt: skip
    done = ok(polyhead("fit", "--config", "timeseries/mvpformer", "--data.root", folder / "data", *SHORT,
                       "--init_from", folder / "pre/bundle", "--output", folder / "fit"))  # fmt: skip
    assert "started from" in done.err and "network.head" in done.err
    return folder / "fit"


def test_the_journey(folder: Path, trained: Path, tmp_path: Path) -> None:
    ok(polyhead("test", "--output", trained, "--ckpt_path", "best"))
    metrics = json.loads((trained / "metrics.json").read_text())
    wanted = {"test/sensitivity", "test/false_alarms_per_hour", "test/auprc", "test/threshold", "val/hours"}
    assert wanted <= set(metrics)
    report = (trained / "report.html").read_text()
    assert "Probability over time" in report
    out = tmp_path / "p"
    ok(polyhead("predict", "--ckpt_path", trained / "bundle", "--data.root", folder / "data", "--output", out))
    found = rows(out)
    assert len(found) == 4 * 24 and {len(r["relevance"]) for r in found} == {5}
    assert found[1]["start"] == 2.0 and found[1]["since"] == 8.0 and found[1]["stop"] == 10.0
    # A low threshold, so that there is something to write
    level = float(np.quantile([r["probability"] for r in found], 0.7))
    ok(polyhead("annotate", "--predictions", out, "--root", folder / "data", "--output", tmp_path / "a",
                f"--threshold={level}", "--smooth=1", "--shortest=2", "--pictures=1"))  # fmt: skip
    table = tmp_path / "a/sub-01_task-simulated_events.tsv"
    with table.open() as file:
        events = list(csv.DictReader(file, delimiter="\t"))
    edf = edfio.read_edf(tmp_path / "a/sub-01_task-simulated_annotated.edf")
    assert events and len(edf.annotations) == len(events) and edf.labels == tuple(f"A{i}" for i in range(1, 6))
    source = edfio.read_edf(folder / "data/sub-01_task-simulated_ieeg.edf")
    assert np.abs(edf.signals[2].data - source.signals[2].data).max() < 0.1
    for event, note in zip(events, edf.annotations, strict=True):
        assert float(event["onset"]) == pytest.approx(note.onset) and note.text.startswith("seizure")
    assert (tmp_path / "a/sub-01_task-simulated.png").stat().st_size > 10_000
    # Annotations alone, without the recordings
    ok(polyhead("annotate", "--predictions", out, "--output", tmp_path / "b", f"--threshold={level}", "--pictures=0"))
    assert not edfio.read_edf(tmp_path / "b/sub-01_task-simulated_annotated.edf").labels


@pytest.mark.parametrize("train", ["lora", "head"])
def test_fine_tuning_a_part(folder: Path, trained: Path, tmp_path: Path, train: str) -> None:
    run = tmp_path / train
    ok(polyhead("fit", "--config", "timeseries/mvpformer", "--data.root", folder / "data", *SHORT,
                f"--model.train={train}", "--init_from", trained / "bundle", "--output", run))  # fmt: skip
    before = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    after = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])} - {"threshold"}
    assert changed and all(k.startswith("network.head") for k in changed)
    assert any("lora_" in k for k in after) == (train == "lora")
    if train == "lora":
        assert any(bool(v.any()) for k, v in after.items() if "lora_B" in k)
        ok(polyhead("export", "--ckpt_path", run / "bundle", "--format=torchscript", "--output", tmp_path / "e"))
        for name in (run / "bundle", tmp_path / "e/model.pt"):
            ok(polyhead("predict", "--ckpt_path", name, "--data.root", folder / "data/sub-02_task-simulated_ieeg.edf",
                        "--output", tmp_path / name.name))  # fmt: skip
        a, b = rows(tmp_path / "bundle"), rows(tmp_path / "model.pt")
        assert [r["id"] for r in a] == [r["id"] for r in b]
        assert max(abs(x["probability"] - y["probability"]) for x, y in zip(a, b, strict=True)) < 1e-4


def test_the_baseline_and_python(folder: Path, trained: Path) -> None:
    done = ok(polyhead("baseline", "--ckpt_path", trained / "bundle", "--root", folder / "data"))
    assert "sensitivity" in done.err and "false_alarms_per_hour" in done.err
    import polyhead as door

    model = door.load(trained / "bundle")
    files = sorted((folder / "data").glob("*.edf"))[:2]
    found = model.predict([str(f) for f in files])
    assert len(found) == 48 and {r["recording"] for r in found} == {str(f) for f in files}
    array = model.predict(30 * np.random.default_rng(0).normal(size=(3, 256 * 12)))
    assert len(array) == 3 and len(array[0]["relevance"]) == 3 and not array[0]["padded"]


def test_a_published_checkpoint(tmp_path: Path, folder: Path) -> None:
    torch.manual_seed(0)
    network = MVPFormer(**VARIANTS["mvpformer_micro"], n_positions=30, n_channels=12)
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    state["module.mvpformer.h.0.ln_2.weight"] = torch.ones(16)
    torch.save(state, tmp_path / "official.pt")
    ok(polyhead("convert", tmp_path / "official.pt", "--output", tmp_path / "bundle"))
    common = ("predict", "--ckpt_path", tmp_path / "bundle", "--data.root", folder / "data", "--output")
    ok(polyhead(*common, tmp_path / "p"))
    found = rows(tmp_path / "p")
    assert len(found) == 4 and all(r["padded"] and "resampled up from 256 to 512" in r["notes"] for r in found)
    done = ok(polyhead(*common, tmp_path / "q", "--data.segments=5"))
    assert "trained on 25" in done.err + done.out


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    config = ("fit", "--config", "timeseries/mvpformer", "--data.root", folder / "data", "--output", tmp_path / "x")
    for options, text in (
        (("--data.labels={seizure: [petit mal]}",), "one class only"),
        (("--data.reference=mean",), "average"),
        (("--model.head=named",), "fixed set of channels"),
        (("--model.size=mvpformer_l",), "no MVPFormer is called"),
        (("--data.kinds=[meg]",), "no channel of the kinds"),
    ):
        done = polyhead(*config, *options)
        assert done.status == 2 and text in done.err and "Traceback" not in done.err, done.err
        assert not (tmp_path / "x").exists()
