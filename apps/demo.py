"""`make demo`: the whole journey on the embedded sample, in a few minutes, and its result as a table."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

from apps.main import main as polyhead

FOLDER = Path("runs/demo")
WANTED = 0.95


def command(text: str) -> None:
    print(f"\n$ polyhead {text}", flush=True)
    status = polyhead(text.split())
    if status:
        sys.exit(f"demo: the command above failed with status {status}")


def write_images(folder: Path) -> None:
    """Forty digits as PNG files, and one file that is no image."""
    folder.mkdir(parents=True)
    digits = load_digits()
    for index in range(40):
        picture = Image.fromarray((digits.images[index] * 15.9).astype(np.uint8))
        picture.resize((64, 64)).save(folder / f"digit-{digits.target[index]}-{index:02d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")


def rows(folder: Path) -> dict[str, tuple[str, float]]:
    table = pq.read_table(folder / "predictions")
    return {r["id"]: (r["label"], r["score"]) for r in table.to_pylist()}


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    images = FOLDER / "images"
    write_images(images)
    command(f"fit --config vision/shvit_digits --output {FOLDER}/fit")
    command(f"test --ckpt_path best --output {FOLDER}/fit")
    command(f"predict --ckpt_path {FOLDER}/fit/bundle --data.root {images} --output {FOLDER}/predict")
    command(f"export --ckpt_path {FOLDER}/fit/bundle --format onnx --output {FOLDER}/export")
    command(f"predict --ckpt_path {FOLDER}/export/model.onnx --data.root {images} --output {FOLDER}/predict_onnx")

    accuracy = json.loads((FOLDER / "fit/metrics.json").read_text())["test/accuracy"]
    torch_rows, onnx_rows = rows(FOLDER / "predict"), rows(FOLDER / "predict_onnx")
    gap = max(abs(score - onnx_rows.get(name, ("", 9))[1]) for name, (_, score) in torch_rows.items())
    same = torch_rows.keys() == onnx_rows.keys() and gap < 1e-4
    same = same and all(label == onnx_rows[name][0] for name, (label, _) in torch_rows.items())
    errors = pq.read_table(FOLDER / "predict/errors.parquet").to_pylist()
    print(f"\n{'test accuracy on digits':<32} {accuracy:.4f}   (wanted: {WANTED})")
    print(f"{'rows predicted':<32} {len(torch_rows)}")
    print(f"{'samples that could not be read':<32} {len(errors)}   ({errors[0]['id']}: {errors[0]['reason']})")
    print(f"{'ONNX rows the same':<32} {same}   (largest difference {gap:.1e})")
    print(f"{'time':<32} {time.perf_counter() - started:.0f} s")
    print(f"{'report':<32} {FOLDER}/fit/report.html")
    if accuracy < WANTED or not same or len(errors) != 1:
        sys.exit("demo: the result is not as it should be")


if __name__ == "__main__":
    main()
