"""Training, validation and test parts: given ones are kept, missing ones are cut, always the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, train_test_split

from polyhead.errors import UserError

# Cuts by group are drawn this many times and the one with the fairest classes is kept
GROUP_DRAWS = 64


def split_indices(
    labels: Sequence[Any] | None,
    groups: Sequence[Any] | None,
    fractions: Mapping[str, float],
    seed: int,
) -> dict[str, np.ndarray]:
    """Divide samples into parts, every class in proportion and no group in two of them.

    Args:
        labels: a class a sample, or None to divide without looking at classes; its length is the sample count
            unless `groups` tells it.
        groups: what must stay together (a patient, a subject), or None. None as one sample's group makes it a
            group of its own.
        fractions: part -> share; the shares add up to 1. The first part takes what the others leave.

    Returns:
        part -> ascending indices. The same arguments give the same parts.

    Raises:
        UserError: the shares are no shares, or there are too few samples, groups or members of a class.
    """
    given = labels if labels is not None else groups
    if given is None:
        raise ValueError("split_indices needs labels or groups")
    names = list(fractions)
    if any(not 0 <= f <= 1 for f in fractions.values()) or not np.isclose(sum(fractions.values()), 1):
        shares = ", ".join(f"{k} {v:g}" for k, v in fractions.items())
        raise UserError(f"the parts of a split must be shares that add up to 1, not {shares}")
    classes = np.array(["all"] * len(given) if labels is None else [str(v) for v in labels])
    together = None
    if groups is not None:
        keys = [f"group {g}" if g is not None else f"single {i}" for i, g in enumerate(groups)]
        together = np.unique(keys, return_inverse=True)[1]
    rest = np.arange(len(given))
    parts: dict[str, np.ndarray] = {}
    for draw, name in enumerate(names[:0:-1]):
        left = sum(fractions[n] for n in names if n not in parts)
        share = fractions[name] / left if left else 0.0
        if share == 0:
            parts[name] = rest[:0]
        elif np.isclose(share, 1):
            parts[name], rest = rest, rest[:0]
        elif together is None:
            rest, parts[name] = _cut(rest, classes, share, seed + draw, name)
        else:
            rest, parts[name] = _cut_groups(rest, classes, together, share, seed + draw, name)
    parts[names[0]] = rest
    return {name: np.sort(parts[name]) for name in names}


def _cut(rest: np.ndarray, classes: np.ndarray, share: float, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    keep, cut = [], []
    # Class by class, so that a rare one is on both sides too
    for kind in np.unique(classes[rest]):
        own = rest[classes[rest] == kind]
        if len(own) < 2:
            raise UserError(
                f"class {kind} has too few samples to be cut into parts (one left for {name}): give more, or "
                "name the parts in the data"
            )
        size = min(max(round(share * len(own)), 1), len(own) - 1)
        a, b = train_test_split(own, test_size=size, random_state=seed)
        keep.append(a)
        cut.append(b)
    return np.sort(np.concatenate(keep or [rest])), np.sort(np.concatenate(cut or [rest]))


def _cut_groups(
    rest: np.ndarray, classes: np.ndarray, groups: np.ndarray, share: float, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    own = np.unique(classes[rest], return_inverse=True)[1]
    number = len(np.unique(groups[rest]))
    if number < 2:
        raise UserError(f"{number} group is too few to cut off a part for {name}: all samples are of one group")
    # At least one group on either side
    size = min(max(round(share * number), 1), number - 1)
    total = np.bincount(own)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for keep, cut in GroupShuffleSplit(GROUP_DRAWS, test_size=size, random_state=seed).split(rest, own, groups[rest]):
        got = np.bincount(own[cut], minlength=len(total))
        unfair = np.abs(got / total - share).sum()
        # A class that is on one side only cannot be learnt or cannot be judged
        missing = ((got == 0) | (got == total)).sum()
        score = float(unfair + 10 * missing)
        if best is None or score < best[0]:
            best = (score, rest[keep], rest[cut])
    assert best is not None
    return best[1], best[2]


def assign_splits(
    splits: Sequence[str | None],
    labels: Sequence[Any] | None,
    groups: Sequence[Any] | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    apart: bool = True,
) -> dict[str, np.ndarray]:
    """The parts `train`, `val` and `test` of a data set that may name some of them.

    Where the data name none, all three are cut. Where they name a training part, a missing validation part is
    cut from it, while a missing test part stays empty: what a model was trained on is no test. Samples
    without a split are left out if others have one.

    Args:
        splits: `train`, `val`, `test` or None, a sample.
        labels, groups, seed: as for `split_indices`.
        val_fraction, test_fraction: shares of what is cut: of all samples, or of the training part.
        apart: refuse a group in two of the parts that the data name; else those stand as they are.

    Raises:
        UserError: a group stands in two of the parts that the data name; as for `split_indices`.
    """
    names = np.array([s or "" for s in splits])
    parts = {name: np.flatnonzero(names == name) for name in ("train", "val", "test")}
    if labels is None and groups is None:
        labels = ["all"] * len(splits)
    if not any(len(p) for p in parts.values()):
        shares = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
        if shares["train"] < -1e-9:
            total = f"val_fraction {val_fraction:g} and test_fraction {test_fraction:g}"
            raise UserError(f"{total} leave no training part: they must add up to less than 1")
        return split_indices(labels, groups, {k: max(v, 0.0) for k, v in shares.items()}, seed)
    if groups is not None and apart:
        _check_apart(parts, groups)
    train = parts["train"]
    if len(train) and not len(parts["val"]) and val_fraction > 0:
        shares = {"train": 1 - val_fraction, "val": val_fraction}
        cut = split_indices(_of(labels, train), _of(groups, train), shares, seed)
        parts["train"], parts["val"] = train[cut["train"]], train[cut["val"]]
    return parts


def _check_apart(parts: Mapping[str, np.ndarray], groups: Sequence[Any]) -> None:
    sides: dict[Any, set[str]] = {}
    for name, indices in parts.items():
        for group in (groups[i] for i in indices):
            sides.setdefault(group, set()).add(name)
    torn = [g for g, names in sides.items() if g is not None and len(names) > 1]
    if torn:
        where = " and ".join(n for n in parts if n in sides[torn[0]])
        raise UserError(
            f"group {torn[0]!r} is in {where} ({len(torn)} of {len(sides)} groups are in two parts): what belongs "
            "to one patient or subject must be in one part",
            ["mend the parts that the data name, or leave them out to have them cut by group"],
        )


def _of(values: Sequence[Any] | None, indices: np.ndarray) -> list[Any] | None:
    return None if values is None else [values[i] for i in indices]


def class_key(name: str) -> tuple[int, float, str]:
    """Sorts class names: whole numbers by value, then the others as text."""
    digits = name.removeprefix("-")
    return (0, int(name), name) if digits.isdecimal() else (1, 0, name)
