"""`polyhead cross-validate`: every bag is tested once, by its patient, and a stopped run goes on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import Done, polyhead

PATIENTS, FOLDS = 12, 3


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bags a patient, of one to four instances; the positive ones lie apart."""
    rng = np.random.default_rng(0)
    rows = [(f"b{p}-{b}", f"p{p}", p % 2, p // 2 % FOLDS, b)
            for p in range(PATIENTS) for b in range(2) for _ in range(rng.integers(1, 5))]  # fmt: skip
    bag, patient, label, part, torn = zip(*rows, strict=True)
    features = {f"f{k}": rng.normal(size=len(rows)) + 3 * np.array(label) for k in range(4)}
    path = tmp_path_factory.mktemp("bags") / "bags.parquet"
    names = {"bag": bag, "patient": patient, "label": label, "part": part, "torn": [str(t) for t in torn]}
    pq.write_table(pa.table({**names, **features}), path)
    return path


def validate(table: Path, output: Path, *options: object) -> Done:
    return polyhead("cross-validate", "--config", "medical/acmil", "--data.root", table, "--output", output,
                    "--trainer.max_epochs", 2, "--trainer.logger", "false", *options)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Path:
    output = tmp_path_factory.mktemp("runs") / "cv"
    run = validate(table, output, "--folds", FOLDS, "--seeds", "0,1")
    assert run.status == 0, run.err
    assert "seed 1 fold 2: accuracy" in run.err and run.out.splitlines()[-2].startswith("mean")
    return output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_bag_is_tested_once_a_seed_and_no_patient_in_two_folds(done: Path) -> None:
    predictions = pq.read_table(done / "predictions.parquet").to_pylist()
    for seed in (0, 1):
        own = [r for r in predictions if r["seed"] == seed]
        assert len({r["id"] for r in own}) == len(own) == 2 * PATIENTS
        assert len({(r["group"], r["fold"]) for r in own}) == PATIENTS
        # Half of the patients of each fold are of each class
        assert {f: {r["truth"] for r in own if r["fold"] == f} for f in range(FOLDS)} == dict.fromkeys(
            range(FOLDS), {"0", "1"}
        )
    assert all(r["group"] == r["id"].split("-")[0].replace("b", "p") for r in predictions)


def test_the_tables_say_what_the_predictions_do(done: Path) -> None:
    predictions = pq.read_table(done / "predictions.parquet").to_pylist()
    folds, pooled = rows(done / "folds.csv"), rows(done / "pooled.csv")
    assert [(r["seed"], r["fold"]) for r in folds] == [(str(s), str(f)) for s in (0, 1) for f in range(FOLDS)]
    hits = {(s, f): [r["truth"] == r["label"] for r in predictions if (r["seed"], r["fold"]) == (s, f)]
            for s in (0, 1) for f in range(FOLDS)}  # fmt: skip
    for row in folds:
        own = hits[int(row["seed"]), int(row["fold"])]
        assert int(row["n"]) == len(own) and float(row["accuracy"]) == pytest.approx(np.mean(own), abs=1e-5)
    means = [np.mean(sum((hits[s, f] for f in range(FOLDS)), [])) for s in (0, 1)]
    assert [float(r["accuracy"]) for r in pooled[:2]] == pytest.approx(means, abs=1e-5)
    assert [r["seed"] for r in pooled] == ["0", "1", "mean", "sd"]
    assert float(pooled[2]["accuracy"]) == pytest.approx(np.mean(means), abs=1e-5)
    assert float(pooled[3]["accuracy"]) == pytest.approx(np.std(means, ddof=1), abs=1e-5)
    assert float(pooled[0]["auroc.low"]) <= float(pooled[0]["auroc"]) <= float(pooled[0]["auroc.high"])


def test_finished_folds_are_left_alone_and_other_settings_refused(done: Path, table: Path) -> None:
    kept = {p: p.stat().st_mtime_ns for p in done.glob("seed-*/fold-*/test.parquet")}
    (lost,) = done.glob("seed-0/fold-1/test.parquet")
    before = lost.read_bytes()
    lost.unlink()
    run = validate(table, done, "--folds", FOLDS, "--seeds", "0,1")
    assert run.status == 0 and "5 of 6 folds were done before" in run.err
    assert {p for p, when in kept.items() if p.stat().st_mtime_ns != when} == {lost}
    assert lost.read_bytes() == before
    other = validate(table, done, "--folds", FOLDS, "--model.d_inner", 32)
    assert other.status == 2 and "holds folds of other settings" in other.err
    started = validate(table, done, "--folds", FOLDS, "--init_from", done / "seed-0/fold-0/bundle")
    assert started.status == 2 and "holds folds of other settings" in started.err


def test_a_fold_that_was_begun_is_not_ended_with_other_settings(done: Path, table: Path, tmp_path: Path) -> None:
    begun = tmp_path / "cv"
    (begun / "seed-0/fold-0").mkdir(parents=True)
    (begun / "cross-validation.yaml").write_bytes((done / "cross-validation.yaml").read_bytes())
    run = validate(table, begun, "--folds", FOLDS, "--model.d_inner", 32)
    assert run.status == 2 and "holds folds of other settings" in run.err


def test_a_fold_without_a_readable_bag_is_named(table: Path, tmp_path: Path) -> None:
    bags = pq.read_table(table)
    broken = [float("nan") if part == 1 else 0.0 for part in bags["part"].to_pylist()]
    pq.write_table(bags.append_column("f4", pa.array(broken)), tmp_path / "bags.parquet")
    run = validate(tmp_path / "bags.parquet", tmp_path / "cv", "--data.fold_column", "part", "--data.on_error", "skip")
    assert run.status == 2 and "fold-1 has no test sample that can be read" in run.err
    assert not (tmp_path / "cv/seed-0/fold-1/test.parquet").exists()


def test_bags_that_cannot_be_read_are_counted_in_every_table(table: Path, tmp_path: Path) -> None:
    bags = pq.read_table(table)
    names = bags["bag"].to_pylist()
    broken = [float("nan") if name == names[0] else 0.0 for name in names]
    pq.write_table(bags.append_column("f4", pa.array(broken)), tmp_path / "bags.parquet")
    run = validate(tmp_path / "bags.parquet", tmp_path / "cv", "--folds", FOLDS, "--data.on_error", "skip")
    assert run.status == 0 and "1 samples could not be read and are not among them" in run.err, run.err
    folds = rows(tmp_path / "cv/folds.csv")
    assert sorted(int(r["left_out"]) for r in folds) == [0, 0, 1]
    pooled = rows(tmp_path / "cv/pooled.csv")
    assert pooled[0]["left_out"] == "1" and int(pooled[0]["n"]) == len(set(names)) - 1


def test_a_fold_is_what_fit_and_test_make_of_it(done: Path, table: Path, tmp_path: Path) -> None:
    fit = polyhead("fit", "--config", "medical/acmil", "--data.root", table, "--data.folds", FOLDS, "--data.fold", 2,
                   "--seed_everything", 1, "--trainer.max_epochs", 2, "--output", tmp_path / "one")  # fmt: skip
    test = polyhead("test", "--ckpt_path", "best", "--output", tmp_path / "one")
    assert fit.status == test.status == 0, fit.err + test.err
    for name in ("bundle/model.safetensors", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (done / "seed-1/fold-2" / name).read_bytes()


def test_a_column_names_the_folds(table: Path, tmp_path: Path) -> None:
    run = validate(table, tmp_path / "cv", "--data.fold_column", "part")
    assert run.status == 0, run.err
    of = dict(zip(*(pq.read_table(table)[c].to_pylist() for c in ("bag", "part")), strict=True))
    found = pq.read_table(tmp_path / "cv/predictions.parquet").to_pylist()
    assert {r["id"]: r["fold"] for r in found} == of


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "how many folds?"),
        (("--data.fold_column", "torn"), "patient p0 is in folds 0 and 1"),
        (("--data.fold_column", "part", "--folds", 5), "column 'part' names 3"),
        (("--folds", 100), "too few for so many folds"),
        (("--folds", 3, "--seeds", "0,x"), "--seeds 0,x"),
        (("--folds", 3, "--data.fold", 1), "no option --data.fold: every fold has its turn"),
        (("--folds", 3, "--overwrite"), "no option --overwrite: for a new start"),
        (("--folds", 3, "--model.nothing", 1), "nothing"),
        (("--folds", 3, "--monitor", "val/auroc"), "needs a validation part"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folds(
    table: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    run = validate(table, tmp_path / "cv", *options)
    assert run.status == 2 and says in run.err and "Traceback" not in run.err
    assert not list(tmp_path.glob("cv/seed-*"))


def test_data_without_folds_are_refused(tmp_path: Path) -> None:
    run = polyhead("cross-validate", "--config", "vision/shvit_digits", "--folds", 3, "--output", tmp_path / "cv")
    assert run.status == 2 and "needs data that have folds" in run.err and not (tmp_path / "cv").exists()
