"""The recommender through the command: training, tables, exports, growing catalogues, explanations."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import polyhead as package
from polyhead import bundle
from polyhead.catalogue import Catalogue
from polyhead.predictions import read_predictions
from recsys.interactions import threads
from tests.command import polyhead

SHORT = ("--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--model.dim=16", "--model.topk=7")


def write(path: Path, keep: Any, extra: list[tuple[str, str, int]] = ()) -> Path:  # type: ignore[assignment]
    """Some of the embedded sample's events as a table with times, and others."""
    log = threads(0, 300, 40)
    rows = [(log.users[u], log.items[i], n) for n, (u, i) in enumerate(zip(log.user, log.item, strict=True))]
    rows = [row for row in rows if keep(row)] + list(extra)
    pq.write_table(pa.table(dict(zip(("user", "item", "time"), map(list, zip(*rows, strict=True)), strict=True))), path)
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "log.parquet", lambda row: row[1] != "item-039")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, log: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = polyhead("fit", "--config", "recsys/mqsa_ted", "--data.root", log, "--output", folder, *SHORT)
    assert done.status == 0, done.err
    return folder


def test_simple_methods_stand_beside_the_model(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("hr_10", "popularity.hr_10", "markov.ndcg_5", "itemknn.mrr"):
        assert 0 < metrics[f"val/{name}"] < 1


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_predictions(folder).to_pylist():
        found.setdefault(row["id"], []).append(row)
    return found


def test_every_user_gets_the_best_items_from_a_newer_log(run: Path, log: Path, tmp_path: Path) -> None:
    extra = [("newcomer", "item-001", 1), ("newcomer", "item-039", 2), ("stranger", "item-039", 3)]
    newer = write(tmp_path / "newer.parquet", lambda row: row[1] != "item-039", extra)
    done = polyhead("predict", "--ckpt_path", run / "bundle", "--data.root", newer, "--output", tmp_path / "out")
    assert done.status == 0 and "2 of" in done.err and "does not know" in done.err
    found = rows_of(tmp_path / "out")
    assert len(found) == 302 and all([r["part"] for r in rows] == list(range(7)) for rows in found.values())
    saved = bundle.read(run / "bundle")
    system: Any = bundle.build_model(saved.model)
    bundle.load_weights(system, saved)
    events = pq.read_table(newer).to_pylist()
    numbers = system.catalogue.numbers
    for user in ("user-0007", "newcomer"):
        history = [numbers[e["item"]] for e in events if e["user"] == user and e["item"] in numbers]
        with torch.no_grad():
            scores = system.eval().users(torch.tensor([history]))[0] @ system.network.item.T
        scores[history] = -torch.inf
        best = scores.topk(7)
        assert [r["item"] for r in found[user]] == [system.catalogue.ids[i] for i in best.indices]
        assert np.allclose([r["score"] for r in found[user]], best.values, atol=1e-5)
        assert not any(r["fallback"] for r in found[user])
    counts = np.bincount(bundle.build_data(saved.data | {"init_args": saved.data["init_args"] | {"root": str(log)}})
                         .train.items, minlength=39)  # type: ignore[attr-defined]  # fmt: skip
    popular = [system.catalogue.ids[i] for i in np.argsort(-counts, kind="stable")[:7]]
    assert [r["item"] for r in found["stranger"]] == popular and found["stranger"][0]["fallback"]


def test_seen_items_come_back_when_they_may(run: Path, log: Path, tmp_path: Path) -> None:
    common = ("predict", "--ckpt_path", run / "bundle", "--data.root", log)
    assert polyhead(*common, "--model.filter_seen=false", "--model.topk=40", "--output", tmp_path / "a").status == 0
    assert polyhead(*common, "--model.topk=40", "--output", tmp_path / "b").status == 0
    events = pq.read_table(log).to_pylist()
    all_, unseen = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    for user in ("user-0001", "user-0200"):
        own = {e["item"] for e in events if e["user"] == user}
        assert {r["item"] for r in all_[user]} == {f"item-{n:03d}" for n in range(39)}
        assert {r["item"] for r in unseen[user]} == {r["item"] for r in all_[user]} - own


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_an_exported_file_recommends_the_same(run: Path, log: Path, tmp_path: Path, format: str) -> None:
    done = polyhead("export", "--ckpt_path", run / "bundle", "--format", format, "--output", tmp_path)
    assert done.status == 0 and "any batch and size" in done.err, done.err
    path = tmp_path / ("model.onnx" if format == "onnx" else "model.pt")
    histories = [["item-001", "item-002"], [], ["item-005"] * 70, ["nothing"]]
    eager, exported = (package.load(str(p)).predict(histories) for p in (run / "bundle", path))
    assert len(eager) == 4 * 7 and [r["fallback"] for r in eager[::7]] == [False, True, False, True]
    for a, b in zip(eager, exported, strict=True):
        assert (a["id"], a["item"], a["part"]) == (b["id"], b["item"], b["part"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_new_items_join_behind_the_old_ones(run: Path, tmp_path: Path) -> None:
    grown = write(tmp_path / "grown.parquet", lambda row: row[1] > "item-004", [("u", "brand new", 1)])
    for number, config in enumerate(([], ["--config", "recsys/mqsa_ted", "--model.dim=16"])):
        folder = tmp_path / f"run{number}"
        still = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--model.optimizer.lr=0")
        start = ("--init_from", run / "bundle", "--data.root", grown)
        done = polyhead("fit", *config, *start, "--output", folder, *still)
        assert done.status == 0, done.err
        old, new = bundle.read(run / "bundle"), bundle.read(folder / "bundle")
        ids = [Catalogue.unpack(s.data["init_args"]["items"]).ids for s in (old, new)]
        assert ids[1] == [*ids[0], "brand new", "item-039"]
        assert torch.equal(new.state["network.item"][: len(ids[0])], old.state["network.item"])
        assert torch.equal(new.state["network.position"], old.state["network.position"])
        assert new.data["init_args"].get("extend") is None
        assert len(new.state["place"]) == 41 and new.state["starts"][-1] > 0


def test_an_increment_goes_on_without_the_model_it_grew_from(run: Path, tmp_path: Path) -> None:
    grown = write(tmp_path / "grown.parquet", lambda row: row[1] > "item-004", [("u", "brand new", 1)])
    start, folder = tmp_path / "start", tmp_path / "run"
    shutil.copytree(run / "bundle", start)
    once = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    done = polyhead("fit", "--init_from", start, "--data.root", grown, "--output", folder, *once)
    assert done.status == 0, done.err
    ids = Catalogue.unpack(bundle.read(folder / "bundle").data["init_args"]["items"]).ids
    shutil.rmtree(start)
    done = polyhead("fit", "--output", folder, "--resume", "--trainer.max_epochs=2")
    assert done.status == 0, done.err
    assert Catalogue.unpack(bundle.read(folder / "bundle").data["init_args"]["items"]).ids == ids


def test_a_training_goes_on_with_its_own_log_only(run: Path, log: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    other = pq.read_table(log)
    items = ["a new name" if item == "item-001" else item for item in other["item"].to_pylist()]
    place = other.column_names.index("item")
    pq.write_table(other.set_column(place, "item", pa.array(items)), tmp_path / "log.parquet")
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    words = ("fit", "--output", tmp_path / "run", "--resume", "--trainer.max_epochs=3")
    done = polyhead(*words, "--data.root", tmp_path / "log.parquet")
    assert done.status == 2 and "the data have changed" in done.err and "items" in done.err, done.err
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before


def test_an_explanation_tells_attention_and_neighbours(run: Path, log: Path, tmp_path: Path) -> None:
    done = polyhead("explain", "--ckpt_path", run / "bundle", "--data.root", log, "--output", tmp_path, "--limit=2")
    assert done.status == 0, done.err
    files = sorted((tmp_path / "explain").glob("*.npz"))
    assert len(files) == 2 == len(list((tmp_path / "explain").glob("*.png")))
    with np.load(files[0], allow_pickle=False) as file:
        arrays = dict(file)
    for name in ("attention_short", "attention_long"):
        assert arrays[name].shape == arrays["history"].shape and arrays[name].sum() == pytest.approx(1, abs=1e-5)
    assert arrays["items"].shape == (5,) and arrays["neighbours"].shape == (5, 3)
    counts = arrays["neighbour_counts"]
    assert (counts[:, 0] >= counts[:, 1]).all() and counts[:, 0].min() > 0
    # What came just before, in all histories but their last two events
    before: Counter[tuple[str, str]] = Counter()
    histories: dict[str, list[str]] = {}
    for row in sorted(pq.read_table(log).to_pylist(), key=lambda row: row["time"]):
        histories.setdefault(row["user"], []).append(row["item"])
    for items in histories.values():
        train = items[: -2 if len(items) > 2 else None]
        before.update(zip(train, train[1:], strict=False))
    for item, neighbours, own in zip(arrays["items"], arrays["neighbours"], counts, strict=True):
        assert [before[n, item] for n in neighbours if n] == own[own > 0].tolist()
        assert own[0] == max(count for (_, after), count in before.items() if after == item)


def test_vectors_give_the_scores(run: Path, log: Path, tmp_path: Path) -> None:
    done = polyhead("vectors", "--ckpt_path", run / "bundle", "--root", log, "--output", tmp_path / "v")
    assert done.status == 0, done.err
    items, users = (np.load(tmp_path / "v" / f"{n}.npy") for n in ("items", "users"))
    names = [pq.read_table(tmp_path / "v" / f"{n}.parquet").to_pydict() for n in ("items", "users")]
    assert (
        polyhead("predict", "--ckpt_path", run / "bundle", "--data.root", log, "--output", tmp_path / "p").status == 0
    )
    scores = users @ items.T
    for user, rows in list(rows_of(tmp_path / "p").items())[:5]:
        for row in rows:
            place = names[1]["user"].index(user), names[0]["item"].index(row["item"])
            assert scores[place] == pytest.approx(row["score"], abs=1e-4)
    again = polyhead("vectors", "--ckpt_path", run / "bundle", "--output", tmp_path / "v")
    assert again.status == 2 and "--overwrite" in again.err


def test_mistakes_are_one_line(run: Path, log: Path, tmp_path: Path) -> None:
    fit = ("fit", "--config", "recsys/mqsa_ted", "--output", tmp_path / "x")
    for words, message in [
        ((*fit, "--data.root", log, "--model.alpha=2"), "model.alpha is 2"),
        ((*fit, "--data.root", log, "--model.heads=5"), "model.heads 5"),
        ((*fit, "--data.root", log, "--data.item_column=thing"), "no column 'thing' (--data.item_column)"),
        ((*fit, "--data.root", log, "--data.max_len=1"), "data.max_len is 1"),
        ((*fit, "--data.root", tmp_path), "no log at"),
        (("vectors", "--ckpt_path", "shvit_s1_flowers", "--output", tmp_path / "y"), "no recommender"),
    ]:
        done = polyhead(*words)
        assert done.status == 2 and message in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "x").exists()


def test_a_published_checkpoint_becomes_a_bundle(shared: Path, tmp_path: Path) -> None:
    folder = shared / "fixtures/mqsa_ted"
    case = json.loads((folder / "fixture.json").read_text())["cases"][0]
    names = tmp_path / "names.txt"
    count = json.loads((folder / f"{case}.json").read_text())["num_item"]
    names.write_text("\n".join(f"film {n}" for n in range(count)))
    done = polyhead("convert", folder / f"{case}.weights.safetensors", "--output", tmp_path / "b", "--classes", names)
    assert done.status == 0, done.err
    rows = package.load(str(tmp_path / "b")).predict([["film 3", "film 5"], ["nothing"]])
    assert {r["item"] for r in rows} <= {f"film {n}" for n in range(count)} and rows[-1]["fallback"]
