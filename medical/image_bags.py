"""Bags whose instances are images: one folder of instance images a bag, labels in a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from polyhead.sources import Entry, Location


def image_folders(entries: Sequence[Entry], bags: set[str] | None) -> dict[str, list[Location]] | None:
    """The images of every folder that a table of bags names, or None when it names files instead.

    Args:
        entries: all images, `id` being their path.
        bags: what the table calls its bags: a folder's name, or its path. None takes every folder with images.

    Returns:
        Bag name -> its images, sorted by name.
    """
    folders: dict[str, list[Location]] = defaultdict(list)
    files: set[str] = set()
    for entry in entries:
        path = Path(entry.id)
        files |= {entry.id, path.name, path.stem}
        parents = ["/".join(path.parts[i:-1]) for i in range(len(path.parts) - 1)]
        named = next((p for p in parents if bags is None or p in bags), None)
        if named is not None and entry.location.problem is None:
            folders[named].append(entry.location)
    if bags is not None and len(folders) <= len(bags & files):
        return None
    return dict(folders)
