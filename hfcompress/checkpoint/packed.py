"""Packed storage: the tensors of a checkpoint entropy coded without loss, one byte stream for each, in plain safetensors files.

A tensor is taken apart into planes of bytes, the exponents of floats by themselves, and each plane that gains by it is coded
(`byte_planes`). Han et al. 2016, Deep Compression (arXiv 1510.00149), code so what pruning and few bits
leave; of bfloat16 weights it is the exponents, as Zhang et al. 2025, DFloat11 (arXiv 2504.11651), found.

A stream: MAGIC, dtype, whether zeros are left out, dimensions, CRC-32 of what it decodes to, then the planes: which elements
are not zero, where zeros are left out, and the bytes of the elements. All integers are little-endian.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from hfcompress.checkpoint.byte_planes import WORDS, coded_plane, decoded_plane, joined, planes_of
from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.checkpoint.writing import written

MAGIC = b"hfcpack1"
DTYPES: tuple[tuple[torch.dtype, str], ...] = (
    (torch.float32, "F32"),
    (torch.bfloat16, "BF16"),
    (torch.float16, "F16"),
    (torch.uint8, "U8"),
    (torch.int8, "I8"),
    (torch.int16, "I16"),
    (torch.int32, "I32"),
    (torch.int64, "I64"),
    (torch.float64, "F64"),
    (torch.bool, "BOOL"),
)
"""As safetensors call them; a stream names one by its place."""
MOST_DENSE = 1024
"""Bytes that one byte of a file may stand for, at most: a small file must not ask for all memory. Streams are padded to it."""
MOST_DIMENSIONS = 8
SPARSE = 0.05
"""The share of zeros from which they are left out of elements of several bytes, each of which would have to say so."""


class _Header(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_sparse: bool
    checksum: int
    end: int
    """Where the planes begin."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_packer(where: str) -> None:
    """CompressionError where the library is missing."""
    if find_spec("constriction") is None:
        raise CompressionError(
            f"{where}: packed weights need the package constriction; pip install constriction (or 'hfcompress[packed]')."
        )


def pack(tensor: Tensor) -> Tensor:
    """The stream, (bytes,) uint8, of a tensor of any shape, on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    if flat.dim() > MOST_DIMENSIONS:
        raise CompressionError(
            f"storage: packed holds tensors of at most {MOST_DIMENSIONS} dimensions, and this one has {flat.dim()}; leave "
            f"storage out."
        )
    code = next((place for place, (dtype, _) in enumerate(DTYPES) if dtype == flat.dtype), None)
    if code is None:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in DTYPES)
        raise CompressionError(f"storage: packed can't hold {flat.dtype}; possible are {known}; cast it, or leave storage out.")
    raw = flat.reshape(-1).view(torch.uint8).numpy()
    rows = flat.shape[0] if flat.dim() > 1 else 1
    there = raw.view(WORDS[flat.itemsize]) != 0 if flat.itemsize > 1 else np.ones(1, bool)
    is_sparse = bool(there.size) and float(there.mean()) < 1 - SPARSE
    parts = [MAGIC, struct.pack("<BBB", code, is_sparse, flat.dim()), struct.pack(f"<{flat.dim()}Q", *flat.shape)]
    parts.append(struct.pack("<I", zlib.crc32(raw.data)))
    if is_sparse:
        parts.append(coded_plane(there.view(np.uint8), rows))
        raw, rows = raw.view(WORDS[flat.itemsize])[there].view(np.uint8), 1
    stream = b"".join([*parts, *(coded_plane(plane, rows) for plane in planes_of(raw, flat.dtype))])
    stream += bytes(max(0, -(-flat.numel() * flat.itemsize // MOST_DENSE) - len(stream)))
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def is_packed(tensor: Any) -> bool:
    """Whether a tensor of a file is such a stream."""
    return tensor.dtype == torch.uint8 and tensor.dim() == 1 and bytes(tensor[: len(MAGIC)].tolist()) == MAGIC


def unpack(stream: Tensor, name: str) -> Tensor:
    """The tensor, bit for bit; CompressionError, before much memory is taken, where the stream is damaged."""
    header = _header(stream, name)
    raw = bytes(stream.numpy())
    rows, place = header.shape[0] if len(header.shape) > 1 else 1, header.end
    count, there, planes = math.prod(header.shape), None, []
    try:
        if header.is_sparse:
            there, place = decoded_plane(raw, place, count, rows)
            count, rows = int(np.count_nonzero(there)), 1
        for _ in range(header.dtype.itemsize):
            plane, place = decoded_plane(raw, place, count, rows)
            planes.append(plane)
    except (struct.error, ValueError, IndexError, AssertionError, OverflowError) as error:
        raise _damaged(name) from error
    whole = joined(planes, header.dtype)
    if there is not None:
        some, words = whole, np.zeros(len(there), WORDS[header.dtype.itemsize])
        words[there != 0] = some.view(words.dtype)
        whole = words.view(np.uint8)
    if any(raw[place:]) or zlib.crc32(whole.data) != header.checksum:
        raise _damaged(name)
    return torch.from_numpy(whole).view(header.dtype).reshape(header.shape)


def unpacked_size(stream: Tensor, name: str) -> tuple[int, int]:
    """(bytes, elements) of what a stream holds."""
    header = _header(stream, name)
    return header.bytes, math.prod(header.shape)


def packed_state(model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` is to write: a stream for every tensor, tied ones once, as long as they are one tensor."""
    check_packer("storage: packed")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state: Mapping[str, Tensor] = model.state_dict()
    left_out |= {
        name for name, first in tied.items() if name in state and first in state and _is_one(state[name], state[first])
    }
    return {name: pack(tensor) for name, tensor in state.items() if name not in left_out}


