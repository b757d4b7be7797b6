"""Pictures of a recommendation."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csc_matrix

SHOWN, NEIGHBOURS = 20, 3


def explanation(
    user: str,
    ids: list[Any],
    history: np.ndarray,
    attention: dict[str, np.ndarray],
    items: np.ndarray,
    scores: np.ndarray,
    before: csc_matrix,
) -> tuple[Any, dict[str, np.ndarray]]:
    """A figure and its arrays: attention over the newest items, and what most often preceded each recommendation.

    Args:
        user: the title.
        ids: of the items.
        history: item numbers, padding (the number of items) included, `[W]`.
        attention: branch -> weights of the last query, `[W]`.
        items, scores: recommended, best first.
        before: transition counts, `[N, N]`, columns the items that followed.
    """
    from matplotlib.figure import Figure

    there = history < len(ids)
    own = history[there]
    names = [str(ids[i]) for i in own]
    weights = {name: w[there] for name, w in attention.items()}
    known = items < len(ids)
    items, scores = items[known], scores[known]
    neighbours, counts = _preceding(before, items)
    figure = Figure(figsize=(11, 0.9 + 0.3 * max(min(len(own), SHOWN), 2 * len(items), 6)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    newest = slice(max(0, len(own) - SHOWN), None)
    rows = np.arange(len(own[newest]))
    for number, (name, w) in enumerate(weights.items()):
        left.barh(rows + 0.4 * (number - 0.5 * (len(weights) - 1)), w[newest], 0.4, label=name)
    left.set_yticks(rows, [n[:24] for n in names[newest]])
    left.set_xlabel("attention of the last query")
    newest_of = f" (newest {SHOWN} of {len(own)})" if len(own) > SHOWN else ""
    left.set_title(f"history of {user}"[:40] + newest_of, pad=24)
    if len(own):
        left.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(weights), frameon=False)
    else:
        left.axis("off")
        left.text(0.5, 0.5, "no item that the model knows:\npopularity decided", ha="center", transform=left.transAxes)
    right.axis("off")
    right.set_title("recommended, and what most often came before it (*: in the history)", pad=24)
    mine = set(own.tolist())
    cells = [
        [str(ids[i])[:24], f"{s:.2f}", "   ".join(
            f"{str(ids[j])[:18]} {c}x{'*' if j in mine else ''}" for j, c in zip(n, k, strict=True) if c
        ) or "never seen after anything"]
        for i, s, n, k in zip(items, scores, neighbours, counts, strict=True)
    ]  # fmt: skip
    if cells:
        table = right.table(cells, colLabels=["item", "score", "came before it"], loc="upper center", cellLoc="left",
                            colWidths=[0.2, 0.1, 0.7])  # fmt: skip
        table.auto_set_font_size(False)
        table.set_fontsize(7)
    else:
        right.text(0.5, 0.5, "nothing is left to recommend", ha="center", transform=right.transAxes)
    arrays = {
        "history": np.array(names), **{f"attention_{k}": v for k, v in weights.items()},
        "items": np.array([str(ids[i]) for i in items]), "scores": scores,
        "neighbours": np.array([[str(ids[j]) if c else "" for j, c in zip(n, k, strict=True)]
                                for n, k in zip(neighbours, counts, strict=True)]).reshape(-1, NEIGHBOURS),
        "neighbour_counts": counts,
    }  # fmt: skip
    return figure, arrays


def _preceding(before: csc_matrix, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items that most often came just before each, and how often, `[K, NEIGHBOURS]`; 0 where there is none."""
    neighbours = np.zeros((len(items), NEIGHBOURS), dtype=np.int64)
    counts = np.zeros((len(items), NEIGHBOURS), dtype=np.int64)
    for row, item in enumerate(items):
        own = slice(before.indptr[item], before.indptr[item + 1])
        best = np.argsort(-before.data[own], kind="stable")[:NEIGHBOURS]
        neighbours[row, : len(best)] = before.indices[own][best]
        counts[row, : len(best)] = before.data[own][best]
    return neighbours, counts
