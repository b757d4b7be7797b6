"""Commands on recordings: simulated ones as files, predictions written back as annotations, a baseline beside."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyhead import bundle
from polyhead.errors import BadSample, UserError
from polyhead.files import atomic_write, write_text
from polyhead.predictions import read_predictions
from timeseries import epileptor as model
from timeseries.edf import Mark
from timeseries.recording_data import RecordingData
from timeseries.recording_pictures import recording_picture
from timeseries.recording_windows import as_recording
from timeseries.recordings import Recording, open_recording, stem
from timeseries.seizures import Intervals, Post, Track, choose_threshold, events, smoothed, total
from timeseries.signals import Preparation, Prepared

# Samples of all channels above which an EDF+ file gets annotations alone
MOST_SAMPLES = 500_000_000
AROUND = 60.0
# Seconds that a data record of a written file may last
RECORDS = (1.0, 0.5, 0.4, 0.25, 0.2, 0.1, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0)
# Of a baseline's training windows, so many without an event for each one with
NEGATIVES = 12


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Files


def write_edf(path: Path, signals: Sequence[tuple[str, float, np.ndarray]], marks: Sequence[Mark]) -> None:
    """An EDF+ file of channels (name, rate, microvolts) and annotations; without channels, annotations alone."""
    import edfio

    made = []
    length = _record(signals)
    for name, rate, row in signals:
        short = -len(row) % round(rate * length)
        row = np.pad(row, (0, short), mode="edge") if short else row
        top = max(float(np.abs(row).max(initial=0.0)), 1.0)
        top = float(f"{top * 1.001:.5g}") if top < 1e6 else float(f"{top * 1.001:.0f}")
        made.append(edfio.EdfSignal(
            row.astype(np.float64), rate, label=name[:16].encode("ascii", "replace").decode(), physical_dimension="uV",
            physical_range=(-top, top),
        ))  # fmt: skip
    texts = [edfio.EdfAnnotation(max(0.0, round(m.onset, 4)), round(m.duration, 4), _text(m)) for m in marks]
    file = edfio.Edf(made, annotations=texts, data_record_duration=length if made else None)
    with atomic_write(path) as temporary:
        file.write(temporary)


def _record(signals: Sequence[tuple[str, float, np.ndarray]]) -> float:
    """Seconds of a data record: whole samples of every channel, and if it can be, whole records in the recording."""
    fitting = [s for s in RECORDS if all(abs(r * s - round(r * s)) < 1e-9 for _, r, _ in signals)]
    whole = [s for s in fitting if all(len(row) % round(r * s) == 0 for _, r, row in signals)]
    return (whole or fitting or [1.0])[0]


def _text(mark: Mark) -> str:
    """An annotation's text; one channel as MNE writes it, several for the eye."""
    if len(mark.channels) == 1:
        return f"{mark.text}@@{mark.channels[0]}"
    return f"{mark.text} ({' '.join(mark.channels)})" if mark.channels else mark.text


def write_events(path: Path, marks: Sequence[Mark], scores: Sequence[float] | None = None) -> None:
    """BIDS' events table: onset, duration, trial_type, channels and, for predicted ones, the highest score."""
    lines = ["\t".join(["onset", "duration", "trial_type", "channels", *(["score"] if scores is not None else [])])]
    for i, mark in enumerate(marks):
        cells = [f"{mark.onset:.4f}", f"{mark.duration:.4f}", mark.text, ",".join(mark.channels) or "n/a"]
        lines.append("\t".join(cells + ([f"{scores[i]:.4f}"] if scores is not None else [])))
    write_text(path, "\n".join(lines) + "\n")


