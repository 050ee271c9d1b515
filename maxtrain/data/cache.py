"""Folders that are made once and then only read: whole or absent, whatever happens while they are made, and never used damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from maxtrain.config.errors import Refused
from maxtrain.data.integrity import MANIFEST, damage, write_manifest

T = TypeVar("T")


def key(*parts: object) -> str:
    """A name of 32 hexadecimal digits for plain data: equal for equal data, in any process."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def say(message: str) -> None:
    """Tell what is not as it should be, on standard error, where it mixes with no output."""
    print(message, file=sys.stderr)


def build_once(
    folder: Path,
    load: Callable[[Path], T],
    write: Callable[[Path], None],
    check: Callable[[T], list[str]] = lambda _: [],
    *,
    whole: bool = False,
) -> T:
    """`load(folder)`, after `write` has made the folder if there is none or its manifest tells damage, which is said.

    It is written to a draft beside it and renamed, so a killed process leaves nothing that is taken for good. Of several
    processes on a machine one writes and the others wait; the draft's name keeps those of other machines apart.

    Args:
        folder: the folder, named by what it is made of.
        load: opens it; raises OSError, ValueError, KeyError, TypeError or Refused for what it cannot be.
        write: fills an empty folder.
        check: what is wrong with the content of what was just written, or was kept before there were manifests.
        whole: compare all of the files, not only the size of those that are larger than a block.

    Raises:
        Refused: the folder cannot be written, or what `write` raises.
    """
    if (found := _find(folder, load, check, whole)[0]) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            again = _find(folder, load, check, whole)
            if again[0] is not None:
                return again[0]
            if wrong := again[1]:
                say(f"{folder}: damaged, so it is made anew: {'; '.join(wrong[:5])}")
            draft = Path(f"{folder}.{socket.gethostname()}.draft")
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed: it held the lock
            draft.mkdir()
            try:
                write(draft)
                if wrong := check(load(draft)):
                    raise Refused(f"{folder}: what was just made is wrong: {'; '.join(wrong[:5])}")
                write_manifest(draft, blocks=True)
                if _find(folder, load, check, whole)[0] is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        place = error.filename or folder.parent
        remedy = "one with room" if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "one that can be written"
        raise Refused(f"{place}: cannot be written: {error.strerror or error}; set data.cache_dir to a folder, {remedy}") from error
    return load(folder)


def _find(folder: Path, load: Callable[[Path], T], check: Callable[[T], list[str]], whole: bool) -> tuple[T | None, list[str]]:
    """What is in `folder`, if it is good, and else what is wrong with it; nothing is wrong where nothing is."""
    if not folder.is_dir():
        return None, []
    if (folder / MANIFEST).exists():
        wrong = damage(folder, whole=whole)
        return (None, wrong) if wrong else (load(folder), [])
    try:
        found = load(folder)
        wrong = check(found)
    except (OSError, ValueError, KeyError, TypeError, Refused) as error:
        return None, [f"it has no hashes yet, and {error}"]
    if wrong:
        return None, wrong
    say(f"{folder}: kept by an earlier version without hashes; it is used as it is and hashed now")
    with contextlib.suppress(OSError):  # a disk that can only be read
        write_manifest(folder, blocks=True)
    return load(folder), []
