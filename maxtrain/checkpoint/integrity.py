"""The manifest of a checkpoint: size and SHA-256 of every file, written last, so that having one means being complete.

Orbax restores a flipped bit without noticing, so nothing is restored before its manifest verifies. SHA-256 because
processors have instructions for it (1.2 GB/s a core against 0.55 for BLAKE2b) and `sha256sum` can check it by hand.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Flush all files below `folder` to disk, then write their manifest. It appears at once or, if anything fails, not at all."""
    for path in folder.rglob("*"):  # folders too: their entries must outlive a power cut as well
        _flush(path)
    names = _files(folder)
    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(lambda name: _measure(folder / name), names), strict=True))
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps({"sha256": _seal(files), "files": files}, indent=1))
    _flush(draft)
    draft.rename(folder / MANIFEST)
    _flush(folder)
    _flush(folder.parent)


def damage(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in `folder`, an entry per file; empty when it is complete and every byte is as written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        sealed = manifest["sha256"] == _seal(files)
    except FileNotFoundError:
        return [f"it is incomplete: {MANIFEST}, which is written last, is missing"]
    except OSError as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    except (ValueError, KeyError, TypeError):  # no longer JSON, or of another form
        sealed = False
    if not sealed:
        return [f"{MANIFEST} itself is damaged: its content does not have the hash it states"]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: _compare(folder / name, name, files[name]), files))
    return [line for line in found if line] + [f"{name} is not in the manifest" for name in _files(folder) if name not in files]


def _files(folder: Path) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != MANIFEST]


def _measure(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _compare(path: Path, name: str, expected: Mapping[str, int | str]) -> str | None:
    try:
        found = _measure(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:  # a bad sector
        return f"{name} cannot be read: {error}"
    if found == expected:
        return None
    return f"{name} has changed: expected {expected['size']} bytes, sha256 {expected['sha256']}; found {found['size']}, {found['sha256']}"


def _seal(files: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