def _is_one(tensor: Tensor, other: Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape and tensor.stride() == other.stride()


def unpack_state(module: Any, state: dict[str, Any], *_: Any) -> None:
    """Before `load_state_dict`, as a Trainer resumes by: what is packed in a checkpoint is unpacked, in place."""
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and is_packed(tensor):
            state[name] = unpack(tensor, name)


def unpack_file(source: str | Path, target: str | Path) -> None:
    """Write a safetensors file with the tensors that the streams of another hold, one at a time; what is no stream stays."""
    with safe_open(source, framework="pt") as file:
        names = list(file.keys())
        shapes: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for name in names:
            tensor = file.get_tensor(name)
            if is_packed(tensor):
                header = _header(tensor, name)
                shapes[name] = _named(header.dtype, name), header.shape, header.bytes
            else:
                shapes[name] = _named(tensor.dtype, name), tuple(tensor.shape), tensor.numel() * tensor.itemsize
        check_packer(str(source))
        with written(Path(target).parent, "the unpacked weights"), Path(target).open("wb") as out:
            out.write(_safetensors_header(shapes))
            for name in names:
                tensor = file.get_tensor(name)
                tensor = unpack(tensor, name) if is_packed(tensor) else tensor
                out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _safetensors_header(shapes: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, size) in shapes.items():
        told[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _named(dtype: torch.dtype, name: str) -> str:
    found = next((known for one, known in DTYPES if one == dtype), None)
    if found is None:
        raise _damaged(name)
    return found


def _header(stream: Tensor, name: str) -> _Header:
    start, place = bytes(stream[: len(MAGIC) + 3 + 8 * MOST_DIMENSIONS + 4].numpy()), len(MAGIC) + 3
    try:
        code, is_sparse, dimensions = struct.unpack_from("<BBB", start, len(MAGIC))
        if start[: len(MAGIC)] != MAGIC or code >= len(DTYPES) or is_sparse > 1 or dimensions > MOST_DIMENSIONS:
            raise _damaged(name)
        dtype = DTYPES[code][0]
        if is_sparse and dtype.itemsize == 1:
            raise _damaged(name)
        shape = struct.unpack_from(f"<{dimensions}Q", start, place)
        (checksum,) = struct.unpack_from("<I", start, place + 8 * dimensions)
    except struct.error as error:
        raise _damaged(name) from error
    header = _Header(dtype, shape, bool(is_sparse), checksum, place + 8 * dimensions + 4)
    most = max(header.bytes, *shape, 0)
    if most > MOST_DENSE * len(stream):
        raise CompressionError(
            f"{shown(name)}: {len(stream)} packed bytes stand for {most}, more than {MOST_DENSE} times as many; the "
            f"checkpoint is damaged or hostile: download it again from who you trust, or save the model again."
        )
    return header


def _damaged(name: str) -> CompressionError:
    return CompressionError(
        f"{shown(name)}: its packed bytes are damaged; download the checkpoint again, or save the model again."
    )
