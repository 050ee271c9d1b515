"""Folders that are made once and then only read: whole or absent, whatever happens while they are made."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from maxtrain.config.errors import Refused

T = TypeVar("T")


def key(*parts: object) -> str:
    """A name of 32 hexadecimal digits for plain data: equal for equal data, in any process."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def build_once(folder: Path, load: Callable[[Path], T | None], write: Callable[[Path], None]) -> T:
    """`load(folder)`, after `write` has made it if `load` finds nothing usable there (None).

    It is written to a draft beside it and renamed, so a killed process leaves nothing that is taken for good. Of several
    processes on a machine one writes and the others wait; the draft's name keeps those of other machines apart.
    """
    if (found := load(folder)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := load(folder)) is not None:
                return found
            draft = Path(f"{folder}.{socket.gethostname()}.draft")
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed: it held the lock
            draft.mkdir()
            try:
                write(draft)
                for path in draft.iterdir():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                if load(folder) is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise Refused(f"{folder.parent}: cannot be written: {error.strerror}; set data.cache_dir to a folder with room") from error
    found = load(folder)
    assert found is not None, f"{folder} is not usable though it was just written"
    return found
