"""Planes of bytes, entropy coded: what a tensor is taken apart into, each with a table of its own counts.

An asymmetric numeral system (Duda 2013, arXiv 1311.2540), by the library constriction; rows of a matrix that are spread alike
share a table. Of floats, exponents are bytes of their own, as mantissas and signs are noise.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
RAW, CODED = 0, 1
GAIN = 0.98
"""A plane is coded where that takes less than this share of its bytes."""
NOISE = 0.995
"""A plane whose bytes take more than this share of eight bits each is not tried: mantissas are noise."""
LEAST = 1024
"""Bytes of a plane below which it is left as it is."""
CHUNK = 1 << 22
"""Symbols that are coded at a time."""
CLASSES = (1, 2, 4, 8)
"""Into how many kinds the rows of a matrix may be parted, each with a table of its own."""


def planes_of(raw: Bytes, dtype: torch.dtype) -> Iterator[Bytes]:
    """The bytes of all elements, the most significant first; of floats, exponents are bytes of their own, signs come last."""
    if dtype.itemsize == 1:
        yield raw
        return
    words: Any = raw.view(WORDS[dtype.itemsize])
    if dtype.is_floating_point:
        top = 8 * dtype.itemsize - 1
        words = (words << words.dtype.type(1)) | (words >> words.dtype.type(top))
    for place in reversed(range(dtype.itemsize)):
        yield (words >> words.dtype.type(8 * place)).astype(np.uint8)


def joined(planes: list[Bytes], dtype: torch.dtype) -> Bytes:
    if dtype.itemsize == 1:
        return planes[0].copy()  # what lies in a file can't be written to
    words: Any = np.zeros(len(planes[0]), WORDS[dtype.itemsize])
    for plane in planes:
        words = (words << words.dtype.type(8)) | plane
    if dtype.is_floating_point:
        top = 8 * dtype.itemsize - 1
        words = (words >> words.dtype.type(1)) | (words << words.dtype.type(top))
    return words.view(np.uint8)  # type: ignore[no-any-return]


def coded_plane(plane: Bytes, rows: int) -> bytes:
    """Its mode; raw bytes, or the rows' classes, and for each class the table, the length, and the words of its code."""
    raw = struct.pack("<B", RAW) + plane.tobytes()
    if len(plane) < LEAST or _entropy(_counts(plane)) > 8 * NOISE * len(plane):
        return raw
    several = [many for many in CLASSES if many > 1 and rows >= 2 * many]
    order = _by_spread(plane.reshape(rows, -1)) if several else np.zeros(1, np.int64)
    best = min((_by_classes(plane, order, many) for many in (1, *several)), key=len)
    return best if len(best) < GAIN * len(raw) else raw


def _by_classes(plane: Bytes, order: NDArray[np.int64], many: int) -> bytes:
    rows = len(order) if many > 1 else 1
    matrix, classes = plane.reshape(rows, -1), np.zeros(rows, np.uint8)
    for number, places in enumerate(np.array_split(order, many) if many > 1 else ()):
        classes[places] = number
    parts = [struct.pack("<BBI", CODED, int(classes.max()) + 1, len(classes)), classes.tobytes() if many > 1 else b""]
    for number in range(int(classes.max()) + 1):
        symbols = np.ascontiguousarray(matrix[classes == number]).reshape(-1)
        counts = _counts(symbols)
        table = _scaled(counts)
        words = _encoded(symbols, table)
        there = np.flatnonzero(table)
        low, high = int(there[0]), int(there[-1])
        parts += [struct.pack("<BBI", low, high, len(words)), table[low : high + 1].tobytes(), words.tobytes()]
    return b"".join(parts)


def _by_spread(matrix: Bytes) -> NDArray[np.int64]:
    """(rows,): the rows in the order of how far they are spread; classes are as many of them each."""
    return np.argsort([_entropy(_counts(row)) for row in matrix], kind="stable")


def decoded_plane(raw: bytes, place: int, count: int, rows: int) -> tuple[Bytes, int]:
    (mode,) = struct.unpack_from("<B", raw, place)
    place += 1
    if mode == RAW:
        if len(raw) < place + count:
            raise ValueError("too short")
        return np.frombuffer(raw, np.uint8, count, place), place + count
    many, told = struct.unpack_from("<BI", raw, place)
    place += 5
    if mode != CODED or not many or told not in (1, rows):
        raise ValueError("no such plane")
    classes: Bytes = np.zeros(1, np.uint8)
    if told > 1 or many > 1:
        classes, place = np.frombuffer(raw, np.uint8, told, place), place + told
    matrix = np.empty((told, count // told), np.uint8)
    for number in range(many):
        mine = classes == number
        low, high, words = struct.unpack_from("<BBI", raw, place)
        place += 6
        table = np.zeros(256, np.uint16)
        table[low : high + 1] = np.frombuffer(raw, "<u2", high - low + 1, place)
        place += 2 * (high - low + 1)
        code = np.frombuffer(raw, "<u4", words, place)
        place += 4 * words
        matrix[mine] = _decoded(code, table, int(mine.sum()) * matrix.shape[1]).reshape(-1, matrix.shape[1])
    if int(classes.max()) >= many:
        raise ValueError("no such class")
    return matrix.reshape(-1), place


def _counts(symbols: Bytes) -> NDArray[np.int64]:
    return np.bincount(symbols, minlength=256)


def _entropy(counts: NDArray[np.int64]) -> float:
    """Bits of all symbols together."""
    some = counts[counts > 0]
    return float((some * np.log2(some.sum() / some)).sum())


def _scaled(counts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Counts in two bytes each, at least 1 where there are any."""
    scaled = np.maximum(1, np.round(counts / counts.max() * 65535)).astype(np.uint16)
    return np.where(counts > 0, scaled, 0).astype(np.uint16)


def _model(table: NDArray[np.uint16]) -> Any:
    import constriction

    weights = table.astype(np.float64)
    if not weights.any():
        raise ValueError("no symbol")
    return constriction.stream.model.Categorical(weights / weights.sum(), perfect=False)


def _encoded(symbols: Bytes, table: NDArray[np.uint16]) -> NDArray[np.uint32]:
    import constriction

    coder, model = constriction.stream.stack.AnsCoder(), _model(table)
    for start in reversed(range(0, len(symbols), CHUNK)):
        coder.encode_reverse(symbols[start : start + CHUNK].astype(np.int32), model)
    return coder.get_compressed()  # type: ignore[no-any-return]


def _decoded(code: NDArray[np.uint32], table: NDArray[np.uint16], count: int) -> Bytes:
    import constriction

    coder, model = constriction.stream.stack.AnsCoder(np.ascontiguousarray(code)), _model(table)
    found = np.empty(count, np.uint8)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        found[start : start + size] = coder.decode(model, size)
    return found
