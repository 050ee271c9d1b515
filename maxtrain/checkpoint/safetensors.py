"""The safetensors format: a header of names, formats, shapes and offsets in JSON, then the bytes.

Read and written a tensor at a time without mapping the file, so that memory holds one tensor and never the file. Every number of
the header is checked against the file before a byte of data is read.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from maxtrain.config.errors import Refused
from maxtrain.config.json_file import parse_object
from maxtrain.config.regular_file import open_regular

DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, as in the reference implementation
MAX_DIMS = 8
PART = 4_000_000  # numbers of a tensor that are compared at a time
REMEDY = "download or export it again"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a file, and what it is."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """Offset in the file, in bytes."""

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor; `Refused` if the file has become shorter since its header was read."""
        return self._numbers(0, math.prod(self.shape)).reshape(self.shape)

    def equal(self, other: "Tensor") -> bool:
        """Whether another one of this shape holds the same numbers; the host holds `PART` of each at a time."""
        for first in range(0, math.prod(self.shape), PART):
            count = min(PART, math.prod(self.shape) - first)
            mine, theirs = self._numbers(first, count), other._numbers(first, count)
            same_bytes = mine.dtype == theirs.dtype and np.array_equal(mine.view(np.uint8), theirs.view(np.uint8))
            if not same_bytes and not np.array_equal(mine.astype(np.float32), theirs.astype(np.float32), equal_nan=True):
                return False
        return True

    def _numbers(self, first: int, count: int) -> np.ndarray:
        """`count` of its numbers in the order of the file."""
        data = np.empty(count * self.dtype.itemsize, np.uint8)
        with open_regular(self.path) as file:
            file.seek(self.start + first * self.dtype.itemsize)
            if file.readinto(data) != data.size:  # type: ignore[arg-type]
                raise Refused(f"{self.path}: it ends within a tensor: {REMEDY}")
        return data.view(self.dtype)


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        Refused: the file cannot be read, is cut short, is no safetensors file, or its header does not describe its data.
    """
    path = os.fspath(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(size - 8, MAX_HEADER):
                raise Refused(
                    f"{path}: it is cut short or no safetensors file: its header of {length:,} bytes does not fit in it; {REMEDY}"
                )
            text = file.read(length)
    except OSError as error:
        raise Refused(f"{path}: cannot be read: {error.strerror}") from None
    header = parse_object(text, f"{path}: its header")
    header.pop("__metadata__", None)
    try:
        found = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, TypeError, LookupError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{path}: no safetensors file, its header is malformed ({type(error).__name__}: {error}); {REMEDY}") from None
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start != end:
            raise Refused(f"{path}: its header lies: {name} begins at byte {tensor.start:,}, the data before it ends at {end:,}; {REMEDY}")
        end += tensor.num_bytes
    if end != size:
        raise Refused(f"{path}: its tensors end at byte {end:,}, the file has {size:,}: it was cut short or changed; {REMEDY}")
    return found


def _entry(path: str, name: str, entry: Mapping[str, Any], base: int, size: int) -> Tensor:
    """The tensor an entry of the header describes, if it lies within the file and its numbers agree."""
    kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in DTYPES:
        raise Refused(f"{path}: {name} is of the format {kind!r}, which is not supported: allowed are {', '.join(DTYPES)}")
    numbers = [*shape, start, stop]
    if len(shape) > MAX_DIMS or any(type(number) is not int or number < 0 for number in numbers):
        raise Refused(f"{path}: its header lies: {name} has shape {shape!s:.100} at {start} to {stop}; {REMEDY}")
    tensor = Tensor(path, np.dtype(DTYPES[kind]), tuple(shape), base + start)
    if stop - start != tensor.num_bytes or base + stop > size:
        raise Refused(
            f"{path}: its header lies or it was cut short: {name} {shape} {kind} needs {tensor.num_bytes:,} bytes and is said to lie "
            f"at {start:,} to {stop:,} of {size - base:,}; {REMEDY}"
        )
    return tensor


def write(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]], dtype: Any, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write tensors to a file, each as it comes.

    Args:
        path: the file.
        shapes: shape of each tensor by name, in the order in which they will lie in the file.
        dtype: the format of all, or of each by name.
        tensors: every name of `shapes` with its array, in any order.
    """
    dtypes = {name: np.dtype(dtype[name] if isinstance(dtype, Mapping) else dtype) for name in shapes}
    header, places, end = dict[str, Any](), dict[str, int](), 0
    header["__metadata__"] = {"format": "pt"}  # transformers asks for it
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(shape), "data_offsets": [end, end + size]}
        places[name] = end
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, array in tensors:
            assert array.shape == shapes[name], (name, array.shape, shapes[name])
            file.seek(8 + len(text) + places.pop(name))
            file.write(np.ascontiguousarray(array, dtypes[name]).view(np.uint8).reshape(-1).data)
        assert not places, f"not written: {sorted(places)}"
