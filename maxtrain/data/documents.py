"""Texts and their names; one that is too large to be held is read in chunks, each time it is asked for."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from maxtrain.config.errors import Refused
from maxtrain.config.regular_file import open_regular

CHUNK = 2**20  # bytes, or characters, that are read or tokenised together
FOREIGN = {  # how files of other formats begin, and what to do with them
    b"PAR1\x15": "a Parquet file: write its text as jsonl",
    b"ARROW1\0\0": "an Arrow file: write its text as jsonl",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: decompress it, or compress it with gzip",
    b"\xfd7zXZ\x00": "compressed with xz: decompress it, or compress it with gzip",
    **{b"BZh%d1AY&SY" % level: "compressed with bzip2: decompress it, or compress it with gzip" for level in range(1, 10)},
    b"\x04\x22\x4d\x18": "compressed with lz4: decompress it, or compress it with gzip",
    b"PK\x03\x04": "a zip archive: extract it, and name the files in it",
    b"%PDF-": "a PDF file: extract its text",
    b"\x93NUMPY": "an array of numpy, no text",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8",
    b"SQLite format 3\0": "a database of SQLite: write its text as jsonl",
    b"\x89PNG": "an image, no text",
    b"\xff\xd8\xff": "an image, no text",
    b"\x89HDF": "an HDF5 file: write its text as jsonl",
}
GZIP = b"\x1f\x8b"


class Document(NamedTuple):
    """A text and its name: the file's path below the source's, with the line for `jsonl`."""

    text: str
    name: str

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def hash(self) -> bytes:
        """BLAKE2b of the text [8 bytes]."""
        return hashlib.blake2b(self.text.encode(), digest_size=8).digest()

    def whole_or_chunks(self) -> Iterator[str]:
        """The text, in chunks only where it is too large for memory."""
        yield self.text

    def chunks(self) -> Iterator[str]:
        """The text in parts of at most `CHUNK` characters."""
        return (self.text[start : start + CHUNK] for start in range(0, len(self.text), CHUNK))


@dataclass(frozen=True)
class LargeDocument:
    """A file that is one document too large to be held in memory; the same attributes as `Document`."""

    path: Path
    name: str

    @property
    def text(self) -> str:
        """The whole text, in memory."""
        return "".join(self.chunks())

    @cached_property
    def _measured(self) -> tuple[int, bytes]:
        size, digest = 0, hashlib.blake2b(digest_size=8)
        with refusing(self.path), open_text(self.path) as file:
            while data := file.read(CHUNK):
                size += len(data)
                digest.update(data)
        return size, digest.digest()

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8."""
        return self._measured[0]

    @property
    def hash(self) -> bytes:
        """BLAKE2b of the text [8 bytes]."""
        return self._measured[1]

    def whole_or_chunks(self) -> Iterator[str]:
        """The text, in chunks only where it is too large for memory."""
        return self.chunks()

    def chunks(self) -> Iterator[str]:
        """The text in parts of at most `CHUNK` bytes."""
        decoder, line, offset = codecs.getincrementaldecoder("utf-8")(), 1, 0
        with refusing(self.path), open_text(self.path) as file:
            while True:
                data = file.read(CHUNK)
                pending = decoder.getstate()[0]
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise not_text(pending + data, error, self.path, line, offset - len(pending)) from None
                if text:
                    yield text
                if not data:
                    return
                line, offset = line + data.count(b"\n"), offset + len(data)


AnyDocument = Document | LargeDocument


def open_text(path: Path) -> BinaryIO:
    """The file's bytes, decompressed if it is gzip.

    Raises:
        Refused: it is no regular file, or one of another format.
    """
    file = open_regular(path)
    start = file.read(16)
    file.seek(0)
    advice = next((advice for magic, advice in FOREIGN.items() if start.startswith(magic)), None)
    if advice is None and not start.startswith(GZIP) and path.suffix != ".gz":
        return file
    file.close()
    if advice is not None:
        raise Refused(f"{path}: {advice}")
    return cast(BinaryIO, gzip.open(path, "rb"))


@contextlib.contextmanager
def refusing(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is read is `Refused`."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from error
    except OSError as error:
        raise Refused(f"{error.filename or path}: cannot be read: {error.strerror}; correct the path or the permissions") from error


def not_text(data: bytes, error: UnicodeDecodeError, path: Path, line: int = 1, offset: int = 0) -> Refused:
    """What is raised for `data` that is not UTF-8; `line` and `offset` say where in the file it begins."""
    at = f"{path}:{line + data.count(10, 0, error.start)}"
    return Refused(f"{at}: byte {offset + error.start} (0x{data[error.start]:02x}) is not valid UTF-8; convert the file to UTF-8")
