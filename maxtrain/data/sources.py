"""Where text comes from: every `Source` section becomes a deterministic stream of documents, sorted by name.

Bad data is refused with file, line and remedy, never skipped. The one exception is the standard library, where an empty
file (`__init__.py`) is normal and simply holds no document.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from maxtrain.config.errors import Refused
from maxtrain.config.paths import expand
from maxtrain.config.schema import Source
from maxtrain.data.cache import key

STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
EMPTY = "remove it, or choose a pattern that leaves it out"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Document(NamedTuple):
    """A text and its name: the file's path below the source's, with the line for `jsonl`."""

    text: str
    name: str


def documents(source: Source) -> Iterator[Document]:
    """The documents of `source` in the order of their names, after `split` and `max_bytes`; `Refused` if there are none."""
    found = size = 0
    for document in KINDS[source.kind](source):
        data = document.text.encode()
        if source.split != "all" and is_heldout(data, source.heldout_fraction) != (source.split == "heldout"):
            continue
        size += len(data)
        if source.max_bytes is not None and size > source.max_bytes:
            break
        found += 1
        yield document
    if not found:
        limit = f" within max_bytes={source.max_bytes}" if size else ""
        remedy = "raise max_bytes" if size else "change heldout_fraction or add documents, since each is in one part as a whole"
        raise Refused(f"{source.path or source.kind}: split {source.split} has no document{limit}; {remedy}")


def is_heldout(data: bytes, fraction: float) -> bool:
    """Whether a document of this content is in the held-out part; equal documents are always in the same part."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) < fraction * 2**64


def fingerprint(source: Source, cache_dir: str) -> str:
    """A name for what `documents(source)` yields: of settings and content, so it is the same wherever the files lie."""
    return key(source.model_dump(exclude={"path", "pattern", "weight"}), _content(_files(source), cache_dir))


def _content(files: list[tuple[str, Path]], cache_dir: str) -> str:
    """Hash of the files' content; remembered by their status, so that a restart does not read a large corpus again."""
    status = []
    for _, path in files:
        with _refusing(path):
            stat = path.stat()
        status.append((str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    memo = Path(expand(cache_dir, "data.cache_dir")) / "content" / key(status)
    with contextlib.suppress(OSError):
        if len(known := memo.read_text()) == 32:
            return known
    digest = hashlib.blake2b(digest_size=16)
    for _, path in files:
        with _refusing(path), open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    # A file changed within the clock's tick of its last change looks the same, so what is that fresh is not remembered.
    if max((entry[-1] for entry in status), default=0) < time.time_ns() - 2 * 10**9:
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            draft = memo.with_suffix(f".{os.getpid()}")
            draft.write_text(digest.hexdigest())
            draft.replace(memo)
    return digest.hexdigest()


def _files(source: Source) -> list[tuple[str, Path]]:
    """(name, path) of the source's files, sorted by name; none for a source without files."""
    if source.kind == "synthetic":
        return []
    if source.kind == "stdlib":
        root, paths = Path(sysconfig.get_paths()["stdlib"]), []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = set(subfolders) - STDLIB_EXCLUDED
            paths += [Path(folder, name) for name in names if name.endswith(".py")]
    else:
        root = Path(expand(source.path or "", "the source's path"))
        if not os.path.exists(root):
            raise Refused(f"{root}: no such file or folder; correct the source's path")
        if not root.is_dir():
            return [(root.name, root)]
        with _refusing(root):
            for _ in os.walk(root, onerror=_raise):  # glob would pass over a folder it may not read
                pass
        try:
            paths = [path for path in root.glob(source.pattern) if not path.is_dir()]
        except (ValueError, NotImplementedError) as error:
            raise Refused(f"pattern {source.pattern!r}: {error}") from error
    if not paths:
        raise Refused(f"{root}: no file matches {source.pattern!r}; correct the source's path or pattern")
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is read is `Refused`."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{path}: not a whole gzip file ({error}); fetch or compress it again") from error
    except OSError as error:
        raise Refused(f"{error.filename or path}: cannot be read: {error.strerror}; correct the path or the permissions") from error


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _decode(data: bytes, path: Path, line: int = 1, offset: int = 0) -> str:
    """`data` as text; `line` and `offset` say where in the file it begins."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        at = offset + error.start
        raise Refused(f"{path}:{line}: byte {at} (0x{data[error.start]:02x}) is not valid UTF-8; convert the file to UTF-8") from error


def _whole(source: Source) -> Iterator[Document]:
    """Every file as a document."""
    for name, path in _files(source):
        with _refusing(path), _open(path) as file:
            data = file.read()
        yield Document(_decode(data, path), name)


def _stdlib(source: Source) -> Iterator[Document]:
    seen: set[str] = set()
    for document in _whole(source):
        if document.text.strip() and key(document.text) not in seen:
            seen.add(key(document.text))
            yield document


def _text(source: Source) -> Iterator[Document]:
    for document in _whole(source):
        if not document.text.strip():
            raise Refused(f"{source.path}: the file {document.name} is empty; {EMPTY}")
        yield document


def _jsonl(source: Source) -> Iterator[Document]:
    for name, path in _files(source):
        number = offset = 0
        with _refusing(path), _open(path) as file:
            for number, line in enumerate(file, 1):
                text = _field(_decode(line, path, number, offset), source.field, f"{path}:{number}")
                offset += len(line)
                yield Document(text, f"{name}:{number}")
        if not number:
            raise Refused(f"{source.path}: the file {name} is empty; {EMPTY}")


def _field(line: str, field: str, where: str) -> str:
    """The text under `field` of one JSONL line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{where}: not a line of JSON ({error}); correct or remove the line") from error
    if not isinstance(record, dict):
        raise Refused(f"{where}: a JSON {type(record).__name__}, not an object with the key {field!r}")
    if field not in record:
        raise Refused(f"{where}: no key {field!r}; the line has {', '.join(map(repr, record)) or 'none'}: set the source's field")
    text = record[field]
    if not isinstance(text, str):
        raise Refused(f"{where}: {field!r} is a JSON {type(text).__name__}, not a string")
    if not text.strip():
        raise Refused(f"{where}: {field!r} is empty; remove the line")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(f"{where}: {field!r} has half a surrogate pair at character {error.start}, which is no text; correct it") from error
    return text


def _synthetic(source: Source) -> Iterator[Document]:
    """Sums, copies, reversals and counts, drawn from the document's number alone: the same in every run, like a file."""
    for number in range(source.num_documents):
        draw = random.Random(number)
        target = draw.randint(1, source.document_length)
        text = ""
        while len(text) < target:
            a, b = draw.randrange(1000), draw.randrange(1000)
            word = "".join(draw.choices(LETTERS, k=8))
            count = " ".join(str(a + i) for i in range(6))
            text += draw.choice([f"{a}+{b}={a + b}\n", f"copy {word} {word}\n", f"turn {word} {word[::-1]}\n", f"count {count}\n"])
        yield Document(text[:target], f"{number:09d}")


KINDS: dict[str, Callable[[Source], Iterator[Document]]] = {"stdlib": _stdlib, "text": _text, "jsonl": _jsonl, "synthetic": _synthetic}
