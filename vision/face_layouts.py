"""Expression data sets as they are published: RAF-DB, FERPlus and AffectNet; and names of expressions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from polyhead.errors import UserError
from polyhead.sources import Entry, Location

# One order for all sets, by name: each lists its own, and numbers of one are another's wrong expressions
CANONICAL = ("anger", "disgust", "fear", "sadness", "happiness", "surprise", "neutral", "contempt")
ALIASES = {
    "angry": "anger", "disgusted": "disgust", "fearful": "fear", "afraid": "fear", "scared": "fear", "sad": "sadness",
    "happy": "happiness", "joy": "happiness", "smile": "happiness", "smiling": "happiness",
    "surprised": "surprise", "surprising": "surprise", "calm": "neutral", "none": "neutral",
}  # fmt: skip
RAF = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
FERPLUS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
AFFECTNET = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")

Votes = Literal["majority", "plurality"]


def canonical(name: str) -> str | None:
    """The expression that a class name means, or None."""
    plain = name.strip().lower().replace("_", " ").split(" ")[0]
    plain = ALIASES.get(plain, plain)
    return plain if plain in CANONICAL else None


def class_order(names: Sequence[str]) -> list[str] | None:
    """Class names in canonical order, or None unless all are expressions, each once."""
    meant = [canonical(n) for n in names]
    if None in meant or len(set(meant)) < len(meant):
        return None
    return sorted(names, key=lambda n: CANONICAL.index(str(canonical(n))))


def published_layout(root: Path, votes: Votes, ignored: list[str]) -> list[Entry] | None:
    """The entries of a root that is one of the published layouts, else None. Raises UserError."""
    if not root.is_dir():
        return None
    for base in (root, root / "basic"):
        if (base / "EmoLabel" / "list_patition_label.txt").is_file():
            return _raf(base)
    if (root / "fer2013new.csv").is_file() or (root / "FER2013Train").is_dir():
        return _ferplus(root, votes, ignored)
    if (root / "train_set" / "annotations").is_dir():
        return _affectnet(root)
    return None


def _entry(id: str, label: str, split: str, path: Path) -> Entry:
    problem = None if path.is_file() else f"no such file: {path.name}"
    return Entry(id, label, split, None, Location(str(path), None, problem))


def _raf(base: Path) -> list[Entry]:
    """`train_00001.jpg 5` a line; pictures in `Image/aligned` (with `_aligned`) or `Image/original`."""
    table = base / "EmoLabel" / "list_patition_label.txt"
    folder = next((f for f in ("aligned_224", "aligned", "original") if (base / "Image" / f).is_dir()), None)
    if folder is None:
        raise UserError(f"{base} has no Image/aligned or Image/original beside its labels")
    entries = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdigit() or not 1 <= int(parts[1]) <= len(RAF):
            raise UserError(f"{table} line {number} is not `file number` with a number of 1 to 7: {line[:60]}")
        name = Path(parts[0])
        file = f"{name.stem}_aligned{name.suffix}" if folder == "aligned" else name.name
        split = "test" if name.stem.startswith("test") else "train"
        entries.append(_entry(name.name, RAF[int(parts[1]) - 1], split, base / "Image" / folder / file))
    return entries


def vote(counts: Sequence[int], rule: Votes) -> str | None:
    """The expression that ten columns of votes (eight expressions, unknown, not a face) agree on, or None.

    `majority`: single votes are removed, and the largest must be more than half of the rest; `plurality`: the
    largest of the eight.
    """
    values = np.asarray(counts, dtype=np.int64)
    if rule == "plurality":
        return FERPLUS[int(values[:8].argmax())] if values[:8].any() else None
    kept = np.where(values > 1, values, 0)
    best = int(kept.argmax())
    if kept[best] * 2 <= kept.sum() or best >= len(FERPLUS):
        return None
    return FERPLUS[best]


def _ferplus(root: Path, votes: Votes, ignored: list[str]) -> list[Entry]:
    """Pictures `fer*.png` in three folders, votes in each folder's label.csv or in fer2013new.csv."""
    folders = {"Training": ("FER2013Train", "train"), "PublicTest": ("FER2013Valid", "val"),
               "PrivateTest": ("FER2013Test", "test")}  # fmt: skip
    rows: list[tuple[str, str, str, list[str]]] = []
    table = root / "fer2013new.csv"
    if table.is_file():
        with open(table, newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                if row and row[0] in folders:
                    folder, split = folders[row[0]]
                    rows.append((folder, split, row[1].strip(), row[2:12]))
    else:
        for folder, split in folders.values():
            own = root / folder / "label.csv"
            if own.is_file():
                with open(own, newline="", encoding="utf-8") as file:
                    rows += [(folder, split, row[0].strip(), row[2:12]) for row in csv.reader(file) if row]
    if not rows:
        raise UserError(f"{root} looks like FERPlus but holds neither fer2013new.csv nor label.csv files")
    entries = []
    for folder, split, name, counts in rows:
        if len(counts) != 10 or not all(c.strip().isdigit() for c in counts):
            raise UserError(f"{root}: the row of {name or '(no name)'} has no ten columns of votes")
        label = vote([int(c) for c in counts], votes)
        if not name or label is None:
            ignored.append(f"{folder}/{name or '(no picture)'}")
            continue
        entries.append(_entry(f"{folder}/{name}", label, split, root / folder / name))
    return entries


def _affectnet(root: Path) -> list[Entry]:
    """`train_set/images/N.jpg` with the number of its expression in `train_set/annotations/N_exp.npy`."""
    entries = []
    for part, split in (("train_set", "train"), ("val_set", "test")):
        for note in sorted((root / part / "annotations").glob("*_exp.npy")):
            try:
                number = int(str(np.load(note, allow_pickle=False)))
            except (ValueError, OSError) as error:
                raise UserError(f"{note} holds no number of an expression") from error
            if not 0 <= number < len(AFFECTNET):
                continue
            name = note.name.removesuffix("_exp.npy") + ".jpg"
            entries.append(_entry(f"{part}/{name}", AFFECTNET[number], split, root / part / "images" / name))
    if not entries:
        raise UserError(f"{root} looks like AffectNet but has no annotations N_exp.npy")
    return entries