def epileptor(
    output: str, recordings: int = 3, channels: int = 16, hours: float = 1.0, seed: int = 0, seizures: int = 4,
    artefacts: int = 6,
) -> None:  # fmt: skip
    """Simulate intracranial recordings with seizures at known times and channels, as EDF+ with BIDS tables.

    Args:
        output: a new or empty folder.
        recordings: how many.
        channels: contacts of each.
        hours: length of each.
        seed: the same seed gives the same recordings.
        seizures: an hour.
        artefacts: an hour, of each of six kinds.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty: choose another --output")
    if recordings < 1:
        raise UserError(f"--recordings is {recordings}: at least 1 is needed")
    began, count, simulated = time.process_time(), 0, 0.0
    for start in range(0, recordings, model.TOGETHER):
        size = min(model.TOGETHER, recordings - start)
        made = model.simulate([channels] * size, seed + start, hours, seizures, artefacts)
        simulated += time.process_time() - began
        for i, one in enumerate(made, start + 1):
            recording = as_recording(f"sub-{i:02d}", one)
            base = folder / f"sub-{i:02d}_task-simulated_ieeg"
            source = recording.source
            rows = source.read(0, range(len(source.names)), 0, one.signal.shape[1])
            signals = [(n, float(model.RATE), r) for n, r in zip(source.names, rows, strict=True)]
            write_edf(base.with_suffix(".edf"), signals, recording.marks)
            write_events(folder / f"{stem(base)}_events.tsv", recording.marks)
            lines = ["name\ttype\tunits\tsampling_frequency\tstatus"]
            lines += [f"{n}\tSEEG\tuV\t{model.RATE}\tgood" for n in source.names]
            write_text(folder / f"{stem(base)}_channels.tsv", "\n".join(lines) + "\n")
            count += len(one.seizures)
        began = time.process_time()
    speed = recordings * hours * 3600 / max(simulated, 1e-9)
    say(f"{recordings} recordings of {hours:g} h with {channels} channels, {count} seizing channels: {folder}")
    say(f"simulated {speed:.0f} times faster than they would take")


# Annotations


def annotate(
    predictions: str,
    output: str,
    root: str | None = None,
    threshold: float | None = None,
    smooth: int = 3,
    join: float = 15.0,
    shortest: float = 6.0,
    pictures: int = 4,
    signals: bool = True,
) -> None:
    """Write predicted seizures back: BIDS events (TSV), EDF+ for a viewer, pictures.

    Args:
        predictions: the run folder of `polyhead predict`.
        output: gets a folder's worth of files a recording: NAME_events.tsv, NAME_annotated.edf, NAME.png and
            NAME_event-1.png, ...
        root: where the recordings are; without it there are no traces in pictures and no signals in EDF+.
        threshold: of the smoothed probability; the model's by default.
        smooth: windows that are averaged.
        join: seconds; events with a shorter gap are one.
        shortest: seconds; shorter events are left out.
        pictures: events of each recording that are drawn, beside its overview.
        signals: put the recording's channels into the EDF+ file too.
    """
    table = read_predictions(predictions)
    wanted = {"recording", "stop", "since", "probability", "threshold", "relevance", "channels"}
    if not table.num_rows or not wanted <= set(table.column_names):
        raise UserError(f"{predictions} holds no predictions of recordings: `polyhead predict` writes them")
    post = Post(smooth, join, shortest)
    count = 0
    names = sorted(set(table.column("recording").to_pylist()))
    place = Path(root) if root is not None else None
    for name in names:
        rows = table.filter([r == name for r in table.column("recording").to_pylist()]).sort_by("stop").to_pydict()
        count += _annotate_one(name, rows, Path(output), place, threshold, post, pictures, signals)
    say(f"{count} events in {len(names)} recordings: {output}")


def _track(rows: dict[str, list[Any]]) -> Track:
    stops = np.array(rows["stop"])
    stride = float(np.median(np.diff(stops))) if len(stops) > 1 else rows["stop"][0] - rows["since"][0]
    scores = np.array(rows["probability"], np.float64)
    return Track(stops, scores, np.zeros(len(stops)), [], stride, rows["stop"][0] - rows["since"][0])


def _annotate_one(
    name: str, rows: dict[str, list[Any]], folder: Path, root: Path | None, threshold: float | None, post: Post,
    pictures: int, signals: bool,
) -> int:  # fmt: skip
    track = _track(rows)
    level = float(rows["threshold"][0]) if threshold is None else threshold
    smooth = smoothed(track, post.smooth)
    relevance = np.array(rows["relevance"], np.float64)
    channels = rows["channels"][0]
    found = events(track, smooth, level, post)
    marks, scores = [], []
    for a, b in found:
        inside = (track.stops > a + 1e-9) & (track.stops <= b + 1e-9)
        mean = relevance[inside].mean(0)
        best = [channels[i] for i in np.argsort(-mean)[:5] if mean[i] >= 0.5 * mean.max()]
        marks.append(Mark(a, b - a, "seizure", tuple(best)))
        scores.append(float(smooth[inside].max()))
    base = folder / Path(name).with_name(stem(Path(name)))
    write_events(base.with_name(f"{base.name}_events.tsv"), marks, scores)
    recording = None
    if root is not None:
        path = root if root.is_file() else root / name
        try:
            recording = open_recording(path, name)
        except BadSample as error:
            say(f"{name}: {error}")
    held = _signals(recording) if recording is not None and signals else []
    write_edf(base.with_name(f"{base.name}_annotated.edf"), held, marks)
    _draw(base, name, recording, track, relevance, channels, level, post, found[:pictures])
    return len(marks)


def _signals(recording: Recording) -> list[tuple[str, float, np.ndarray]]:
    """All channels of a recording, unless it has gaps or would not fit into memory."""
    source = recording.source
    if len(source.pieces) > 1:
        say(f"{recording.id}: has gaps, which a continuous file cannot hold: its EDF+ has annotations alone")
        return []
    duration = source.pieces[0].duration
    if not any(all(abs(r * s - round(r * s)) < 1e-9 for r in source.rates) for s in RECORDS):
        say(f"{recording.id}: its sampling rate fits no record of EDF+, which gets annotations alone")
        return []
    if duration * sum(source.rates) > MOST_SAMPLES:
        say(f"{recording.id}: too long to be copied: its EDF+ has annotations alone")
        return []
    rows = []
    for i, (name, rate) in enumerate(zip(source.names, source.rates, strict=True)):
        row = source.read(0, [i], 0, round(duration * rate))[0]
        rows.append((name, rate, np.nan_to_num(row)))
    return rows


def _draw(
    base: Path, name: str, recording: Recording | None, track: Track, relevance: np.ndarray, channels: list[str],
    level: float, post: Post, found: Intervals,
) -> None:  # fmt: skip
    """The overview, and each event with a minute before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    prepared = None
    if recording is not None:
        names = set(channels)
        try:
            prepared = Prepared(recording, Preparation(rate=128.0, scale="microvolt"))
        except BadSample:
            prepared = None
        if prepared is not None and not names <= set(prepared.names):
            prepared = None
    spans = {f"{base.name}.png": (float(track.stops[0] - track.segment), float(track.stops[-1]))}
    spans |= {f"{base.name}_event-{i}.png": (a - AROUND, b + AROUND) for i, (a, b) in enumerate(found, 1)}
    for file, (low, high) in spans.items():
        chosen = (track.stops > low) & (track.stops - track.segment < high)
        part = Track(track.stops[chosen], track.scores[chosen], track.labels[chosen], track.truth, track.stride,
                     track.segment)  # fmt: skip
        low, high = float(part.stops[0] - part.segment), float(part.stops[-1])
        x, seconds = _traces(prepared, channels, low, high)
        figure = recording_picture(name, x, seconds, channels, part, relevance[chosen], level, post)
        with atomic_write(base.with_name(file)) as temporary:
            figure.savefig(temporary, dpi=100)
        pyplot.close(figure)


