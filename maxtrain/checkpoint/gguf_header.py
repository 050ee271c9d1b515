"""The header of a GGUF file: its metadata, and where each tensor lies. Read without the library, which believes every length that is
written there: 49 bytes make it allocate without end. Here each is compared with the file before anything is read or allocated."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np

from maxtrain.config.errors import Refused
from maxtrain.config.regular_file import open_regular

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type -> format of struct
FLOAT32, STRING, ARRAY = 6, 8, 9
PLAIN = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
MAX_HEADER = 256_000_000  # bytes; the largest vocabularies need 20 million
MAX_ITEMS, MAX_DIMS = 10_000_000, 4  # of an array; of a tensor, as in the format
REMEDY = "download it again"


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file; read from it when needed, since mapped pages would count as memory in use."""

    kind: Any
    """Its quantisation, as the library names it."""
    shape: tuple[int, ...]
    start: int
    """Offset in the file, in bytes."""
    bytes_shape: tuple[int, ...]
    """Shape of the data as kept in the file."""
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.bytes_shape) * self.dtype.itemsize

    def read(self, path: str, index: int | None = None) -> np.ndarray:
        """The data as kept in the file, or one slice along its first dim."""
        shape, start = self.bytes_shape, self.start
        size = math.prod(shape)
        if index is not None:
            shape, size = shape[1:], size // shape[0]
            start += index * size * self.dtype.itemsize
        data = np.fromfile(path, self.dtype, size, offset=start)
        if data.size != size:
            raise Refused(f"{path}: it ends within a tensor: {REMEDY}")
        return data.reshape(shape)


class _Header:
    """A file from its beginning on, of which no more is taken than it has."""

    def __init__(self, file: BufferedReader, size: int, path: str) -> None:
        self.file, self.path, self.left = file, path, min(size, MAX_HEADER)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.left:
            raise Refused(
                f"{self.path}: it is damaged or cut short: its header needs {count:,} bytes where {self.left:,} are left: {REMEDY}"
            )
        self.left -= count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        """The next number, of a format of struct."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int, what: str) -> int:
        """The next number, which is one of things of at least so many bytes each."""
        found = self.number("Q")
        if found * least > self.left or found > MAX_ITEMS:
            raise Refused(f"{self.path}: it is damaged or cut short: {found:,} {what} do not fit in it: {REMEDY}")
        return found

    def text(self) -> str:
        """The next string."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """The next value; a float32 as the decimal number it was written as (1e-5, not 9.99e-6)."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner = self.number("I")
            if inner == STRING:
                return [self.text() for _ in range(self.count(8, "strings"))]
            code = "<" + SCALARS[inner]
            size = struct.calcsize(code)
            count = self.count(size, "numbers")
            return [value for (value,) in struct.iter_unpack(code, self.take(count * size))]
        found = self.number(SCALARS[kind])
        return float(str(np.float32(found))) if kind == FLOAT32 else found


def read(path: str, library: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file, by name.

    Raises:
        Refused: it cannot be read, is no GGUF file, is damaged or cut short.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(4) != MAGIC:
            raise Refused(f"{path}: no GGUF file, it does not begin with {MAGIC.decode()}")
        header = _Header(file, size - 4, path)
        try:
            values, found = _walk(header)
            alignment = values.get("general.alignment", ALIGNMENT)
            if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
                raise Refused(f"{path}: general.alignment = {alignment!r:.100} is no power of two: {REMEDY}")
            start = -(-file.tell() // alignment) * alignment
            tensors = {name: _tensor(library, shape, kind, start + offset) for name, (shape, kind, offset) in found.items()}
        except (ValueError, LookupError, struct.error, OSError) as error:  # ValueError: bytes that are no UTF-8, a type that is not known
            if isinstance(error, Refused):
                raise
            raise Refused(f"{path}: it is damaged or cut short ({type(error).__name__}: {error}): {REMEDY}") from None
    _check_places(path, tensors, start, size)
    return values, tensors


def _walk(header: _Header) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
    """Metadata; shape, type and offset of every tensor."""
    version = header.number("I")
    if version not in VERSIONS:
        order = " in the other byte order" * (version & 0xFFFF == 0)
        raise Refused(f"{header.path}: version {version} of GGUF{order} is not supported: convert the model anew, to version 3")
    num_tensors, num_values = header.count(24, "tensors"), header.count(13, "keys")
    values: dict[str, Any] = {}
    tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_values):
        name = header.text()
        if name in values:
            raise Refused(f"{header.path}: the key {name!r:.100} is there twice: {REMEDY}")
        values[name] = header.value(header.number("I"))
    for _ in range(num_tensors):
        name, num_dims = header.text(), header.number("I")
        if name in tensors or num_dims > MAX_DIMS:
            reason = "is there twice" if name in tensors else f"has {num_dims:,} dims"
            raise Refused(f"{header.path}: it is damaged: the tensor {name!r:.100} {reason}: {REMEDY}")
        dims = tuple(header.number("Q") for _ in range(num_dims))
        tensors[name] = dims[::-1], header.number("I"), header.number("Q")
    return values, tensors


def _tensor(library: Any, shape: tuple[int, ...], kind: int, start: int) -> Tensor:
    found = library.GGMLQuantizationType(kind)
    if found.name in PLAIN:
        return Tensor(found, shape, start, shape, np.dtype(PLAIN[found.name]))
    return Tensor(found, shape, start, tuple(library.quant_shape_to_byte_shape(shape, found)), np.dtype(np.uint8))


def _check_places(path: str, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """Refuse tensors that lie outside of the file or over one another."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start < end or tensor.start + tensor.num_bytes > size:
            raise Refused(
                f"{path}: it is damaged or cut short: {name} of {tensor.num_bytes:,} bytes is said to lie at byte {tensor.start:,}, "
                f"the data before it ends at {end:,} and the file at {size:,}: {REMEDY}"
            )
        end = tensor.start + tensor.num_bytes
