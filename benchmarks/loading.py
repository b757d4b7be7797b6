"""Whether reading and augmenting photographs holds up a training: SHViT S1 at 128 px on JPEG files, 2 workers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Report
from vision.images import ImageData
from vision.tasks import ImageClassifier

WORKERS = 2


def write_photographs(folder: Path, count: int) -> None:
    """Smooth noise as JPEG files of 128 x 170 in two classes: as large as small photographs, and as hard to decode."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = rng.integers(0, 256, (16, 22, 3), dtype=np.uint8)
        path = folder / ("train" if index % 4 else "val") / "ab"[index // 4 % 2] / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((170, 128), Image.Resampling.BICUBIC).save(path, quality=87)


def endless(data: ImageData) -> Iterator[dict[str, Any]]:
    loader = data.loader(data.samples("train"), "train")
    epoch = 0
    while True:
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from loader
        epoch += 1


def run(command: str, threads: int, quick: bool, only: str) -> Report:
    count, batch, block, rounds = (128, 16, 2, 2) if quick else (1024, 64, 8, 7)
    with tempfile.TemporaryDirectory() as work:
        write_photographs(Path(work), count)
        options: dict[str, Any] = {"image_size": 128, "scale": (0.3, 1.0), "policy": "trivial"}
        data = ImageData(work, batch_size=batch, num_workers=WORKERS, **options)
        data.setup("fit")
        model = ImageClassifier(data.facts(), "shvit_s1", image_size=128, cutmix_alpha=1.0, mixup_alpha=0.2)
        optimizer = torch.optim.AdamW(model.parameters())
        batches = endless(data)
        resident = next(batches)

        def step(sample: dict[str, Any]) -> None:
            loss = model.losses(sample)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        seconds: dict[str, list[float]] = {"batch in memory": [], "batches from files": []}
        for _ in range(rounds + 1):
            for name, times in seconds.items():
                began = time.perf_counter()
                for _ in range(block):
                    step(resident if name == "batch in memory" else next(batches))
                times.append((time.perf_counter() - began) / block)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratio = medians["batch in memory"] / medians["batches from files"]
    alone = medians["batch in memory"]
    rows = [{"training": n, "steps a second": 1 / s, "share": alone / s} for n, s in medians.items()]
    notes = [
        f"{WORKERS} workers, {threads} threads for the model, batch {batch}; wall time, blocks of {block} steps.",
        f"The step rate with files is {ratio:.2f} of the model's own.",
    ]
    return Report("loading", command, {"step rate": rows}, notes)
