"""Prediction over what people really have: every kind of file, however it is named, killed and gone on with."""

from __future__ import annotations

import io
import signal
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pytorch_lightning import Callback, Trainer

import polyhead as door
from polyhead.callbacks import WritePredictions
from polyhead.predictions import read_errors, read_predictions
from tests.apps.conftest import picture
from tests.command import Done, polyhead

# EXIF orientation -> what a camera held that way has done to the upright picture
HELD = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
SAME = {
    **{f"turned/{k}.png": "turned/1.png" for k in HELD},
    "rgba.png": "on_white.png",
    "palette.png": "palette_as_rgb.png",
    "grey.png": "grey_as_rgb.png",
    "deep.png": "grey.png",
    "cmyk.tif": "cmyk_as_rgb.png",
    "wrong_suffix.jpg": "good.png",
    "no_suffix": "good.png",
    "twins/b/x.png": "twins/a/x.png",
}
BAD = {
    "bomb.png": "too many pixels",
    "corrupt.png": "damaged",
    "cut.jpg": "damaged",
    "empty.png": "the file is empty",
    "text.png": "not an image",
    "tool.exe": "not an image",
}


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A tiny file whose header promises a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo") / "zoo"
    for folder in ("turned", "twins/a", "twins/b"):
        (root / folder).mkdir(parents=True)
    upright = picture(1, 50, 34)
    upright.save(root / "turned/1.png")
    for orientation, held in HELD.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.transpose(held).save(root / f"turned/{orientation}.png", exif=exif)
    good = picture(2)
    good.save(root / "good.png")
    for name in ("wrong_suffix.jpg", "no_suffix"):
        (root / name).write_bytes((root / "good.png").read_bytes())
    clear = good.copy()
    clear.putalpha(Image.fromarray(np.linspace(0, 255, 40 * 32).reshape(32, 40).astype(np.uint8)))
    clear.save(root / "rgba.png")
    Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB").save(root / "on_white.png")
    palette = good.quantize(16)
    palette.save(root / "palette.png")
    palette.convert("RGB").save(root / "palette_as_rgb.png")
    grey = picture(3).convert("L")
    grey.save(root / "grey.png")
    grey.convert("RGB").save(root / "grey_as_rgb.png")
    Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 77).save(root / "deep.png")
    cmyk = picture(4).convert("CMYK")
    cmyk.save(root / "cmyk.tif")
    cmyk.convert("RGB").save(root / "cmyk_as_rgb.png")
    for twin in "ab":
        picture(5).save(root / f"twins/{twin}/x.png")
    jpeg = io.BytesIO()
    picture(6, 120, 90).save(jpeg, "JPEG")
    (root / "photo.jpg").write_bytes(jpeg.getvalue())
    (root / "cut.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    whole = bytearray((root / "good.png").read_bytes())
    whole[60:200] = bytes(140)
    (root / "corrupt.png").write_bytes(bytes(whole))
    (root / "bomb.png").write_bytes(png_of_claimed_size(20_000, 20_000))
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("this is no picture")
    (root / "tool.exe").write_bytes(b"MZ" + bytes(range(256)))
    return root


Row = dict[str, Any]


def rows(folder: Path) -> dict[str, Row]:
    listed = read_predictions(folder).to_pylist()
    assert len({r["id"] for r in listed}) == len(listed)
    return {r["id"]: r for r in listed}


def errors(folder: Path) -> dict[str, str]:
    return {r["id"]: r["reason"] for r in pq.read_table(folder / "errors.parquet").to_pylist()}


def close(one: Row, other: Row, tolerance: float = 1e-5) -> bool:
    gap = np.abs(np.array(one["probabilities"]) - np.array(other["probabilities"])).max()
    return one["label"] == other["label"] and abs(one["score"] - other["score"]) <= tolerance and gap <= tolerance


def predict(model: Path, data: Path, output: Path, *options: object) -> Done:
    return polyhead("predict", "--ckpt_path", model, "--data.root", data, "--output", output, *options)


@pytest.fixture(scope="module")
def named(zoo: Path) -> dict[str, Path]:
    """The same files as a folder, a zip, a list and a table."""
    home = zoo.parent
    names = sorted(p.relative_to(zoo).as_posix() for p in zoo.rglob("*") if p.is_file())
    with zipfile.ZipFile(home / "zoo.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(zoo / name, name)
    (zoo / "names.txt").write_text("\n".join(names) + "\n")
    (zoo / "table.csv").write_text("file,patient\n" + "\n".join(f"{n},p{i}" for i, n in enumerate(names)) + "\n")
    return {"folder": zoo, "zip": home / "zoo.zip", "list": zoo / "names.txt", "table": zoo / "table.csv"}


@pytest.fixture(scope="module")
def outputs(named: dict[str, Path], pets_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folder of a prediction by each way of naming."""
    home = tmp_path_factory.mktemp("outputs")
    for way, data in named.items():
        done = predict(pets_run / "bundle", data, home / way)
        assert done.status == 0, done.err
        count = len(rows(home / way))
        assert f"{count} samples predicted in {home / way / 'predictions'}" in done.err
        assert f"{len(BAD)} samples could not be read: {home / way / 'errors.parquet'} says why" in done.err
    return {way: home / way for way in named}


def test_every_file_is_a_row_or_an_error(zoo: Path, outputs: dict[str, Path]) -> None:
    files = {p.relative_to(zoo).as_posix() for p in zoo.rglob("*") if p.suffix not in (".txt", ".csv") and p.is_file()}
    got, failed = rows(outputs["folder"]), errors(outputs["folder"])
    assert got.keys() | failed.keys() == files and not got.keys() & failed.keys()
    assert failed.keys() == BAD.keys()
    for name, why in BAD.items():
        assert why in failed[name], (name, failed[name])


def test_pictures_are_read_right(outputs: dict[str, Path]) -> None:
    got = rows(outputs["folder"])
    for name, like in SAME.items():
        assert close(got[name], got[like]), (name, got[name], got[like])
    # and the model does tell pictures apart
    different = [got["good.png"], got["grey.png"], got["turned/1.png"], got["cmyk.tif"], got["photo.jpg"]]
    assert len({round(r["score"], 4) for r in different}) == len(different)


@pytest.mark.parametrize("way", ["zip", "list", "table"])
def test_the_same_rows_whichever_way_the_files_are_named(outputs: dict[str, Path], way: str) -> None:
    reference, got = rows(outputs["folder"]), rows(outputs[way])
    assert got.keys() == reference.keys()
    assert all(close(row, reference[name]) for name, row in got.items())
    assert errors(outputs[way]) == errors(outputs["folder"])


def test_rows_have_the_documented_columns(outputs: dict[str, Path]) -> None:
    schema = read_predictions(outputs["folder"]).schema
    assert {f.name: str(f.type) for f in schema} == {
        "id": "string",
        "part": "int32",
        "label": "string",
        "score": "float",
        "probabilities": "fixed_size_list<element: float>[2]",
    }
    row = rows(outputs["folder"])["good.png"]
    assert row["part"] == 0 and row["label"] in ("cat", "dog")
    assert row["score"] == max(row["probabilities"]) and abs(sum(row["probabilities"]) - 1) < 1e-6


def test_strict_makes_unreadable_samples_an_error(zoo: Path, pets_run: Path, tmp_path: Path) -> None:
    done = predict(pets_run / "bundle", zoo, tmp_path / "run", "--strict")
    assert done.status == 2
    where = tmp_path / "run/errors.parquet"
    assert done.err == f"polyhead: {len(BAD)} samples could not be read: {where} says why\n" or done.err.endswith(
        f"polyhead: {len(BAD)} samples could not be read: {where} says why\n"
    )
    assert errors(tmp_path / "run").keys() == BAD.keys() and rows(tmp_path / "run")
    clean = predict(pets_run / "bundle", zoo / "turned", tmp_path / "clean", "--strict")
    assert clean.status == 0, clean.err


@pytest.mark.parametrize("model", ["checkpoints/best.ckpt", "export/model.onnx"])
def test_every_form_of_the_model_gives_the_same_rows(
    zoo: Path, outputs: dict[str, Path], pets_run: Path, pets_export: Path, tmp_path: Path, model: str
) -> None:
    path = pets_run / model if model.startswith("checkpoints") else pets_export / "model.onnx"
    done = predict(path, zoo, tmp_path / "run")
    assert done.status == 0, done.err
    reference, got = rows(outputs["folder"]), rows(tmp_path / "run")
    assert got.keys() == reference.keys()
    assert all(close(row, reference[name], 1e-4) for name, row in got.items())
    assert errors(tmp_path / "run") == errors(outputs["folder"])


@pytest.fixture(scope="module")
def loaded(pets_run: Path) -> door.door.Model:  # type: ignore[name-defined]
    return door.load(str(pets_run / "bundle"))


def test_the_door_gives_the_command_s_rows(zoo: Path, outputs: dict[str, Path], loaded: Any) -> None:
    reference = rows(outputs["folder"])
    names = [*reference, *BAD]
    answers = loaded.predict([zoo / name for name in names], batch_size=7)
    assert [a["id"] for a in answers] == [str(zoo / name) for name in names]
    for name, answer in zip(names, answers, strict=True):
        if name in BAD:
            assert answer["error"] == errors(outputs["folder"])[name]
        else:
            assert close(answer, reference[name])
            assert set(answer) == {"id", "label", "score", "probabilities"}


def test_the_door_takes_what_programs_hold(zoo: Path, outputs: dict[str, Path], loaded: Any) -> None:
    reference = rows(outputs["folder"])
    image = Image.open(zoo / "rgba.png")
    turned = Image.open(zoo / "turned/6.png")
    array = np.asarray(Image.open(zoo / "photo.jpg"))
    grey = np.asarray(Image.open(zoo / "grey.png"))
    got = loaded.predict([image, turned, array, grey, (zoo / "good.png").read_bytes()])
    wanted = ["rgba.png", "turned/6.png", "photo.jpg", "grey.png", "good.png"]
    assert [a["id"] for a in got] == [f"input-{i}" for i in range(5)]
    assert all(close(a, reference[name]) for a, name in zip(got, wanted, strict=True))
    (alone,) = loaded.predict(str(zoo / "good.png"))
    assert close(alone, reference["good.png"])
    assert loaded.predict([]) == []


@pytest.mark.parametrize("suffix", [".onnx", ".pt"])
def test_the_door_takes_exported_files(zoo: Path, outputs: dict[str, Path], pets_export: Path, suffix: str) -> None:
    model = door.load(pets_export / f"model{suffix}")  # type: ignore[arg-type]
    reference = rows(outputs["folder"])
    names = ["good.png", "photo.jpg"]
    for answer, name in zip(model.predict([zoo / n for n in names]), names, strict=True):
        assert close(answer, reference[name], 1e-4)


def test_a_used_folder_is_refused_and_overwritten_on_demand(zoo: Path, pets_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert predict(pets_run / "bundle", zoo / "turned", folder).status == 0
    again = predict(pets_run / "bundle", zoo / "twins", folder)
    assert again.status == 2
    assert again.err == (
        f"polyhead: {folder} already holds results of predict (config_predict.yaml)\n"
        "  add --resume or --overwrite, or choose another --output\n"
    )
    assert rows(folder).keys() == {f"{k}.png" for k in range(1, 9)}
    (folder / "notes.txt").write_text("mine")
    assert predict(pets_run / "bundle", zoo / "twins", folder, "--overwrite").status == 0
    assert rows(folder).keys() == {"a/x.png", "b/x.png"}
    assert (folder / "notes.txt").read_text() == "mine"


def test_predictions_may_lie_beside_the_run_that_made_the_model(zoo: Path, pets_run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in pets_run.rglob("*") if p.is_file()}
    done = polyhead("predict", "--ckpt_path", "best", "--data.root", zoo / "twins", "--output", pets_run)
    assert done.status == 0, done.err
    assert len(rows(pets_run)) == 2
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_going_on_with_another_model_is_refused(zoo: Path, digits_run: Path, pets_run: Path, tmp_path: Path) -> None:
    assert predict(pets_run / "bundle", zoo / "turned", tmp_path / "run").status == 0
    done = predict(digits_run / "bundle", zoo, tmp_path / "run", "--resume")
    assert done.status == 2
    assert "have other columns than this run: probabilities" in done.err
    assert len(rows(tmp_path / "run")) == 8


class Kill(Callback):
    """Ends the process with SIGKILL before batch `batch` of a prediction whose parts hold few rows."""

    def __init__(self, batch: int, rows_per_part: int = 2) -> None:
        self.batch, self.rows_per_part = batch, rows_per_part

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        import os

        (writing,) = [c for c in trainer.callbacks if isinstance(c, WritePredictions)]  # type: ignore[attr-defined]
        writing.writer.rows_per_part = self.rows_per_part
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_gone_on_with_every_id_is_there_once(
    zoo: Path, outputs: dict[str, Path], pets_run: Path, tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "run"
    options: tuple[object, ...] = ("--data.batch_size=3", "--data.num_workers", workers)
    done = []
    for batch in (4, 2, 2):
        kill = f'{{"class_path": "tests.apps.test_predict.Kill", "init_args": {{"batch": {batch}}}}}'
        killed = predict(pets_run / "bundle", zoo, folder, *options, f"--trainer.callbacks+={kill}", "--resume")
        assert killed.status == -signal.SIGKILL, killed.err
        done.append(len(rows(folder)) + len(errors(folder)))
    assert 0 < done[0] < done[1] < done[2] < len(rows(outputs["folder"])) + len(BAD)
    last = predict(pets_run / "bundle", zoo, folder, *options, "--resume")
    assert last.status == 0, last.err
    assert f"({done[2]} were done before)" in last.err
    reference = rows(outputs["folder"])
    counts = Counter(r["id"] for r in read_predictions(folder).to_pylist())
    assert counts == Counter(dict.fromkeys(reference, 1))
    assert all(close(row, reference[name]) for name, row in rows(folder).items())
    failed = Counter(r["id"] for r in read_errors(folder).to_pylist())
    assert failed == Counter(dict.fromkeys(BAD, 1))
    once_more = predict(pets_run / "bundle", zoo, folder, *options, "--resume")
    assert once_more.status == 0, once_more.err
    assert len(rows(folder)) == len(reference)
