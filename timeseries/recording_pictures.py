"""Pictures of recordings: probability over time with marks and alarms, traces with relevance, one window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from timeseries.seizures import Intervals, Post, Track, events, smoothed

MOST = 8
MARKED, ALARM = "tab:orange", "tab:red"


def _axes(rows: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(rows, 1, figsize=(width, height), squeeze=False, layout="constrained", **options)


def _shade(axis: Any, intervals: Intervals, colour: str, label: str, low: float, high: float) -> None:
    for number, (a, b) in enumerate(intervals):
        axis.axvspan(a, b, low, high, color=colour, alpha=0.35, lw=0, label=label if number == 0 else None)


def tracks_picture(tracks: Sequence[Track], threshold: float, post: Post) -> Any:
    """Smoothed probability of up to eight recordings over time, with marked seizures and events above threshold."""
    shown = sorted(tracks, key=lambda t: -len(t.truth))[:MOST]
    figure, axes = _axes(len(shown), 9, 0.6 + 1.2 * len(shown))
    for axis, track in zip(axes[:, 0], shown, strict=True):
        smooth = smoothed(track, post.smooth)
        _shade(axis, track.truth, MARKED, "marked", 0.0, 1.0)
        _shade(axis, events(track, smooth, threshold, post), ALARM, "event", 0.9, 1.0)
        axis.plot(track.stops, smooth, lw=0.7, color="black")
        axis.axhline(threshold, color="grey", lw=0.6, ls="--")
        axis.set_ylim(0, 1.05)
        axis.set_xlim(track.stops[0], track.stops[-1] + 1e-6)
    axes[0, 0].legend(loc="upper right", fontsize="x-small")
    axes[-1, 0].set_xlabel("seconds")
    return figure


def traces(axis: Any, x: np.ndarray, seconds: np.ndarray, names: Sequence[str], weight: np.ndarray | None) -> None:
    """Channels one above the other, the first on top, darker the more relevant; robustly scaled."""
    step = 6 * np.median(np.abs(x - np.median(x, 1, keepdims=True))) + 1e-9
    shade = np.full(len(x), 0.8) if weight is None else 0.15 + 0.85 * _unit(weight)
    for i, row in enumerate(x):
        line = np.clip(row - np.median(row), -2 * step, 2 * step) / step
        axis.plot(seconds, line - i, lw=0.4, color=str(1 - shade[i]))
    every = max(1, len(x) // 24)
    axis.set_yticks(-np.arange(0, len(x), every), list(names)[::every], fontsize="x-small")
    axis.set_ylim(-len(x), 1)
    axis.set_xlim(seconds[0], seconds[-1])


def _unit(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / (np.ptp(x) + 1e-12)


def window_picture(name: str, arrays: Mapping[str, Any], rate: float, start: float, probability: float) -> Any:
    """One window: traces shaded by relevance, relevance by channel, and where the last segment attends."""
    from matplotlib import pyplot

    x, names, relevance = arrays["x"], list(arrays["channels"]), arrays["relevance"]
    figure, axes = pyplot.subplots(
        1, 3, figsize=(11, 2 + 0.16 * len(names)), layout="constrained", width_ratios=(5, 1.2, 2.2)
    )
    traces(axes[0], x, start + np.arange(x.shape[1]) / rate, names, relevance)
    axes[0].set_xlabel("seconds")
    axes[0].set_title(f"{name}: {probability:.3f}", fontsize="small")
    axes[1].barh(-np.arange(len(names)), relevance, color="tab:blue")
    axes[1].set_ylim(-len(names), 1)
    axes[1].set_yticks([])
    axes[1].set_title("relevance", fontsize="small")
    shown = axes[2].imshow(arrays["attention"].T, aspect="auto", cmap="magma", interpolation="nearest")
    axes[2].set_title("attention of the last segment", fontsize="small")
    axes[2].set_xlabel("segment")
    axes[2].set_ylabel("channel")
    figure.colorbar(shown, ax=axes[2])
    return figure


def recording_picture(
    title: str, x: np.ndarray, seconds: np.ndarray, names: Sequence[str], track: Track, relevance: np.ndarray,
    threshold: float, post: Post,
) -> Any:  # fmt: skip
    """Probability over time above the traces, and channel-by-time relevance below.

    Args:
        x: traces `[C, n]` at `seconds [n]`.
        relevance: `[windows, C]`, of the windows of `track`.
    """
    from matplotlib import pyplot

    height = 3.5 + 0.22 * len(names)
    figure, axes = pyplot.subplots(
        3, 1, figsize=(11, height), sharex=True, layout="constrained", height_ratios=(1, 2, 1.3)
    )
    smooth = smoothed(track, post.smooth)
    _shade(axes[0], track.truth, MARKED, "marked", 0.0, 1.0)
    _shade(axes[0], events(track, smooth, threshold, post), ALARM, "event", 0.9, 1.0)
    axes[0].step(track.stops, track.scores, where="pre", lw=0.5, color="grey", label="window")
    axes[0].step(track.stops, smooth, where="pre", lw=1.0, color="black", label="smoothed")
    axes[0].axhline(threshold, color="grey", lw=0.6, ls="--")
    axes[0].set_ylim(0, 1.05)
    axes[0].set_title(title, fontsize="small")
    axes[0].legend(loc="upper right", fontsize="x-small", ncols=4)
    traces(axes[1], x, seconds, names, None)
    edges = np.concatenate([track.stops[:1] - track.segment, track.stops])
    shown = axes[2].pcolormesh(edges, np.arange(len(names) + 1) - 0.5, relevance.T, cmap="magma", shading="flat")
    axes[2].invert_yaxis()
    every = max(1, len(names) // 24)
    axes[2].set_yticks(np.arange(0, len(names), every), list(names)[::every], fontsize="x-small")
    axes[2].set_xlabel("seconds")
    axes[2].set_ylabel("relevance")
    figure.colorbar(shown, ax=axes[2], pad=0.01)
    axes[2].set_xlim(seconds[0], seconds[-1])
    return figure
