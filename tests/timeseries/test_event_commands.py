"""Event models through the command: from a table to predictions, pictures, simulated sequences and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import polyhead as package
from checkpoints.converters.sahp import to_published
from polyhead.errors import UserError
from polyhead.predictions import read_errors, read_predictions
from tests.command import Done, polyhead
from timeseries.event_data import EventData
from timeseries.event_pictures import ks_distance
from timeseries.event_tasks import EventModel
from timeseries.events import read
from timeseries.hawkes import simulate
from timeseries.sahp import SAHP

MU, ALPHA, BETA = [0.3, 0.1], [[0.3, 0.1], [0.6, 0.1]], 2.0


def ok(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


def refused(done: Done, text: str) -> None:
    assert done.status == 2 and "Traceback" not in done.err and text in done.err, done.err


def write_table(path: Path, count: int, seed: int, split: bool = True) -> Path:
    columns: dict[str, list[object]] = {"user": [], "time": [], "type": [], "window": [], "split": []}
    for i, (times, types) in enumerate(simulate(MU, ALPHA, BETA, 200.0, count, seed)):
        part = "train" if i < count * 0.6 else "val" if i < count * 0.8 else "test"
        for t, k in zip(times, types, strict=True):
            for name, value in zip(columns, (f"u{i}", t * 10, "ab"[k], 2000.0, part), strict=True):
                columns[name].append(value)
    if not split:
        del columns["split"]
    pa_csv.write_csv(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short fit on a table of two types whose first excites the second, times in tenths."""
    folder = tmp_path_factory.mktemp("events")
    write_table(folder / "table.csv", 40, 0)
    done = polyhead("fit", "--config", "timeseries/sahp", "--data.root", folder / "table.csv", "--data.time_unit=10",
                    "--output", folder / "run", "--trainer.max_epochs=2", "--model.d_model=16")  # fmt: skip
    assert "all events, up to the end of observation; 2 types" in ok(done).err
    return folder / "run"


