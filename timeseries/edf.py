"""EDF and BDF files read in slices: any record length, channels of several rates, and gaps where a file has some.

MNE reads a discontinuous file (EDF+D, BDF+D) as if it were continuous and brings all channels to one rate; edfio
maps the whole file. Here records are read where they lie, each channel at its own rate, and the recording is a
list of pieces without a gap inside. Format: Kemp et al. 1992 (EDF), Kemp and Olivan 2003 (EDF+), biosemi.com (BDF).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from polyhead.errors import BadSample

ANNOTATIONS = ("EDF Annotations", "BDF Annotations")
# Microvolts in one unit of what a header may say
UNITS = {"v": 1e6, "mv": 1e3, "uv": 1.0, "\u00b5v": 1.0, "\u03bcv": 1.0, "nv": 1e-3}
# Widths of a signal's header fields: label, transducer, dimension, physical and digital range, filter, samples, rest
FIELDS = (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)
TAL = re.compile(rb"([+-]\d+(?:\.\d*)?)(?:\x15(\d+(?:\.\d*)?))?\x14([^\x00]*)\x14")
# Records that start within this share of a record of where the last one ended follow it
SLACK = 0.01


class Mark(NamedTuple):
    """An annotation: seconds from the recording's start, text, and the channels it names (none: all)."""

    onset: float
    duration: float
    text: str
    channels: tuple[str, ...] = ()


class Piece(NamedTuple):
    """A stretch without gaps: seconds from the recording's start."""

    start: float
    duration: float


@dataclass(frozen=True)
class _Channel:
    label: str
    unit: str
    offset: int  # of its samples in a record
    samples: int  # a record
    gain: float
    shift: float


def split_channels(text: str) -> tuple[str, tuple[str, ...]]:
    """MNE's way of naming channels in an annotation's text: `text@@A1@@A2`."""
    first, *names = text.split("@@")
    return first, tuple(n for n in names if n)


