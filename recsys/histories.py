"""Histories of items as flat arrays: cutting, padding, and counting what follows what."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix


class Histories(NamedTuple):
    """Everybody's items one after the other: those of `u` are `items[starts[u] : starts[u + 1]]`, the oldest first.

    An item is a number from 0, or -1 where a model does not know it.
    """

    starts: np.ndarray
    items: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def pieces(self, first: np.ndarray, last: np.ndarray, rows: np.ndarray | None = None) -> Histories:
        """The items `first` to `last - 1` of each (or of `rows`), counted from its own beginning."""
        begin = self.starts[:-1] if rows is None else self.starts[:-1][rows]
        lengths = last - first
        starts = np.concatenate([[0], np.cumsum(lengths)])
        where = np.arange(starts[-1]) + np.repeat(begin + first - starts[:-1], lengths)
        return Histories(starts, self.items[where])

    def newest(self, count: int) -> Histories:
        """At most `count` of the newest items of each."""
        return self.pieces(np.maximum(self.lengths - count, 0), self.lengths)

    def known(self) -> Histories:
        """Without the items that are -1."""
        keep = self.items >= 0
        return Histories(np.concatenate([[0], np.cumsum(keep)])[self.starts], self.items[keep])


def padded(histories: Histories, width: int, padding: int, rows: np.ndarray | None = None) -> np.ndarray:
    """The newest `width` items of each (or of `rows`), right-aligned, `[U, width]` int64."""
    begin, end = histories.starts[:-1], histories.starts[1:]
    if rows is not None:
        begin, end = begin[rows], end[rows]
    where = end[:, None] - width + np.arange(width)
    there = where >= begin[:, None]
    if not len(histories.items):
        return np.full(there.shape, padding, dtype=np.int64)
    return np.where(there, histories.items[np.where(there, where, 0)], padding).astype(np.int64)


def transitions(histories: Histories, items: int, span: int = 1) -> csr_matrix:
    """How often item j came 1 to `span` places after item i in one history, `[N, N]`, columns ascending."""
    user = np.repeat(np.arange(len(histories.lengths)), histories.lengths)
    total = csr_matrix((items, items), dtype=np.int32)
    for step in range(1, span + 1):
        same = user[step:] == user[:-step]
        pair = histories.items[:-step][same], histories.items[step:][same]
        total = total + csr_matrix((np.ones(len(pair[0]), np.int32), pair), shape=(items, items))
    total.sum_duplicates()
    total.sort_indices()
    return total