def test_a_fit_begins_at_the_baseline_and_says_what_it_is(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val/nll"] < metrics["val/poisson_nll"]
    assert metrics["val/nll"] < metrics["val/hawkes_nll"] + 0.02
    assert metrics["val/nll"] == pytest.approx(metrics["val/nll_time"] + metrics["val/nll_type"], abs=1e-4)
    assert "rescaled waiting times" in (run / "report.html").read_text()


def test_test_reports_the_same_likelihood_as_the_python_door(run: Path) -> None:
    ok(polyhead("test", "--output", run, "--ckpt_path", "best"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 < metrics["test/ks"] < 0.2 and 0.8 < metrics["test/coverage"] < 1
    model = package.load(run / "bundle")
    system, data = model.system, model.data
    assert isinstance(system, EventModel) and isinstance(data, EventData)
    again = EventData(str(run.parent / "table.csv"), time_unit=10, types=system.types, time_scale=system.scale)
    total = count = 0.0
    samples = again.dataset("test")
    with torch.no_grad():
        for i in range(len(samples)):
            batch = again.collate([samples.load(i, 0)])
            events = int((batch["target"] >= 0).sum())
            total += float(system.score(batch)[1].nll) + events * np.log(system.scale)
            count += events
    assert total / count == pytest.approx(metrics["test/nll"], abs=1e-4)


def test_predictions_are_rows_with_intervals_in_the_reported_unit(run: Path, tmp_path: Path) -> None:
    rows = [{"time_since_start": [10.0, 20.0, 35.0], "type_event": ["a", "b", "a"], "seq_idx": 0},
            {"time_since_start": [10.0, 5.0], "type_event": ["a", "b"], "seq_idx": 1},
            {"time_since_start": [10.0], "type_event": ["c"], "seq_idx": 2},
            {"time_since_start": [7.0], "type_event": ["b"], "seq_idx": 3}]  # fmt: skip
    (tmp_path / "new.json").write_text(json.dumps(rows))
    words = ("--data.root", tmp_path / "new.json", "--output", tmp_path / "p")
    ok(polyhead("predict", "--ckpt_path", run / "bundle", *words, "--model.horizon=5", "--model.samples=40"))
    got = {r["id"]: r for r in read_predictions(tmp_path / "p").to_pylist()}
    assert set(got) == {"new-0", "new-3"}
    errors = {r["id"]: r["reason"] for r in read_errors(tmp_path / "p").to_pylist()}
    assert "go back" in errors["new-1"] and "'c'" in errors["new-2"]
    row = got["new-0"]
    assert row["wait_low"] < row["wait_median"] < row["wait_high"] and 0.1 < row["wait_mean"] < 10
    assert row["next_type"] in "ab" and sum(row["type_probabilities"]) == pytest.approx(1, abs=1e-5)
    assert row["count_low"] <= row["count_mean"] <= row["count_high"]
    assert sum(row["counts_by_type"]) == pytest.approx(row["count_mean"], rel=1e-5)
    door = package.load(run / "bundle").predict(
        [{"times": [10.0, 20.0, 35.0], "types": ["a", "b", "a"]}, ([7.0], ["b"])]
    )
    assert [d["wait_mean"] for d in door] == pytest.approx([row["wait_mean"], got["new-3"]["wait_mean"]], rel=1e-4)


def test_every_event_is_predicted_in_one_pass_as_if_it_were_the_last(run: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", 3, 9, split=False)
    words = ("predict", "--ckpt_path", run / "bundle", "--data.root", table, "--output", tmp_path / "p")
    refused(polyhead(*words, "--model.every_event=true", "--model.horizon=3"), "leave model.every_event out")
    ok(polyhead(*words, "--model.every_event=true"))
    rows = read_predictions(tmp_path / "p").to_pylist()
    assert len(rows) == pa_csv.read_csv(table).num_rows and len({(r["id"], r["part"]) for r in rows}) == len(rows)
    first = read(table).sequences[0]
    found = {r["part"]: r for r in rows if r["id"] == first.id}
    cut = [(first.times[:n], first.types[:n]) for n in (1, 5, len(first.times))]
    alone = package.load(run / "bundle").predict(cut)
    for n, row in zip((1, 5, len(first.times)), alone, strict=True):
        assert found[n - 1]["wait_mean"] == pytest.approx(row["wait_mean"], rel=1e-4)
        assert found[n - 1]["next_score"] == pytest.approx(row["next_score"], rel=1e-4)


def test_an_exported_file_predicts_the_same_rows(run: Path, tmp_path: Path) -> None:
    ok(polyhead("export", "--ckpt_path", run / "bundle", "--format", "torchscript", "--output", tmp_path / "e"))
    ok(polyhead("export", "--ckpt_path", run / "bundle", "--format", "onnx", "--output", tmp_path / "e"))
    table = write_table(tmp_path / "t.csv", 6, 9, split=False)
    tables = []
    for model in (run / "bundle", tmp_path / "e/model.onnx"):
        out = tmp_path / f"p{len(tables)}"
        ok(polyhead("predict", "--ckpt_path", model, "--data.root", table, "--output", out))
        tables.append({r["id"]: r for r in read_predictions(out).to_pylist()})
    assert tables[0].keys() == tables[1].keys() and len(tables[0]) == 6
    for name, row in tables[0].items():
        assert row["wait_mean"] == pytest.approx(tables[1][name]["wait_mean"], rel=1e-4)
        assert row["next_type"] == tables[1][name]["next_type"]


def test_simulated_sequences_are_data_that_the_model_is_calibrated_on(run: Path, tmp_path: Path) -> None:
    for kind in ("npz", "csv", "parquet"):
        out = tmp_path / f"sim.{kind}"
        ok(polyhead("simulate", "--ckpt_path", run / "bundle", "--output", out, "--window=200", "--sequences=30"))
        reading = read(out)
        assert len(reading.sequences) == 30 and all(s.problem is None and s.end == 200 for s in reading.sequences)
    model = package.load(run / "bundle")
    system = model.system
    assert isinstance(system, EventModel)
    data = EventData(
        str(tmp_path / "sim.npz"), types=["0", "1"], time_scale=system.scale, first_event="scored", window="full"
    )
    samples = data.dataset("predict")
    metrics = system.make_metrics()
    with torch.no_grad():
        for i in range(len(samples)):
            system.evaluate(data.collate([samples.load(i, 0)]), metrics)
    system.results["test"] = {k: m.compute() for k, m in metrics.items()}
    times = system._rescaled("test")
    assert times is not None and ks_distance(times) < 1.63 / len(times) ** 0.5
    assert metrics["coverage"].compute().item() == pytest.approx(0.9, abs=0.03)


def test_simulate_continues_histories_and_refuses_what_makes_no_sense(run: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", 3, 9, split=False)
    out = tmp_path / "more.parquet"
    words = ["simulate", "--ckpt_path", run / "bundle", "--window=20", "--sequences=4"]
    ok(polyhead(*words, "--output", out, "--history", table))
    rows = pq.read_table(out).to_pylist()
    old = [r for r in rows if not r["simulated"]]
    assert len({r["sequence"] for r in rows}) == 12 and len(old) == 4 * pa_csv.read_csv(table).num_rows
    refused(polyhead(*words, "--output", out), "is there already")
    refused(polyhead(*words, "--output", tmp_path / "x.txt"), "must end in")
    refused(polyhead(*words, "--output", tmp_path / "x.csv", "--first", "aa"), "no such type")
    refused(polyhead(*words[:-2], "--output", tmp_path / "x.csv", "--window=-1"), "above 0")


def test_explanations_are_pictures_and_arrays(run: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", 3, 9, split=False)
    ok(polyhead("explain", "--ckpt_path", run / "bundle", "--data.root", table, "--output", tmp_path, "--limit", 2,
                "--data.batch_size=2", "--data.max_positions=20"))  # fmt: skip
    pictures = sorted((tmp_path / "explain").glob("*.png"))
    assert len(pictures) == 2 and all(p.stat().st_size > 10_000 for p in pictures)
    with np.load(pictures[0].with_suffix(".npz")) as arrays:
        attention = arrays["attention"]
        assert np.allclose(attention.sum(1), 1, atol=1e-4) and not np.triu(attention, 1).any()
        assert len(arrays["event_times"]) == len(attention) - 1
        # The first type excites the second more than the second excites anything
        for key in ("influence_removal", "influence_kernels"):
            assert arrays[key].shape == (2, 2) and arrays[key][1, 0] == arrays[key].max()
        assert (arrays["intensity"] > 0).all()


def test_a_published_checkpoint_becomes_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SAHP(3, 16, 8, 4, score="exp_softmax")
    theirs = to_published(network.state_dict(), "sahp", 4)
    torch.save({**theirs, "position_emb.position": torch.zeros(50, 1)}, tmp_path / "sahp.pth")
    ok(polyhead("convert", tmp_path / "sahp.pth", "--output", tmp_path / "b"))
    rows = package.load(tmp_path / "b").predict([([1.0, 2.0], [0, 2])])
    states = network.eval()(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[3, 0, 2]]))
    rate = network.intensity(states, torch.zeros(1, 3, 1))[0, -1, 0]
    assert rows[0]["next_type"] in "012" and rate.sum().item() > 0
    peer = SAHP(3, 16, 2, 2, variant="easytpp", norm=True)
    save_file(to_published(peer.state_dict(), "easytpp", 2, True), tmp_path / "peer.safetensors")
    ok(polyhead("convert", tmp_path / "peer.safetensors", "--output", tmp_path / "c"))
    assert package.load(tmp_path / "c").predict([([1.0], [0])])[0]["wait_mean"] > 0


def test_the_published_alignment_is_for_training_the_published_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rates 0"):
        EventModel(alignment="official")
    with pytest.warns(UserWarning, match="no likelihood"):
        system = EventModel({"types": ["a", "b"]}, alignment="official", rates=0)
    data = EventData()
    data.facts()
    data.setup("fit")
    samples = data.samples("train")
    batch = data.collate([samples.load(i, 0) for i in range(3)])
    causal = EventModel({"types": ["a", "b"]}, rates=0)
    causal.load_state_dict(system.state_dict())
    assert system.losses(batch)["loss"].item() != causal.losses(batch)["loss"].item()
    # What is reported is the likelihood in either case
    assert system.score(batch)[1].nll.item() == causal.score(batch)[1].nll.item()


def test_doctor_tells_what_is_in_a_table(run: Path, tmp_path: Path) -> None:
    words = ("--config", "timeseries/sahp", "--data.root", run.parent / "table.csv")
    done = ok(polyhead("doctor", *words))
    assert "40" in done.out and "window" in done.out and "2: a, b" in done.out
    refused(polyhead("fit", *words, "--output", tmp_path / "x", "--data.time_column", "tme"), "no column 'tme'")
    assert not (tmp_path / "x").exists()
