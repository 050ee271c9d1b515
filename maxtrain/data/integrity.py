"""The manifest of a folder: size and SHA-256 of every file, written last, so that having one means being complete.

What changed on the disk since is found before it is used: a checkpoint whole, a large file of a cache block by block, when a block is
first read. SHA-256 because processors have instructions for it (1.2 GB/s a core against 0.55 for BLAKE2b) and `sha256sum` can check
it by hand.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
RUN_MANIFEST = "files.json"  # of a run's folder, in which manifest.json describes the run
BLOCK = 2**24  # bytes that have a hash of their own in a manifest with blocks

Measure = dict[str, Any]
"""`size` in bytes, and `sha256` of the file or `blocks`, a list with that of each block."""


def write_manifest(folder: Path, name: str = MANIFEST, *, blocks: bool = False) -> None:
    """Flush all files below `folder` to disk, then write their manifest. It appears at once or, if anything fails, not at all.

    With `blocks` every 16 MiB have a hash of their own, for files too large to be read before the first byte is used.
    """
    for path in folder.rglob("*"):  # folders too: their entries must outlive a power cut as well
        _flush(path)
    names = _files(folder, name)
    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(lambda path: _measure(folder / path, blocks), names), strict=True))
    seal(folder, files, name)
    _flush(folder.parent)


def seal(folder: Path, files: Mapping[str, Any], name: str = MANIFEST) -> None:
    """Write the manifest of these measures; a file may have a list of them, any of which is right."""
    replace(folder / name, json.dumps({"sha256": _seal(files), "files": files}, indent=1).encode())


def replace(path: Path, content: bytes) -> None:
    """Give a file this content at once: whatever is killed, it has the old or the new one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        draft.write_bytes(content)
        _flush(draft)
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
    _flush(path.parent)


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The measures of the files of `folder`.

    Raises:
        FileNotFoundError: it has no manifest.
        OSError: the manifest cannot be read.
        ValueError: the manifest is damaged.
    """
    try:
        manifest = json.loads((folder / name).read_bytes())
        if manifest["sha256"] == _seal(manifest["files"]) and isinstance(manifest["files"], dict):
            return manifest["files"]
    except (ValueError, KeyError, TypeError, RecursionError):  # no longer JSON, or of another form
        pass
    raise ValueError(f"{name} itself is damaged: its content does not have the hash it states")


def damage(folder: Path, name: str = MANIFEST, *, only: Iterable[str] | None = None, whole: bool = True) -> list[str]:
    """What is wrong with the files of `folder`, an entry each; empty when all are there and every byte is as written.

    Args:
        folder: where the manifest and its files lie.
        name: the manifest.
        only: the files to compare; all when None.
        whole: compare hashes; if not, of files that are larger than a block the size alone.
    """
    try:
        files = read_manifest(folder, name)
    except FileNotFoundError:
        return [f"it is incomplete: {name}, which is written last, is missing"]
    except OSError as error:
        return [f"{name} cannot be read: {error}"]
    except ValueError as error:
        return [str(error)]
    names = list(files if only is None else only)
    with ThreadPoolExecutor() as pool:
        return list(filter(None, pool.map(lambda path: _compare(folder / path, path, files.get(path), whole), names)))


def strangers(folder: Path, name: str = MANIFEST) -> list[str]:
    """Files of `folder` that its manifest does not name: a note, a `.DS_Store`. They say nothing about the others."""
    known = read_manifest(folder, name)
    return [path for path in _files(folder, name) if path not in known]


def set_aside(path: Path) -> Path:
    """Rename what is damaged to `<name>.damaged`, or with a number behind that, and return that path: nothing is lost."""
    names = (f"{path.name}.damaged{(number and f'-{number}') or ''}" for number in count())
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(target)


def rewrite(folder: Path, contents: Mapping[str, bytes], name: str) -> None:
    """Give files of a folder new content, and its manifest their measures.

    At every moment, whatever is killed, each file is as the manifest says: while a file is replaced, it allows both contents.
    """
    try:
        before = read_manifest(folder, name)
    except (OSError, ValueError):
        before = {}
    after = before | {path: measure_bytes(content) for path, content in contents.items()}
    there = {path: _measure(folder / path, False) for path in contents if (folder / path).is_file()}
    changed = [path for path in contents if there.get(path) != after[path]]
    if after == before and not changed:
        return
    seal(folder, {path: [there[path], new] if path in changed and path in there else new for path, new in after.items()}, name)
    for path in changed:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        replace(folder / path, contents[path])
    seal(folder, after, name)


class Mapped:
    """A file of a folder as a mapped array, each block of which is compared with its hash before it is first read.

    Args:
        path: the file.
        dtype: what it holds.
        mend: called with what is wrong when a block is damaged; returns when the file has been made anew. It raises if it cannot.
    """

    def __init__(self, path: Path, dtype: Any, mend: Callable[[str], None]) -> None:
        self.path, self.dtype, self._mend = path, np.dtype(dtype), mend
        self._open()

    def _open(self) -> None:
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map, self.dtype)
        try:
            self._hashes: list[str] = read_manifest(self.path.parent)[self.path.name]["blocks"]
        except FileNotFoundError:  # kept by an earlier version on a disk that cannot be written
            self._hashes = []
        self._verified = [False] * len(self._hashes)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int | slice) -> Any:
        within = range(len(self))[index if isinstance(index, slice) else slice(index, index + 1 or None)]
        self._verify(within.start, within.stop)
        return self._array[index]

    def parts(self, size: int) -> Iterator[np.ndarray]:
        """The array in order, `size` elements at a time; what was read leaves the memory of the process again."""
        for start in range(0, len(self), size):
            yield self[start : start + size]
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype, copy=copy)

    def _verify(self, first: int, last: int) -> None:
        size = BLOCK // self.dtype.itemsize
        for block in range(first // size, min(-(-last // size), len(self._verified))):
            if not self._verified[block] and not self._is_good(block, size):
                self._mend(f"{self.path.name} has changed: bytes {block * BLOCK} to {min((block + 1) * BLOCK, self._array.nbytes) - 1}")
                self._open()
                if not self._is_good(block, size):
                    raise OSError(f"{self.path}: what was just written has changed: the disk is not to be trusted")
            self._verified[block] = True

    def _is_good(self, block: int, size: int) -> bool:
        return hashlib.sha256(self._array[block * size : (block + 1) * size].data).hexdigest() == self._hashes[block]


def _files(folder: Path, name: str) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [path for path in names if path != name]


def _measure(path: Path, blocks: bool) -> Measure:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if blocks:
            return {"size": size, "blocks": [hashlib.sha256(part).hexdigest() for part in iter(lambda: file.read(BLOCK), b"")]}
        return {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def measure_bytes(content: bytes) -> Measure:
    """The measure of a file with this content."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _compare(path: Path, name: str, expected: Any, whole: bool) -> str | None:
    if expected is None:
        return f"{name} is not in the manifest"
    allowed = expected if isinstance(expected, list) else [expected]
    try:
        if not whole and (size := path.stat().st_size) > BLOCK:
            return None if size == allowed[0]["size"] else f"{name} has changed: expected {allowed[0]['size']} bytes, found {size}"
        found = _measure(path, "blocks" in allowed[0])
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:  # a bad sector
        return f"{name} cannot be read: {error}"
    if found in allowed:
        return None
    return f"{name} has changed: expected {_text(allowed[-1])}; found {_text(found)}"


def _text(measure: Measure) -> str:
    return f"{measure['size']} bytes, sha256 {measure.get('sha256') or ' '.join(measure['blocks'])}"


def _seal(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
