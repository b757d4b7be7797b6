"""`report.html`: one self-contained page about a run that a person can open."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import pytorch_lightning
import torch
from jinja2 import Environment

import polyhead
from polyhead.callbacks import read_rows
from polyhead.files import write_text
from polyhead.system import System

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # names are a person's, and may hold a $


def picture(figure: Any) -> str:
    """A figure as a data address; the figure is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def curves(rows: list[dict[str, Any]]) -> Any | None:
    """Losses in one panel, then a panel a metric, over epochs; None without rows."""
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            stage, _, metric = name.partition("/")
            if metric and value not in ("", None):
                panels[metric][stage].append((int(row["epoch"]), float(value)))
    if not panels:
        return None
    order = sorted(panels, key=lambda m: (m != "loss", m))[:8]
    wide = min(4, len(order))
    high = -(-len(order) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(3.4 * wide, 2.6 * high), squeeze=False, layout="constrained")
    for axis in axes.flat[len(order) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes.flat, order, strict=False):
        for stage, points in panels[metric].items():
            marker = "o" if len(points) == 1 else None
            axis.plot(*zip(*points, strict=True), label=stage, marker=marker)
        axis.set_title(metric)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return figure


def confusion_picture(matrix: Any, classes: list[str]) -> Any:
    """A confusion matrix `[K, K]`, rows the truth, shaded by recall, with counts where they fit."""
    from matplotlib import pyplot

    counts = torch.as_tensor(matrix)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    size = min(9.0, 2.2 + 0.5 * len(classes))
    figure, axis = pyplot.subplots(figsize=(size, size), layout="constrained")
    axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if len(classes) <= 20:
        for i in range(len(classes)):
            for j in range(len(classes)):
                colour = "white" if share[i, j] > 0.5 else "black"
                axis.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=colour, fontsize="small")
    return figure


def write_report(folder: Path, system: System, stage: str, command: str, config: str) -> Path:
    """Write `folder/report.html` from the run's files and the system's own pictures of `stage`."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in sorted(metrics.items()):
        part, _, metric = name.partition("/")
        table[metric][part] = value
    shown = curves(read_rows(folder / "metrics.csv"))
    pictures = {"Training": shown} if shown is not None else {}
    pictures |= {f"{title} ({stage})": figure for title, figure in system.figures(stage).items()}
    template = (importlib.resources.files("polyhead") / "report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template).render(
        title=folder.resolve().name,
        system=type(system).__name__,
        parameters=sum(p.numel() for p in system.parameters()),
        stages=sorted({s for row in table.values() for s in row}, reverse=True),
        table=table,
        pictures={title: picture(figure) for title, figure in pictures.items()},
        command=command,
        config=config,
        versions={
            "polyhead": polyhead.__version__,
            "torch": torch.__version__,
            "pytorch-lightning": pytorch_lightning.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
    )  # fmt: skip
    path = folder / "report.html"
    write_text(path, page)
    return path