class EdfFile:
    """An EDF, EDF+, BDF or BDF+ file.

    Attributes:
        names, units, rates: of the signals, annotations left out; a rate a channel.
        pieces: stretches without a gap, one for a continuous file.
        marks: annotations in true time.
        notes: what is odd about the file, in a person's words.

    Raises:
        BadSample: it is none, is empty, or is cut inside the header.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.notes: list[str] = []
        try:
            with self.path.open("rb") as file:
                self._header(file.read(256), file)
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror or error}") from error
        except (ValueError, IndexError) as error:
            raise BadSample("not an EDF or BDF file, or its header is damaged") from error
        self._times()

    def _header(self, head: bytes, file: object) -> None:
        text = head.decode("latin-1")
        self.width = 3 if head[:1] == b"\xff" else 2
        if len(head) < 256 or (self.width == 2 and text[:8].strip() != "0"):
            raise ValueError("no version")
        kind = text[192:236]
        self.discontinuous = kind.startswith(("EDF+D", "BDF+D"))
        count, self.duration_of_record = int(text[236:244]), float(text[244:252])
        number = int(text[252:256])
        fields = file.read(256 * number).decode("latin-1")  # type: ignore[attr-defined]
        columns, at = [], 0
        for width in FIELDS:
            columns.append([fields[at + i * width : at + (i + 1) * width].strip() for i in range(number)])
            at += width * number
        samples = [int(s) for s in columns[8]]
        self.header, self.record = 256 * (number + 1), sum(samples) * self.width
        channels, offset = [], 0
        self._tal: list[tuple[int, int]] = []
        for i, label in enumerate(columns[0]):
            if label in ANNOTATIONS:
                self._tal.append((offset, samples[i] * self.width))
            else:
                low, high = float(columns[3][i]), float(columns[4][i])
                bottom, top = float(columns[5][i]), float(columns[6][i])
                gain = (high - low) / (top - bottom) if top != bottom else 0.0
                channels.append(_Channel(label, columns[2][i], offset, samples[i], gain, low - gain * bottom))
            offset += samples[i] * self.width
        if not self.record or not number:
            raise ValueError("no signals")
        whole = (self.path.stat().st_size - self.header) // self.record
        if count not in (-1, whole):
            self.notes.append(f"the header says {count} records, the file holds {whole}")
        self.records = int(whole if count < 0 else min(count, whole))
        if self.records < 1:
            raise BadSample("holds no data record")
        if self.duration_of_record <= 0:
            raise BadSample("has records without a duration")
        self._channels = [c for c in channels if c.samples > 0]
        self.names = [c.label for c in self._channels]
        self.units = [c.unit for c in self._channels]
        self.rates = [c.samples / self.duration_of_record for c in self._channels]

    def _times(self) -> None:
        """Annotations, and where records follow each other without a gap."""
        length = self.duration_of_record
        starts = np.arange(self.records) * length
        self.marks: list[Mark] = []
        if self._tal:
            with self.path.open("rb") as file:
                for record in range(self.records):
                    for number, (offset, size) in enumerate(self._tal):
                        file.seek(self.header + record * self.record + offset)
                        found = self._lists(file.read(size), first=number == 0)
                        if number == 0 and found is not None:
                            starts[record] = found
        origin = starts[0]
        starts = starts - origin
        self.marks = [m._replace(onset=m.onset - origin) for m in self.marks]
        if self.discontinuous and not self._tal:
            self.notes.append("says it has gaps but not where: records are taken one by one")
            breaks = np.arange(1, self.records)
        else:
            breaks = np.flatnonzero(np.abs(np.diff(starts) - length) > SLACK * length) + 1
        firsts = [0, *breaks.tolist()]
        lasts = [*breaks.tolist(), self.records]
        self.pieces = [Piece(float(starts[a]), (b - a) * length) for a, b in zip(firsts, lasts, strict=True)]
        self._firsts = firsts
        if len(self.pieces) > 1:
            gaps = len(self.pieces) - 1
            self.notes.append(f"has {gaps} gap{'s' if gaps > 1 else ''}; no window crosses one")

    def _lists(self, raw: bytes, first: bool) -> float | None:
        """Take the annotations of one record; its own start in seconds, which its first empty one says."""
        start = None
        for onset, duration, texts in TAL.findall(raw):
            for text in texts.split(b"\x14"):
                said = text.decode("utf-8", "replace").strip()
                if said:
                    name, channels = split_channels(said)
                    # A start without any other text is the record's own; some writers put it into words
                    if not re.fullmatch(r"[+-]\d+(\.\d+)?", name):
                        self.marks.append(Mark(float(onset), float(duration or 0), name, channels))
            if first and start is None:
                start = float(onset)
        return start

    def read(self, piece: int, channels: Sequence[int], start: int, stop: int) -> np.ndarray:
        """Samples `[n, stop - start]` of channels that share a rate, float32 microvolts, from a piece's start.

        A dimension that is no voltage is taken as it is.
        """
        size = self._channels[channels[0]].samples
        first, last = start // size, -(-stop // size)
        with self.path.open("rb") as file:
            file.seek(self.header + (self._firsts[piece] + first) * self.record)
            raw = np.frombuffer(file.read((last - first) * self.record), np.uint8)
        raw = raw[: len(raw) // self.record * self.record].reshape(-1, self.record)
        out = np.empty((len(channels), len(raw) * size), np.float32)
        for row, number in enumerate(channels):
            channel = self._channels[number]
            part = raw[:, channel.offset : channel.offset + channel.samples * self.width]
            values = self._numbers(np.ascontiguousarray(part))
            factor = UNITS.get(channel.unit.lower(), 1.0)
            out[row] = (values * np.float64(channel.gain * factor) + channel.shift * factor).ravel()
        return out[:, start - first * size : stop - first * size]

    def _numbers(self, raw: np.ndarray) -> np.ndarray:
        if self.width == 2:
            return raw.view("<i2")
        # 24 bits: into the upper three bytes of 32, then down again with the sign
        wide = np.zeros((*raw.shape[:1], raw.shape[1] // 3, 4), np.uint8)
        wide[..., 1:] = raw.reshape(len(raw), -1, 3)
        return wide.view("<i4")[..., 0] >> 8
