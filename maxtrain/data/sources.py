"""Where text comes from: every `Source` section becomes a deterministic stream of documents, sorted by name.

Bad data is refused with file, line and remedy, never skipped. The one exception is the standard library, where an empty
file (`__init__.py`) is normal and simply holds no document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from maxtrain.config.errors import Refused
from maxtrain.config.json_file import each_key_once
from maxtrain.config.paths import expand
from maxtrain.config.regular_file import open_regular
from maxtrain.config.schema import Source
from maxtrain.data import corpus
from maxtrain.data.cache import key
from maxtrain.data.documents import AnyDocument, Document, LargeDocument, not_text, open_text, refusing

STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
EMPTY = "remove it, or choose a pattern that leaves it out"
LARGE = 16 * 2**20  # bytes of a file from which on it is read in chunks; the most of a line of jsonl
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def documents(source: Source) -> Iterator[AnyDocument]:
    """The documents of `source` in the order of their names, after `split` and `max_bytes`; `Refused` if there are none."""
    found = size = 0
    for document in KINDS[source.kind](source):
        if source.split != "all" and is_heldout(document, source.heldout_fraction) != (source.split == "heldout"):
            continue
        if source.max_bytes is not None:
            size += document.num_bytes
            if size > source.max_bytes:
                break
        found += 1
        yield document
    if not found:
        limit = f" within max_bytes={source.max_bytes}" if size else ""
        remedy = "raise max_bytes" if size else "change heldout_fraction or add documents, since each is in one part as a whole"
        raise Refused(f"{source.path or source.kind}: split {source.split} has no document{limit}; {remedy}")


def is_heldout(document: AnyDocument, fraction: float) -> bool:
    """Whether a document of this content is in the held-out part; equal documents are always in the same part."""
    return int.from_bytes(document.hash) < fraction * 2**64


def fingerprint(source: Source, cache_dir: str) -> str:
    """A name for what `documents(source)` yields: of settings and content, so it is the same wherever the files lie.

    Raises:
        Refused: there are no such files, or what is kept in `cache_dir` would be among them.
    """
    _check_apart(source, cache_dir)
    return key(source.model_dump(exclude={"path", "pattern", "weight"}), _content(_files(source), cache_dir))


def _check_apart(source: Source, cache_dir: str) -> None:
    """Refuse a source that would read prepared data as text: its folder holds the cache, and its pattern takes the cache's files."""
    if source.kind not in ("text", "jsonl"):
        return
    root, cache = (os.path.realpath(path) for path in (_root(source), expand(cache_dir, "data.cache_dir")))
    if os.path.isdir(root) and os.path.commonpath((root, cache)) == root:
        kept = [os.path.relpath(os.path.join(cache, "shards", "any", name), root) for name in ("tokens", "meta.json")]
        if any(corpus.takes(source.pattern, name) for name in kept):
            raise Refused(
                f"data.cache_dir={cache_dir} lies in the source's folder {source.path}, and the pattern {source.pattern!r} would take "
                "prepared data for text: set data.cache_dir to a folder elsewhere, or to one whose name begins with a dot"
            )