def _traces(prepared: Prepared | None, channels: list[str], low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """At most some thousand points of each channel between two times; flat where there is no signal."""
    points = 4000
    if prepared is None:
        return np.zeros((len(channels), 2)), np.array([low, high])
    order = [prepared.names.index(c) for c in channels]
    rows, times = [], []
    for piece, (start, count) in enumerate(prepared.pieces):
        a = max(0, round((low - start) * prepared.how.rate))
        b = min(count, round((high - start) * prepared.how.rate))
        step = max(1, round((high - low) * prepared.how.rate / points))
        for first in range(a, b, 1 << 15):
            size = min(1 << 15, b - first)
            rows.append(prepared.read(piece, first, size)[order][:, ::step])
            times.append(start + (first + np.arange(0, size, step)) / prepared.how.rate)
    if not rows:
        return np.zeros((len(channels), 2)), np.array([low, high])
    return np.concatenate(rows, 1), np.concatenate(times)


# The baseline


def baseline(ckpt_path: str, root: str | None = None, seed: int = 0) -> None:
    """What a classical model reaches on the data and labels of a trained one, with the same features.

    For detectors: gradient boosting on the log band energies of every channel's window; the second-highest channel
    counts; threshold and events as for the model. For windows at events: logistic regression on the energies.

    Args:
        ckpt_path: the trained model, whose data settings are taken.
        root: the recordings; the embedded sample by default.
        seed: of splits and of what is drawn.
    """
    saved = bundle.read(ckpt_path)
    data: Any = bundle.build_data({**saved.data, "init_args": {**saved.data["init_args"], "root": root, "seed": seed}})
    if not isinstance(data, RecordingData):
        raise UserError(f"{ckpt_path} is no model of recordings")
    for stage in ("fit", "test"):
        data.setup(stage)
    results = _boosting(data, seed) if data.windows == "sliding" else _logistic(data)
    for name, value in results.items():
        say(f"  {name:<24} {value:.4f}")


@torch.no_grad()
def _features(data: RecordingData, split: Any, chosen: Iterable[int]) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Log band energies of windows, each `[C, T * bands]`, and the windows without their signal."""
    samples: Any = data.samples(split)
    features, kept = [], []
    for index in chosen:
        sample = samples.plain(int(index))
        x = data._encoder.features(sample["x"][None], *(sample[k][None] if k in sample else None
                                                        for k in ("energy_mean", "energy_deviation")))[0]  # fmt: skip
        features.append(x.transpose(0, 1).flatten(1).numpy())
        kept.append({k: v for k, v in sample.items() if k != "x"})
    return features, kept


def _boosting(data: RecordingData, seed: int) -> dict[str, float]:
    from sklearn.ensemble import HistGradientBoostingClassifier

    rng = np.random.default_rng(seed)
    train: Any = data.samples("train")
    positive = np.flatnonzero(train.rows[:, 3] > 0)
    rest = np.setdiff1d(np.arange(len(train.rows)), positive)
    chosen = np.concatenate([positive, rng.choice(rest, min(len(rest), NEGATIVES * len(positive)), replace=False)])
    features, kept = _features(data, "train", np.sort(chosen))
    labels = []
    for sample in kept:
        own = sample["channel_label"].numpy()
        labels.append(np.where(own < 0, int(sample["label"]), own) > 0)
    fitted = HistGradientBoostingClassifier(random_state=seed, max_iter=200, learning_rate=0.1)
    fitted.fit(np.concatenate(features), np.concatenate(labels))
    tracks = {s: _tracks(data, s, fitted) for s in ("val", "test")}
    post = Post()
    level = choose_threshold(tracks["val"], post)
    sums = total(tracks["test"], level, post)
    return {
        "sensitivity": sums.sensitivity, "false_alarms_per_hour": sums.per_hour, "seizures": sums.seizures,
        "found": sums.found, "hours": sums.hours, "threshold": level,
    }  # fmt: skip


def _tracks(data: RecordingData, split: Any, fitted: Any) -> list[Track]:
    samples: Any = data.samples(split)
    found = []
    for number in range(len(samples.recordings)):
        features, kept = _features(data, split, np.flatnonzero(samples.rows[:, 0] == number))
        if not kept:
            continue
        scores = fitted.predict_proba(np.concatenate(features))[:, 1].reshape(len(kept), -1)
        second = np.sort(scores, 1)[:, -min(2, scores.shape[1])]
        stops = np.array([float(s["stop"]) for s in kept])
        labels = np.array([int(s["label"]) for s in kept])
        found.append(Track(stops, second, labels, samples.truth[number], data.stride, data.segment))
    return found


def _logistic(data: RecordingData) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, roc_auc_score

    parts: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        features, kept = _features(data, split, range(len(data.samples(split))))
        steps = data.segments
        rows = np.stack([f.reshape(len(f), steps, -1).mean(1).ravel() for f in features])
        parts[split] = rows, np.array([int(s["label"]) for s in kept])
    (x, y), (xv, yv), (xt, yt) = parts.values()
    fits = [LogisticRegression(C=c, max_iter=2000).fit(x, y) for c in (0.001, 0.003, 0.01, 0.03)]
    best = max(fits, key=lambda m: float(m.score(xv, yv)))
    scores = best.predict_proba(xt)
    area = roc_auc_score(yt, scores[:, 1] if scores.shape[1] == 2 else scores, multi_class="ovr")
    return {"accuracy": float(accuracy_score(yt, best.predict(xt))), "auroc": float(area)}