def _content(files: list[tuple[str, Path]], cache_dir: str) -> str:
    """Hash of the files' content; remembered by their status, so that a restart does not read a large corpus again."""
    status = []
    for _, path in files:
        with refusing(path):
            stat = path.stat()
            open_regular(path).close()  # a fifo or a device has no content to be hashed
        status.append((str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    memo = Path(expand(cache_dir, "data.cache_dir")) / "content" / key(status)
    with contextlib.suppress(OSError, ValueError):
        known, seal = memo.read_text()[:32], memo.read_text()[32:]
        if seal == key(known) or (not seal and re.fullmatch("[0-9a-f]{32}", known)):  # earlier versions wrote no seal
            return known
    digest = hashlib.blake2b(digest_size=16)
    for _, path in files:
        with refusing(path), open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    # A file changed within the clock's tick of its last change looks the same, so what is that fresh is not remembered.
    if max((entry[-1] for entry in status), default=0) < time.time_ns() - 2 * 10**9:
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            draft = memo.with_suffix(f".{os.getpid()}")
            draft.write_text(digest.hexdigest() + key(digest.hexdigest()))
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
        return sorted((path.relative_to(root).as_posix(), path) for path in paths)
    root = _root(source)
    if not root.is_dir():
        return [(root.name, root)]
    with refusing(root):
        files, hidden = corpus.find(root, source.pattern)
    if not files:
        only = f" but what begins with a dot ({', '.join(hidden[:3])})" if hidden else ""
        raise Refused(f"{root}: no file matches {source.pattern!r}{only}; correct the source's path or pattern")
    return files


def _root(source: Source) -> Path:
    root = Path(expand(source.path or "", "the source's path"))
    if not os.path.exists(root):
        raise Refused(f"{root}: no such file or folder; correct the source's path")
    return root


def notes(source: Source) -> list[str]:
    """What is to be said about the files of a source: those that are left out, and a setting without effect."""
    if source.kind not in ("text", "jsonl"):
        return []
    root = _root(source)
    if not root.is_dir():
        return [f"pattern={source.pattern} has no effect: {root} is a file"] if "pattern" in source.changed else []
    with refusing(root):
        hidden = corpus.find(root, source.pattern).hidden
    named = ", ".join(hidden[:3]) + ", ..." * (len(hidden) > 3)
    return [f"{root}: {len(hidden)} left out for a dot in front ({named}); a pattern with one takes them"] if hidden else []


def _whole(source: Source) -> Iterator[AnyDocument]:
    """Every file as a document."""
    for name, path in _files(source):
        with refusing(path), open_text(path) as file:
            data = file.read(LARGE + 1)
        if len(data) > LARGE:
            yield LargeDocument(path, name)
            continue
        try:
            yield Document(data.decode(), name)
        except UnicodeDecodeError as error:
            raise not_text(data, error, path) from None


def _stdlib(source: Source) -> Iterator[AnyDocument]:
    seen: set[str] = set()
    for document in _whole(source):
        if document.text.strip() and key(document.text) not in seen:
            seen.add(key(document.text))
            yield document


def _text(source: Source) -> Iterator[AnyDocument]:
    for document in _whole(source):
        if not any(chunk.strip() for chunk in document.chunks()):
            raise Refused(f"{source.path}: the file {document.name} is empty; {EMPTY}")
        yield document


def _jsonl(source: Source) -> Iterator[Document]:
    for name, path in _files(source):
        number = offset = 0
        with refusing(path), open_text(path) as file:
            while line := file.readline(LARGE + 1):
                number += 1
                if len(line) > LARGE:
                    raise Refused(f"{path}:{number}: longer than {LARGE:,} bytes, the most of a line; cut its text, or make it a text file")
                try:
                    decoded = line.decode()
                except UnicodeDecodeError as error:
                    raise not_text(line, error, path, number, offset) from None
                yield Document(
                    _field(decoded.removeprefix("\ufeff" if number == 1 else ""), source.field, f"{path}:{number}"), f"{name}:{number}"
                )
                offset += len(line)
        if not number:
            raise Refused(f"{source.path}: the file {name} is empty; {EMPTY}")


def _field(line: str, field: str, where: str) -> str:
    """The text under `field` of one JSONL line."""
    try:
        record = json.loads(line, object_pairs_hook=each_key_once)
    except Refused as refusal:
        raise Refused(f"{where}: {refusal}") from None
    except (ValueError, RecursionError) as error:
        if where.endswith(":1") and line.strip() in ("[", "{", "[{"):
            kind = "object" if line.strip() == "{" else "array"
            raise Refused(
                f"{where}: the file is one JSON {kind} over several lines; write each document as an object in one line"
            ) from None
        raise Refused(f"{where}: not a line of JSON ({error}); correct or remove the line") from error
    if isinstance(record, list):
        raise Refused(f"{where}: a JSON array (list), not an object with the key {field!r}; write each of its objects in a line of its own")
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


KINDS: dict[str, Callable[[Source], Iterator[AnyDocument]]] = {
    "stdlib": _stdlib,
    "text": _text,
    "jsonl": _jsonl,
    "synthetic": _synthetic,
}
